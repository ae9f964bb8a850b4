//! The disk in memory.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};
use tokio::sync::Notify;

use super::driver::Random;

const BLOCK: u64 = ALIGNMENT as u64;
const SECTOR: usize = 512;
const SECTORS: usize = ALIGNMENT / SECTOR;

/// What happens at an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It and all later ones never end: the moment of a kill or a power cut.
    Freeze,
    /// It fails, and changes nothing.
    Fail(io::ErrorKind),
    /// A write goes to this offset of its file and is reported as done.
    Misdirect(u64),
    /// A write is reported as durable and never reaches the medium.
    Lose,
    /// A write ends only after so long.
    Hang(Duration),
}

/// What a power cut leaves of a block's write that was not flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tear {
    /// Nothing of any.
    Nothing,
    /// All of every one.
    Everything,
    /// Of every block the sectors whose bits are set.
    Sectors(u8),
    /// Anything, by these numbers; with chance one in two a block is whole or lost.
    Random(u64),
}

/// What a power cut leaves of one write that was not flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// All of it.
    Everything,
    /// The first half of its sectors.
    Front,
    /// The second half.
    Back,
    /// All but the middle half.
    Ends,
}

impl Left {
    /// The sectors that are left of block `number` of `count`.
    fn sectors(self, number: u64, count: u64) -> u8 {
        let all = count * SECTORS as u64;
        let is_left = |sector: u64| match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::Front => sector < all / 2,
            Self::Back => sector >= all / 2,
            Self::Ends => sector < all / 4 || sector >= all - all / 4,
        };
        let sectors = (0..SECTORS).filter(|n| is_left(number * SECTORS as u64 + *n as u64));
        sectors.fold(0, |mask, n| mask | 1 << n)
    }
}

type Block = Rc<[u8; ALIGNMENT]>;

#[derive(Clone)]
enum Change {
    Write { block: u64, data: Block, ticket: u64 },
    Punch { block: u64, ticket: u64 },
}

impl Change {
    fn block(&self) -> u64 {
        match self {
            Self::Write { block, .. } | Self::Punch { block, .. } => *block,
        }
    }
    fn ticket(&self) -> u64 {
        match self {
            Self::Write { ticket, .. } | Self::Punch { ticket, .. } => *ticket,
        }
    }
}

#[derive(Clone, Default)]
struct Content {
    /// What is on the medium.
    durable: BTreeMap<u64, Block>,
    /// What is in the cache, in order.
    cached: Vec<Change>,
    /// Blocks that take space.
    allocated: BTreeSet<u64>,
    length: u64,
    unreadable: BTreeSet<u64>,
    /// Blocks that cannot be read whatever is written to them.
    dead: BTreeSet<u64>,
    /// Blocks of which the next read fails.
    hiccups: BTreeSet<u64>,
    /// Blocks of which the next read takes so long.
    slow: BTreeMap<u64, Duration>,
    /// The operation that last wrote a block.
    written_at: BTreeMap<u64, u64>,
}

impl Content {
    fn apply(&mut self, change: &Change, sectors: u8) {
        match change {
            // Zeros need no memory.
            Change::Write { block, data, .. } if sectors == u8::MAX && data.iter().all(|byte| *byte == 0) => {
                self.durable.remove(block);
            }
            Change::Write { block, data, .. } if sectors == u8::MAX => {
                self.durable.insert(*block, data.clone());
            }
            Change::Write { block, data, .. } => {
                let mut now = self.durable.get(block).map_or([0; ALIGNMENT], |data| **data);
                for sector in (0..SECTORS).filter(|n| sectors & (1 << n) != 0) {
                    let at = sector * SECTOR..(sector + 1) * SECTOR;
                    now[at.clone()].copy_from_slice(&data[at]);
                }
                self.durable.insert(*block, Rc::new(now));
            }
            Change::Punch { block, .. } if sectors != 0 => {
                self.durable.remove(block);
            }
            Change::Punch { .. } => {}
        }
    }

    fn settle(&mut self, which: impl Fn(&Change) -> bool) {
        let cached = std::mem::take(&mut self.cached);
        for change in cached {
            if which(&change) {
                // What was to go to the same block before is superseded.
                self.cached.retain(|other| other.block() != change.block());
                self.apply(&change, u8::MAX);
            } else {
                self.cached.push(change);
            }
        }
    }

    fn power_cut(&mut self, sectors_of: &dyn Fn() -> u8) {
        for change in std::mem::take(&mut self.cached) {
            self.apply(&change, sectors_of());
        }
    }

    fn power_cut_leaving(&mut self, left: &dyn Fn(u64) -> Left) {
        let cached = std::mem::take(&mut self.cached);
        // The first block of each write, and how many there are.
        let mut extents: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        for change in &cached {
            let (first, end) = extents.entry(change.ticket()).or_insert((change.block(), change.block()));
            (*first, *end) = ((*first).min(change.block()), (*end).max(change.block() + 1));
        }
        for change in cached {
            let (first, end) = extents[&change.ticket()];
            let sectors = left(change.ticket()).sectors(change.block() - first, end - first);
            self.apply(&change, sectors);
        }
    }

    fn size(&self) -> FileSize {
        FileSize { length: self.length, allocated: self.allocated.len() as u64 * BLOCK }
    }

    fn read_block(&self, block: u64) -> [u8; ALIGNMENT] {
        for change in self.cached.iter().rev() {
            match change {
                Change::Write { block: at, data, .. } if *at == block => return **data,
                Change::Punch { block: at, .. } if *at == block => return [0; ALIGNMENT],
                _ => {}
            }
        }
        self.durable.get(&block).map_or([0; ALIGNMENT], |data| **data)
    }
}

/// Names, and which of their changes are not durable yet.
#[derive(Clone, Default)]
struct State {
    files: BTreeMap<u64, Content>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    next_file: u64,
}

impl State {
    /// After a power cut: the names are as they are, or as they were when they were last synced.
    fn settle_names(&mut self, keep: bool) {
        if !keep {
            self.names = self.durable_names.clone();
        }
        self.durable_names = self.names.clone();
        let known: BTreeSet<u64> = self.names.values().copied().collect();
        self.files.retain(|id, _| known.contains(id));
    }

    /// Blocks of the files that have a name.
    fn used_blocks(&self) -> u64 {
        let named = self.names.values().filter_map(|id| self.files.get(id));
        named.map(|file| file.allocated.len() as u64).sum()
    }
}

/// The content of a disk at a moment.
#[derive(Clone)]
pub struct Image(State);

struct Disk {
    state: State,
    operations: u64,
    faults: BTreeMap<u64, Fault>,
    frozen: bool,
    space: Option<u64>,
    /// So many more times somebody finds room.
    grants: Option<u64>,
    flushes: u64,
    random: Random,
    /// The file that a write was for.
    targets: BTreeMap<u64, u64>,
}

/// A disk in memory. Cheap to clone; every clone is the same disk.
#[derive(Clone)]
pub struct MemoryDisk {
    disk: Rc<RefCell<Disk>>,
    stopped: Rc<Notify>,
}

impl MemoryDisk {
    /// An empty disk; the seed says how long operations take.
    pub fn new(seed: u64) -> Self {
        Self::from_image(&Image(State::default()), seed)
    }

    /// A disk that begins as `image`.
    pub fn from_image(image: &Image, seed: u64) -> Self {
        let disk = Disk {
            state: image.0.clone(),
            operations: 0,
            faults: BTreeMap::new(),
            frozen: false,
            space: None,
            grants: None,
            flushes: 0,
            random: Random::new(seed ^ 0xd15c),
            targets: BTreeMap::new(),
        };
        Self { disk: Rc::new(RefCell::new(disk)), stopped: Rc::default() }
    }

    /// The content now. Nothing is in the cache.
    pub fn image(&self) -> Image {
        Image(self.disk.borrow().state.clone())
    }

    /// Another disk that is as this one now, with what is in the cache; operations are counted on.
    pub fn copy(&self) -> Self {
        let copy = Self::from_image(&self.image(), 7);
        copy.disk.borrow_mut().operations = self.operations();
        copy
    }

    /// As a directory.
    pub fn directory(&self) -> Rc<dyn Directory> {
        Rc::new(self.clone())
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.disk.borrow().operations
    }

    /// Flushes and durable writes so far.
    pub fn flushes(&self) -> u64 {
        self.disk.borrow().flushes
    }

    /// Numbers of the writes to files whose names end so, from operation `from` on.
    pub fn writes_to(&self, end: &str, from: u64) -> Vec<u64> {
        let disk = self.disk.borrow();
        let named: BTreeSet<u64> =
            disk.state.names.iter().filter(|(name, _)| name.ends_with(end)).map(|(_, id)| *id).collect();
        disk.targets.range(from..).filter(|(_, id)| named.contains(id)).map(|(number, _)| *number).collect()
    }

    /// Something happens at an operation of this number (the first is 0).
    pub fn at(&self, operation: u64, fault: Fault) {
        self.disk.borrow_mut().faults.insert(operation, fault);
    }

    /// From now on at most so many bytes can be allocated.
    pub fn limit_space(&self, bytes: Option<u64>) {
        self.disk.borrow_mut().space = bytes;
    }

    /// From now on room is found so many times: for blocks, or for a new file; then no more.
    pub fn limit_allocations(&self, grants: Option<u64>) {
        self.disk.borrow_mut().grants = grants;
    }

    /// Bytes that all files take.
    pub fn used(&self) -> u64 {
        self.disk.borrow().state.used_blocks() * BLOCK
    }

    /// Ends when an operation was reached at which the world stops.
    pub async fn frozen(&self) {
        loop {
            let stopped = self.stopped.notified();
            if self.disk.borrow().frozen {
                return;
            }
            stopped.await;
        }
    }

    /// The process ends; caches live on. Also thaws.
    pub fn kill(&self) {
        let mut disk = self.disk.borrow_mut();
        disk.frozen = false;
        disk.faults.clear();
    }

    /// The power goes: what was not flushed is lost, in part or whole. Also thaws.
    pub fn power_cut(&self, tear: Tear) {
        self.kill();
        let mut disk = self.disk.borrow_mut();
        let random = Random::new(if let Tear::Random(seed) = tear { seed } else { 0 });
        let sectors_of = || match tear {
            Tear::Nothing => 0,
            Tear::Everything => u8::MAX,
            Tear::Sectors(mask) => mask,
            Tear::Random(_) => match random.below(4) {
                0 => 0,
                1 => u8::MAX,
                _ => random.next() as u8,
            },
        };
        let keep_names = sectors_of() & 1 == 1;
        disk.state.files.values_mut().for_each(|file| file.power_cut(&sectors_of));
        disk.state.settle_names(keep_names);
    }

    /// Numbers of the operations of which something is in the cache.
    pub fn unflushed(&self) -> Vec<u64> {
        let disk = self.disk.borrow();
        let changes = disk.state.files.values().flat_map(|file| &file.cached);
        changes.map(Change::ticket).collect::<BTreeSet<u64>>().into_iter().collect()
    }

    /// Whether names were made or removed and no directory was synced since.
    pub fn has_unsynced_names(&self) -> bool {
        let disk = self.disk.borrow();
        disk.state.names != disk.state.durable_names
    }

    /// The power goes, and `left` says what is left of each operation's write. Also thaws.
    pub fn power_cut_leaving(&self, left: impl Fn(u64) -> Left, keep_names: bool) {
        self.kill();
        let mut disk = self.disk.borrow_mut();
        disk.state.files.values_mut().for_each(|file| file.power_cut_leaving(&left));
        disk.state.settle_names(keep_names);
    }

    /// A number that is equal for equal content of the medium, and hardly for others.
    pub fn fingerprint(&self) -> u32 {
        let disk = self.disk.borrow();
        let mut hasher = crc32fast::Hasher::new();
        for (name, id) in &disk.state.names {
            let content = &disk.state.files[id];
            hasher.update(name.as_bytes());
            hasher.update(&content.length.to_le_bytes());
            for (block, data) in &content.durable {
                hasher.update(&block.to_le_bytes());
                hasher.update(&data[..]);
            }
        }
        hasher.finalize()
    }

    /// Names of the files.
    pub fn names(&self) -> Vec<String> {
        self.disk.borrow().state.names.keys().cloned().collect()
    }

    fn with_file<T>(&self, name: &str, change: impl FnOnce(&mut Content) -> T) -> T {
        let mut disk = self.disk.borrow_mut();
        let id = *disk.state.names.get(name).unwrap_or_else(|| panic!("there is no file {name}"));
        change(disk.state.files.get_mut(&id).expect("a name has a file"))
    }

    /// Flips bits of a byte on the medium.
    pub fn rot(&self, name: &str, offset: u64, bits: u8) {
        self.with_file(name, |file| {
            let (block, within) = (offset / BLOCK, (offset % BLOCK) as usize);
            let mut data = file.read_block(block);
            data[within] ^= bits;
            file.durable.insert(block, Rc::new(data));
        });
    }

    /// Puts other bytes, 4096 of them, in the place of a block on the medium.
    pub fn replace(&self, name: &str, block: u64, bytes: &[u8]) {
        self.with_file(name, |file| {
            let mut data = [0; ALIGNMENT];
            data.copy_from_slice(bytes);
            file.durable.insert(block, Rc::new(data));
        });
    }

    /// Makes a block unreadable.
    pub fn make_unreadable(&self, name: &str, block: u64) {
        self.with_file(name, |file| file.unreadable.insert(block));
    }

    /// Makes a block unreadable for good: writing it anew does not help.
    pub fn make_dead(&self, name: &str, block: u64) {
        self.with_file(name, |file| file.dead.insert(block));
    }

    /// Makes the next read of a block fail, and no other.
    pub fn hiccup(&self, name: &str, block: u64) {
        self.with_file(name, |file| file.hiccups.insert(block));
    }

    /// Makes the next read of a block take so long, and no other.
    pub fn slow_read(&self, name: &str, block: u64, time: Duration) {
        self.with_file(name, |file| file.slow.insert(block, time));
    }

    /// Puts other bytes in the place of a block.
    pub fn put_block(&self, name: &str, block: u64, bytes: &[u8]) {
        let mut data = [0; ALIGNMENT];
        data.copy_from_slice(bytes);
        self.with_file(name, |file| {
            file.cached.retain(|change| change.block() != block);
            file.durable.insert(block, Rc::new(data));
        });
    }

    /// Blocks of a file that were written, with the number of the operation that last wrote each.
    pub fn written(&self, name: &str) -> Vec<(u64, u64)> {
        self.with_file(name, |file| file.written_at.iter().map(|(block, at)| (*block, *at)).collect())
    }

    /// A block as it reads.
    pub fn block(&self, name: &str, block: u64) -> Vec<u8> {
        self.with_file(name, |file| file.read_block(block).to_vec())
    }

    /// Bytes that a file takes.
    pub fn allocated(&self, name: &str) -> u64 {
        self.with_file(name, |file| file.allocated.len() as u64 * BLOCK)
    }

    /// Takes a number for an operation and what happens at it.
    fn begin(&self) -> (u64, Option<Fault>) {
        let mut disk = self.disk.borrow_mut();
        let number = disk.operations;
        disk.operations += 1;
        let fault = disk.faults.get(&number).copied();
        if fault == Some(Fault::Freeze) {
            disk.frozen = true;
            self.stopped.notify_waiters();
        }
        (number, fault)
    }

    /// Takes some turns, then ends; never, if the world has stopped.
    async fn turn(&self) {
        let turns = self.disk.borrow().random.below(4);
        for _ in 0..=turns {
            holdfast_env::yield_now().await;
        }
        if self.disk.borrow().frozen {
            std::future::pending::<()>().await;
        }
    }

    fn has_space(&self, more_blocks: u64) -> bool {
        let mut disk = self.disk.borrow_mut();
        let used = disk.state.used_blocks();
        let granted = disk.grants != Some(0);
        disk.grants = disk.grants.map(|grants| grants.saturating_sub(1));
        granted && disk.space.is_none_or(|space| (used + more_blocks) * BLOCK <= space)
    }
}

fn full() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, "no space left on the disk in memory")
}

struct Handle {
    disk: MemoryDisk,
    id: u64,
}

impl Handle {
    fn with<T>(&self, change: impl FnOnce(&mut Content) -> T) -> T {
        let mut disk = self.disk.disk.borrow_mut();
        // A file that was removed lives on for who holds it open.
        change(disk.state.files.entry(self.id).or_default())
    }

    fn allocate_blocks(&self, first: u64, end: u64) -> io::Result<()> {
        let missing = self.with(|file| (first..end).filter(|block| !file.allocated.contains(block)).count());
        if missing > 0 && !self.disk.has_space(missing as u64) {
            return Err(full());
        }
        self.with(|file| {
            file.allocated.extend(first..end);
            file.length = file.length.max(end * BLOCK);
        });
        Ok(())
    }

    fn start_write(&self, number: u64, fault: Option<Fault>, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = if let Some(Fault::Misdirect(elsewhere)) = fault { elsewhere } else { offset };
        match fault {
            Some(Fault::Fail(kind)) => return Err(kind.into()),
            Some(Fault::Lose) => return Ok(()),
            _ => {}
        }
        let first = offset / BLOCK;
        self.allocate_blocks(first, first + (bytes.len() / ALIGNMENT) as u64)?;
        self.with(|file| {
            for (block, data) in (first..).zip(bytes.chunks_exact(ALIGNMENT)) {
                let mut copy = [0; ALIGNMENT];
                copy.copy_from_slice(data);
                file.unreadable.remove(&block);
                file.written_at.insert(block, number);
                file.cached.push(Change::Write { block, data: Rc::new(copy), ticket: number });
            }
        });
        Ok(())
    }
}

impl File for Handle {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        assert!(offset.is_multiple_of(BLOCK), "writes are aligned");
        let (number, fault) = self.disk.begin();
        self.disk.disk.borrow_mut().targets.insert(number, self.id);
        let started = self.start_write(number, fault, offset, buffer.as_slice());
        let this = Self { disk: self.disk.clone(), id: self.id };
        async move {
            this.disk.turn().await;
            if let Some(Fault::Hang(long)) = fault {
                holdfast_env::sleep(long).await;
            }
            started?;
            if durability == Durability::Durable {
                this.disk.disk.borrow_mut().flushes += 1;
                this.with(|file| {
                    file.settle(|change| matches!(change, Change::Write { ticket, .. } if *ticket == number))
                });
            }
            Ok(buffer)
        }
        .boxed_local()
    }

    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let this = Self { disk: self.disk.clone(), id: self.id };
        async move {
            this.disk.turn().await;
            let first = offset / BLOCK;
            let slow = this.with(|file| {
                let block =
                    file.slow.range(first..first + length as u64 / BLOCK).next().map(|(block, _)| *block);
                block.and_then(|block| file.slow.remove(&block))
            });
            if let Some(time) = slow {
                holdfast_env::sleep(time).await;
            }
            let mut buffer = AlignedBuffer::zeroed(length);
            let lost = this.with(|file| {
                let cached: BTreeSet<u64> = file.cached.iter().map(Change::block).collect();
                let blocks = first..first + buffer.len() as u64 / BLOCK;
                for (block, data) in file.durable.range(blocks.clone()) {
                    let at = ((block - first) * BLOCK) as usize;
                    buffer.as_mut_slice()[at..at + ALIGNMENT].copy_from_slice(&data[..]);
                }
                for block in cached.range(blocks.clone()) {
                    let at = ((block - first) * BLOCK) as usize;
                    buffer.as_mut_slice()[at..at + ALIGNMENT].copy_from_slice(&file.read_block(*block));
                }
                let hiccup = file.hiccups.range(blocks.clone()).next().copied();
                hiccup.iter().for_each(|block| _ = file.hiccups.remove(block));
                let mut lost = file.unreadable.range(blocks.clone()).chain(file.dead.range(blocks));
                hiccup.is_some() || lost.next().is_some()
            });
            if lost { Err(io::Error::other("a block cannot be read")) } else { Ok(buffer) }
        }
        .boxed_local()
    }

    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let (number, fault) = self.disk.begin();
        let this = Self { disk: self.disk.clone(), id: self.id };
        async move {
            this.disk.turn().await;
            if let Some(Fault::Fail(kind)) = fault {
                return Err(kind.into());
            }
            this.disk.disk.borrow_mut().flushes += 1;
            if fault != Some(Fault::Lose) {
                let covered = |change: &Change| match change {
                    Change::Write { ticket, .. } => *ticket < number,
                    Change::Punch { .. } => true,
                };
                this.with(|file| file.settle(covered));
            }
            Ok(())
        }
        .boxed_local()
    }

    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let (_, fault) = self.disk.begin();
        let done = match fault {
            Some(Fault::Fail(kind)) => Err(kind.into()),
            _ => self.allocate_blocks(offset / BLOCK, (offset + length).div_ceil(BLOCK)),
        };
        let disk = self.disk.clone();
        async move { disk.turn().await }.map(|()| done).boxed_local()
    }

    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let (ticket, fault) = self.disk.begin();
        let blocks = offset.div_ceil(BLOCK)..(offset + length) / BLOCK;
        if !matches!(fault, Some(Fault::Fail(_))) {
            self.with(|file| {
                for block in blocks {
                    file.allocated.remove(&block);
                    file.cached.push(Change::Punch { block, ticket });
                }
            });
        }
        let disk = self.disk.clone();
        async move {
            disk.turn().await;
            if let Some(Fault::Fail(kind)) = fault { Err(kind.into()) } else { Ok(()) }
        }
        .boxed_local()
    }

    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let (ticket, fault) = self.disk.begin();
        if let Some(Fault::Fail(kind)) = fault {
            return async move { Err(kind.into()) }.boxed_local();
        }
        self.with(|file| {
            let end = length.div_ceil(BLOCK);
            let beyond: Vec<u64> = file.allocated.range(end..).copied().collect();
            for block in beyond {
                file.allocated.remove(&block);
                file.cached.push(Change::Punch { block, ticket });
            }
            file.length = length;
        });
        let disk = self.disk.clone();
        async move {
            disk.turn().await;
            Ok(())
        }
        .boxed_local()
    }

    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        std::future::ready(Ok(self.with(|file| file.size()))).boxed_local()
    }
}

impl Directory for MemoryDisk {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let created = (mode == OpenMode::CreateNew).then(|| self.begin());
        let (this, name) = (self.clone(), name.to_owned());
        async move {
            this.turn().await;
            if let Some((_, Some(Fault::Fail(kind)))) = created {
                return Err(kind.into());
            }
            if mode == OpenMode::CreateNew && !this.has_space(0) {
                return Err(full());
            }
            let id = {
                let mut disk = this.disk.borrow_mut();
                let state = &mut disk.state;
                match (state.names.get(&name).copied(), mode) {
                    (Some(id), OpenMode::Existing) => id,
                    (None, OpenMode::Existing) => return Err(io::ErrorKind::NotFound.into()),
                    (Some(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
                    (None, OpenMode::CreateNew) => {
                        let id = state.next_file;
                        state.next_file += 1;
                        state.names.insert(name, id);
                        state.files.insert(id, Content::default());
                        id
                    }
                }
            };
            let file: Rc<dyn File> = Rc::new(Handle { disk: this, id });
            Ok(file)
        }
        .boxed_local()
    }

    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>> {
        let names = self.names().into_iter().filter(|name| name.starts_with(prefix)).collect();
        async move { Ok(names) }.boxed_local()
    }

    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>> {
        let (this, prefix) = (self.clone(), prefix.to_owned());
        async move {
            this.turn().await;
            let State { names, files, .. } = &this.disk.borrow().state;
            let named = names.iter().filter(|(name, _)| name.starts_with(&prefix));
            Ok(named.map(|(name, id)| (name.clone(), files[id].size())).collect())
        }
        .boxed_local()
    }

    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let (_, fault) = self.begin();
        let (this, name) = (self.clone(), name.to_owned());
        async move {
            this.turn().await;
            if let Some(Fault::Fail(kind)) = fault {
                return Err(kind.into());
            }
            this.disk.borrow_mut().state.names.remove(&name);
            Ok(())
        }
        .boxed_local()
    }

    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let (_, fault) = self.begin();
        let (this, from, to) = (self.clone(), from.to_owned(), to.to_owned());
        async move {
            this.turn().await;
            if let Some(Fault::Fail(kind)) = fault {
                return Err(kind.into());
            }
            let mut disk = this.disk.borrow_mut();
            let id = disk.state.names.remove(&from).ok_or(io::ErrorKind::NotFound)?;
            disk.state.names.insert(to, id);
            Ok(())
        }
        .boxed_local()
    }

    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let (_, fault) = self.begin();
        let this = self.clone();
        async move {
            this.turn().await;
            if let Some(Fault::Fail(kind)) = fault {
                return Err(kind.into());
            }
            let mut disk = this.disk.borrow_mut();
            disk.state.durable_names = disk.state.names.clone();
            Ok(())
        }
        .boxed_local()
    }

    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        let disk = self.disk.borrow();
        let used = disk.state.used_blocks() * BLOCK;
        let total = disk.space.unwrap_or(1 << 40);
        async move { Ok(Space { total, available: total.saturating_sub(used) }) }.boxed_local()
    }
}
