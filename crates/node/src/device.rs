//! A session as a frontend's device.

use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_frontend::{Device, DeviceError, Run, RunKind};
use holdfast_session::{Session, SessionError};
use holdfast_types::BlockRange;

/// The device of a session.
pub(crate) struct SessionDevice(pub(crate) Rc<Session>);

fn device_error(error: SessionError) -> DeviceError {
    match error {
        SessionError::Closed(why) => DeviceError::Ended(why.to_string()),
        SessionError::OutOfRange { .. } => DeviceError::OutOfRange,
        SessionError::ReadOnly => DeviceError::ReadOnly,
        other => DeviceError::Failed(other.to_string()),
    }
}

impl Device for SessionDevice {
    fn size_bytes(&self) -> u64 {
        self.0.size().0
    }
    fn read_only(&self) -> bool {
        self.0.read_only()
    }
    fn read(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<Bytes, DeviceError>> {
        Box::pin(async move { self.0.read(range).await.map_err(device_error) })
    }
    fn write(&self, range: BlockRange, data: Bytes) -> LocalBoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { self.0.write(range, data).await.map_err(device_error) })
    }
    fn trim(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { self.0.trim(range).await.map_err(device_error) })
    }
    fn zero(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { self.0.zero(range).await.map_err(device_error) })
    }
    fn status(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<Vec<Run>, DeviceError>> {
        Box::pin(async move {
            let runs = self.0.block_status(range).await.map_err(device_error)?;
            runs.into_iter()
                .map(|(blocks, kind)| {
                    let kind = match kind {
                        0 => RunKind::Data,
                        1 => RunKind::Zero,
                        2 => RunKind::Absent,
                        other => {
                            return Err(DeviceError::Failed(format!("blocks of an unknown kind {other}")));
                        }
                    };
                    Ok(Run { blocks, kind })
                })
                .collect()
        })
    }
    fn ended(&self) -> Option<String> {
        self.0.closed_now().map(|why| why.to_string())
    }
}
