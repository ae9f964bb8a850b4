//! What every block holds as of every index, as the one history says: written down from the commands that counted, so
//! that what a replica holds can be compared with it at any moment.

use std::cell::RefCell;
use std::collections::BTreeMap;

use holdfast_protocol::command::VolumeCommand;
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, LogIndex, block_checksum};

static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// Of every block the indexes at which it changed, with the checksums that it had from then on.
#[derive(Default)]
pub(crate) struct Content(RefCell<BTreeMap<u64, Vec<(LogIndex, u32)>>>);

impl Content {
    /// A command counts at an index, which is newer than all before.
    pub(crate) fn counted(&self, at: LogIndex, command: &VolumeCommand) {
        let mut blocks = self.0.borrow_mut();
        match command {
            VolumeCommand::Write { range, checksums, .. } => {
                for (block, sum) in range.blocks().zip(checksums) {
                    blocks.entry(block.0).or_default().push((at, *sum));
                }
            }
            VolumeCommand::Trim { range, .. } | VolumeCommand::Zero { range, .. } => {
                for block in range.blocks() {
                    blocks.entry(block.0).or_default().push((at, block_checksum(block, &ZEROS)));
                }
            }
            _ => {}
        }
    }

    /// Runs of blocks that were ever changed, each of so many at most.
    pub(crate) fn runs(&self, most: u32) -> Vec<BlockRange> {
        let mut runs: Vec<BlockRange> = Vec::new();
        for block in self.0.borrow().keys() {
            match runs.last_mut() {
                Some(run) if run.end().0 == *block && run.count < most => run.count += 1,
                _ => runs.push(BlockRange::new(BlockIndex(*block), 1)),
            }
        }
        runs
    }

    /// Why this cannot be the content of a block as of an index; nothing if it is.
    pub(crate) fn differs(&self, block: BlockIndex, applied: LogIndex, holds: u32) -> Option<String> {
        let blocks = self.0.borrow();
        let versions = blocks.get(&block.0).map(Vec::as_slice).unwrap_or_default();
        let last = versions.iter().rev().find(|(at, _)| *at <= applied);
        let (since, wanted) = last.copied().unwrap_or((LogIndex::ZERO, block_checksum(block, &ZEROS)));
        if holds == wanted {
            return None;
        }
        let of = versions.iter().rev().find(|(_, sum)| *sum == holds).map(|(at, _)| *at);
        let of = of.map_or_else(|| "of nothing".to_owned(), |at| format!("of entry {at}"));
        Some(format!("block {} is as {of} left it, and entry {since} changed it last", block.0))
    }
}
