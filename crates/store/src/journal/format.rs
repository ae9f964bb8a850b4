//! Batches as bytes. See docs/FORMAT.md, "The journal".
//!
//! A batch is `list | payloads | list again`: the list names everything in the batch, with the heads in full, and
//! stands once before and once after the payloads, in other blocks. So one damaged region loses either a payload,
//! whose identity stays known, or one copy of the list.

use bytes::Bytes;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer};
use holdfast_types::{DecodeError, GroupId, LogIndex, Reader, ReplicaId, StoreId, Term, Writer, limits};

use crate::{EntryId, ReplicaIdentity};

const MAGIC_FRONT: u64 = 0x6873_6166_6a62_6631; // "1fbjfash"
const MAGIC_BACK: u64 = 0x6873_6166_6a62_6232;
/// Version 1 was never released; it had no doubts.
const VERSION: u16 = 2;
/// Bytes in front of the records of a list.
const FIXED_BYTES: usize = 96;
/// Longest head of an entry, in bytes.
pub(crate) const HEAD_BYTES_MAX: usize = limits::LOG_HEAD_BYTES_MAX;
/// Longest vote, in bytes.
pub(crate) const VOTE_BYTES_MAX: usize = 256;
const RECORDS_MAX: usize = 1 << 16;

const RECORD_STATE: u8 = 1;
const RECORD_ENTRY: u8 = 2;
const RECORD_COPY: u8 = 3;
const RECORD_DAMAGED: u8 = 5;
const RECORD_CUT: u8 = 4;

/// The whole durable state of a group beside its entries.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct GroupState {
    pub(crate) vote: Option<Bytes>,
    pub(crate) purged: Option<EntryId>,
    pub(crate) committed: LogIndex,
    /// Everything from this index on is cut off by this record.
    pub(crate) truncate_from: Option<LogIndex>,
    pub(crate) dropped: bool,
    /// A recovery found that part of this group's log, or its vote, may be lost. Written down, so that the segments
    /// that proved it may be reused and it is not forgotten.
    pub(crate) doubt: bool,
}

/// An entry without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EntryRecord {
    pub(crate) id: EntryId,
    pub(crate) kind: u8,
    pub(crate) head: Bytes,
    pub(crate) payload_bytes: u32,
    pub(crate) payload_crc: u32,
    /// The highest index that the group knew to be committed.
    pub(crate) committed: LogIndex,
    /// Written again so that its first place may be reused; changes nothing else.
    pub(crate) copy: bool,
    /// A copy of one whose payload is known to be damaged: none is behind the list. (Rubbish there would make the whole
    /// batch look torn.)
    pub(crate) damaged: bool,
}

/// One line of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    State(ReplicaIdentity, GroupState),
    Entry(ReplicaIdentity, EntryRecord),
    /// Batches of these numbers were never acknowledged and are void.
    Cut {
        from: u64,
        to: u64,
    },
}

impl Record {
    pub(crate) fn who(&self) -> Option<ReplicaIdentity> {
        match self {
            Self::State(who, _) | Self::Entry(who, _) => Some(*who),
            Self::Cut { .. } => None,
        }
    }
    /// Bytes of payload that stand behind the list.
    pub(crate) fn payload_bytes(&self) -> usize {
        match self {
            Self::Entry(_, entry) if !entry.damaged => entry.payload_bytes as usize,
            _ => 0,
        }
    }
}

/// A list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct List {
    pub(crate) store: StoreId,
    pub(crate) segment: u32,
    /// Where the batch begins in its segment, in blocks of 4096 bytes.
    pub(crate) start_block: u32,
    /// Blocks of one copy of the list.
    pub(crate) list_blocks: u32,
    /// Blocks of the whole batch.
    pub(crate) total_blocks: u32,
    pub(crate) seq: u64,
    /// The batch before this one, and the checksum of its list: the chain.
    pub(crate) previous: u64,
    pub(crate) previous_crc: u32,
    /// Every batch up to this one was flushed when this one was made.
    pub(crate) flushed: u64,
    /// No batch below this one is needed any more.
    pub(crate) oldest: u64,
    /// Drawn when the journal was opened, so that no batch follows one of an earlier life by accident.
    pub(crate) life: u32,
    pub(crate) records: Vec<Record>,
    /// Checksum of the life and the records; what the next batch chains to.
    pub(crate) crc: u32,
}

fn put_entry_id(out: &mut Writer, id: EntryId) {
    id.term.encode(out);
    id.leader.encode(out);
    id.index.encode(out);
}

fn get_entry_id(input: &mut Reader<'_>) -> Result<EntryId, DecodeError> {
    Ok(EntryId {
        term: Term::decode(input)?,
        leader: ReplicaId::decode(input)?,
        index: LogIndex::decode(input)?,
    })
}

fn put_who(out: &mut Writer, who: &ReplicaIdentity) {
    who.group.encode(out);
    who.replica.encode(out);
}

fn put_record(out: &mut Writer, record: &Record) {
    match record {
        Record::State(who, state) => {
            out.u8(RECORD_STATE);
            put_who(out, who);
            out.bool(state.vote.is_some());
            out.bytes(state.vote.as_deref().unwrap_or_default());
            out.bool(state.purged.is_some());
            put_entry_id(out, state.purged.unwrap_or_default());
            state.committed.encode(out);
            out.bool(state.truncate_from.is_some());
            state.truncate_from.unwrap_or_default().encode(out);
            out.bool(state.dropped);
            out.bool(state.doubt);
        }
        Record::Entry(who, entry) => {
            out.u8(match (entry.copy, entry.damaged) {
                (false, _) => RECORD_ENTRY,
                (true, false) => RECORD_COPY,
                (true, true) => RECORD_DAMAGED,
            });
            put_who(out, who);
            put_entry_id(out, entry.id);
            out.u8(entry.kind);
            entry.committed.encode(out);
            out.u32(entry.payload_bytes);
            out.u32(entry.payload_crc);
            out.bytes(&entry.head);
        }
        Record::Cut { from, to } => {
            out.u8(RECORD_CUT);
            out.u64(*from);
            out.u64(*to);
        }
    }
}

fn get_record(input: &mut Reader<'_>) -> Result<Record, DecodeError> {
    let kind = input.u8()?;
    if kind == RECORD_CUT {
        return Ok(Record::Cut { from: input.u64()?, to: input.u64()? });
    }
    let who = ReplicaIdentity { group: GroupId::decode(input)?, replica: ReplicaId::decode(input)? };
    match kind {
        RECORD_STATE => {
            let has_vote = input.bool()?;
            let vote = Bytes::copy_from_slice(input.bytes(VOTE_BYTES_MAX)?);
            let has_purged = input.bool()?;
            let purged = get_entry_id(input)?;
            let committed = LogIndex::decode(input)?;
            let has_cut = input.bool()?;
            let cut = LogIndex::decode(input)?;
            let state = GroupState {
                vote: has_vote.then_some(vote),
                purged: has_purged.then_some(purged),
                committed,
                truncate_from: has_cut.then_some(cut),
                dropped: input.bool()?,
                doubt: input.bool()?,
            };
            Ok(Record::State(who, state))
        }
        RECORD_ENTRY | RECORD_COPY | RECORD_DAMAGED => {
            let id = get_entry_id(input)?;
            let entry_kind = input.u8()?;
            let committed = LogIndex::decode(input)?;
            let payload_bytes = input.count("payload", limits::REQUEST_BYTES_MAX)? as u32;
            let payload_crc = input.u32()?;
            let head = Bytes::copy_from_slice(input.bytes(HEAD_BYTES_MAX)?);
            let (copy, damaged) = (kind != RECORD_ENTRY, kind == RECORD_DAMAGED);
            Ok(Record::Entry(
                who,
                EntryRecord {
                    id,
                    kind: entry_kind,
                    head,
                    payload_bytes,
                    payload_crc,
                    committed,
                    copy,
                    damaged,
                },
            ))
        }
        other => Err(DecodeError::Unknown { what: "journal record", value: other.into() }),
    }
}

/// Bytes of a record in a list, for filling batches.
pub(crate) fn record_bytes(record: &Record) -> usize {
    match record {
        Record::State(_, state) => 100 + state.vote.as_ref().map_or(0, Bytes::len),
        Record::Entry(_, entry) => entry_bytes(entry),
        Record::Cut { .. } => 17,
    }
}

/// The same of an entry's.
pub(crate) fn entry_bytes(entry: &EntryRecord) -> usize {
    80 + entry.head.len()
}

/// Checksum of a list's fixed part and records, bound to this store by its salt.
fn list_crc(salt: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&salt.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

fn chain_crc(life: u32, records: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&life.to_le_bytes());
    hasher.update(records);
    hasher.finalize()
}

impl List {
    /// Blocks that one copy of a list of so many record bytes takes.
    pub(crate) fn blocks_for(record_bytes: usize) -> u32 {
        (FIXED_BYTES + record_bytes).div_ceil(ALIGNMENT) as u32
    }

    /// The records as bytes; sets `crc`.
    pub(crate) fn encode_records(&mut self) -> Bytes {
        let mut out = Writer::new();
        self.records.iter().for_each(|record| put_record(&mut out, record));
        let records = out.finish();
        self.crc = chain_crc(self.life, &records);
        records
    }

    /// Writes one copy of the list into `place`, which has `list_blocks` blocks.
    pub(crate) fn encode_into(&self, front: bool, salt: u64, records: &[u8], place: &mut [u8]) {
        let mut out = Writer::with_capacity(FIXED_BYTES);
        out.u64(if front { MAGIC_FRONT } else { MAGIC_BACK });
        out.u16(VERSION);
        out.u16(0);
        self.store.encode(&mut out);
        out.u32(self.segment);
        out.u32(self.start_block);
        out.u32(self.list_blocks);
        out.u32(self.total_blocks);
        out.u64(self.seq);
        out.u64(self.previous);
        out.u32(self.previous_crc);
        out.u32(self.records.len() as u32);
        out.u64(self.flushed);
        out.u64(self.oldest);
        out.u32(self.life);
        out.u32(records.len() as u32);
        let fixed = out.finish();
        place[..fixed.len()].copy_from_slice(&fixed);
        let at = fixed.len() + 4;
        place[at..at + records.len()].copy_from_slice(records);
        let mut covered = fixed.to_vec();
        covered.extend_from_slice(records);
        let crc = list_crc(salt, &covered);
        place[fixed.len()..at].copy_from_slice(&crc.to_le_bytes());
    }

    /// Whether a block begins like a list.
    pub(crate) fn looks_like(block: &[u8]) -> bool {
        let magic = block.get(..8).and_then(|m| m.try_into().ok()).map(u64::from_le_bytes);
        matches!(magic, Some(MAGIC_FRONT | MAGIC_BACK))
    }

    /// Reads a list that begins at `bytes`; `None` if there is none that is whole and of this store.
    pub(crate) fn decode(salt: u64, bytes: &[u8]) -> Option<(Self, bool)> {
        Self::try_decode(salt, bytes).ok().flatten()
    }

    fn try_decode(salt: u64, bytes: &[u8]) -> Result<Option<(Self, bool)>, DecodeError> {
        let mut input = Reader::new(bytes);
        let magic = input.u64()?;
        if magic != MAGIC_FRONT && magic != MAGIC_BACK {
            return Ok(None);
        }
        if input.u16()? != VERSION {
            return Ok(None);
        }
        input.u16()?;
        let store = StoreId::decode(&mut input)?;
        let (segment, start_block) = (input.u32()?, input.u32()?);
        let (list_blocks, total_blocks) = (input.u32()?, input.u32()?);
        let (seq, previous, previous_crc) = (input.u64()?, input.u64()?, input.u32()?);
        let count = input.count("records", RECORDS_MAX)?;
        let (flushed, oldest, life) = (input.u64()?, input.u64()?, input.u32()?);
        let length = input.u32()? as usize;
        let fixed = &bytes[..bytes.len() - input.remaining()];
        let crc = input.u32()?;
        let records_bytes = input.raw(length)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&salt.to_le_bytes());
        hasher.update(fixed);
        hasher.update(records_bytes);
        if hasher.finalize() != crc {
            return Ok(None);
        }
        let mut records_input = Reader::new(records_bytes);
        let records = (0..count).map(|_| get_record(&mut records_input)).collect::<Result<Vec<_>, _>>()?;
        records_input.end()?;
        let crc = chain_crc(life, records_bytes);
        let list = Self {
            store,
            segment,
            start_block,
            list_blocks,
            total_blocks,
            seq,
            previous,
            previous_crc,
            flushed,
            oldest,
            life,
            records,
            crc,
        };
        Ok(list.is_consistent().then_some((list, magic == MAGIC_FRONT)))
    }

    fn is_consistent(&self) -> bool {
        let payloads: usize = self.records.iter().map(Record::payload_bytes).sum();
        let blocks = u64::from(self.list_blocks) * 2 + (payloads / ALIGNMENT) as u64;
        payloads.is_multiple_of(ALIGNMENT) && blocks == u64::from(self.total_blocks) && self.list_blocks > 0
    }
}

/// For fuzzing: reads `bytes` as if a list of a store without salt began with them; what is read is written as it was.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let length = bytes.len().max(FIXED_BYTES) - FIXED_BYTES;
    let mut out = Writer::new();
    out.u64(MAGIC_FRONT);
    out.u16(VERSION);
    out.u16(0);
    let fixed = &bytes[..bytes.len().min(FIXED_BYTES)];
    let mut place = [0; FIXED_BYTES];
    place[..fixed.len()].copy_from_slice(fixed);
    out.raw(&place[12..FIXED_BYTES - 8]);
    out.u32(length as u32);
    let records = &bytes[bytes.len().min(FIXED_BYTES)..];
    let crc = list_crc(0, &[out.as_slice(), records].concat());
    out.u32(crc);
    out.raw(records);
    if let Some((mut list, _)) = List::decode(0, out.as_slice()) {
        let encoded = list.encode_records();
        let mut again = vec![0; FIXED_BYTES + encoded.len()];
        list.encode_into(true, 0, &encoded, &mut again);
        assert_eq!(List::decode(0, &again), Some((list, true)), "a list is written otherwise");
    }
}

/// Makes a batch: the buffer to write, and the byte offset of each payload within it.
pub(crate) fn make_batch(mut list: List, payloads: &[Bytes], salt: u64) -> (List, AlignedBuffer, Vec<u64>) {
    let records = list.encode_records();
    list.list_blocks = List::blocks_for(records.len());
    let payload_bytes: usize = payloads.iter().map(Bytes::len).sum();
    list.total_blocks = list.list_blocks * 2 + (payload_bytes / ALIGNMENT) as u32;
    let list_bytes = list.list_blocks as usize * ALIGNMENT;
    let mut buffer = AlignedBuffer::zeroed(list.total_blocks as usize * ALIGNMENT);
    let bytes = buffer.as_mut_slice();
    let mut at = list_bytes;
    let mut offsets = Vec::with_capacity(payloads.len());
    for payload in payloads {
        offsets.push(at as u64);
        bytes[at..at + payload.len()].copy_from_slice(payload);
        at += payload.len();
    }
    list.encode_into(true, salt, &records, &mut bytes[..list_bytes]);
    list.encode_into(false, salt, &records, &mut bytes[at..]);
    (list, buffer, offsets)
}
