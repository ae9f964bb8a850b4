//! A shard from other threads: the node's first one, and those of its other stores.

use std::future::Future;
use std::rc::Rc;

use holdfast_types::{ErrorCode, UserError};
use tokio::sync::{mpsc, oneshot};

use crate::shard::Shard;

/// Requests to a shard that wait.
const QUEUE_MAX: usize = 256;

type Job<T> = Box<dyn FnOnce(Rc<T>) + Send>;

/// Sends work to the thread of a shard. Cheap to clone.
pub(crate) struct Handle<T>(mpsc::Sender<Job<T>>);

/// The node's first shard.
pub(crate) type ShardHandle = Handle<Shard>;

/// The shard's end.
pub(crate) struct Jobs<T>(mpsc::Receiver<Job<T>>);

pub(crate) fn channel<T>() -> (Handle<T>, Jobs<T>) {
    let (sender, receiver) = mpsc::channel(QUEUE_MAX);
    (Handle(sender), Jobs(receiver))
}

impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Jobs<T> {
    /// Runs what is sent until every handle is gone.
    pub(crate) async fn serve(mut self, shard: Rc<T>) {
        while let Some(job) = self.0.recv().await {
            job(shard.clone());
        }
    }
}

impl<S: 'static> Handle<S> {
    /// Runs `work` on the shard and waits for its result. Work whose caller has gone away goes on.
    pub(crate) async fn run<T, W, F>(&self, work: W) -> Result<T, UserError>
    where
        T: Send + 'static,
        W: FnOnce(Rc<S>) -> F + Send + 'static,
        F: Future<Output = Result<T, UserError>> + 'static,
    {
        let (answer, result) = oneshot::channel();
        let job: Job<S> = Box::new(move |shard| {
            holdfast_env::spawn("admin", async move {
                // The caller may have gone away; what was done stays done.
                let _ = answer.send(work(shard).await);
            });
        });
        let stopping = || UserError::new(ErrorCode::Unavailable, "the shard has ended, or is stopping");
        self.0.send(job).await.map_err(|_| stopping())?;
        result.await.map_err(|_| stopping())?
    }
}
