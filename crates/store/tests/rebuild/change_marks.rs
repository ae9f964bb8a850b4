//! Change marks decide which chunks a rebuild compares at all. Two replicas that have applied prefixes of one log, and
//! have cleaned at whatever moments, may show equal marks of a chunk only if its content is equal.

use std::path::Path;
use std::rc::Rc;

use holdfast_store::volume::{BlockSum, Clear, LayerId, LayerMark, VolumeData};
use holdfast_types::{BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex, LogIndex};
use proptest::prelude::*;

use crate::replica::{At, Log, replica, write};

/// Chunks that the steps touch.
const CHUNKS: u32 = 2;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u32),
    Clear(u64, u32, bool),
}

/// Makes a replica and applies `steps` to it; it cleans after those that `cleans` names.
async fn after(place: &Path, log: &Rc<Log>, steps: &[Step], cleans: &[bool]) -> VolumeData {
    let data = replica(place, log).await;
    for (index, (step, clean)) in (1..).zip(steps.iter().zip(cleans)) {
        match step {
            Step::Write(start, count) => {
                write(&data, log, index, BlockRange::new(BlockIndex(*start), *count), index as u8);
            }
            Step::Clear(start, count, trim) => {
                let how = if *trim { Clear::Trim } else { Clear::Zero };
                data.apply_clear(LogIndex(index), BlockRange::new(BlockIndex(*start), *count), how);
            }
        }
        if *clean {
            data.clean(&At(index)).await.expect("is cleaned");
        }
    }
    data
}

/// The marks of `receiver`'s home and of `source`, and what they stand for.
async fn check(receiver: &VolumeData, source: &VolumeData) {
    let ours = receiver.home_summaries(LayerMark::ONLY, ChunkIndex(0), CHUNKS).await.expect("is read");
    let theirs = source.chunk_summaries(LayerId::BASE, ChunkIndex(0), CHUNKS).await.expect("is read");
    for theirs in theirs {
        let mark = (theirs.incarnation, theirs.last_index);
        let ours = ours.iter().find(|ours| ours.chunk == theirs.chunk);
        if ours.is_none_or(|ours| (ours.incarnation, ours.last_index) != mark) {
            continue;
        }
        let home = receiver.home_checksums(LayerMark::ONLY, theirs.chunk).await.expect("is read");
        let content = source.chunk_checksums(theirs.chunk).await.expect("is read");
        for (home, content) in home.iter().zip(content) {
            assert!(same(*home, content), "chunk {} at mark {mark:?}: {home:?}, {content:?}", theirs.chunk.0);
        }
    }
}

/// Zeros are zeros, whether they have been written or not.
fn same(home: Option<BlockSum>, content: BlockSum) -> bool {
    match (home, content) {
        (Some(BlockSum::Data(ours)), BlockSum::Data(theirs)) => ours == theirs,
        (Some(BlockSum::Data(_)) | None, _) | (_, BlockSum::Data(_)) => false,
        _ => true,
    }
}

/// A few blocks on both sides of the chunks' border, so that steps meet.
fn step() -> impl Strategy<Value = Step> {
    let start = CHUNK_BLOCKS - 5..CHUNK_BLOCKS + 5;
    (start, 1u32..6, 0u8..4).prop_map(|(start, count, kind)| match kind {
        0 => Step::Clear(start, count, false),
        1 => Step::Clear(start, count, true),
        _ => Step::Write(start, count),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn equal_marks_stand_for_equal_content(
        steps in proptest::collection::vec(step(), 1..16),
        behind in 0usize..8,
        cleans in proptest::collection::vec((proptest::bool::weighted(0.2), proptest::bool::weighted(0.2)), 16),
    ) {
        let place = tempfile::tempdir().expect("a place");
        holdfast_env::real::run(async {
            let log = Rc::new(Log::default());
            let (ours, theirs): (Vec<bool>, Vec<bool>) = cleans.into_iter().unzip();
            let shorter = steps.len().saturating_sub(behind);
            let receiver = after(&place.path().join("a"), &log, &steps[..shorter], &ours).await;
            // As a rebuild does before it compares.
            receiver.clean(&At(shorter as u64)).await.expect("is cleaned");
            let source = after(&place.path().join("b"), &log, &steps, &theirs).await;
            check(&receiver, &source).await;
            source.clean(&At(steps.len() as u64)).await.expect("is cleaned");
            check(&receiver, &source).await;
        });
    }
}

/// What is given back in a chunk that holds nothing at home yet counts as a change of it, if anything else comes home.
#[test]
fn a_trim_before_the_first_data_comes_home_is_marked() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let log = Rc::new(Log::default());
        let steps = [Step::Write(0, 4), Step::Write(9, 1), Step::Clear(0, 4, true)];
        let receiver = after(&place.path().join("a"), &log, &steps[..2], &[false, true]).await;
        let source = after(&place.path().join("b"), &log, &steps, &[false, false, true]).await;
        check(&receiver, &source).await;
    });
}
