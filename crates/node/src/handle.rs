//! The shard from other threads.

use std::future::Future;
use std::rc::Rc;

use holdfast_types::{ErrorCode, UserError};
use tokio::sync::{mpsc, oneshot};

use crate::shard::Shard;

/// Requests to a shard that wait.
const QUEUE_MAX: usize = 256;

type Job = Box<dyn FnOnce(Rc<Shard>) + Send>;

/// Sends work to the shard's thread. Cheap to clone.
#[derive(Clone)]
pub(crate) struct ShardHandle(mpsc::Sender<Job>);

/// The shard's end.
pub(crate) struct Jobs(mpsc::Receiver<Job>);

pub(crate) fn channel() -> (ShardHandle, Jobs) {
    let (sender, receiver) = mpsc::channel(QUEUE_MAX);
    (ShardHandle(sender), Jobs(receiver))
}

impl Jobs {
    /// Runs what is sent until every handle is gone.
    pub(crate) async fn serve(mut self, shard: Rc<Shard>) {
        while let Some(job) = self.0.recv().await {
            job(shard.clone());
        }
    }
}

impl ShardHandle {
    /// Runs `work` on the shard and waits for its result. Work whose caller has gone away goes on.
    pub(crate) async fn run<T, W, F>(&self, work: W) -> Result<T, UserError>
    where
        T: Send + 'static,
        W: FnOnce(Rc<Shard>) -> F + Send + 'static,
        F: Future<Output = Result<T, UserError>> + 'static,
    {
        let (answer, result) = oneshot::channel();
        let job: Job = Box::new(move |shard| {
            holdfast_env::spawn("admin", async move {
                // The caller may have gone away; what was done stays done.
                let _ = answer.send(work(shard).await);
            });
        });
        let stopping = || UserError::new(ErrorCode::Unavailable, "the daemon is stopping");
        self.0.send(job).await.map_err(|_| stopping())?;
        result.await.map_err(|_| stopping())?
    }
}
