//! The block map: what applied commands have put over the home file and is not home yet.

use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_types::{BlockIndex, BlockRange, CHUNK_BLOCKS, LogIndex};

/// What a run of blocks is.
#[derive(Clone, Debug)]
pub(super) enum What {
    /// Blocks of a log entry's payload, from block `offset` of it, with the checksums of the whole entry.
    Data { offset: u32, checksums: Rc<[u32]> },
    /// Zeros.
    Zero,
    /// Given back.
    Absent,
}

/// A run of blocks that one log entry wrote or cleared.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    pub(super) count: u64,
    pub(super) index: LogIndex,
    pub(super) what: What,
}

impl Extent {
    /// The part from block `skip` on, `count` blocks long.
    pub(super) fn part(&self, skip: u64, count: u64) -> Self {
        let what = match &self.what {
            What::Data { offset, checksums } => {
                What::Data { offset: offset + skip as u32, checksums: checksums.clone() }
            }
            What::Zero => What::Zero,
            What::Absent => What::Absent,
        };
        Self { count, index: self.index, what }
    }

    /// Checksum of the extent's block `n`; it is data.
    pub(super) fn checksum(&self, n: u64) -> Option<u32> {
        match &self.what {
            What::Data { offset, checksums } => checksums.get((u64::from(*offset) + n) as usize).copied(),
            _ => None,
        }
    }
}

/// Runs by their first block; they never overlap.
#[derive(Default, Debug)]
pub(super) struct ExtentMap {
    runs: BTreeMap<u64, Extent>,
    data_blocks: u64,
    cleared_blocks: u64,
}

impl ExtentMap {
    /// Puts a run over whatever was there.
    pub(super) fn insert(&mut self, start: BlockIndex, extent: Extent) {
        self.remove(start.0, start.0 + extent.count);
        *self.counter(&extent.what) += extent.count;
        self.runs.insert(start.0, extent);
    }

    fn counter(&mut self, what: &What) -> &mut u64 {
        match what {
            What::Data { .. } => &mut self.data_blocks,
            What::Zero | What::Absent => &mut self.cleared_blocks,
        }
    }

    fn remove(&mut self, start: u64, end: u64) {
        let before = self.runs.range(..start).next_back().filter(|(at, run)| *at + run.count > start);
        let first = before.map_or(start, |(at, _)| *at);
        let hit: Vec<u64> = self.runs.range(first..end).map(|(at, _)| *at).collect();
        for at in hit {
            let Some(run) = self.runs.remove(&at) else { continue };
            let run_end = at + run.count;
            if at < start {
                self.runs.insert(at, run.part(0, start - at));
            }
            if run_end > end {
                self.runs.insert(end, run.part(end - at, run_end - end));
            }
            *self.counter(&run.what) -= run_end.min(end) - at.max(start);
        }
    }

    /// What covers `range`, in order; gaps are what is home.
    pub(super) fn over(&self, range: BlockRange) -> Vec<(BlockIndex, Extent)> {
        let (start, end) = (range.start.0, range.end().0);
        let before = self.runs.range(..start).next_back().filter(|(at, run)| *at + run.count > start);
        let first = before.map_or(start, |(at, _)| *at);
        let mut out = Vec::new();
        for (at, run) in self.runs.range(first..end) {
            let (from, to) = ((*at).max(start), (at + run.count).min(end));
            out.push((BlockIndex(from), run.part(from - at, to - from)));
        }
        out
    }

    /// Behind the last run.
    pub(super) fn end(&self) -> BlockIndex {
        BlockIndex(self.runs.last_key_value().map_or(0, |(at, run)| at + run.count))
    }

    /// Every run that an entry up to `index` made, in block order.
    pub(super) fn up_to(&self, index: LogIndex) -> Vec<(BlockIndex, Extent)> {
        let old = self.runs.iter().filter(|(_, run)| run.index <= index);
        old.map(|(at, run)| (BlockIndex(*at), run.clone())).collect()
    }

    /// Drops every run that an entry up to `index` made: it is home.
    pub(super) fn drop_up_to(&mut self, index: LogIndex) {
        self.runs.retain(|_, run| run.index > index);
        let is_data = |run: &&Extent| matches!(run.what, What::Data { .. });
        self.data_blocks = self.runs.values().filter(is_data).map(|run| run.count).sum();
        self.cleared_blocks = self.runs.values().map(|run| run.count).sum::<u64>() - self.data_blocks;
    }

    /// Puts everything of a newer map over this one.
    pub(super) fn fold(&mut self, newer: Self) {
        if self.is_empty() {
            *self = newer;
            return;
        }
        for (at, run) in newer.runs {
            self.insert(BlockIndex(at), run);
        }
    }

    pub(super) fn data_blocks(&self) -> u64 {
        self.data_blocks
    }
    /// Chunks that hold any of the data.
    pub(super) fn data_chunks(&self) -> u64 {
        let (mut count, mut next) = (0, 0);
        for (at, run) in &self.runs {
            if matches!(run.what, What::Data { .. }) {
                let first = (at / CHUNK_BLOCKS).max(next);
                next = (at + run.count).div_ceil(CHUNK_BLOCKS).max(next);
                count += next.saturating_sub(first);
            }
        }
        count
    }
    pub(super) fn cleared_blocks(&self) -> u64 {
        self.cleared_blocks
    }
    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_newest_run_shows(steps in proptest::collection::vec((0u64..170, 1u64..22, 0u8..3), 1..60)) {
            let mut map = ExtentMap::default();
            let mut model = vec![None; 3 * CHUNK_BLOCKS as usize];
            for (n, (start, count, kind)) in steps.into_iter().enumerate() {
                let index = LogIndex(n as u64 + 1);
                let what = match kind {
                    0 => What::Data { offset: 0, checksums: (0..count as u32).collect() },
                    1 => What::Zero,
                    _ => What::Absent,
                };
                map.insert(BlockIndex(start), Extent { count, index, what });
                for (k, block) in (start..start + count).enumerate() {
                    model[block as usize] = Some((index, (kind == 0).then_some(k as u32)));
                }
            }
            let mut shown = vec![None; 3 * CHUNK_BLOCKS as usize];
            for (at, run) in map.over(BlockRange::new(BlockIndex(0), 3 * CHUNK_BLOCKS as u32)) {
                for n in 0..run.count {
                    prop_assert!(shown[(at.0 + n) as usize].is_none(), "runs never overlap");
                    shown[(at.0 + n) as usize] = Some((run.index, run.checksum(n)));
                }
            }
            let data = model.iter().flatten().filter(|(_, sum)| sum.is_some()).count() as u64;
            prop_assert_eq!(map.data_blocks(), data);
            let chunk_holds = |chunk: &&[Option<(LogIndex, Option<u32>)>]| {
                chunk.iter().flatten().any(|(_, sum)| sum.is_some())
            };
            let chunks = model.chunks(CHUNK_BLOCKS as usize).filter(chunk_holds).count() as u64;
            prop_assert_eq!(map.data_chunks(), chunks);
            prop_assert_eq!(map.cleared_blocks(), model.iter().flatten().count() as u64 - data);
            prop_assert_eq!(shown, model);
        }
    }
}
