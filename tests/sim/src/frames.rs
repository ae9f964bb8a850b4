//! What can be told of a frame from its head: for the trace, and for crash points after certain answers.

use holdfast_replica::messages::{self, DATA, RAFT, REBUILD, SESSION};
use holdfast_wire::rpc;

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Vote,
    PreVote,
    Append,
    Raft,
    Data,
    Session,
    Rebuild,
    Answer,
    Refusal,
    Other,
}

/// A frame's kind and the number of its call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    pub(crate) kind: Kind,
    pub(crate) id: u64,
}

/// Looks at a frame's head.
pub(crate) fn look(head: &[u8]) -> Told {
    let Some(call) = rpc::CallHead::read(head) else { return Told { kind: Kind::Other, id: 0 } };
    let kind = match call.kind {
        rpc::CallKind::Answer => Kind::Answer,
        rpc::CallKind::Refusal => Kind::Refusal,
        rpc::CallKind::Request if call.service == RAFT => match messages::raft_call(call.rest) {
            Some(messages::RaftCall::Vote) => Kind::Vote,
            Some(messages::RaftCall::PreVote) => Kind::PreVote,
            Some(messages::RaftCall::Append) => Kind::Append,
            _ => Kind::Raft,
        },
        rpc::CallKind::Request if call.service == DATA => Kind::Data,
        rpc::CallKind::Request if call.service == SESSION => Kind::Session,
        rpc::CallKind::Request if call.service == REBUILD => Kind::Rebuild,
        rpc::CallKind::Request => Kind::Other,
    };
    Told { kind, id: call.id }
}
