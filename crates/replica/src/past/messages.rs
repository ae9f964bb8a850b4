//! What replicas ask and tell each other of their past.

use bytes::Bytes;
use holdfast_store::past_file::{Acknowledged, LINES_MAX};
use holdfast_store::recovery_file::Order;
use holdfast_types::{DecodeError, GroupId, Reader, RecoveryId, ReplicaId, Writer};

const ASK: u8 = 1;
const TELL: u8 = 2;

/// Lines that are told at once.
pub(crate) const TOLD_MAX: usize = 256;

/// A question, or news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A replica asks what is known of it.
    Ask { group: GroupId, replica: ReplicaId },
    /// A leader tells what it knows of replicas.
    Tell(Vec<(GroupId, ReplicaId, Acknowledged)>),
}

impl Message {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Writer::new();
        match self {
            Self::Ask { group, replica } => {
                out.u8(ASK);
                group.encode(&mut out);
                replica.encode(&mut out);
            }
            Self::Tell(lines) => {
                out.u8(TELL);
                out.u32(lines.len() as u32);
                for (group, replica, known) in lines {
                    group.encode(&mut out);
                    replica.encode(&mut out);
                    known.encode(&mut out);
                }
            }
        }
        out.finish()
    }

    pub(crate) fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(head);
        let message = match input.u8()? {
            ASK => {
                let (group, replica) = (GroupId::decode(&mut input)?, ReplicaId::decode(&mut input)?);
                Self::Ask { group, replica }
            }
            TELL => {
                let line = |input: &mut Reader<'_>| {
                    let (group, replica) = (GroupId::decode(input)?, ReplicaId::decode(input)?);
                    Ok((group, replica, Acknowledged::decode(input)?))
                };
                let count = input.count("lines", TOLD_MAX)?;
                Self::Tell((0..count).map(|_| line(&mut input)).collect::<Result<_, DecodeError>>()?)
            }
            other => {
                return Err(DecodeError::Unknown { what: "message about the past", value: other.into() });
            }
        };
        input.end()?;
        Ok(message)
    }
}

/// What a store answers to [`Message::Ask`].
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Answer {
    /// A replica here leads the group, with a quorum.
    pub(crate) leads: bool,
    /// What is known here; nothing also where no replica of the group stands any more.
    pub(crate) known: Option<Acknowledged>,
    /// A recovery has replaced the group (INV-RECOVER): its replicas do not run any more.
    pub(crate) superseded: Option<Order>,
}

impl Answer {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Writer::with_capacity(34);
        out.bool(self.leads);
        out.bool(self.known.is_some());
        if let Some(known) = &self.known {
            known.encode(&mut out);
        }
        // Left out where it says nothing, so that whoever knows no recoveries reads the rest.
        if let Some(order) = &self.superseded {
            out.u64(order.number);
            order.id.encode(&mut out);
        }
        out.finish()
    }

    pub(crate) fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(head);
        let leads = input.bool()?;
        let known = if input.bool()? { Some(Acknowledged::decode(&mut input)?) } else { None };
        let superseded = match input.remaining() {
            0 => None,
            _ => Some(Order { number: input.u64()?, id: RecoveryId::decode(&mut input)? }),
        };
        input.end()?;
        Ok(Self { leads, known, superseded })
    }
}

const _: () = assert!(TOLD_MAX >= LINES_MAX, "what is known of one group fits into a message");

#[cfg(test)]
mod tests {
    use holdfast_types::{LogIndex, Term};

    use super::*;

    #[test]
    fn messages_survive_the_wire_and_short_ones_are_refused() {
        let known = Acknowledged {
            term: Term(3),
            leader: ReplicaId(2),
            matched: LogIndex(90),
            committed: LogIndex(80),
        };
        let line = (GroupId(9), ReplicaId(1), known);
        let ask = Message::Ask { group: GroupId(9), replica: ReplicaId(4) };
        for message in [ask, Message::Tell(vec![line, line]), Message::Tell(Vec::new())] {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Ok(message));
            for end in 0..bytes.len() {
                assert!(Message::decode(&bytes[..end]).is_err());
            }
        }
        let told = Answer { leads: true, known: Some(known), superseded: None };
        let superseded = Some(Order { number: 2, id: RecoveryId(9) });
        for answer in [Answer::default(), told.clone(), Answer { superseded, ..told }] {
            let bytes = answer.encode();
            assert_eq!(Answer::decode(&bytes), Ok(answer.clone()));
            for end in 0..bytes.len() {
                // All but what stands last is a whole answer of one that knows no recoveries.
                let cut = Answer::decode(&bytes[..end]);
                assert!(cut.is_err() || cut == Ok(Answer { superseded: None, ..answer.clone() }), "{cut:?}");
            }
        }
    }
}
