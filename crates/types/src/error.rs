//! The error that reaches a user: a code, what happened, and what to do next.

use serde::{Deserialize, Serialize};

/// What kind of failure it is. Maps to the exit codes of the command line (docs/cli.md) and to gRPC codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// A parameter is wrong by itself.
    InvalidArgument,
    /// A parameter is beyond a limit.
    OutOfRange,
    /// The thing does not exist.
    NotFound,
    /// The name is taken by something else.
    AlreadyExists,
    /// The state of the system does not allow it: attached elsewhere, fenced, policy.
    Refused,
    /// No room.
    ResourceExhausted,
    /// The quorum or the peer that is needed cannot be reached now.
    Unavailable,
    /// It did not end in time; the outcome may be unknown.
    TimedOut,
    /// Not built yet.
    Unimplemented,
    /// A fault of the system itself.
    Internal,
}

impl ErrorCode {
    /// The exit code of the command line: 1 failed, 3 not found, 4 refused, 5 timed out.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::NotFound => 3,
            Self::Refused | Self::AlreadyExists | Self::Unavailable => 4,
            Self::TimedOut => 5,
            Self::InvalidArgument | Self::OutOfRange => 2,
            Self::ResourceExhausted | Self::Unimplemented | Self::Internal => 1,
        }
    }
}

/// An error for users.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct UserError {
    /// Its kind.
    pub code: ErrorCode,
    /// What happened, with the names of what it happened to.
    pub message: String,
    /// What to do next; may be empty.
    pub hint: String,
}

impl UserError {
    /// An error without a hint yet.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: String::new() }
    }
    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}
