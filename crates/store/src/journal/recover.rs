//! Recovery: reads the whole journal and decides of every part whether it is good, faulty, unknown or torn.
//!
//! | what is found of batch `s` | `s` is named as flushed | it is not |
//! |---|---|---|
//! | a list and every payload | good | good while every batch before it is good, else void |
//! | a list, a payload does not match | that entry is *faulty* | torn: void from here on |
//! | no list | *unknown* for every group | torn: void from here on |
//! | a list of it at another place | *unknown* for every group | *unknown*: a misdirected write is no torn one |
//!
//! «Named as flushed» is said by any valid list of a later batch or closing mark. Batches complete in order, so what
//! follows a batch that was not flushed was never acknowledged either: cutting it forgets no promise. Nothing else is
//! ever cut. The cut itself is written down in the next batch, so that what was void stays void.
//!
//! What a batch says of segments that are not needed any more counts only if the batch is not void: the records that
//! made them unneeded are in it or before it. What is unknown is written down at once (`GroupState::doubt`), because
//! the segments that prove it are reused.
//!
//! Before anything is believed the segments are flushed: what a process before this one wrote may be readable and not
//! yet be on the medium.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use futures_util::StreamExt;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, File};
use holdfast_types::LogIndex;
use tokio::sync::Notify;

use super::format::{EntryRecord, GroupState, List, Record};
use super::group::{Group, GroupLog, Meta, Place};
use super::writer::{Start, State};
use super::{
    Cleaning, DOUBT, Inner, Journal, JournalUsage, RecoveredGroup, Recovery, StoreOptions, planted,
    segment_name,
};
use crate::{EntryId, ReplicaIdentity, StoreError, StoreIdentity};

/// A batch as found.
struct Found {
    list: List,
    /// Payloads that match, in the order of the records that have one.
    intact: Vec<bool>,
}

impl Found {
    fn is_whole(&self) -> bool {
        self.intact.iter().all(|intact| *intact)
    }
}

#[derive(Default)]
struct Scan {
    batches: BTreeMap<u64, Found>,
    flushed: u64,
    highest: u64,
    /// Batches of which a list was found where it does not belong.
    misplaced: BTreeSet<u64>,
    /// Blocks that the medium does not give back.
    unreadable: BTreeSet<(u32, u64)>,
}

/// Bytes of segments that are read at once, but for one segment at least.
const READ_AHEAD_BYTES: u64 = 128 << 20;
/// Segments that are read at once, at most: the disk is busy with fewer.
const READ_AHEAD_MAX: u64 = 4;

/// How many segments are read while another one is looked at.
fn read_ahead(options: &StoreOptions) -> usize {
    (READ_AHEAD_BYTES / options.segment_bytes).clamp(1, READ_AHEAD_MAX) as usize
}

/// Bytes of a segment, read into this memory if there is any, and its blocks that the medium does not give back; those are
/// zeros.
async fn read_segment(
    file: &Rc<dyn File>,
    name: &str,
    bytes: usize,
    memory: Option<AlignedBuffer>,
) -> Result<(AlignedBuffer, Vec<u64>), StoreError> {
    // What this process does not know to be flushed may be readable and still be lost.
    if !planted("recover-unflushed") {
        file.flush().await.map_err(|error| StoreError::io(name, &error))?;
    }
    let read = match memory {
        Some(memory) => file.read_into(0, memory),
        None => file.read_at(0, bytes),
    };
    let cause = match read.await {
        Ok(whole) => return Ok((whole, Vec::new())),
        Err(error) => error,
    };
    let mut whole = AlignedBuffer::zeroed(bytes);
    let mut unreadable = Vec::new();
    for (number, place) in (0u64..).zip(whole.as_mut_slice().chunks_exact_mut(ALIGNMENT)) {
        match file.read_at(number * ALIGNMENT as u64, ALIGNMENT).await {
            Ok(block) => place.copy_from_slice(block.as_slice()),
            Err(_) => unreadable.push(number),
        }
    }
    tracing::warn!(name, error = %cause, blocks = unreadable.len(), "blocks of a segment cannot be read");
    Ok((whole, unreadable))
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
            let Some((list, front)) = found.filter(|(list, _)| list.store == store) else {
                block += 1;
                continue;
            };
            let start = list.start_block as usize;
            let end = start + list.total_blocks as usize;
            let expected = if front { start } else { end.saturating_sub(list.list_blocks as usize) };
            if list.segment != number || expected != block || end > blocks {
                self.misplaced.insert(list.seq);
                block += 1;
                continue;
            }
            let seq = list.seq;
            // Only what is untouched from front to back is passed over: a newer batch, torn or not, may have been
            // written into the middle of what an older lap left.
            let back = &bytes[(end - list.list_blocks as usize) * ALIGNMENT..];
            let untouched = front && List::decode(salt, back).is_some_and(|(other, _)| other == list);
            if front || !planted("forget-second-list") {
                self.take(list, bytes);
            }
            let is_whole = self.batches.get(&seq).is_some_and(Found::is_whole);
            block = if untouched && is_whole { end } else { block + 1 };
        }
    }

    fn take(&mut self, list: List, bytes: &[u8]) {
        self.flushed = self.flushed.max(list.flushed);
        self.highest = self.highest.max(list.seq);
        if self.batches.contains_key(&list.seq) {
            return;
        }
        let mut block = u64::from(list.start_block + list.list_blocks);
        let mut intact = Vec::new();
        for record in &list.records {
            let length = record.payload_bytes();
            if length > 0 {
                let (at, Record::Entry(_, entry)) = (block as usize * ALIGNMENT, record) else { continue };
                let next = block + (length / ALIGNMENT) as u64;
                let lost =
                    self.unreadable.range((list.segment, block)..(list.segment, next)).next().is_some();
                let matches = crc32fast::hash(&bytes[at..at + length]) == entry.payload_crc;
                intact.push((!lost && matches) || planted("payload-unchecked"));
                block = next;
            }
        }
        self.batches.insert(list.seq, Found { list, intact });
    }

    /// Blocks that cannot be read and that no batch accounts for: anything may have stood there.
    fn unexplained(&self, last: u64) -> Option<(u32, u64)> {
        let covers = |list: &List, (segment, block): (u32, u64)| {
            let start = u64::from(list.start_block);
            list.segment == segment && (start..start + u64::from(list.total_blocks)).contains(&block)
        };
        let known: Vec<&List> = self.batches.range(..=last).map(|(_, found)| &found.list).collect();
        let mut lost = self.unreadable.iter().copied();
        lost.find(|place| !known.iter().any(|list| covers(list, *place)))
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
                    if let Some(from) = state.truncate_from.filter(|_| !planted("forget-truncation")) {
                        group.entries.split_off(&from.0);
                    }
                    if let Some(purged) = state.purged {
                        group.entries = group.entries.split_off(&(purged.index.0 + 1));
                    }
                    if state.dropped {
                        group.entries.clear();
                    }
                    let committed = group.state.committed.max(state.committed);
                    let vote =
                        if planted("forget-vote") { group.state.vote.clone() } else { state.vote.clone() };
                    group.state = GroupState { committed, truncate_from: None, vote, ..state.clone() };
                    group.state_segment = Some(segment);
                }
                Record::Entry(who, entry) => {
                    let place = Place { segment, offset };
                    let stored = record.payload_bytes();
                    let is_intact = stored > 0 && intact.next().copied().unwrap_or(false);
                    let good = !entry.damaged && (entry.payload_bytes == 0 || is_intact);
                    offset += stored as u64;
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
    /// The first batch that is still needed.
    first: u64,
    last: (u64, u32),
    void: Option<(u64, u64)>,
}

/// The last batch that may have been acknowledged, and the first that is needed by what those up to it say.
fn bounds(scan: &Scan, replay: &Replay) -> (u64, u64) {
    let mut last = scan.flushed;
    for seq in scan.flushed + 1..=scan.highest {
        if replay.is_cut(seq) {
            continue;
        }
        if !scan.batches.get(&seq).is_some_and(Found::is_whole) {
            if planted("trust-behind-a-hole") {
                continue;
            }
            break;
        }
        last = seq;
    }
    if planted("cut-faulty-entry") {
        let rotten = scan.batches.iter().find(|(_, found)| !found.is_whole()).map(|(seq, _)| seq - 1);
        last = rotten.unwrap_or(last).min(last);
    }
    let valid = scan.batches.range(..=last).filter(|(seq, _)| !replay.is_cut(**seq));
    let first = valid.map(|(_, found)| found.list.oldest).max().unwrap_or(1);
    (first.max(1), last)
}

fn replay(scan: &Scan) -> (Replay, End) {
    let mut replay = Replay::default();
    let cuts = scan.batches.values().flat_map(|found| &found.list.records);
    replay.cut = cuts
        .filter_map(|r| if let Record::Cut { from, to } = r { Some((*from, *to)) } else { None })
        .collect();
    let (first, valid) = bounds(scan, &replay);
    let mut last = (first - 1, None);
    for seq in first..=valid {
        if replay.is_cut(seq) {
            continue;
        }
        let Some(found) = scan.batches.get(&seq) else {
            replay.unknown =
                Some(format!("batch {seq} was flushed and neither copy of its list can be read"));
            continue;
        };
        let follows =
            found.list.previous != last.0 || last.1.is_none_or(|crc| crc == found.list.previous_crc);
        if !follows {
            replay.unknown =
                Some(format!("batch {seq} does not follow batch {}: the chain is broken", last.0));
        }
        replay.batch(found);
        last = (seq, Some(found.list.crc));
    }
    let strayed = scan.misplaced.range(valid + 1..).find(|seq| !replay.is_cut(**seq));
    if let Some(seq) = strayed.filter(|_| !planted("ignore-misplaced")) {
        replay.unknown = Some(format!("batch {seq} was written to a wrong place"));
    }
    if let Some((segment, block)) = scan.unexplained(valid) {
        replay.unknown = Some(format!("block {block} of segment {segment} cannot be read"));
    }
    if let Some(why) = &replay.unknown {
        tracing::error!(%why, "the journal is damaged");
    }
    // Everything behind the last valid batch, also what an earlier cut, itself not durable, had made void.
    let highest = scan.misplaced.last().copied().unwrap_or_default().max(scan.highest);
    let void = (highest > valid).then_some((valid + 1, highest));
    let crc = last.1.filter(|_| last.0 == valid).unwrap_or_default();
    (replay, End { first, last: (valid, crc), void })
}

/// Opens the segments and recovers the groups.
pub(super) async fn open(
    identity: StoreIdentity,
    options: StoreOptions,
    salt: u64,
    files: Vec<Rc<dyn File>>,
) -> Result<(Journal, Vec<RecoveredGroup>), StoreError> {
    let mut scan = Scan::default();
    // Read ahead, and looked at in the order of their numbers whichever comes first.
    let unused = RefCell::new(Vec::new());
    let reads = files.iter().enumerate().map(|(number, file)| {
        let (bytes, unused) = (options.segment_bytes as usize, &unused);
        async move {
            // Memory of one that was looked at: clearing as much for each takes half as long as reading it.
            let memory = unused.borrow_mut().pop();
            read_segment(file, &segment_name(number as u32), bytes, memory).await
        }
    });
    let mut segments = futures_util::stream::iter(reads).buffered(read_ahead(&options));
    let mut number = 0;
    while let Some(read) = segments.next().await {
        let (bytes, unreadable) = read?;
        scan.unreadable.extend(unreadable.into_iter().map(|block| (number, block)));
        scan.segment(number, bytes.as_slice(), identity.store, salt);
        unused.borrow_mut().push(bytes);
        number += 1;
    }
    drop(segments);
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
        recent_flushes: RefCell::default(),
        admission: RefCell::default(),
        cleaning: RefCell::new(Cleaning::new(options.line_bytes())),
        foreground: RefCell::default(),
        reserve: OnceCell::new(),
        options,
    };
    let journal = Journal(Rc::new(inner));
    let groups = adopt(&journal, replayed);
    journal.log_recovered();
    // What was freed just before the end is not yet known to be free.
    journal.reclaim();
    journal.kick();
    journal.close_when_idle();
    Ok((journal, groups))
}

/// Where writing goes on: behind the last valid batch, over what is void.
fn start(scan: &Scan, replayed: &Replay, end: &End, options: &StoreOptions) -> Start {
    let segment_blocks = (options.segment_bytes / ALIGNMENT as u64) as u32;
    let mut first_in: BTreeMap<usize, u64> = BTreeMap::new();
    let valid = || scan.batches.range(end.first..end.last.0 + 1).filter(|(seq, _)| !replayed.is_cut(**seq));
    for (seq, found) in valid() {
        first_in.entry(found.list.segment as usize).or_insert(*seq);
    }
    let mut used: Vec<(usize, u64)> = first_in.into_iter().collect();
    used.sort_by_key(|(_, seq)| *seq);
    let tail = valid().next_back().map(|(_, found)| &found.list);
    let (head, head_block) =
        tail.map_or((0, 0), |list| (list.segment as usize, list.start_block + list.total_blocks));
    let behind = end.void.filter(|_| !planted("reuse-number"));
    let next_seq = behind.map_or(end.last.0, |(_, to)| to) + 1;
    if used.is_empty() {
        used.push((head, next_seq));
    }
    let is_mark = tail.is_some_and(|list| {
        list.flushed == list.previous && list.records.iter().all(|r| matches!(r, Record::Cut { .. }))
    });
    Start {
        next_seq,
        last: end.last,
        head,
        head_block,
        segment_blocks,
        used,
        segments: options.segments as usize,
        cut: end.void,
        marked: if is_mark { end.last.0 } else { 0 },
    }
}

fn adopt(journal: &Journal, mut replayed: Replay) -> Vec<RecoveredGroup> {
    let mut out = Vec::new();
    if replayed.unknown.is_some() {
        replayed.groups.entry(DOUBT).or_default();
    }
    for (who, found) in replayed.groups {
        if found.state.dropped {
            continue;
        }
        let mut unknown = replayed.unknown.clone();
        if found.state.doubt {
            unknown.get_or_insert_with(|| "an earlier start found part of the journal unreadable".into());
        }
        let vote_lost = unknown.is_some();
        let (mut group, faulty, gap) = index(journal, found);
        let unknown = gap.or(unknown);
        if unknown.is_some() && !group.state.doubt && !planted("forget-doubt") {
            group.state.doubt = true;
            journal.enqueue_urgent(Record::State(who, group.state.clone()), None);
        }
        let group = Rc::new(RefCell::new(group));
        journal.0.groups.borrow_mut().insert(who, group.clone());
        if who == DOUBT {
            continue;
        }
        let state = match unknown {
            Some(why) => Recovery::Unknown(why),
            None if !faulty.is_empty() => Recovery::Faulty(faulty),
            None => Recovery::Clean,
        };
        let log = GroupLog { journal: journal.clone(), who, group };
        out.push(RecoveredGroup { id: who, log, state, vote_lost });
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
            journal.0.state.borrow_mut().add_live(place.segment, record.payload_bytes);
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
            faulty: !good,
        };
        group.flushed = LogIndex(index);
        group.push(meta);
    }
    (group, faulty, gap)
}
