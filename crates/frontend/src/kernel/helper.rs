//! Work that may wait for the very device that the calling thread serves.

use std::time::Duration;

use tokio::sync::oneshot;

use super::KernelError;

/// Runs `work` on a thread of its own and waits for it at most `deadline`. Work that takes longer goes on by itself:
/// a thread that the kernel holds cannot be ended.
pub(super) async fn run<T: Send + 'static>(
    what: &'static str,
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, KernelError> {
    let (done, result) = oneshot::channel();
    let started = std::thread::Builder::new().name(what.into()).spawn(move || {
        // Whoever waited may have given up; the work has been done all the same.
        let _ = done.send(work());
    });
    started.map_err(|source| KernelError::Io { what: what.into(), source })?;
    match holdfast_env::timeout(deadline, result).await {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(_)) => Err(KernelError::Io {
            what: what.into(),
            source: std::io::Error::other("the thread ended without a result"),
        }),
        Err(_) => Err(KernelError::TimedOut { what, seconds: deadline.as_secs() }),
    }
}
