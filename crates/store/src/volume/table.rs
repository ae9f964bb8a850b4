//! The chunk table of a layer: per chunk which blocks are data, zero or absent, their checksums, and its last change. Pages of
//! 4 KiB, each with two copies, loaded when first touched.
//!
//! Between checkpoints both copies of a page are equal, so that either may rot. A checkpoint writes one copy of each
//! changed page, flushes, is written to the manifest, which lists the pages, and only then writes the other copies. A
//! crash before the manifest leaves at least the copies of the checkpoint before; a crash after it leaves the list,
//! and [`Table::settle`] makes the copies equal again.
//!
//! Invariant: what memory shows of a page is never older than what was last written of it. A page that is being
//! written stays in memory until the write has ended, and what was read from disk meanwhile is read again: an older
//! page that came back would be changed and written over the newer one, whose blocks then read as zeros.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use holdfast_env::disk::{AlignedBuffer, Durability, File};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, CHUNK_BLOCKS, ChunkIndex, DecodeError, GroupId, LogIndex, Reader, ReplicaId,
    Writer,
};

use super::layers::LayerId;
use super::owners::Owners;
use crate::journal::planted;
use crate::{ReplicaIdentity, StoreError};

const MAGIC: u64 = 0x6873_6166_7462_3031;
/// Version 1 was never released; it did not name the layer.
const VERSION: u16 = 2;
/// Chunks of a page.
pub(super) const PAGE_CHUNKS: u64 = 14;
const HEADER_BYTES: usize = 64;
/// Where a page's checksum stands.
#[cfg(any(test, feature = "testing"))]
const CRC_AT: usize = 58;
/// Clean pages kept in memory: 16 MiB a replica.
const PAGES_MAX: usize = 4096;
/// Of each layer, if there are many.
const PAGES_MIN: usize = 16;

/// How a block is, by the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockSum {
    /// Nothing here: zeros, no space.
    Absent,
    /// Zeros.
    Zero,
    /// Data with this checksum.
    Data(u32),
}

/// One chunk's line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    data: u64,
    zero: u64,
    sums: [u32; CHUNK_BLOCKS as usize],
    pub(super) incarnation: u64,
    pub(super) last_index: LogIndex,
}

impl Default for Chunk {
    fn default() -> Self {
        Self {
            data: 0,
            zero: 0,
            sums: [0; CHUNK_BLOCKS as usize],
            incarnation: 0,
            last_index: LogIndex::ZERO,
        }
    }
}

impl Chunk {
    pub(super) fn get(&self, within: usize) -> BlockSum {
        let bit = 1 << within;
        match (self.data & bit != 0, self.zero & bit != 0) {
            (true, _) => BlockSum::Data(self.sums[within]),
            (false, true) => BlockSum::Zero,
            (false, false) => BlockSum::Absent,
        }
    }
    pub(super) fn set(&mut self, within: usize, sum: BlockSum) {
        let bit = 1 << within;
        self.data &= !bit;
        self.zero &= !bit;
        self.sums[within] = 0;
        match sum {
            BlockSum::Data(crc) => {
                self.data |= bit;
                self.sums[within] = crc;
            }
            BlockSum::Zero => self.zero |= bit,
            BlockSum::Absent => {}
        }
    }
    /// Takes over what a younger line says, and the later change mark.
    pub(super) fn put_over(&mut self, younger: &Self) {
        for within in 0..CHUNK_BLOCKS as usize {
            let sum = younger.get(within);
            if sum != BlockSum::Absent {
                self.set(within, sum);
            }
        }
        let (ours, theirs) = (self.mark(), younger.mark());
        (self.last_index, self.incarnation) = if theirs > ours { theirs } else { ours };
    }
    /// Blocks of a mask become absent: a younger piece shows them. Those that are shown by now.
    pub(super) fn hide(&mut self, mask: u64) -> u64 {
        let shown = mask | self.data | self.zero;
        self.data &= !mask;
        self.zero &= !mask;
        shown
    }
    /// Everything becomes absent; that it was changed stays known.
    pub(super) fn emptied(&self) -> Self {
        Self { incarnation: self.incarnation, last_index: self.last_index, ..Self::default() }
    }
    /// Its last change, for comparisons: indices only grow, over incarnations too.
    pub(super) fn mark(&self) -> (LogIndex, u64) {
        (self.last_index, self.incarnation)
    }
    /// Blocks of which it holds something, a bit per block.
    pub(super) fn held(&self) -> u64 {
        self.data | self.zero
    }
    pub(super) fn holds(&self, within: usize) -> bool {
        self.held() >> within & 1 == 1
    }
    pub(super) fn has_data(&self) -> bool {
        self.data != 0
    }
    pub(super) fn is_present(&self) -> bool {
        self.held() != 0
    }
}

/// A page that a checkpoint wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageMark {
    pub(super) number: u64,
    pub(super) generation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Page {
    chunks: [Chunk; PAGE_CHUNKS as usize],
    generation: u64,
    /// The copy that may be overwritten first: the other one is good.
    spare: u64,
}

impl Default for Page {
    fn default() -> Self {
        Self { chunks: std::array::from_fn(|_| Chunk::default()), generation: 0, spare: 0 }
    }
}

impl Page {
    fn encode(&self, number: u64, (who, layer): PageOwner) -> AlignedBuffer {
        let mut body = Writer::with_capacity(BLOCK_BYTES);
        for chunk in &self.chunks {
            body.u64(chunk.data);
            body.u64(chunk.zero);
            chunk.sums.iter().for_each(|sum| body.u32(*sum));
            body.u64(chunk.incarnation);
            chunk.last_index.encode(&mut body);
        }
        let mut head = Writer::new();
        head.u64(MAGIC);
        head.u16(VERSION);
        head.u64(number);
        head.u64(self.generation);
        who.group.encode(&mut head);
        who.replica.encode(&mut head);
        layer.0.encode(&mut head);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(head.as_slice());
        hasher.update(body.as_slice());
        head.u32(hasher.finalize());
        let mut page = AlignedBuffer::zeroed(BLOCK_BYTES);
        page.as_mut_slice()[..head.len()].copy_from_slice(head.as_slice());
        page.as_mut_slice()[HEADER_BYTES..HEADER_BYTES + body.len()].copy_from_slice(body.as_slice());
        page
    }

    /// `Ok(None)` for a copy that was never written.
    fn decode(bytes: &[u8], number: u64, who: PageOwner) -> Result<Option<Self>, DecodeError> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let mut head = Reader::new(&bytes[..HEADER_BYTES]);
        let bad = |what, value| Err(DecodeError::Unknown { what, value });
        let magic = head.u64()?;
        if magic != MAGIC || head.u16()? != VERSION {
            return bad("table page magic", magic);
        }
        let (found, generation) = (head.u64()?, head.u64()?);
        let owner =
            ReplicaIdentity { group: GroupId::decode(&mut head)?, replica: ReplicaId::decode(&mut head)? };
        let owner = (owner, LayerId(LogIndex::decode(&mut head)?));
        let covered = HEADER_BYTES - head.remaining();
        let crc = head.u32()?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[..covered]);
        hasher.update(&bytes[HEADER_BYTES..]);
        if hasher.finalize() != crc {
            return bad("table page checksum", crc.into());
        }
        if found != number || owner != who {
            return bad("table page of another place", found);
        }
        let mut body = Reader::new(&bytes[HEADER_BYTES..]);
        let mut page = Self { generation, ..Self::default() };
        for chunk in &mut page.chunks {
            chunk.data = body.u64()?;
            chunk.zero = body.u64()?;
            for sum in &mut chunk.sums {
                *sum = body.u32()?;
            }
            chunk.incarnation = body.u64()?;
            chunk.last_index = LogIndex::decode(&mut body)?;
        }
        Ok(Some(page))
    }
}

/// Whose a page is.
pub(super) type PageOwner = (ReplicaIdentity, LayerId);

/// For fuzzing: reads `body` as if page 3 of a table held it; what is read is written as it was.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(body: &[u8]) {
    let who = (ReplicaIdentity { group: GroupId(1), replica: ReplicaId(1) }, LayerId::BASE);
    let mut bytes = Page { generation: 7, ..Page::default() }.encode(3, who);
    let bytes = bytes.as_mut_slice();
    let count = body.len().min(BLOCK_BYTES - HEADER_BYTES);
    bytes[HEADER_BYTES..HEADER_BYTES + count].copy_from_slice(&body[..count]);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..CRC_AT]);
    hasher.update(&bytes[HEADER_BYTES..]);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&hasher.finalize().to_le_bytes());
    let page = Page::decode(bytes, 3, who).expect("its checksum matches").expect("it was written");
    assert_eq!(page.encode(3, who).as_slice(), bytes, "a page is written otherwise");
}

/// The table of one layer's piece.
pub(super) struct Table {
    file: Rc<dyn File>,
    name: String,
    who: PageOwner,
    pages: RefCell<BTreeMap<u64, Rc<Page>>>,
    /// Pages of which only a copy older than the checkpoint is left.
    stale: RefCell<BTreeSet<u64>>,
    bytes_written: Cell<u64>,
    flushes: Cell<u64>,
    pages_max: Cell<usize>,
    /// Pages that are being written: the disk may still show what they were before.
    writing: RefCell<BTreeMap<u64, Rc<Page>>>,
    /// Writes that have ended.
    writes: Cell<u64>,
    /// Pages of which one copy was written, and the other is not yet.
    owed: RefCell<Vec<Written>>,
    /// Is told whenever memory shows another page.
    owners: Rc<Owners>,
}

/// How a page stands on the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageFound {
    /// Both copies are whole and equal.
    Whole,
    /// One or both were not, and are again.
    Repaired,
    /// Neither is left.
    Lost,
}

/// A page of which one copy was written.
#[derive(Clone)]
struct Written {
    number: u64,
    /// The copy that is still as it was.
    other: u64,
    page: Rc<Page>,
}

/// Both copies of a page as they stand on the medium.
struct Copies {
    bytes: AlignedBuffer,
    page: Page,
    equal: bool,
}

fn place_of(chunk: ChunkIndex) -> (u64, usize) {
    (chunk.0 / PAGE_CHUNKS, (chunk.0 % PAGE_CHUNKS) as usize)
}

impl Table {
    pub(super) fn new(file: Rc<dyn File>, name: String, who: PageOwner, owners: Rc<Owners>) -> Self {
        Self {
            file,
            name,
            who,
            owners,
            pages: RefCell::default(),
            stale: RefCell::default(),
            pages_max: Cell::new(PAGES_MAX),
            writing: RefCell::default(),
            writes: Cell::new(0),
            owed: RefCell::default(),
            bytes_written: Cell::new(0),
            flushes: Cell::new(0),
        }
    }

    fn cached(&self, number: u64) -> Option<Rc<Page>> {
        let writing = self.writing.borrow().get(&number).cloned();
        writing.or_else(|| self.pages.borrow().get(&number).cloned())
    }

    fn keep(&self, number: u64, page: Rc<Page>) {
        let mut pages = self.pages.borrow_mut();
        while pages.len() >= self.pages_max.get() && !pages.contains_key(&number) {
            pages.pop_first();
        }
        pages.insert(number, page);
    }

    /// Bounds the pages in memory to one of `tables` equal parts.
    pub(super) fn share_memory(&self, tables: usize) {
        self.pages_max.set((PAGES_MAX / tables.max(1)).max(PAGES_MIN));
        let mut pages = self.pages.borrow_mut();
        while pages.len() > self.pages_max.get() {
            pages.pop_first();
        }
    }

    /// Pages that may have been written.
    pub(super) async fn page_count(&self) -> Result<u64, StoreError> {
        let size = self.file.size().await.map_err(|error| StoreError::io(&self.name, &error))?;
        Ok(size.length.div_ceil(2 * BLOCK_BYTES as u64))
    }

    async fn copies(&self, number: u64) -> Result<Copies, StoreError> {
        let place = number * 2 * BLOCK_BYTES as u64;
        let mut bytes = AlignedBuffer::zeroed(2 * BLOCK_BYTES);
        match self.file.read_at(place, 2 * BLOCK_BYTES).await {
            Ok(both) => bytes = both,
            // One of the copies may still be there; the other is as good as rotten.
            Err(error) => {
                for copy in 0..2 {
                    let part = &mut bytes.as_mut_slice()[copy * BLOCK_BYTES..(copy + 1) * BLOCK_BYTES];
                    match self.file.read_at(place + (copy * BLOCK_BYTES) as u64, BLOCK_BYTES).await {
                        Ok(read) => part.copy_from_slice(read.as_slice()),
                        Err(_) => part.fill(0xff),
                    }
                }
                tracing::warn!(file = %self.name, page = number, %error, "a copy of a table page cannot be read");
            }
        }
        let (first, second) = bytes.as_slice().split_at(BLOCK_BYTES);
        let decoded = [first, second].map(|copy| Page::decode(copy, number, self.who));
        let equal = first == second;
        let mut page = match decoded {
            [Ok(Some(first)), Ok(Some(second))] if second.generation > first.generation => {
                Page { spare: 0, ..second }
            }
            [Ok(Some(first)), _] => Page { spare: 1, ..first },
            [_, Ok(Some(second))] => Page { spare: 0, ..second },
            // A copy that was being written for the first time, and never before.
            [Ok(None), Ok(None) | Err(_)] => Page { spare: 1, ..Page::default() },
            [Err(_), Ok(None)] => Page::default(),
            [Err(error), Err(_)] => {
                return Err(StoreError::damaged(format!("page {number} of {}", self.name), &error));
            }
        };
        if equal {
            page.spare = (page.generation + 1) % 2;
        }
        Ok(Copies { bytes, page, equal })
    }

    async fn page(&self, number: u64) -> Result<Rc<Page>, StoreError> {
        if self.stale.borrow().contains(&number) {
            return Err(StoreError::Damaged {
                what: format!("page {number} of {}", self.name),
                why: "only an older copy of it is left; replace this replica, the others hold the data"
                    .into(),
            });
        }
        loop {
            if let Some(page) = self.cached(number) {
                return Ok(page);
            }
            let before = self.writes.get();
            let loaded = self.copies(number).await;
            // Somebody may have loaded or changed it meanwhile: theirs is at least as new.
            if let Some(newer) = self.cached(number) {
                return Ok(newer);
            }
            if self.writes.get() != before {
                continue; // it may have been written since it was read
            }
            let page = Rc::new(loaded?.page);
            self.keep(number, page.clone());
            return Ok(page);
        }
    }

    /// Something of a chunk's line.
    pub(super) async fn line<T>(
        &self,
        chunk: ChunkIndex,
        of: impl FnOnce(&Chunk) -> T,
    ) -> Result<T, StoreError> {
        let (page, within) = place_of(chunk);
        Ok(of(&self.page(page).await?.chunks[within]))
    }

    pub(super) async fn chunk(&self, chunk: ChunkIndex) -> Result<Chunk, StoreError> {
        self.line(chunk, Chunk::clone).await
    }

    /// As [`Self::chunk`]; `None` if its page is lost.
    pub(super) async fn chunk_if_there(&self, chunk: ChunkIndex) -> Result<Option<Chunk>, StoreError> {
        match self.chunk(chunk).await {
            Ok(line) => Ok(Some(line)),
            Err(StoreError::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn block(&self, block: BlockIndex) -> Result<BlockSum, StoreError> {
        self.line(block.chunk(), |line| line.get(block.within_chunk())).await
    }

    /// Writes one copy of each page of the changed chunks, then flushes. In memory the change shows at once; the block
    /// map still covers what it is about. [`Self::write_other_copies`] follows once the manifest lists the pages. After
    /// an error memory forgets the change, so that trying again never writes over the only whole copy.
    pub(super) async fn write(
        &self,
        changed: BTreeMap<ChunkIndex, Chunk>,
    ) -> Result<Vec<PageMark>, StoreError> {
        if changed.is_empty() {
            return Ok(Vec::new());
        }
        // A full medium may have come between.
        self.write_other_copies().await?;
        let written = self.write_pages(changed).await;
        let pages = self.writing.take();
        if written.is_err() {
            self.pages.borrow_mut().retain(|number, _| !pages.contains_key(number));
            self.owners.clear();
        }
        self.writes.set(self.writes.get() + 1);
        let written = written?;
        let mark = |page: &Written| PageMark { number: page.number, generation: page.page.generation };
        let marks = written.iter().map(mark).collect();
        *self.owed.borrow_mut() = written;
        Ok(marks)
    }

    async fn write_pages(&self, changed: BTreeMap<ChunkIndex, Chunk>) -> Result<Vec<Written>, StoreError> {
        let mut by_page: BTreeMap<u64, Vec<(usize, Chunk)>> = BTreeMap::new();
        for (chunk, line) in changed {
            let (page, within) = place_of(chunk);
            by_page.entry(page).or_default().push((within, line));
        }
        let mut written = Vec::with_capacity(by_page.len());
        for (number, lines) in by_page {
            let mut page = (*self.page(number).await?).clone();
            for (within, line) in lines {
                page.chunks[within] = line;
            }
            page.generation += 1;
            written.push(self.write_first_copy(number, page).await?);
        }
        self.flush().await?;
        Ok(written)
    }

    async fn write_first_copy(&self, number: u64, page: Page) -> Result<Written, StoreError> {
        let (bytes, spare) = (page.encode(number, self.who), page.spare);
        let page = Rc::new(page);
        self.writing.borrow_mut().insert(number, page.clone());
        self.keep(number, page.clone());
        self.owners.told(self.who.1, number, &page.chunks);
        self.write_copy(number, spare, bytes.clone()).await?;
        if planted("page-in-place") {
            self.write_copy(number, 1 - spare, bytes).await?;
        }
        Ok(Written { number, other: 1 - spare, page })
    }

    async fn write_copy(&self, number: u64, copy: u64, bytes: AlignedBuffer) -> Result<(), StoreError> {
        let offset = (number * 2 + copy) * BLOCK_BYTES as u64;
        self.bytes_written.set(self.bytes_written.get() + bytes.len() as u64);
        let written = self.file.write_at(offset, bytes, Durability::Volatile).await;
        written.map(drop).map_err(|error| StoreError::io(&self.name, &error))
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.flushes.set(self.flushes.get() + 1);
        self.file.flush().await.map_err(|error| StoreError::flush(&self.name, &error))
    }

    /// Whether a chunk's page was never written; of one that is lost something was.
    pub(super) async fn is_new_page(&self, chunk: ChunkIndex) -> Result<bool, StoreError> {
        match self.page(place_of(chunk).0).await {
            Ok(page) => Ok(page.generation == 0),
            Err(StoreError::Damaged { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes room for both copies of a chunk's page.
    pub(super) async fn take_page(&self, chunk: ChunkIndex) -> Result<(), StoreError> {
        let both = 2 * BLOCK_BYTES as u64;
        let taken = self.file.allocate(place_of(chunk).0 * both, both).await;
        taken.map_err(|error| StoreError::io(&self.name, &error))
    }

    /// The inverse, if it still was never written.
    pub(super) async fn give_page_back(&self, chunk: ChunkIndex) -> Result<(), StoreError> {
        let both = 2 * BLOCK_BYTES as u64;
        if !self.is_new_page(chunk).await? || self.owes(place_of(chunk).0) {
            return Ok(());
        }
        let given = self.file.punch(place_of(chunk).0 * both, both).await;
        given.map_err(|error| StoreError::io(&self.name, &error))
    }

    fn owes(&self, number: u64) -> bool {
        self.owed.borrow().iter().any(|page| page.number == number)
    }

    /// Writes the other copy of each page, now that the manifest says that the first copies count.
    pub(super) async fn write_other_copies(&self) -> Result<(), StoreError> {
        let owed = self.owed.borrow().clone();
        if owed.is_empty() || planted("one-table-copy") {
            return Ok(());
        }
        for Written { number, other, page } in owed {
            self.write_copy(number, other, page.encode(number, self.who)).await?;
        }
        self.flush().await?;
        self.owed.borrow_mut().clear();
        Ok(())
    }

    /// Makes both copies of the listed pages equal again, at start. A page of which only a copy older than the list says
    /// is left is stale from now on. Returns the listed pages' chunks that were changed once and hold no data now.
    pub(super) async fn settle(&self, marks: &[PageMark]) -> Result<Vec<ChunkIndex>, StoreError> {
        // What a process before this one wrote may be readable and not yet be on the medium.
        self.flush().await?;
        let (mut repaired, mut empty) = (0, Vec::new());
        for mark in marks {
            let copies = match self.copies(mark.number).await {
                Ok(copies) if copies.page.generation >= mark.generation || planted("serve-stale-page") => {
                    copies
                }
                Ok(_) | Err(StoreError::Damaged { .. }) => {
                    tracing::error!(file = %self.name, page = mark.number, "a table page is lost");
                    self.stale.borrow_mut().insert(mark.number);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let chunks = (mark.number * PAGE_CHUNKS..).zip(&copies.page.chunks);
            let emptied = chunks.filter(|(_, line)| line.last_index > LogIndex::ZERO && !line.has_data());
            empty.extend(emptied.map(|(chunk, _)| ChunkIndex(chunk)));
            if !copies.equal && !planted("leave-copies-unequal") {
                let good = (1 - copies.page.spare) as usize * BLOCK_BYTES;
                let bytes = AlignedBuffer::copy_of(&copies.bytes.as_slice()[good..good + BLOCK_BYTES]);
                self.write_copy(mark.number, copies.page.spare, bytes).await?;
                repaired += 1;
            }
        }
        if repaired > 0 {
            tracing::info!(file = %self.name, repaired, "table pages have two good copies again");
            self.flush().await?;
        }
        Ok(empty)
    }

    /// What a chunk's page says is not believed any more, though it is true to itself: it is as good as lost.
    pub(super) fn distrust(&self, chunk: ChunkIndex) {
        let (number, _) = place_of(chunk);
        self.stale.borrow_mut().insert(number);
        self.pages.borrow_mut().remove(&number);
        // INV-LAYER: of whom a block is that this page does not have is not known any more, either.
        self.owners.clear();
    }

    /// A chunk's line of a page that is not believed. It may be old; but what matches it was written once.
    pub(super) async fn disbelieved(&self, chunk: ChunkIndex) -> Result<Option<Chunk>, StoreError> {
        let (number, within) = place_of(chunk);
        if !self.stale.borrow().contains(&number) {
            return Ok(None);
        }
        match self.copies(number).await {
            Ok(copies) => Ok(Some(copies.page.chunks[within].clone())),
            Err(StoreError::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether both copies of a chunk's page are lost: what it said must come from another replica.
    pub(super) async fn is_lost(&self, chunk: ChunkIndex) -> Result<bool, StoreError> {
        match self.page(place_of(chunk).0).await {
            Ok(_) => Ok(false),
            Err(StoreError::Damaged { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Looks at both copies of a chunk's page on the medium, and makes a rotten one again from the other, or both from
    /// memory. Nothing else writes the table meanwhile (the caller holds the cleaner's lock).
    pub(super) async fn scrub_page(&self, chunk: ChunkIndex) -> Result<PageFound, StoreError> {
        self.write_other_copies().await?;
        let number = place_of(chunk).0;
        if self.stale.borrow().contains(&number) {
            return Ok(PageFound::Lost);
        }
        let cached = self.cached(number);
        let copies = match self.copies(number).await {
            Ok(copies) => Some(copies),
            Err(StoreError::Damaged { .. }) => None,
            Err(error) => return Err(error),
        };
        // What memory shows is what was written last: both copies may be whole, and a write of them lost.
        let as_new =
            |copies: &Copies| cached.as_ref().is_none_or(|page| page.generation == copies.page.generation);
        if copies.as_ref().is_some_and(|copies| copies.equal && as_new(copies)) {
            return Ok(PageFound::Whole);
        }
        let known = cached.or_else(|| copies.map(|copies| Rc::new(copies.page)));
        let Some(page) = known else { return Ok(PageFound::Lost) };
        let bytes = page.encode(number, self.who);
        // One after the other, so that a cut between them leaves a whole one.
        for copy in [page.spare, 1 - page.spare] {
            self.write_copy(number, copy, bytes.clone()).await?;
            self.flush().await?;
        }
        Ok(PageFound::Repaired)
    }

    /// Chunks of the page that a chunk stands on.
    pub(super) fn page_chunks(chunk: ChunkIndex) -> impl Iterator<Item = ChunkIndex> {
        let first = place_of(chunk).0 * PAGE_CHUNKS;
        (first..first + PAGE_CHUNKS).map(ChunkIndex)
    }

    /// As [`Self::write`], for all chunks of a page of which both copies are lost: it says what it is told from the
    /// moment at which it says anything again.
    pub(super) async fn restore(
        &self,
        lines: BTreeMap<ChunkIndex, Chunk>,
    ) -> Result<Vec<PageMark>, StoreError> {
        self.write_other_copies().await?;
        let Some(number) = lines.first_key_value().map(|(chunk, _)| place_of(*chunk).0) else {
            return Ok(Vec::new());
        };
        let mut page = self.what_is_left(number).await;
        for (chunk, line) in lines {
            let (at, within) = place_of(chunk);
            assert_eq!(at, number, "one page is restored at a time");
            page.chunks[within] = line;
        }
        page.generation += 1;
        self.stale.borrow_mut().remove(&number);
        let mut written = self.write_first_copy(number, page).await;
        if written.is_ok()
            && let Err(error) = self.flush().await
        {
            written = Err(error);
        }
        self.writing.take();
        self.writes.set(self.writes.get() + 1);
        if written.is_err() {
            self.pages.borrow_mut().remove(&number);
            self.stale.borrow_mut().insert(number);
            self.owners.clear();
        }
        let written = written?;
        let mark = PageMark { number, generation: written.page.generation };
        *self.owed.borrow_mut() = vec![written];
        Ok(vec![mark])
    }

    /// A page that says nothing, newer than whatever is left of a lost page's copies.
    async fn what_is_left(&self, number: u64) -> Page {
        let mut page = Page::default();
        for copy in 0..2 {
            let place = (number * 2 + copy) * BLOCK_BYTES as u64;
            // One that cannot be read is written over like a rotten one.
            let Ok(bytes) = self.file.read_at(place, BLOCK_BYTES).await else { continue };
            if let Ok(Some(left)) = Page::decode(bytes.as_slice(), number, self.who)
                && left.generation >= page.generation
            {
                (page.generation, page.spare) = (left.generation, 1 - copy);
            }
        }
        page
    }

    /// Pages that are lost, for the next manifest's list: it must not be forgotten that they are.
    pub(super) fn stale(&self) -> Vec<PageMark> {
        let stale = self.stale.borrow();
        stale.iter().map(|number| PageMark { number: *number, generation: u64::MAX }).collect()
    }

    /// The chunks of a page.
    pub(super) async fn lines(&self, page: u64) -> Result<Vec<(ChunkIndex, Chunk)>, StoreError> {
        let chunks = self.page(page).await?;
        let numbered = (page * PAGE_CHUNKS..).zip(&chunks.chunks);
        Ok(numbered.map(|(chunk, line)| (ChunkIndex(chunk), line.clone())).collect())
    }

    /// Bytes written, and flushes.
    pub(super) fn written(&self) -> (u64, u64) {
        (self.bytes_written.get(), self.flushes.get())
    }
}

#[cfg(test)]
mod tests;
