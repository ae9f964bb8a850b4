//! What stores ask each other about groups that rest.

use bytes::Bytes;
use holdfast_store::EntryId;
use holdfast_types::{DecodeError, GroupId, LogIndex, Reader, ReplicaId, Term, Writer};

const OFFER: u8 = 1;
const ASK: u8 = 2;
const WAKE: u8 = 3;

/// Groups that are asked about at once.
pub(crate) const ASKED_MAX: usize = 4096;

/// Whose leadership a group rests under.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Leadership {
    pub(crate) term: Term,
    pub(crate) leader: ReplicaId,
}

/// A group about which a store asks, and for whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Line {
    pub(crate) group: GroupId,
    pub(crate) under: Leadership,
    pub(crate) follower: ReplicaId,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A leader asks a member whether the group may rest, with this as everybody's last entry.
    Offer { group: GroupId, to: ReplicaId, under: Leadership, last: EntryId },
    /// A store asks which of these groups still rest under their leaders there.
    Ask(Vec<Line>),
    /// A member of a group that rests has a reason why it should not.
    Wake { group: GroupId, under: Leadership },
}

impl Leadership {
    fn encode(self, out: &mut Writer) {
        self.term.encode(out);
        self.leader.encode(out);
    }
    fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { term: Term::decode(input)?, leader: ReplicaId::decode(input)? })
    }
}

impl Message {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Writer::new();
        match self {
            Self::Offer { group, to, under, last } => {
                out.u8(OFFER);
                group.encode(&mut out);
                to.encode(&mut out);
                under.encode(&mut out);
                last.term.encode(&mut out);
                last.leader.encode(&mut out);
                last.index.encode(&mut out);
            }
            Self::Ask(lines) => {
                out.u8(ASK);
                out.u32(lines.len() as u32);
                for line in lines {
                    line.group.encode(&mut out);
                    line.under.encode(&mut out);
                    line.follower.encode(&mut out);
                }
            }
            Self::Wake { group, under } => {
                out.u8(WAKE);
                group.encode(&mut out);
                under.encode(&mut out);
            }
        }
        out.finish()
    }

    pub(crate) fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(head);
        let input = &mut reader;
        let message = match input.u8()? {
            OFFER => Self::Offer {
                group: GroupId::decode(input)?,
                to: ReplicaId::decode(input)?,
                under: Leadership::decode(input)?,
                last: EntryId {
                    term: Term::decode(input)?,
                    leader: ReplicaId::decode(input)?,
                    index: LogIndex::decode(input)?,
                },
            },
            ASK => {
                let line = |input: &mut Reader<'_>| {
                    let (group, under) = (GroupId::decode(input)?, Leadership::decode(input)?);
                    Ok(Line { group, under, follower: ReplicaId::decode(input)? })
                };
                let count = input.count("groups that rest", ASKED_MAX)?;
                Self::Ask((0..count).map(|_| line(input)).collect::<Result<_, DecodeError>>()?)
            }
            WAKE => Self::Wake { group: GroupId::decode(input)?, under: Leadership::decode(input)? },
            other => return Err(DecodeError::Unknown { what: "message about rest", value: other.into() }),
        };
        reader.end()?;
        Ok(message)
    }
}

/// Of each group that was asked about, whether it rests there.
pub(crate) fn encode_answer(rests: &[bool]) -> Bytes {
    rests.iter().map(|rests| u8::from(*rests)).collect::<Vec<u8>>().into()
}

/// Reads what [`encode_answer`] wrote, about so many groups.
pub(crate) fn decode_answer(head: &[u8], count: usize) -> Option<Vec<bool>> {
    let is_whole = head.len() == count && head.iter().all(|byte| *byte <= 1);
    is_whole.then(|| head.iter().map(|byte| *byte == 1).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_arrives_as_it_was() {
        let (group, under) = (GroupId(7), Leadership { term: Term(3), leader: ReplicaId(1) });
        let last = EntryId { term: Term(3), leader: ReplicaId(1), index: LogIndex(9) };
        let line = Line { group, under, follower: ReplicaId(2) };
        for message in [
            Message::Offer { group, to: ReplicaId(2), under, last },
            Message::Ask(vec![]),
            Message::Ask(vec![line, Line { follower: ReplicaId(3), ..line }]),
            Message::Wake { group, under },
        ] {
            let head = message.encode();
            assert_eq!(Message::decode(&head), Ok(message));
            assert!(Message::decode(&head[..head.len() - 1]).is_err());
        }
        assert!(Message::decode(&[9]).is_err());
        assert_eq!(decode_answer(&encode_answer(&[true, false]), 2), Some(vec![true, false]));
        assert_eq!(decode_answer(&encode_answer(&[true]), 2), None, "of another question");
        assert_eq!(decode_answer(&[2], 1), None);
    }

    #[test]
    fn the_largest_question_fits_into_a_frame() {
        let under = Leadership { term: Term(u64::MAX), leader: ReplicaId(u64::MAX) };
        let line = Line { group: GroupId(u128::MAX), under, follower: ReplicaId(u64::MAX) };
        let bytes = Message::Ask(vec![line; ASKED_MAX]).encode().len();
        assert!(bytes < holdfast_types::limits::FRAME_HEAD_BYTES_MAX / 2, "{bytes}");
    }
}
