//! Recovery: reads the whole journal and decides of every part whether it is good, faulty, unknown or torn.
//!
//! | what is found of batch `s` | `s` is named as flushed | it is not |
//! |---|---|---|
//! | a list and every payload | good | good while every batch before it is good, else void |
//! | a list, a payload does not match | that entry is *faulty* | torn: void from here on |
//! | no list | *unknown* for every group | torn: void from here on |
//!
//! «Named as flushed» is said by any valid list of a later batch or closing mark. Batches complete in order, so what
//! follows a batch that was not flushed was never acknowledged either: cutting it forgets no promise. Nothing else is
//! ever cut. The cut itself is written down in the next batch, so that what was void stays void.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, File};
use holdfast_types::LogIndex;
use tokio::sync::{Notify, Semaphore};

use super::format::{EntryRecord, GroupState, List, Record};
use super::group::{Group, GroupLog, Meta, Place};
use super::writer::{Start, State};
use super::{Inner, Journal, JournalUsage, RecoveredGroup, Recovery, StoreOptions, segment_name};
use crate::{EntryId, ReplicaIdentity, StoreError, StoreIdentity};

/// Bytes read at once.
const READ_BYTES: usize = 4 << 20;

/// A batch as found.
struct Found {
    list: List,
    /// Payloads that match, in the order of the records that have one.
    intact: Vec<bool>,
}

#[derive(Default)]
struct Scan {
    batches: BTreeMap<u64, Found>,
    flushed: u64,
    oldest: u64,
    highest: u64,
}

async fn read_segment(file: &Rc<dyn File>, name: &str, bytes: u64) -> Result<AlignedBuffer, StoreError> {
    let mut whole = AlignedBuffer::zeroed(bytes as usize);
    let mut at = 0;
    while at < bytes as usize {
        let length = READ_BYTES.min(bytes as usize - at);
        let part = file.read_at(at as u64, length).await.map_err(|error| StoreError::io(name, &error))?;
        whole.as_mut_slice()[at..at + length].copy_from_slice(part.as_slice());
        at += length;
    }
    Ok(whole)
}

impl Scan {
    /// Takes every valid list of one segment. Lists are found by walking from batch to batch, and where the walk
    /// breaks, by looking at every block: a list counts only where it says it stands.
    fn segment(&mut self, number: u32, bytes: &[u8], store: holdfast_types::StoreId, salt: u64) {
        let blocks = bytes.len() / ALIGNMENT;
        let mut block = 0;
        while block < blocks {
            let here = &bytes[block * ALIGNMENT..];
            let found = if List::looks_like(here) { List::decode(salt, here) } else { None };
            let Some((list, front)) = found.filter(|(list, _)| list.store == store && list.segment == number)
            else {
                block += 1;
                continue;
            };
            let start = list.start_block as usize;
            let end = start + list.total_blocks as usize;
            let expected = if front { start } else { end.saturating_sub(list.list_blocks as usize) };
            if expected != block || end > blocks {
                block += 1; // a misdirected write, or block data that looks like a list
                continue;
            }
            self.take(list, bytes);
            // The walk goes on behind the batch; an older lap's batches lie there once the newest was passed.
            block = if front { end } else { block + 1 };
        }
    }

    fn take(&mut self, list: List, bytes: &[u8]) {
        self.flushed = self.flushed.max(list.flushed);
        self.oldest = self.oldest.max(list.oldest);
        self.highest = self.highest.max(list.seq);
        if self.batches.contains_key(&list.seq) {
            return;
        }
        let mut at = (list.start_block + list.list_blocks) as usize * ALIGNMENT;
        let mut intact = Vec::new();
        for record in &list.records {
            if let Record::Entry(_, entry) = record {
                let length = entry.payload_bytes as usize;
                if length > 0 {
                    intact.push(crc32fast::hash(&bytes[at..at + length]) == entry.payload_crc);
                    at += length;
                }
            }
        }
        self.batches.insert(list.seq, Found { list, intact });
    }
}

/// What the batches say, in order.
#[derive(Default)]
struct Replay {
    groups: BTreeMap<ReplicaIdentity, Replayed>,
    cut: Vec<(u64, u64)>,
    unknown: Option<String>,
}

#[derive(Default)]
struct Replayed {
    state: GroupState,
    state_segment: Option<usize>,
    entries: BTreeMap<u64, (EntryRecord, Place, bool)>,
}

impl Replay {
    fn batch(&mut self, found: &Found) {
        let segment = found.list.segment as usize;
        let mut intact = found.intact.iter();
        let mut offset = u64::from(found.list.start_block + found.list.list_blocks) * ALIGNMENT as u64;
        for record in &found.list.records {
            match record {
                Record::State(who, state) => {
                    let group = self.groups.entry(*who).or_default();
                    if let Some(keep) = state.truncate_after {
                        group.entries.split_off(&(keep.0 + 1));
                    }
                    if let Some(purged) = state.purged {
                        group.entries = group.entries.split_off(&(purged.index.0 + 1));
                    }
                    let committed = group.state.committed.max(state.committed);
                    group.state = GroupState { committed, truncate_after: None, ..state.clone() };
                    group.state_segment = Some(segment);
                }
                Record::Entry(who, entry) => {
                    let place = Place { segment, offset };
                    let good = entry.payload_bytes == 0 || intact.next().copied().unwrap_or(false);
                    offset += u64::from(entry.payload_bytes);
                    let group = self.groups.entry(*who).or_default();
                    group.state.committed = group.state.committed.max(entry.committed);
                    if group.state.purged.is_none_or(|purged| purged.index < entry.id.index) {
                        group.entries.insert(entry.id.index.0, (entry.clone(), place, good));
                    }
                }
                Record::Cut { .. } => {}
            }
        }
    }

    fn is_cut(&self, seq: u64) -> bool {
        self.cut.iter().any(|(from, to)| (*from..=*to).contains(&seq))
    }
}

/// Where the valid part of the journal ends.
struct End {
    last: (u64, u32),
    void: Option<(u64, u64)>,
}

fn replay(scan: &Scan) -> (Replay, End) {
    let mut replay = Replay::default();
    let cuts = scan.batches.values().flat_map(|found| &found.list.records);
    replay.cut = cuts
        .filter_map(|r| if let Record::Cut { from, to } = r { Some((*from, *to)) } else { None })
        .collect();
    let first = scan.oldest.max(1);
    let mut last = (first - 1, 0);
    let mut void = None;
    for seq in first..=scan.highest {
        if replay.is_cut(seq) {
            continue;
        }
        let found = scan.batches.get(&seq);
        let whole = found.is_some_and(|found| found.intact.iter().all(|intact| *intact));
        if seq > scan.flushed && !whole {
            // From the last valid batch on: what lies between was cut by a batch that is now void itself, and its word
            // goes with it. Cut again, else the next recovery would stumble over it and cut what came after.
            void = Some((last.0 + 1, scan.highest));
            break;
        }
        match found {
            None => {
                let why = format!("batch {seq} was flushed and neither copy of its list can be read");
                tracing::error!(%why, "the journal is damaged");
                replay.unknown = Some(why);
            }
            Some(found) => {
                if found.list.previous == last.0 && last.1 != 0 && found.list.previous_crc != last.1 {
                    replay.unknown =
                        Some(format!("batch {seq} does not follow batch {}: the chain is broken", last.0));
                }
                replay.batch(found);
                last = (seq, found.list.crc);
            }
        }
    }
    (replay, End { last, void })
}

/// Opens the segments and recovers the groups.
pub(super) async fn open(
    identity: StoreIdentity,
    options: StoreOptions,
    salt: u64,
    files: Vec<Rc<dyn File>>,
) -> Result<(Journal, Vec<RecoveredGroup>), StoreError> {
    let mut scan = Scan::default();
    for (number, file) in files.iter().enumerate() {
        let name = segment_name(number as u32);
        let bytes = read_segment(file, &name, options.segment_bytes).await?;
        scan.segment(number as u32, bytes.as_slice(), identity.store, salt);
        // A daemon that was killed may have left a batch in the kernel's or the disk's cache only. What is read from
        // there is counted on from now on (Raft tells others that it has it), so it must be on the medium first.
        file.flush().await.map_err(|error| StoreError::io(&name, &error))?;
    }
    let (replayed, end) = replay(&scan);
    if let Some((from, to)) = end.void {
        tracing::info!(from, to, "the torn tail of the journal, never acknowledged, is void");
    }
    let state = State::new(start(&scan, &replayed, &end, &options));
    let inner = Inner {
        identity,
        salt,
        files,
        state: RefCell::new(state),
        groups: RefCell::default(),
        failed: RefCell::new(None),
        changed: Notify::new(),
        shorter: Notify::new(),
        usage: Cell::new(JournalUsage::default()),
        flush_latency: RefCell::default(),
        admission: Rc::new(Semaphore::new(Journal::admission_kib(&options) as usize)),
        options,
    };
    let journal = Journal(Rc::new(inner));
    let groups = adopt(&journal, replayed);
    journal.log_recovered();
    // What was freed just before the end is not yet known to be free.
    journal.reclaim();
    Ok((journal, groups))
}

/// Where writing goes on: behind the last valid batch, over what is void.
fn start(scan: &Scan, replayed: &Replay, end: &End, options: &StoreOptions) -> Start {
    let segment_blocks = (options.segment_bytes / ALIGNMENT as u64) as u32;
    let first = scan.oldest.max(1);
    let mut first_in: BTreeMap<usize, u64> = BTreeMap::new();
    for (seq, found) in scan.batches.range(first..) {
        let void = end.void.is_some_and(|(from, _)| *seq >= from) || replayed.is_cut(*seq);
        if !void {
            first_in.entry(found.list.segment as usize).or_insert(*seq);
        }
    }
    let mut used: Vec<(usize, u64)> = first_in.into_iter().collect();
    used.sort_by_key(|(_, seq)| *seq);
    let tail = scan.batches.get(&end.last.0).filter(|_| !used.is_empty());
    let (head, head_block) = match tail {
        Some(found) => (found.list.segment as usize, found.list.start_block + found.list.total_blocks),
        None => (0, 0),
    };
    if used.is_empty() {
        used.push((head, scan.highest + 1));
    }
    Start {
        next_seq: scan.highest + 1,
        last: end.last,
        head,
        head_block,
        segment_blocks,
        used,
        segments: options.segments as usize,
        cut: end.void,
    }
}

fn adopt(journal: &Journal, replayed: Replay) -> Vec<RecoveredGroup> {
    let mut out = Vec::new();
    for (who, found) in replayed.groups {
        if found.state.dropped {
            continue;
        }
        let mut recovery = replayed.unknown.clone().map_or(Recovery::Clean, Recovery::Unknown);
        let (group, faulty, gap) = index(journal, found);
        if let Some(gap) = gap {
            recovery = Recovery::Unknown(gap);
        }
        if recovery == Recovery::Clean && !faulty.is_empty() {
            recovery = Recovery::Faulty(faulty);
        }
        let group = Rc::new(RefCell::new(group));
        journal.0.groups.borrow_mut().insert(who, group.clone());
        let log = GroupLog { journal: journal.clone(), who, group };
        let vote_lost = replayed.unknown.is_some();
        out.push(RecoveredGroup { id: who, log, state: recovery, vote_lost });
    }
    out
}

/// The in-memory index of a group: its entries without gaps, those that are faulty, and the first gap if there is one.
fn index(journal: &Journal, found: Replayed) -> (Group, Vec<EntryId>, Option<String>) {
    // A group's log begins at 0 with the voters that it was begun with; one that was never begun is empty.
    let first = found.state.purged.map_or(0, |id| id.index.0 + 1);
    let flushed = LogIndex(first.saturating_sub(1));
    let mut group =
        Group { state: found.state, state_segment: found.state_segment, first, flushed, ..Group::default() };
    let (mut faulty, mut gap) = (Vec::new(), None);
    for (expected, (index, (record, place, good))) in (first..).zip(found.entries) {
        if index != expected {
            gap = Some(format!("entry {expected} is missing and entry {index} is there"));
            break;
        }
        if !good {
            faulty.push(record.id);
        }
        if record.payload_bytes > 0 {
            journal.0.state.borrow_mut().add_live(place.segment);
        }
        let payload = (record.payload_bytes == 0).then(Bytes::new);
        let meta = Meta {
            id: record.id,
            kind: record.kind,
            head: record.head,
            payload_bytes: record.payload_bytes,
            payload_crc: record.payload_crc,
            payload,
            place: Some(place),
            durable: true,
        };
        group.flushed = LogIndex(index);
        group.push(meta);
    }
    (group, faulty, gap)
}
