//! A volume's snapshot quota (INV-QUOTA): whatever is written and whatever snapshots are asked for, no replica's layers
//! hold more than the volume's size and the quota; and what is deleted makes room for new ones.

mod group;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use group::steps::within;
use group::{GROUP, Member, Switch, attach, block, control, first_leads, members};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::planted;
use holdfast_protocol::refusal::Refusal;
use holdfast_protocol::volume::VolumeReply;
use holdfast_replica::messages::{DataReply, DataRequest};
use holdfast_session::Session;
use holdfast_types::{BlockIndex, BlockRange, ByteSize, CHUNK_BLOCKS, CHUNK_BYTES, SnapshotId};

const MEBIBYTE: u64 = 1 << 20;
/// Of the volumes of these tests.
const SIZE: u64 = 64 * MEBIBYTE;
const QUOTA: ByteSize = ByteSize(20 * MEBIBYTE);

/// Writes the first mebibytes of the volume.
async fn fill(session: &Session, mebibytes: u64, value: u8) {
    for start in (0..mebibytes * 256).step_by(256) {
        let range = BlockRange::new(BlockIndex(start), 256);
        within(30, "a write", session.write(range, block(value, 256)))
            .await
            .expect("in time")
            .expect("writes");
    }
}

/// Asks the leader for a snapshot, as the catalog does.
async fn make(leader: &Member, id: u128) -> VolumeReply {
    let command = VolumeCommand::Snapshot { id: SnapshotId(id), name: format!("s{id}"), created_ms: 0 };
    let request = DataRequest::MakeSnapshot { group: GROUP, command: command.encode(), quota: QUOTA };
    let volume = leader.host.volume(GROUP).expect("runs");
    match volume.answer(request, Bytes::new()).await.0 {
        DataReply::Applied { reply, .. } => reply,
        other => panic!("it answered {other:?}"),
    }
}

fn is_made(reply: &VolumeReply) -> bool {
    matches!(reply, VolumeReply::Snapshotted { .. })
}

/// Everything is home.
async fn settled(all: &[Member]) {
    for member in all {
        let volume = member.host.volume(GROUP).expect("runs");
        let home = async {
            while volume.data().dirty().any || volume.data().dirty().merges {
                holdfast_env::sleep(Duration::from_millis(20)).await;
            }
        };
        within(30, "everything is home", home).await.expect("in time");
    }
}

/// Bytes that the file system has given to the blocks of a store's replicas.
fn blocks_below(root: &Path) -> u64 {
    let mut bytes = 0;
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            // Files come and go while a store works.
            let Ok(found) = std::fs::symlink_metadata(&path) else { continue };
            if found.is_dir() {
                pending.push(path);
            } else if path.ends_with("home") {
                bytes += found.blocks() * 512;
            }
        }
    }
    bytes
}

#[test]
fn a_snapshot_that_could_not_be_kept_is_refused_and_deleting_makes_room() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let all = members(place.path(), &Rc::new(Switch::default())).await;
        within(30, "the first leads", first_leads(&all)).await.expect("in time");
        let session = attach(&all[1], false).await.expect("attaches");
        fill(&session, 8, 1).await;
        settled(&all).await;
        assert!(is_made(&make(&all[0], 1).await), "8 MiB may have to be kept");
        fill(&session, 8, 2).await;
        settled(&all).await;
        let second = make(&all[0], 2).await;
        assert!(is_made(&second), "16 MiB: {second:?}");
        fill(&session, 8, 3).await;
        settled(&all).await;
        match make(&all[0], 3).await {
            VolumeReply::Refused(Refusal::SnapshotQuota { held, quota }) => {
                // A file system may count its own lists of extents.
                assert!((24 * MEBIBYTE..25 * MEBIBYTE).contains(&held), "{held} bytes");
                assert_eq!(quota, QUOTA.0);
            }
            other => panic!("24 MiB: {other:?}"),
        }
        assert_eq!(make(&all[0], 2).await, second, "what is there is no new one");
        // Refused for good or for now: never for good while what was dropped is on its way out.
        control(&all[0], VolumeCommand::DropSnapshot { id: SnapshotId(1) }).await;
        let made = insist(&all[0], 4).await;
        assert!(is_made(&made), "{made:?}");
        for member in &all {
            member.host.stop().await;
        }
    });
}

/// As [`make`], until it is made or refused for good.
async fn insist(leader: &Member, id: u128) -> VolumeReply {
    let made = async {
        loop {
            match make(leader, id).await {
                VolumeReply::Refused(Refusal::SnapshotsUnsettled) => {
                    holdfast_env::sleep(Duration::from_millis(5)).await;
                }
                other => return other,
            }
        }
    };
    within(30, "what was done last is settled", made).await.expect("in time")
}

/// Single blocks far apart take whole chunks when they come home.
#[test]
fn what_is_not_home_yet_counts_as_it_will_stand() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let all = members(place.path(), &Rc::new(Switch::default())).await;
        within(30, "the first leads", first_leads(&all)).await.expect("in time");
        let session = attach(&all[1], false).await.expect("attaches");
        for chunk in 0..SIZE / CHUNK_BYTES {
            let at = BlockRange::new(BlockIndex(chunk * CHUNK_BLOCKS), 1);
            let written = within(30, "a write", session.write(at, block(1, 1))).await;
            written.expect("in time").expect("writes");
        }
        let answer = insist(&all[0], 1).await;
        assert!(matches!(answer, VolumeReply::Refused(Refusal::SnapshotQuota { .. })), "{answer:?}");
        for member in &all {
            member.host.stop().await;
        }
    });
}

/// Writes and asks for snapshots as fast as it can; the most that the blocks of a replica have taken, in bytes.
async fn attack(place: &Path) -> u64 {
    let all = members(place, &Rc::new(Switch::default())).await;
    within(30, "the first leads", first_leads(&all)).await.expect("in time");
    let session = attach(&all[1], false).await.expect("attaches");
    let mut most = 0;
    for round in 1..=3 {
        // Whatever it is answered: the guest goes on.
        let _answer = insist(&all[0], round).await;
        fill(&session, 18, round as u8).await;
        settled(&all).await;
        most = (1..=3).map(|n| blocks_below(&place.join(format!("n{n}")))).fold(most, u64::max);
    }
    fill(&session, SIZE / MEBIBYTE, 9).await;
    settled(&all).await;
    most = (1..=3).map(|n| blocks_below(&place.join(format!("n{n}")))).fold(most, u64::max);
    for member in &all {
        member.host.stop().await;
    }
    most
}

#[test]
fn no_replica_grows_beyond_size_and_quota() {
    let place = tempfile::tempdir().expect("a place");
    let most = holdfast_env::real::run(attack(place.path()));
    assert!(most <= SIZE + QUOTA.0, "{most} bytes");
    assert!(most > SIZE, "{most} bytes: a snapshot was made and is kept");
}

#[test]
fn without_the_quota_it_does() {
    let place = tempfile::tempdir().expect("a place");
    let most = holdfast_env::real::run(async {
        planted::plant(&["snapshot-quota-ignored"]);
        let most = attack(place.path()).await;
        planted::plant(&[]);
        most
    });
    assert!(most > SIZE + QUOTA.0, "{most} bytes");
}
