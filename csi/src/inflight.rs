//! One call at a time for each volume, and calls that outlive their caller.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::{Response, Status};

/// Calls under way at once; beyond, callers are told to come again.
const CALLS_MAX: usize = 256;

/// The subjects (volumes, names) of the calls that are under way.
#[derive(Clone, Default)]
pub(crate) struct InFlight(Arc<Mutex<BTreeSet<String>>>);

/// Ends the call's hold of its subject when dropped.
pub(crate) struct Guard {
    calls: InFlight,
    subject: String,
}

impl InFlight {
    /// Enters a call; ABORTED while another one has the subject, as the specification asks.
    pub(crate) fn enter(&self, subject: &str) -> Result<Guard, Status> {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if calls.len() >= CALLS_MAX {
            return Err(Status::unavailable(format!("{CALLS_MAX} calls are under way: try again")));
        }
        if !calls.insert(subject.to_owned()) {
            return Err(Status::aborted(format!(
                "a call for {subject} is under way: try again when it ends"
            )));
        }
        Ok(Guard { calls: self.clone(), subject: subject.to_owned() })
    }

    /// Carries out a call for a subject to its end, even if the caller gives up waiting: the caller's retry then finds
    /// the finished result, and never something half-done.
    pub(crate) async fn carry_out<T: Send + 'static>(
        &self,
        subject: &str,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let guard = self.enter(subject)?;
        let task = tokio::spawn(async move {
            let _held_until_done = guard;
            work.await
        });
        match task.await {
            Ok(done) => done.map(Response::new),
            Err(error) => Err(Status::internal(format!("the call has ended in the middle: {error}"))),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.calls.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.subject);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[tokio::test]
    async fn a_call_goes_on_without_its_caller_and_holds_its_subject_until_it_ends() {
        let calls = InFlight::default();
        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        let (done, is_done) = tokio::sync::oneshot::channel::<()>();
        let work = async move {
            let _ = finished.await;
            let _ = done.send(());
            Ok(())
        };
        let mut call = Box::pin(calls.carry_out("a", work));
        tokio::select! {
            biased;
            _ = &mut call => panic!("the call has not ended"),
            () = tokio::task::yield_now() => {}
        }
        drop(call);
        let second = calls.carry_out("a", async { Ok(()) }).await;
        assert_eq!(second.map_err(|status| status.code()).err(), Some(Code::Aborted));
        assert!(calls.carry_out("b", async { Ok(()) }).await.is_ok());
        finish.send(()).expect("the call waits");
        is_done.await.expect("the call ends by itself");
        while calls.enter("a").is_err() {
            tokio::task::yield_now().await;
        }
    }
}
