//! Errors as CSI wants them: a code of the specification's tables, a message that says what to do, no details.

use holdfast_types::{ErrorCode, UserError};
use tonic::{Code, Status};

/// The status of an error of the cluster.
pub(crate) fn status(error: UserError) -> Status {
    let code = match error.code {
        // A parameter that is not built yet is one that this driver does not support.
        ErrorCode::InvalidArgument | ErrorCode::Unimplemented => Code::InvalidArgument,
        ErrorCode::OutOfRange => Code::OutOfRange,
        ErrorCode::NotFound => Code::NotFound,
        ErrorCode::AlreadyExists => Code::AlreadyExists,
        ErrorCode::Refused => Code::FailedPrecondition,
        ErrorCode::ResourceExhausted => Code::ResourceExhausted,
        ErrorCode::Unavailable => Code::Unavailable,
        ErrorCode::TimedOut => Code::DeadlineExceeded,
        ErrorCode::Internal => Code::Internal,
    };
    let message =
        if error.hint.is_empty() { error.message } else { format!("{}: {}", error.message, error.hint) };
    Status::new(code, message)
}

pub(crate) fn invalid(message: impl Into<String>) -> Status {
    Status::invalid_argument(message)
}

pub(crate) fn no_volume(id: &str) -> Status {
    Status::not_found(format!("there is no volume {id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_a_failed_precondition_with_its_hint() {
        let error = UserError::new(ErrorCode::Refused, "volume a is attached to n1").hint("detach it");
        let status = status(error);
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(status.message(), "volume a is attached to n1: detach it");
        assert!(status.details().is_empty());
    }
}
