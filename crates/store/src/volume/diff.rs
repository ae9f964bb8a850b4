//! What differs between two views of a volume, from the layers between them.

use holdfast_types::{BlockIndex, ChunkIndex, LogIndex};

use super::layers::View;
use super::marks::resolve;
use super::read::ReadError;
use super::table::BlockSum;
use super::{BlockKind, VolumeData};

/// Chunks that one call looks at: 1 GiB.
const CHUNKS_MAX: u64 = 4096;

/// A run of blocks that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiffExtent {
    /// The first of them.
    pub start: BlockIndex,
    /// How many.
    pub count: u64,
    /// What they are in the newer view: data, or zeros.
    pub kind: BlockKind,
}

/// A part of what differs.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Diff {
    /// In block order.
    pub extents: Vec<DiffExtent>,
    /// Where to go on; `None` at the end.
    pub next: Option<ChunkIndex>,
}

impl VolumeData {
    /// What `to` shows otherwise than the snapshot `from`; without that, whatever `to` has that is not zero. At
    /// 4 KiB granularity, from `first` on, until `limit` extents were found or a bounded part was looked at.
    ///
    /// A block that was written in between is in it even if it holds the same again: equal checksums are no proof.
    /// One that was cleared in between and read as zeros before is not.
    pub async fn diff(
        &self,
        from: Option<LogIndex>,
        to: View,
        first: ChunkIndex,
        limit: usize,
    ) -> Result<Diff, ReadError> {
        let end = self.0.size.get().chunks();
        let mut diff = Diff::default();
        let mut chunk = first.0;
        while chunk < end && chunk < first.0 + CHUNKS_MAX && diff.extents.len() < limit.max(1) {
            self.diff_chunk(from, to, ChunkIndex(chunk), &mut diff.extents).await?;
            chunk += 1;
        }
        diff.next = (chunk < end).then_some(ChunkIndex(chunk));
        Ok(diff)
    }

    async fn diff_chunk(
        &self,
        from: Option<LogIndex>,
        to: View,
        chunk: ChunkIndex,
        out: &mut Vec<DiffExtent>,
    ) -> Result<(), ReadError> {
        let changed = resolve(&self.between(from, to)?, chunk).await?;
        let before = match from {
            Some(from) if changed.contains(&BlockSum::Zero) => {
                Some(self.view_checksums(View::Snapshot(from), chunk).await?)
            }
            _ => None,
        };
        // Neither was dropped meanwhile.
        self.between(from, to)?;
        let end = self.0.size.get().blocks();
        for (within, sum) in changed.iter().enumerate() {
            let block = BlockIndex(chunk.first_block().0 + within as u64);
            let was_data = before.as_ref().is_some_and(|sums| matches!(sums[within], BlockSum::Data(_)));
            let kind = match sum {
                BlockSum::Data(_) => BlockKind::Data,
                BlockSum::Zero if was_data => BlockKind::Zero,
                _ => continue,
            };
            if block.0 >= end {
                break;
            }
            match out.last_mut() {
                Some(last) if last.kind == kind && last.start.0 + last.count == block.0 => last.count += 1,
                _ => out.push(DiffExtent { start: block, count: 1, kind }),
            }
        }
        Ok(())
    }
}
