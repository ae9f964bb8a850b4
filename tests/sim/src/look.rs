//! Looks into replicas: whether one that would serve readers holds what the one history says, as of what it has applied,
//! and whether its log is one that Raft can have made. A look takes no time, waits for nothing and draws nothing.

use futures_util::FutureExt;
use holdfast_replica::Volume;
use holdfast_types::{LogIndex, limits::REQUEST_BLOCKS_MAX};

use crate::plan::Fault;
use crate::world::World;

/// Blocks that one look compares at most.
const BLOCKS_MAX: u64 = 1024;

impl World {
    /// Looks at a node's replica, if it would serve readers; whether it did. `turn` says where in the volume it begins.
    pub(crate) fn look_at(&self, number: u64, turn: u64) -> bool {
        let node = self.node(number);
        // What is bad on a medium is read from the others, until it is healed.
        let is_bad = self.plan.faults.contains(&Fault::BadMedium) && self.plan.bad_medium == number;
        let Some(volume) = node.volume().filter(|_| !is_bad && !node.disk.has_failed.get()) else {
            return false;
        };
        if !volume.group().position().has_reached(LogIndex::ZERO) {
            return false;
        }
        node.disk.looked_into.set(true);
        self.executor.within(node.owner(), || self.compare(number, &volume, turn));
        node.disk.looked_into.set(false);
        true
    }

    fn compare(&self, number: u64, volume: &Volume, turn: u64) {
        let applied = volume.group().position().applied_index();
        let mut runs = self.oracle.content.runs(REQUEST_BLOCKS_MAX);
        let first = usize::try_from(turn).unwrap_or(0) % runs.len().max(1);
        runs.rotate_left(first);
        let mut left = BLOCKS_MAX;
        for range in runs {
            if left < u64::from(range.count) {
                break;
            }
            left -= u64::from(range.count);
            let held = match volume.data().read_checked(range).now_or_never() {
                Some(Ok(held)) => held,
                Some(Err(error)) => {
                    return self.trace.violation(format_args!(
                        "INV-STAGE: n{number} would serve readers as of {applied}, and cannot read {range:?}: {error}"
                    ));
                }
                None => {
                    self.trace.mark("looks that would have had to wait");
                    continue;
                }
            };
            let blocks = range.blocks().zip(&held.checksums);
            let differ = blocks.filter_map(|(block, sum)| self.oracle.content.differs(block, applied, *sum));
            if let Some(why) = differ.into_iter().next() {
                return self.trace.violation(format_args!(
                    "INV-STAGE: n{number} would serve readers as of {applied}: {why}"
                ));
            }
        }
        self.trace.mark("looks into replicas");
    }

    /// INV-TERM: looks at the log with which a replica has started.
    pub(crate) fn look_at_log(&self, number: u64) {
        let Some(volume) = self.node(number).volume() else { return };
        let log = volume.group().log();
        let applied = volume.group().position().applied_index();
        let first = log.purged().map_or(0, |id| id.index.0) + 1;
        let last = log.last().map_or(0, |id| id.index.0);
        let mut before = log.purged();
        for id in (first..=last).filter_map(|index| log.entry_id(LogIndex(index))) {
            if let Some(before) = before.filter(|before| before.term > id.term) {
                return self.trace.violation(format_args!(
                    "INV-TERM: n{number} starts with entry {} of term {} behind one of term {}",
                    id.index, id.term, before.term
                ));
            }
            if id.index <= applied && self.oracle.applied_id(id.index).is_some_and(|known| known != id) {
                return self.trace.violation(format_args!(
                    "INV-TERM: n{number} starts with another entry {} than was applied",
                    id.index
                ));
            }
            before = Some(id);
        }
    }
}
