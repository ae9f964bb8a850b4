//! How an attached volume appears on this node: an NBD export, a file, or a block device.

use holdfast_frontend::kernel::{self, Close, KernelDevice, KernelError};
use holdfast_types::{ErrorCode, UserError};
use serde::{Deserialize, Serialize};

use crate::shard::Shard;

/// How a guest reaches a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FrontendKind {
    /// An export on the node's NBD socket.
    Nbd,
    /// A regular file.
    Fuse,
    /// A block device.
    Loop,
}

impl FrontendKind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::Fuse => "fuse",
            Self::Loop => "loop",
        }
    }
}

/// What whoever attaches asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FrontendChoice {
    /// The best that this node can do: a block device, else a file, else NBD.
    Auto,
    /// This one.
    Only(FrontendKind),
}

impl std::str::FromStr for FrontendChoice {
    type Err = UserError;
    fn from_str(text: &str) -> Result<Self, UserError> {
        match text {
            "" | "auto" => Ok(Self::Auto),
            "nbd" => Ok(Self::Only(FrontendKind::Nbd)),
            "fuse" => Ok(Self::Only(FrontendKind::Fuse)),
            "loop" => Ok(Self::Only(FrontendKind::Loop)),
            other => Err(UserError::new(ErrorCode::InvalidArgument, format!("there is no frontend {other}"))
                .hint("use nbd, fuse, loop or auto")),
        }
    }
}

fn available(kind: FrontendKind) -> Result<(), KernelError> {
    match kind {
        FrontendKind::Nbd => Ok(()),
        FrontendKind::Fuse => kernel::file_available(),
        FrontendKind::Loop => kernel::loop_available(),
    }
}

impl FrontendChoice {
    /// What it is on this node; an error if this node cannot do it.
    pub(crate) fn resolve(self) -> Result<FrontendKind, UserError> {
        match self {
            Self::Only(kind) => available(kind).map(|()| kind).map_err(|error| user_error(&error)),
            Self::Auto => {
                let best = [FrontendKind::Loop, FrontendKind::Fuse].into_iter();
                Ok(best.into_iter().find(|kind| available(*kind).is_ok()).unwrap_or(FrontendKind::Nbd))
            }
        }
    }

    /// Whether it is satisfied by what is there already.
    pub(crate) fn allows(self, kind: FrontendKind) -> bool {
        self == Self::Auto || self == Self::Only(kind)
    }
}

pub(crate) fn user_error(error: &KernelError) -> UserError {
    let code = match error {
        KernelError::Unavailable { .. } | KernelError::InUse(_) => ErrorCode::Refused,
        KernelError::Io { .. } => ErrorCode::Internal,
        KernelError::TimedOut { .. } => ErrorCode::TimedOut,
    };
    UserError::new(code, error.to_string()).hint(error.hint())
}

/// A device's error for users.
pub(crate) fn device_error(volume: &str, error: &KernelError) -> UserError {
    let UserError { code, message, hint } = user_error(error);
    UserError::new(code, format!("volume {volume}: {message}")).hint(hint)
}

/// A frontend that serves.
pub(crate) enum Shown {
    /// An export; where it is.
    Nbd(String),
    /// A device of the kernel.
    Kernel(FrontendKind, Box<KernelDevice>),
}

impl Shown {
    pub(crate) async fn open(
        shard: &Shard,
        volume: &str,
        kind: FrontendKind,
        edge: std::rc::Rc<holdfast_frontend::Edge>,
    ) -> Result<Self, KernelError> {
        let how = match kind {
            FrontendKind::Nbd => {
                shard.nbd.exports().add(volume, edge);
                let socket = shard.nbd.path().display();
                return Ok(Self::Nbd(format!("nbd+unix:///{volume}?socket={socket}")));
            }
            FrontendKind::Fuse => kernel::Shown::File,
            FrontendKind::Loop => kernel::Shown::Loop { direct_io: true },
        };
        let directory = shard.layout.devices().join(volume);
        let device = KernelDevice::open(&edge, &directory, how).await?;
        tracing::info!(volume, device = %device.path().display(), direct_io = device.direct_io(), "shown");
        Ok(Self::Kernel(kind, Box::new(device)))
    }

    pub(crate) fn kind(&self) -> FrontendKind {
        match self {
            Self::Nbd(_) => FrontendKind::Nbd,
            Self::Kernel(kind, _) => *kind,
        }
    }

    /// What a guest opens.
    pub(crate) fn device(&self) -> String {
        match self {
            Self::Nbd(address) => address.clone(),
            Self::Kernel(_, device) => device.path().display().to_string(),
        }
    }

    /// Shows that the volume has grown. NBD clients learn it when they connect anew.
    pub(crate) async fn resized(&self) -> Result<(), KernelError> {
        match self {
            Self::Nbd(_) => Ok(()),
            Self::Kernel(_, device) => device.resized().await,
        }
    }

    /// Ends it. NBD connections end at once, as when a server is stopped.
    pub(crate) async fn close(&self, shard: &Shard, volume: &str, how: Close) -> Result<(), KernelError> {
        match self {
            Self::Nbd(_) => {
                shard.nbd.exports().remove(volume);
                Ok(())
            }
            Self::Kernel(_, device) => device.close(how).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_what_it_says_or_what_the_node_can_do() {
        let choice = |text: &str| text.parse::<FrontendChoice>();
        assert_eq!(choice("nbd").and_then(FrontendChoice::resolve), Ok(FrontendKind::Nbd));
        assert_eq!(choice("iscsi").map_err(|error| error.code), Err(ErrorCode::InvalidArgument));
        let best = choice("auto").and_then(FrontendChoice::resolve).expect("there is always NBD");
        assert_eq!(kernel::loop_available().is_ok(), best == FrontendKind::Loop);
        assert!(FrontendChoice::Auto.allows(FrontendKind::Fuse));
        assert!(!FrontendChoice::Only(FrontendKind::Loop).allows(FrontendKind::Nbd));
    }
}
