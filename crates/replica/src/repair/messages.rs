//! Which entries a damaged replica asks for, and what a peer says of each.

use bytes::Bytes;
use holdfast_store::EntryId;
use holdfast_store::journal::EntrySum;
use holdfast_types::{DecodeError, GroupId, LogIndex, Reader, ReplicaId, Term, Writer, limits};

/// Entries that are asked for at once.
pub(crate) const WANTED_MAX: usize = 256;

/// What a replica has of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Has {
    /// The payload is in the answer's body.
    Payload = 1,
    /// It has it; it did not fit into this answer.
    MoreThanFits = 2,
    /// Its log begins behind the entry: what stood there is in its checkpoint.
    Purged = 3,
    /// It has the entry and cannot read it either.
    Unreadable = 4,
    /// Its log, which is not in doubt, shows something else or ends before.
    Never = 5,
    /// It does not have it, and may only have lost it.
    Unsure = 6,
}

impl Has {
    fn from(value: u8) -> Result<Self, DecodeError> {
        Ok(match value {
            1 => Self::Payload,
            2 => Self::MoreThanFits,
            3 => Self::Purged,
            4 => Self::Unreadable,
            5 => Self::Never,
            6 => Self::Unsure,
            other => return Err(DecodeError::Unknown { what: "what a peer has", value: other.into() }),
        })
    }
}

/// A replica asks for the payloads of its damaged entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) group: GroupId,
    pub(crate) entries: Vec<EntrySum>,
}

impl Wanted {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Writer::with_capacity(32 + self.entries.len() * 32);
        self.group.encode(&mut out);
        out.u32(self.entries.len() as u32);
        for sum in &self.entries {
            sum.id.term.encode(&mut out);
            sum.id.leader.encode(&mut out);
            sum.id.index.encode(&mut out);
            out.u32(sum.payload_bytes);
            out.u32(sum.payload_crc);
        }
        out.finish()
    }

    pub(crate) fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(head);
        let group = GroupId::decode(&mut input)?;
        let entry = |input: &mut Reader<'_>| {
            let (term, leader) = (Term::decode(input)?, ReplicaId::decode(input)?);
            let id = EntryId { term, leader, index: LogIndex::decode(input)? };
            let payload_bytes = input.count("payload", limits::REQUEST_BYTES_MAX)? as u32;
            Ok(EntrySum { id, payload_bytes, payload_crc: input.u32()? })
        };
        let count = input.count("entries", WANTED_MAX)?;
        let entries = (0..count).map(|_| entry(&mut input)).collect::<Result<_, DecodeError>>()?;
        input.end()?;
        Ok(Self { group, entries })
    }
}

/// What a peer answers. The payloads follow in the body, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Who answers.
    pub(crate) replica: ReplicaId,
    /// The term of its vote, which is durable: it takes nothing from leaders of lower terms any more.
    pub(crate) term: Term,
    /// Of each entry that was asked for.
    pub(crate) has: Vec<Has>,
}

impl Answer {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Writer::with_capacity(32 + self.has.len());
        self.replica.encode(&mut out);
        self.term.encode(&mut out);
        out.u32(self.has.len() as u32);
        self.has.iter().for_each(|has| out.u8(*has as u8));
        out.finish()
    }

    pub(crate) fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(head);
        let (replica, term) = (ReplicaId::decode(&mut input)?, Term::decode(&mut input)?);
        let count = input.count("entries", WANTED_MAX)?;
        let has = (0..count).map(|_| Has::from(input.u8()?)).collect::<Result<_, _>>()?;
        input.end()?;
        Ok(Self { replica, term, has })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_and_its_answer_survive_the_wire_and_short_ones_are_refused() {
        let id = EntryId { term: Term(3), leader: ReplicaId(2), index: LogIndex(70) };
        let sum = EntrySum { id, payload_bytes: 8192, payload_crc: 77 };
        let wanted = Wanted { group: GroupId(9), entries: vec![sum, EntrySum { payload_crc: 1, ..sum }] };
        let bytes = wanted.encode();
        assert_eq!(Wanted::decode(&bytes), Ok(wanted));
        let all = [Has::Payload, Has::MoreThanFits, Has::Purged, Has::Unreadable, Has::Never, Has::Unsure];
        let answer = Answer { replica: ReplicaId(4), term: Term(5), has: all.to_vec() };
        let told = answer.encode();
        assert_eq!(Answer::decode(&told), Ok(answer));
        for end in 0..bytes.len() {
            assert!(Wanted::decode(&bytes[..end]).is_err());
        }
        for end in 0..told.len() {
            assert!(Answer::decode(&told[..end]).is_err());
        }
    }
}
