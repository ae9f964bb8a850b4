//! Chunks of a layer as another replica has them: compared, and taken over.
//!
//! Where a page of the table is lost, or what it says is shown to be old, nothing here says what its chunks must hold.
//! They are adopted from another replica: INV-HEAL, only such that tell of a change that is flushed and applied here, and
//! of no time before this replica's checkpoint, so that the journal repeats the rest. What is not to be believed and
//! cannot be adopted is distrusted: its page counts as lost, durably, and others answer for it.
//!
//! Both sides name the logical layer with its end. While a replica has such a layer, what it holds depends on what was
//! applied alone, so two replicas can be compared wherever the spans between last change and applied index meet, in a
//! frozen layer as in the one that is written.
//!
//! A layer may be several pieces here, by drops that no checkpoint covers yet, even. What is adopted goes to the oldest of
//! them, and the younger ones lose the chunk, as a merge would leave it. After a crash the checkpoint's layers are those
//! from before the drop for a while, and show something of after it: so nothing is served (INV-STAGE) before
//! everything is applied again that was applied then.

use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, CHUNK_BLOCKS, CHUNK_BYTES, ChunkIndex, LogIndex, block_checksum,
};

use super::heal::Finding;
use super::layers::{LayerId, LayerMark, PieceFiles};
use super::marks::sum_of;
use super::read::ReadError;
use super::table::{BlockSum, Chunk, PageMark, Table};
use super::{Change, Checkpoint, VolumeData};
use crate::StoreError;
use crate::journal::planted;

/// What a chunk of a layer holds now, as this replica shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkNow {
    /// Incarnation of its last change.
    pub incarnation: u64,
    /// Entry of its last change; zero before the first.
    pub last_index: LogIndex,
    /// How each block is.
    pub sums: Vec<BlockSum>,
}

impl ChunkNow {
    fn shown(&self, layer: LayerId) -> impl Iterator<Item = BlockSum> {
        let below = layer != LayerId::BASE;
        self.sums
            .iter()
            .map(move |sum| if *sum == BlockSum::Zero && !below { BlockSum::Absent } else { *sum })
    }

    /// Whether every block of a layer is the same. In the oldest one what is absent reads as zeros; in others it shows
    /// what is below.
    pub fn is_same(&self, layer: LayerId, other: &Self) -> bool {
        self.shown(layer).eq(other.shown(layer))
    }

    /// A digest of that: the same for what is the same, and not for what is not but for a coincidence. FNV-1a, whose
    /// input are checksums.
    pub fn digest(&self, layer: LayerId) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        for sum in self.shown(layer) {
            match sum {
                BlockSum::Absent => add(0),
                BlockSum::Zero => add(1),
                BlockSum::Data(crc) => {
                    add(2);
                    crc.to_le_bytes().into_iter().for_each(&mut add);
                }
            }
        }
        hash
    }
}

/// A chunk of a layer of another replica, to be adopted.
#[derive(Clone, Debug)]
pub struct ChunkContent {
    /// Which.
    pub chunk: ChunkIndex,
    /// What it is there.
    pub now: ChunkNow,
    /// What that replica had applied when it said so: the chunk did not change between its last change and then.
    pub applied: LogIndex,
    /// Its data blocks.
    pub blocks: Vec<(BlockIndex, Bytes)>,
}

/// The pieces of a layer that have files, the oldest first.
type Homes = Vec<(LayerId, Rc<PieceFiles>)>;

impl VolumeData {
    /// What a chunk of a layer holds now, with its last change: taken in one moment.
    pub async fn chunk_now(&self, layer: LayerMark, chunk: ChunkIndex) -> Result<ChunkNow, ReadError> {
        let (pieces, lines) = loop {
            let before = self.0.changes.get();
            let pieces = self.layer_of(layer)?;
            let mut lines = Vec::with_capacity(pieces.len());
            for piece in pieces.iter() {
                lines.push(match piece.files() {
                    Some(files) => files.table.chunk(chunk).await?,
                    None => Chunk::default(),
                });
            }
            if self.0.changes.get() == before {
                break (pieces, lines);
            }
        };
        let sums = vec![BlockSum::Absent; CHUNK_BLOCKS as usize];
        let mut now = ChunkNow { incarnation: 0, last_index: LogIndex::ZERO, sums };
        let range = BlockRange::new(chunk.first_block(), CHUNK_BLOCKS as u32);
        for line in &lines {
            if line.last_index > now.last_index {
                (now.incarnation, now.last_index) = (line.incarnation, line.last_index);
            }
            for (n, sum) in now.sums.iter_mut().enumerate() {
                *sum = if line.get(n) == BlockSum::Absent { *sum } else { line.get(n) };
            }
        }
        for piece in pieces.iter() {
            for (at, run) in piece.map.borrow().over(range) {
                now.incarnation = self.0.identity.incarnation;
                now.last_index = now.last_index.max(run.index);
                for n in 0..run.count {
                    now.sums[BlockIndex(at.0 + n).within_chunk()] = sum_of(piece, &run, n);
                }
            }
        }
        Ok(now)
    }

    fn homes(&self, layer: LayerMark) -> Homes {
        let pieces = self.layer_of(layer).ok();
        let all = pieces.iter().flat_map(|pieces| pieces.iter());
        all.filter_map(|piece| Some((piece.id, piece.files()?))).collect()
    }

    /// Chunks that must come together with this one: those of its page if that is lost, else it alone.
    pub async fn chunks_to_adopt(
        &self,
        layer: LayerMark,
        chunk: ChunkIndex,
    ) -> Result<Vec<ChunkIndex>, StoreError> {
        for (_, files) in self.homes(layer) {
            if files.table.is_lost(chunk).await? {
                return Ok(Table::page_chunks(chunk).collect());
            }
        }
        Ok(vec![chunk])
    }

    /// What the table says of a chunk of a layer is shown to be old. From here on its page counts as lost: it is not
    /// served, it is adopted before it says anything again, and all that is durable when this returns. False if that
    /// cannot be now; nothing has changed then.
    ///
    /// While a rebuild is collected nothing is distrusted: what it has compared with must stay as it was, and what it
    /// brings is compared again.
    pub async fn distrust(&self, layer: LayerMark, chunk: ChunkIndex) -> Result<bool, StoreError> {
        let _nothing_moves = self.alone().await?;
        let homes = self.homes(layer);
        // What has never been home comes from the journal.
        if homes.is_empty() || self.0.rebuilds.get() > 0 {
            return Ok(false);
        }
        self.write_owed_copies().await?;
        homes.iter().for_each(|(_, files)| files.table.distrust(chunk));
        self.changed();
        tracing::error!(replica = %self.0.prefix, layer = layer.id.0.0, chunk = chunk.0, "a table page is not believed any more");
        self.write_manifest(Change { pages: Some(&[]), ..Change::default() }).await?;
        self.note(layer.id, chunk, &Finding::Lost);
        self.suspect_chunk(chunk);
        Ok(true)
    }

    /// Blocks of a chunk whose page is not believed, that match what it says. They may be old: they are for one that knows
    /// the checksums that it wants (INV-HEAL).
    pub async fn old_blocks(
        &self,
        layer: LayerMark,
        chunk: ChunkIndex,
        mut mask: u64,
    ) -> Result<Vec<(BlockIndex, Bytes)>, StoreError> {
        let mut out = Vec::new();
        for (_, files) in self.homes(layer).into_iter().rev() {
            let Some(line) = files.table.disbelieved(chunk).await? else { continue };
            for n in (0..CHUNK_BLOCKS).filter(|n| mask >> n & 1 == 1) {
                let BlockSum::Data(sum) = line.get(n as usize) else { continue };
                let block = BlockIndex(chunk.first_block().0 + n);
                let mut data = vec![0; BLOCK_BYTES];
                let unreadable = self.read_home_blocks(&files, block, &mut data).await;
                if unreadable.is_empty() && block_checksum(block, &data) == sum {
                    out.push((block, data.into()));
                }
            }
            out.iter().for_each(|(block, _)| mask &= !(1 << block.within_chunk()));
        }
        out.sort_by_key(|(block, _)| *block);
        Ok(out)
    }

    /// Whether there are pages that are not believed any more, or whose newest copy is lost.
    pub fn awaits_pages(&self) -> bool {
        self.0
            .chain
            .all()
            .iter()
            .filter_map(|piece| piece.files())
            .any(|files| !files.table.stale().is_empty())
    }

    /// Whether content of another replica may stand here. INV-HEAL: its last change is applied and durable here (the
    /// journal repeats it), and it is not of before the checkpoint (what came between is nowhere else).
    fn may_adopt(&self, layer: LayerMark, content: &ChunkContent, applied: LogIndex) -> bool {
        let last = content.now.last_index;
        let checkpoint = self.checkpoint().id.index;
        let of_this_time = last <= applied.min(self.0.payloads.flushed()) && content.applied >= checkpoint;
        // What is frozen does not change after it was.
        let of_this_layer = layer.frozen.is_none_or(|end| last <= end);
        of_this_time && of_this_layer || planted("adopt-anything")
    }

    /// Takes chunks of a layer as another replica has them: all of a page, or one ([`Self::chunks_to_adopt`]). `applied`
    /// is what this replica has applied. False if that cannot be done now; nothing has changed then.
    ///
    /// The order is the cleaner's. The checkpoint stays: what the chunks hold is repeated from it.
    pub async fn adopt(
        &self,
        layer: LayerMark,
        chunks: &[ChunkContent],
        applied: LogIndex,
    ) -> Result<bool, StoreError> {
        let _nothing_moves = self.alone().await?;
        let homes = self.homes(layer);
        let (Some(first), Some(((oldest_id, oldest), younger))) = (chunks.first(), homes.split_first())
        else {
            return Ok(false);
        };
        let wanted = self.chunks_to_adopt(layer, first.chunk).await?;
        let given: Vec<ChunkIndex> = chunks.iter().map(|content| content.chunk).collect();
        let may = chunks.iter().all(|content| self.may_adopt(layer, content, applied));
        if self.0.rebuilds.get() > 0 || wanted != given || !may {
            return Ok(false);
        }
        self.write_owed_copies().await?;
        self.raise_floor(applied).await?;
        self.0.payloads.keep_committed(applied.min(self.0.payloads.flushed())).await?;
        // Who reads home now looks again if it does not match.
        self.changed();
        let mut lines = BTreeMap::new();
        for content in chunks {
            lines.insert(content.chunk, self.write_content(oldest, content).await?);
        }
        self.flush_home(oldest).await?;
        // The younger ones lose it only when it stands in the oldest one.
        let mut pages: Vec<_> =
            Self::put_lines(oldest, lines).await?.into_iter().map(|page| (*oldest_id, page)).collect();
        for (id, files) in younger {
            let lines = Self::emptied(files, &given).await?;
            pages.extend(Self::put_lines(files, lines).await?.into_iter().map(|page| (*id, page)));
        }
        self.write_manifest(Change { pages: Some(&pages), ..Change::default() }).await?;
        self.changed();
        for (_, files) in &homes {
            files.table.write_other_copies().await?;
            self.punch(files, &given).await?;
        }
        for content in chunks {
            let found = self.verify_alone(layer.id, content.chunk).await?;
            self.note(layer.id, content.chunk, &found);
        }
        let whole_page = given.len() > 1;
        tracing::warn!(replica = %self.0.prefix, layer = layer.id.0.0, chunk = first.chunk.0, whole_page, "chunks were taken from a peer");
        self.count_health(|health| match whole_page {
            true => health.healed_pages += 1,
            false => health.replaced_chunks += 1,
        });
        Ok(true)
    }

    /// The layers are other ones since the checkpoint: what comes home may be of them. INV-STAGE: after a crash nothing
    /// is served before they are there again.
    async fn raise_floor(&self, applied: LogIndex) -> Result<(), StoreError> {
        let checkpoint = self.checkpoint();
        let is_of_these_layers = self.0.chain.changed_at() <= checkpoint.id.index;
        if is_of_these_layers || checkpoint.serve_floor >= applied || planted("adopt-without-floor") {
            return Ok(());
        }
        let checkpoint = Checkpoint { serve_floor: applied, ..checkpoint };
        self.write_manifest(Change { checkpoint: Some(checkpoint), ..Change::default() }).await
    }

    /// Lines of a piece without what it says of chunks, as far as it says anything, or all if that is lost.
    async fn emptied(
        files: &PieceFiles,
        chunks: &[ChunkIndex],
    ) -> Result<BTreeMap<ChunkIndex, Chunk>, StoreError> {
        let mut lines = BTreeMap::new();
        for chunk in chunks {
            if files.table.is_lost(*chunk).await? {
                lines.insert(*chunk, Chunk::default());
                continue;
            }
            let line = files.table.chunk(*chunk).await?;
            if line.is_present() {
                lines.insert(*chunk, line.emptied());
            }
        }
        Ok(lines)
    }

    async fn put_lines(
        files: &PieceFiles,
        lines: BTreeMap<ChunkIndex, Chunk>,
    ) -> Result<Vec<PageMark>, StoreError> {
        let Some((first, _)) = lines.first_key_value() else { return Ok(Vec::new()) };
        match files.table.is_lost(*first).await? {
            true => files.table.restore(lines).await,
            false => files.table.write(lines).await,
        }
    }

    /// Brings a chunk's blocks home; its line.
    async fn write_content(&self, files: &PieceFiles, content: &ChunkContent) -> Result<Chunk, StoreError> {
        let mut line = Chunk::default();
        (line.incarnation, line.last_index) = (content.now.incarnation, content.now.last_index);
        if !content.blocks.is_empty() {
            let offset = content.chunk.first_block().byte_offset();
            let allocated = files.home.allocate(offset, CHUNK_BYTES).await;
            allocated.map_err(|error| StoreError::io("home", &error))?;
        }
        for (n, sum) in content.now.sums.iter().enumerate() {
            line.set(n, *sum);
        }
        for (block, data) in &content.blocks {
            if line.get(block.within_chunk()) != BlockSum::Data(block_checksum(*block, data)) {
                let why = "it does not match its checksum".into();
                return Err(StoreError::Damaged { what: format!("block {} from a peer", block.0), why });
            }
            self.write_block_home(files, *block, data).await?;
        }
        Ok(line)
    }
}
