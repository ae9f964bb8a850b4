//! [`UserError`] as a gRPC status: the code by kind, the whole error as JSON in a trailer.

use holdfast_types::{ErrorCode, UserError};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

const TRAILER: &str = "holdfast-error-bin";

/// The status that carries `error`.
pub fn to_status(error: &UserError) -> Status {
    let code = match error.code {
        ErrorCode::InvalidArgument => Code::InvalidArgument,
        ErrorCode::OutOfRange => Code::OutOfRange,
        ErrorCode::NotFound => Code::NotFound,
        ErrorCode::AlreadyExists => Code::AlreadyExists,
        ErrorCode::Refused => Code::FailedPrecondition,
        ErrorCode::ResourceExhausted => Code::ResourceExhausted,
        ErrorCode::Unavailable => Code::Unavailable,
        ErrorCode::TimedOut => Code::DeadlineExceeded,
        ErrorCode::Unimplemented => Code::Unimplemented,
        ErrorCode::Internal => Code::Internal,
    };
    let mut status = Status::new(code, error.to_string());
    if let Ok(json) = serde_json::to_vec(error) {
        status.metadata_mut().insert_bin(TRAILER, MetadataValue::from_bytes(&json));
    }
    status
}

/// The error that a status carries; a status that is not ours becomes one with its text.
pub fn from_status(status: &Status) -> UserError {
    let carried = status
        .metadata()
        .get_bin(TRAILER)
        .and_then(|value| value.to_bytes().ok())
        .and_then(|json| serde_json::from_slice(&json).ok());
    if let Some(error) = carried {
        return error;
    }
    let code = match status.code() {
        Code::Unavailable => ErrorCode::Unavailable,
        Code::DeadlineExceeded => ErrorCode::TimedOut,
        Code::Unimplemented => ErrorCode::Unimplemented,
        _ => ErrorCode::Internal,
    };
    UserError::new(code, format!("the daemon answered: {}", status.message()))
        .hint("is the daemon running, and does --admin (or HOLDFAST_ADMIN) name its socket?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_wire() {
        let error = UserError::new(ErrorCode::Refused, "volume a is attached to n1").hint("use --force");
        let status = to_status(&error);
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(from_status(&status), error);
    }
}
