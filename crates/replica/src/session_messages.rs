//! Calls from a leader to a session.

use bytes::Bytes;
use holdfast_types::{DecodeError, Epoch, GroupId, Reader, SessionId, Writer};

/// A call to a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionRequest {
    /// The session's epoch is over: fail everything, serve no more reads, and confirm by answering.
    Fence {
        /// The volume's group.
        group: GroupId,
        /// The session.
        session: SessionId,
        /// The epoch that replaced it.
        epoch: Epoch,
    },
}

impl SessionRequest {
    /// The request as a frame's head.
    pub fn encode(&self) -> Bytes {
        let Self::Fence { group, session, epoch } = self;
        let mut out = Writer::with_capacity(48);
        group.encode(&mut out);
        session.encode(&mut out);
        epoch.encode(&mut out);
        out.finish()
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(head);
        let request = Self::Fence {
            group: GroupId::decode(&mut input)?,
            session: SessionId::decode(&mut input)?,
            epoch: Epoch::decode(&mut input)?,
        };
        input.end()?;
        Ok(request)
    }
}
