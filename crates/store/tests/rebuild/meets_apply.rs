//! A replica that is being rebuilt goes on applying what it has in its log: none of that may show after the switch.

use std::rc::Rc;

use bytes::Bytes;
use holdfast_store::volume::{BlockSum, Checkpoint, CheckpointSource, LayerId, LayerMark, VolumeData};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, ChunkIndex, LogIndex, block_checksum};

use crate::replica::{At, Log, checkpoint, replica};

fn block(index: u64) -> BlockRange {
    BlockRange::new(BlockIndex(index), 1)
}

fn content(fill: u8) -> Bytes {
    vec![fill; BLOCK_BYTES].into()
}

fn sum(at: u64, fill: u8) -> u32 {
    block_checksum(BlockIndex(at), &content(fill))
}

fn write(data: &VolumeData, log: &Log, index: u64, at: u64, fill: u8) {
    crate::replica::write(data, log, index, block(at), fill);
}

async fn read(data: &VolumeData, at: u64) -> u8 {
    let bytes = data.read(block(at)).await.expect("is read");
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

#[test]
fn what_is_applied_after_the_comparison_goes_with_the_old_log() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let log = Rc::new(Log::default());
        let data = replica(place.path(), &log).await;
        write(&data, &log, 1, 0, 0xaa);
        data.clean(&At(1)).await.expect("is cleaned");
        let staging = data.begin_staging(vec![LayerMark::ONLY]).await.expect("begins");
        let home = data.home_checksums(LayerMark::ONLY, ChunkIndex(0)).await.expect("is read");
        assert_eq!(home[0], Some(BlockSum::Data(sum(0, 0xaa))), "the leader has the same: it is not staged");
        // Its own log says otherwise in between; the leader's content has come back to what it was.
        write(&data, &log, 2, 0, 0xbb);
        data.clean(&At(2)).await.expect("is left for later");
        staging.commit(checkpoint(9)).await.expect("is switched in");
        drop(staging);
        assert_eq!(read(&data, 0).await, 0xaa, "an older entry shows through the rebuild");
        write(&data, &log, 10, 0, 0xcc);
        data.clean(&At(10)).await.expect("is cleaned");
        assert_eq!((read(&data, 0).await, data.checkpoint().id.index), (0xcc, LogIndex(10)));
    });
}

#[test]
fn a_block_that_is_not_home_equals_nothing_of_the_leader() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let log = Rc::new(Log::default());
        let data = replica(place.path(), &log).await;
        write(&data, &log, 1, 3, 0xaa);
        let staging = data.begin_staging(vec![LayerMark::ONLY]).await.expect("begins");
        let summaries = data.home_summaries(LayerMark::ONLY, ChunkIndex(0), 4).await.expect("is read");
        assert_eq!(summaries.len(), 1);
        assert_eq!((summaries[0].last_index, summaries[0].present), (LogIndex::ZERO, true));
        let home = data.home_checksums(LayerMark::ONLY, ChunkIndex(0)).await.expect("is read");
        assert_eq!(home[3], None);
        assert!(data.begin_staging(vec![LayerMark::ONLY]).await.is_err(), "one rebuild at a time");
        staging.put(LayerId::BASE, block(3), content(0xaa), &[sum(3, 0xaa)]).await.expect("is staged");
        staging.commit(checkpoint(9)).await.expect("is switched in");
        drop(staging);
        assert_eq!(read(&data, 3).await, 0xaa);
        data.begin_staging(vec![LayerMark::ONLY]).await.expect("the next one may begin");
    });
}

/// The state at 6 is all that is durable here; what is applied goes up to 9.
struct Behind;

impl CheckpointSource for Behind {
    fn capture(&self) -> Checkpoint {
        checkpoint(9)
    }
    fn captured_up_to(&self, _: LogIndex) -> Option<Checkpoint> {
        Some(checkpoint(6))
    }
}

#[test]
fn an_older_state_is_served_only_with_what_has_overwritten_it() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let log = Rc::new(Log::default());
        let data = replica(place.path(), &log).await;
        write(&data, &log, 5, 0, 0xaa);
        write(&data, &log, 9, 0, 0xbb);
        data.clean(&Behind).await.expect("is cleaned");
        let made = data.checkpoint();
        // Entry 5 is in the checkpoint, but not in the home file: a restart that loses entry 9 has neither.
        assert_eq!((made.id.index, made.serve_floor), (LogIndex(6), LogIndex(9)));
        assert_eq!(read(&data, 0).await, 0xbb);
    });
}
