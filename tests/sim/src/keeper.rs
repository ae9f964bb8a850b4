//! What outlives a killed daemon on its node: the requests that the kernel still waits for, each with the number under
//! which it was sent. A daemon that takes its node's attachment over sends them again under the same numbers, so that
//! each has its effect once (INV-ONCE).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::command::{Tag, VolumeCommand};
use holdfast_protocol::volume::{Refusal, VolumeReply};
use holdfast_replica::messages::{DATA, DataReply, DataRequest};
use holdfast_scenario::history::{self, OperationId};
use holdfast_session::Session;
use holdfast_types::{Seq, SessionId};
use holdfast_wire::rpc::{CallHead, CallKind, Rpc};

use crate::world::{GROUP, World};

/// Between two tries of a replay.
const AGAIN: Duration = Duration::from_millis(20);
/// How long one try waits.
const PATIENCE: Duration = Duration::from_secs(1);

/// A write as it was sent.
#[derive(Clone)]
struct Sent {
    command: VolumeCommand,
    body: Bytes,
}

/// The writes that sessions have sent, by session and number.
#[derive(Default)]
pub(crate) struct Keeper(RefCell<BTreeMap<SessionId, BTreeMap<Seq, Sent>>>);

impl Keeper {
    /// A frame leaves a node.
    pub(crate) fn note(&self, frame: &Frame) {
        let Some(call) = CallHead::read(&frame.head) else { return };
        if call.kind != CallKind::Request || call.service != DATA || frame.body.is_empty() {
            return;
        }
        let Ok(DataRequest::Propose { command, .. }) = DataRequest::decode(call.rest) else { return };
        let Ok(command) = VolumeCommand::decode(&command) else { return };
        let Some(Tag { session, seq, .. }) = command.tag().copied() else { return };
        let sent = Sent { command, body: frame.body[0].clone() };
        self.0.borrow_mut().entry(session).or_default().insert(seq, sent);
    }

    /// A write was answered.
    pub(crate) fn forget(&self, session: SessionId, stamp: history::Stamp) {
        if let Some(sent) = self.0.borrow_mut().get_mut(&session) {
            sent.retain(|_, sent| history::stamp_of(&sent.body) != stamp);
        }
    }

    /// Of the writes that a guest waited for those that its session had sent, by number.
    fn kept(
        &self,
        session: SessionId,
        waited: &BTreeMap<OperationId, history::Stamp>,
    ) -> Vec<(OperationId, Seq, Sent)> {
        let all = self.0.borrow();
        let Some(sent) = all.get(&session) else { return Vec::new() };
        let find = |(id, stamp): (&OperationId, &history::Stamp)| {
            let (seq, sent) = sent.iter().find(|(_, sent)| history::stamp_of(&sent.body) == *stamp)?;
            Some((*id, *seq, sent.clone()))
        };
        let mut kept: Vec<_> = waited.iter().filter_map(find).collect();
        kept.sort_by_key(|(_, seq, _)| *seq);
        kept
    }

    /// Which writes of a session that has died are sent again.
    pub(crate) fn operations(
        &self,
        session: SessionId,
        waited: &BTreeMap<OperationId, history::Stamp>,
    ) -> Vec<OperationId> {
        self.kept(session, waited).into_iter().map(|(id, ..)| id).collect()
    }
}

/// Sends what the session before waited for again, under the same numbers; whether the new session goes on.
pub(crate) async fn replay(
    world: &Rc<World>,
    rpc: &Rpc,
    session: &Rc<Session>,
    before: SessionId,
    waited: &BTreeMap<OperationId, history::Stamp>,
    answered: impl Fn(OperationId),
) -> bool {
    let kept = world.keeper.kept(before, waited);
    for (id, seq, sent) in kept {
        // In the order of their numbers: nothing below this one is waited for any more.
        let tag = Tag { epoch: session.epoch(), session: session.id(), seq, oldest: seq };
        let VolumeCommand::Write { range, checksums, .. } = sent.command else { continue };
        let command = VolumeCommand::Write { tag, range, checksums };
        let request = DataRequest::Propose { group: GROUP, command: command.encode() };
        world.trace.mark("writes sent again after a restart");
        if !repeat(world, rpc, session, &request, &sent.body).await {
            return false;
        }
        answered(id);
    }
    true
}

/// Until it is answered; false if the session's epoch is over.
async fn repeat(
    world: &Rc<World>,
    rpc: &Rpc,
    session: &Rc<Session>,
    request: &DataRequest,
    body: &Bytes,
) -> bool {
    loop {
        for store in world.target().stores {
            if session.closed_now().is_some() {
                return false;
            }
            let frame = Frame { head: request.encode(), body: vec![body.clone()] };
            let Ok(answer) = rpc.call(store, Lane::Bulk, DATA, frame, PATIENCE).await else { continue };
            match DataReply::decode(&answer.head) {
                Ok(DataReply::Applied { reply: VolumeReply::Done { fresh }, .. }) => {
                    world.trace.mark(if fresh {
                        "replays that counted"
                    } else {
                        "replays that had counted before"
                    });
                    return true;
                }
                Ok(DataReply::Applied { reply: VolumeReply::Refused(refusal), .. }) => match refusal {
                    Refusal::OldEpoch { .. } | Refusal::NotAttached | Refusal::NotHolder => return false,
                    refusal if refusal.retryable() => {}
                    refusal => {
                        world
                            .trace
                            .violation(format_args!("a write that is sent again is refused: {refusal}"));
                        return false;
                    }
                },
                Ok(DataReply::Fenced { .. }) => return false,
                Ok(DataReply::Elsewhere { .. }) => {}
                other => {
                    world.trace.violation(format_args!("a write that is sent again is answered {other:?}"));
                    return false;
                }
            }
        }
        holdfast_env::sleep(AGAIN).await;
    }
}
