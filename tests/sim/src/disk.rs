//! A simulated disk: files of pages, of which each has a durable content and the contents written since.
//!
//! A write is seen by reads when it completes. It is durable when it completes (durable writes), or when a flush that
//! began later does. A power cut leaves of every page's unflushed contents, and of what was under way, nothing, the
//! newest, or any mixture of 512-byte sectors, as the seed says; of the names created, renamed and removed since the
//! last sync of the directory it leaves a prefix in their order. Ending the process alone loses nothing: the page
//! cache outlives it, and calls under way are carried out.
//!
//! A medium may rot, fail a call once, and put a block's write elsewhere or nowhere.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};
use tokio::sync::oneshot;

use crate::executor::{Executor, MICROSECOND, MILLISECOND, WORLD};
use crate::hooks::{CrashPoint, Hooks};
use crate::random::Random;
use crate::trace::Trace;

const PAGE: u64 = ALIGNMENT as u64;
const SECTOR: usize = 512;
static ZEROS: [u8; ALIGNMENT] = [0; ALIGNMENT];

/// What a power cut does to what was not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CutMode {
    Discard,
    Keep,
    Tear,
}

/// Content of a page; `None` is zeros.
type Content = Option<Rc<[u8]>>;

struct Version {
    /// When it was written, for flushes; 0 is durable.
    written: u64,
    content: Content,
}

#[derive(Default)]
struct Inode {
    name: String,
    /// Contents of pages, oldest first; only the first may be durable.
    pages: BTreeMap<u64, Vec<Version>>,
    /// Pages with contents that are not durable.
    dirty: BTreeSet<u64>,
    length: u64,
    durable_length: u64,
}

enum Change {
    Write { at: u64, buffer: AlignedBuffer },
    Punch { at: u64, length: u64 },
    Flush { upto: u64 },
}

struct Operation {
    inode: usize,
    change: Change,
    durable: bool,
}

enum NameChange {
    Put(String, usize),
    Remove(String),
}

fn apply_name(names: &mut BTreeMap<String, usize>, change: &NameChange) {
    match change {
        NameChange::Put(name, inode) => {
            names.insert(name.clone(), *inode);
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

#[derive(Default)]
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    unsynced_names: Vec<NameChange>,
    /// Calls under way, by number.
    under_way: BTreeMap<u64, Operation>,
    clock: u64,
}

/// One node's disk. Outlives its boots.
pub(crate) struct Disk {
    node: u64,
    executor: Rc<Executor>,
    trace: Rc<Trace>,
    hooks: Rc<Hooks>,
    random: RefCell<Random>,
    state: RefCell<State>,
    /// Added to every call, in nanoseconds: a slow disk.
    pub(crate) slowness: Cell<u64>,
    /// Nothing completes before this time: a stall.
    pub(crate) stalled_until: Cell<u64>,
    /// The mean of a call's duration, in nanoseconds.
    pub(crate) mean: u64,
    /// The next write or flush fails.
    pub(crate) fail_next: Cell<bool>,
    /// So many of the next reads of blocks at home fail.
    pub(crate) fail_reads: Cell<u64>,
    /// The next write of a block at home goes elsewhere in its file, or nowhere.
    pub(crate) misdirect_next: Cell<bool>,
    /// Added to every call to a file of the journal, in nanoseconds.
    pub(crate) journal_slowness: Cell<u64>,
    /// Reads are answered at once, and leave no trace: the simulation itself looks into the files.
    pub(crate) looked_into: Cell<bool>,
    /// A write or flush fails, or has failed, since the process started: its store stops.
    pub(crate) has_failed: Cell<bool>,
}

/// A medium's error.
fn medium_error() -> io::Error {
    io::Error::from_raw_os_error(5)
}

fn is_home(name: &str) -> bool {
    name.ends_with("home")
}
/// Of a call's description.
fn is_journal(what: &str) -> bool {
    what.contains(" journal/")
}
fn is_table(name: &str) -> bool {
    name.ends_with("table")
}

impl Inode {
    fn visible(&self, page: u64) -> &[u8] {
        let newest = self.pages.get(&page).and_then(|versions| versions.last());
        newest.and_then(|version| version.content.as_deref()).unwrap_or(&ZEROS)
    }

    fn put(&mut self, page: u64, content: Content, written: u64, durable: bool) {
        let versions = self.pages.entry(page).or_default();
        if durable {
            versions.clear();
            self.dirty.remove(&page);
            if content.is_none() {
                self.pages.remove(&page);
                return;
            }
            versions.push(Version { written: 0, content });
        } else {
            versions.push(Version { written, content });
            self.dirty.insert(page);
        }
    }

    /// Everything written up to `upto` is durable.
    fn flush(&mut self, upto: u64) {
        let pages = &mut self.pages;
        self.dirty.retain(|page| {
            let Some(versions) = pages.get_mut(page) else { return false };
            if let Some(last) = versions.iter().rposition(|version| version.written <= upto) {
                versions.drain(..last);
                versions[0].written = 0;
            }
            let still = versions.iter().any(|version| version.written > 0);
            if !still && versions.last().is_some_and(|version| version.content.is_none()) {
                pages.remove(page);
            }
            still
        });
        self.durable_length = self.length;
    }
}

fn pages_of(offset: u64, length: u64) -> std::ops::Range<u64> {
    offset / PAGE..(offset + length).div_ceil(PAGE)
}

fn content_of(page: &[u8]) -> Content {
    (page != ZEROS).then(|| Rc::from(page))
}

impl State {
    fn read(&self, inode: usize, offset: u64, length: usize) -> AlignedBuffer {
        let mut buffer = AlignedBuffer::zeroed(length);
        let file = &self.inodes[inode];
        let range = pages_of(offset, length as u64);
        for (page, _) in file.pages.range(range.clone()) {
            let place = ((page - range.start) * PAGE) as usize;
            buffer.as_mut_slice()[place..place + ALIGNMENT].copy_from_slice(file.visible(*page));
        }
        buffer
    }

    /// Whether something is written where what a rebuild has collected is kept, beside this file.
    fn is_staged_beside(&self, inode: usize) -> bool {
        let name = &self.inodes[inode].name;
        let staging = name.strip_suffix("manifest").map(|prefix| format!("{prefix}staging"));
        let staging = staging.and_then(|staging| self.names.get(&staging));
        staging.is_some_and(|staging| self.inodes[*staging].length > 0)
    }

    fn carry_out(&mut self, operation: &Operation) {
        self.clock += 1;
        let (clock, inode) = (self.clock, &mut self.inodes[operation.inode]);
        match &operation.change {
            Change::Write { at, buffer } => {
                for (page, data) in
                    pages_of(*at, buffer.len() as u64).zip(buffer.as_slice().chunks(ALIGNMENT))
                {
                    if !inode.pages.contains_key(&page) && data == ZEROS {
                        continue; // zeros over zeros
                    }
                    inode.put(page, content_of(data), clock, operation.durable);
                }
                inode.length = inode.length.max(at + buffer.len() as u64);
                if operation.durable {
                    inode.durable_length = inode.durable_length.max(at + buffer.len() as u64);
                }
            }
            Change::Punch { at, length } => {
                for page in pages_of(*at, *length) {
                    if inode.pages.contains_key(&page) {
                        inode.put(page, None, clock, false);
                    }
                }
            }
            Change::Flush { upto } => inode.flush(*upto),
        }
    }

    /// What is left of everything that was not durable.
    fn cut_power(&mut self, mode: CutMode, random: &mut Random) -> usize {
        // What was under way may have reached the medium, or a part of it.
        for (_, operation) in std::mem::take(&mut self.under_way) {
            if matches!(operation.change, Change::Write { .. }) {
                self.carry_out(&Operation { durable: false, ..operation });
            }
        }
        let mut torn = 0;
        for inode in &mut self.inodes {
            for page in std::mem::take(&mut inode.dirty) {
                let Some(versions) = inode.pages.remove(&page) else { continue };
                let (content, was_torn) = settle(&versions, mode, random);
                torn += usize::from(was_torn);
                if content.is_some() {
                    inode.pages.insert(page, vec![Version { written: 0, content }]);
                }
            }
            let kept = mode == CutMode::Keep || (mode == CutMode::Tear && random.percent(50));
            inode.length = if kept { inode.length } else { inode.durable_length };
            inode.durable_length = inode.length;
        }
        let changes = std::mem::take(&mut self.unsynced_names);
        let kept = match mode {
            CutMode::Discard => 0,
            CutMode::Keep => changes.len(),
            CutMode::Tear => random.below(changes.len() as u64 + 1) as usize,
        };
        for change in &changes[..kept] {
            apply_name(&mut self.durable_names, change);
        }
        self.names = self.durable_names.clone();
        torn
    }
}

/// What a page holds after a power cut, and whether that is a mixture.
fn settle(versions: &[Version], mode: CutMode, random: &mut Random) -> (Content, bool) {
    let durable = versions.first().filter(|version| version.written == 0).and_then(|v| v.content.clone());
    let newest = versions.last().and_then(|version| version.content.clone());
    // Even a disk that loses its cache may have written it a moment before.
    let mode =
        if mode == CutMode::Tear { random.pick(&[CutMode::Discard, CutMode::Keep, mode]) } else { mode };
    match mode {
        CutMode::Discard => (durable, false),
        CutMode::Keep => (newest, false),
        CutMode::Tear => {
            let mut page = durable.as_deref().unwrap_or(&ZEROS).to_vec();
            for sector in page.chunks_mut(SECTOR).enumerate() {
                let (n, bytes) = sector;
                let from = random.below(versions.len() as u64 + 1) as usize;
                if let Some(version) = versions.get(from) {
                    let content = version.content.as_deref().unwrap_or(&ZEROS);
                    bytes.copy_from_slice(&content[n * SECTOR..(n + 1) * SECTOR]);
                }
            }
            (content_of(&page), true)
        }
    }
}

impl Disk {
    pub(crate) fn new(
        node: u64,
        executor: Rc<Executor>,
        trace: Rc<Trace>,
        hooks: Rc<Hooks>,
        random: Random,
        mean: u64,
    ) -> Rc<Self> {
        Rc::new(Self {
            node,
            executor,
            trace,
            hooks,
            random: RefCell::new(random),
            state: RefCell::default(),
            slowness: Cell::new(0),
            stalled_until: Cell::new(0),
            mean,
            fail_next: Cell::new(false),
            fail_reads: Cell::new(0),
            misdirect_next: Cell::new(false),
            journal_slowness: Cell::new(0),
            looked_into: Cell::new(false),
            has_failed: Cell::new(false),
        })
    }

    /// No faults are to come any more; what has happened stays.
    pub(crate) fn heal(&self) {
        self.slowness.set(0);
        self.stalled_until.set(0);
        self.fail_next.set(false);
        self.fail_reads.set(0);
        self.misdirect_next.set(false);
        self.journal_slowness.set(0);
    }

    /// A bit of a block at home or of a page of the table flips on the medium; whether there was one.
    pub(crate) fn rot(&self, random: &mut Random) -> bool {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let stored = state.names.iter().filter(|(name, _)| is_home(name) || is_table(name));
        let durable: Vec<(usize, u64)> = stored
            .flat_map(|(_, inode)| {
                let file = &state.inodes[*inode];
                let pages = file.pages.iter().filter(|(page, versions)| {
                    let settled = versions.len() == 1 && !file.dirty.contains(page);
                    settled && versions[0].content.is_some()
                });
                pages.map(|(page, _)| (*inode, *page)).collect::<Vec<_>>()
            })
            .collect();
        if durable.is_empty() {
            return false;
        }
        let (inode, page) = random.pick(&durable);
        let bit = random.below(ALIGNMENT as u64 * 8) as usize;
        let file = &mut state.inodes[inode];
        let Some(version) = file.pages.get_mut(&page).and_then(|versions| versions.first_mut()) else {
            return false;
        };
        let mut bytes = version.content.as_deref().unwrap_or(&ZEROS).to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        version.content = content_of(&bytes);
        self.trace.add(self.node, format_args!("ROT in page {page} of {}", file.name));
        true
    }

    /// Where a write at home really goes, if it is misdirected.
    fn misdirected(&self, inode: usize, change: Change) -> Change {
        let Change::Write { at, buffer } = change else { return change };
        let wrong = is_home(&self.state.borrow().inodes[inode].name) && self.misdirect_next.replace(false);
        if !wrong {
            return Change::Write { at, buffer };
        }
        let nowhere = self.random.borrow_mut().percent(50);
        self.trace.add(
            self.node,
            format_args!("a write at {at} is {}", if nowhere { "LOST" } else { "MISDIRECTED" }),
        );
        self.trace.mark(if nowhere {
            "writes at home that were lost"
        } else {
            "writes at home that went astray"
        });
        // Never into the header at the beginning of the file.
        let length = self.state.borrow().inodes[inode].length / PAGE;
        let first = self.random.borrow_mut().range(1, length.max(2));
        let room = length.saturating_sub(first) * PAGE;
        if nowhere || room < buffer.len() as u64 {
            return Change::Flush { upto: 0 };
        }
        Change::Write { at: first * PAGE, buffer }
    }

    /// Power is cut: see the module's description.
    pub(crate) fn cut_power(&self, mode: CutMode) {
        let torn = self.state.borrow_mut().cut_power(mode, &mut self.random.borrow_mut());
        self.trace.add(self.node, format_args!("disk after the power cut: {mode:?}, {torn} pages torn"));
        if torn > 0 {
            self.trace.mark("power cuts that tore pages");
        }
    }

    /// The process has ended, the machine runs on: calls that were being carried out are, in the order in which they
    /// were made, and those that still stood in line never are.
    pub(crate) fn end_process(&self) {
        let mut state = self.state.borrow_mut();
        let under_way = std::mem::take(&mut state.under_way);
        let carried_out = self.random.borrow_mut().below(under_way.len() as u64 + 1) as usize;
        self.trace.add(
            self.node,
            format_args!("disk after the process: {carried_out} of {} calls", under_way.len()),
        );
        for operation in under_way.into_values().take(carried_out) {
            state.carry_out(&operation);
        }
    }

    fn completes_at(&self, is_flush: bool) -> u64 {
        let mut random = self.random.borrow_mut();
        let mut takes = 20 * MICROSECOND + random.around(self.mean);
        if is_flush {
            takes += random.around(self.mean);
        }
        if random.below(200) == 0 {
            takes += random.around(5 * MILLISECOND);
        }
        let slow = self.slowness.get();
        if slow > 0 {
            takes += random.around(slow);
        }
        self.executor.time() + takes
    }

    /// Where a node may be made to crash once this is done, and the node does not know yet.
    fn point_of(&self, operation: &Operation) -> Option<CrashPoint> {
        let state = self.state.borrow();
        let name = &state.inodes[operation.inode].name;
        let is_flush = matches!(operation.change, Change::Flush { .. });
        match name {
            name if is_flush && is_home(name) => Some(CrashPoint::AfterHomeFlush),
            name if operation.durable
                && name.ends_with("manifest")
                && state.is_staged_beside(operation.inode) =>
            {
                Some(CrashPoint::AfterSwitch)
            }
            _ => None,
        }
    }

    /// Runs `done` when a call would return, whether or not anybody waits for it.
    fn call<T: 'static>(
        self: &Rc<Self>,
        at: u64,
        done: impl FnOnce(&Self) -> Option<io::Result<T>> + 'static,
    ) -> LocalBoxFuture<'static, io::Result<T>> {
        let (sender, receiver) = oneshot::channel();
        let (disk, sleep) = (self.clone(), self.executor.sleep_until_time(at));
        let task = async move {
            sleep.await;
            while disk.executor.time() < disk.stalled_until.get() {
                disk.executor.sleep_for(5 * MILLISECOND).await;
            }
            if let Some(result) = done(&disk) {
                // Nobody waits any more: the work is done all the same.
                let _ = sender.send(result);
            }
        };
        self.executor.spawn_for(WORLD, Box::pin(task));
        async move { receiver.await.unwrap_or_else(|_| Err(io::Error::other("the machine has lost power"))) }
            .boxed_local()
    }

    fn submit(
        self: &Rc<Self>,
        inode: usize,
        change: Change,
        durable: bool,
    ) -> LocalBoxFuture<'static, io::Result<()>> {
        let is_flush = matches!(change, Change::Flush { .. });
        let change = self.misdirected(inode, change);
        let fails = !matches!(change, Change::Punch { .. }) && self.fail_next.replace(false);
        if fails {
            // From here on: who heals the disk while this is under way starts the store again, too.
            self.has_failed.set(true);
        }
        let (number, what) = {
            let mut state = self.state.borrow_mut();
            state.clock += 1;
            let number = state.clock;
            let what = match &change {
                Change::Write { at, buffer } => format!("write {at}+{} durable={durable}", buffer.len()),
                Change::Punch { at, length } => format!("punch {at}+{length}"),
                Change::Flush { .. } => "flush".to_owned(),
            };
            let name = state.inodes[inode].name.clone();
            state.under_way.insert(number, Operation { inode, change, durable });
            (number, format!("{what} {name}"))
        };
        self.trace.add(self.node, format_args!("disk #{number} {what}"));
        let slow = if is_journal(&what) { self.journal_slowness.get() } else { 0 };
        let at = self.completes_at(is_flush || durable) + slow;
        if durable || is_flush {
            self.hooks.reached(self.node, CrashPoint::BeforeFlush);
            if what.ends_with("/manifest") || what.ends_with("/table") {
                self.hooks.reached(self.node, CrashPoint::DuringCheckpoint);
            }
        }
        self.call(at, move |disk| {
            let operation = disk.state.borrow_mut().under_way.remove(&number)?;
            if fails {
                // What it covered may be there or not; a half of it will do for both.
                disk.trace.add(disk.node, format_args!("disk #{number} FAILS"));
                disk.trace.mark(if is_flush { "flushes that failed" } else { "writes that failed" });
                if disk.random.borrow_mut().percent(50) {
                    disk.state.borrow_mut().carry_out(&Operation { durable: false, ..operation });
                }
                return Some(Err(medium_error()));
            }
            disk.trace.add(disk.node, format_args!("disk #{number} done"));
            disk.state.borrow_mut().carry_out(&operation);
            let reached = disk.point_of(&operation);
            if reached.is_some_and(|point| disk.hooks.reached(disk.node, point)) {
                return None;
            }
            if (operation.durable || is_flush) && disk.hooks.reached(disk.node, CrashPoint::AfterFlush) {
                return None;
            }
            Some(Ok(()))
        })
    }

    /// The directory as one boot sees it.
    pub(crate) fn directory(self: &Rc<Self>) -> Rc<dyn Directory> {
        Rc::new(SimDirectory(self.clone()))
    }

    fn rename_now(&self, changes: Vec<NameChange>) {
        let mut state = self.state.borrow_mut();
        for change in changes {
            apply_name(&mut state.names, &change);
            state.unsynced_names.push(change);
        }
    }

    /// A call about names, which takes a moment.
    fn metadata<T: 'static>(
        self: &Rc<Self>,
        done: impl FnOnce(&Self) -> io::Result<T> + 'static,
    ) -> LocalBoxFuture<'static, io::Result<T>> {
        let at = self.completes_at(false);
        self.call(at, |disk| Some(done(disk)))
    }
}

struct SimDirectory(Rc<Disk>);

impl Directory for SimDirectory {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (disk, name) = (self.0.clone(), name.to_owned());
        let opened = self.0.metadata(move |disk| {
            let found = disk.state.borrow().names.get(&name).copied();
            match (found, mode) {
                (Some(inode), OpenMode::Existing) => Ok(inode),
                (None, OpenMode::CreateNew) => {
                    let inode = {
                        let mut state = disk.state.borrow_mut();
                        state.inodes.push(Inode { name: name.clone(), ..Inode::default() });
                        state.inodes.len() - 1
                    };
                    disk.rename_now(vec![NameChange::Put(name, inode)]);
                    Ok(inode)
                }
                (None, OpenMode::Existing) => Err(io::ErrorKind::NotFound.into()),
                (Some(_), OpenMode::CreateNew) => Err(io::ErrorKind::AlreadyExists.into()),
            }
        });
        async move {
            let inode = opened.await?;
            let file: Rc<dyn File> = Rc::new(SimFile { disk, inode });
            Ok(file)
        }
        .boxed_local()
    }

    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>> {
        let prefix = prefix.to_owned();
        self.0.metadata(move |disk| {
            let state = disk.state.borrow();
            Ok(state.names.keys().filter(|name| name.starts_with(&prefix)).cloned().collect())
        })
    }

    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>> {
        let prefix = prefix.to_owned();
        self.0.metadata(move |disk| {
            let state = disk.state.borrow();
            let named = state.names.iter().filter(|(name, _)| name.starts_with(&prefix));
            let size = |inode: &usize| {
                let file = &state.inodes[*inode];
                FileSize { length: file.length, allocated: file.pages.len() as u64 * PAGE }
            };
            Ok(named.map(|(name, inode)| (name.clone(), size(inode))).collect())
        })
    }

    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let name = name.to_owned();
        self.0.metadata(move |disk| {
            let known = disk.state.borrow().names.contains_key(&name);
            if known {
                disk.rename_now(vec![NameChange::Remove(name)]);
            }
            Ok(())
        })
    }

    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let (from, to) = (from.to_owned(), to.to_owned());
        self.0.metadata(move |disk| {
            let inode = disk.state.borrow().names.get(&from).copied();
            let inode = inode.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            // One change, so that a power cut leaves the old name or the new one.
            let mut state = disk.state.borrow_mut();
            state.names.remove(&from);
            state.names.insert(to.clone(), inode);
            state.unsynced_names.push(NameChange::Put(to, inode));
            state.unsynced_names.push(NameChange::Remove(from));
            Ok(())
        })
    }

    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let upto = self.0.state.borrow().unsynced_names.len();
        self.0.metadata(move |disk| {
            let mut state = disk.state.borrow_mut();
            let upto = upto.min(state.unsynced_names.len());
            let changes: Vec<NameChange> = state.unsynced_names.drain(..upto).collect();
            for change in &changes {
                apply_name(&mut state.durable_names, change);
            }
            Ok(())
        })
    }

    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        self.0.metadata(|_| Ok(Space { total: 1 << 40, available: 1 << 39 }))
    }
}

struct SimFile {
    disk: Rc<Disk>,
    inode: usize,
}

impl File for SimFile {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        assert!(offset.is_multiple_of(PAGE), "direct I/O is aligned");
        let change = Change::Write { at: offset, buffer };
        let written = self.disk.submit(self.inode, change, durability == Durability::Durable);
        // Nobody of the callers uses the buffer again.
        async move { written.await.map(|()| AlignedBuffer::default()) }.boxed_local()
    }

    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        assert!(offset.is_multiple_of(PAGE) && length.is_multiple_of(ALIGNMENT), "direct I/O is aligned");
        let inode = self.inode;
        if self.disk.looked_into.get() {
            let read = self.disk.state.borrow().read(inode, offset, length);
            return futures_util::future::ready(Ok(read)).boxed_local();
        }
        let at = self.disk.completes_at(false);
        let left = self.disk.fail_reads.get();
        let fails = left > 0 && is_home(&self.disk.state.borrow().inodes[inode].name);
        if fails {
            self.disk.fail_reads.set(left - 1);
        }
        self.disk.call(at, move |disk| {
            if fails {
                disk.trace.mark("reads of the medium that failed");
                return Some(Err(medium_error()));
            }
            Some(Ok(disk.state.borrow().read(inode, offset, length)))
        })
    }

    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let upto = self.disk.state.borrow().clock;
        self.disk.submit(self.inode, Change::Flush { upto }, false)
    }

    fn allocate(&self, _offset: u64, _length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.disk.metadata(|_| Ok(()))
    }

    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.disk.submit(self.inode, Change::Punch { at: offset, length }, false)
    }

    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let inode = self.inode;
        self.disk.metadata(move |disk| {
            let mut state = disk.state.borrow_mut();
            let file = &mut state.inodes[inode];
            assert!(length >= file.length, "nothing shortens a file");
            file.length = length;
            Ok(())
        })
    }

    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        let inode = self.inode;
        self.disk.metadata(move |disk| {
            let state = disk.state.borrow();
            let file = &state.inodes[inode];
            Ok(FileSize { length: file.length, allocated: file.pages.len() as u64 * PAGE })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::SECOND;
    use crate::random::Purpose;

    fn run(mode: CutMode) -> (u8, u8, bool) {
        let executor = Executor::new(3, false);
        let trace = Trace::new(executor.clone(), None);
        let hooks = Hooks::new(executor.clone(), trace.clone());
        let random = Random::new(3, Purpose::Disk, 1);
        let disk = Disk::new(1, executor.clone(), trace, hooks, random, MILLISECOND);
        let directory = disk.directory();
        let before = holdfast_env::install(Some(executor.clone()));
        executor.spawn_for(
            WORLD,
            Box::pin(async move {
                let file = directory.open("f", OpenMode::CreateNew).await.expect("creates");
                directory.sync().await.expect("syncs");
                directory.open("g", OpenMode::CreateNew).await.expect("creates");
                let page = |value| AlignedBuffer::copy_of(&[value; ALIGNMENT]);
                file.write_at(0, page(1), Durability::Durable).await.expect("writes");
                file.write_at(PAGE, page(1), Durability::Volatile).await.expect("writes");
                file.flush().await.expect("flushes");
                file.write_at(0, page(2), Durability::Volatile).await.expect("writes");
                file.write_at(PAGE, page(3), Durability::Volatile).await.expect("writes");
                let read = file.read_at(0, ALIGNMENT).await.expect("reads");
                assert_eq!(read.as_slice()[0], 2);
            }),
        );
        executor.run_until(SECOND, || false);
        disk.cut_power(mode);
        holdfast_env::install(before);
        assert!(executor.take_panics().is_empty());
        let state = disk.state.borrow();
        let file = &state.inodes[state.names["f"]];
        (file.visible(0)[0], file.visible(1)[0], state.names.contains_key("g"))
    }

    #[test]
    fn a_power_cut_leaves_what_was_flushed() {
        assert_eq!(run(CutMode::Discard), (1, 1, false));
        assert_eq!(run(CutMode::Keep), (2, 3, true));
        let (first, second, _) = run(CutMode::Tear);
        assert!([1, 2].contains(&first) && [1, 3].contains(&second));
    }
}
