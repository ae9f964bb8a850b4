//! What a store says of its space is true: beside the blocks that the file system has given to each file.

mod group;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use group::steps::within;
use group::{GROUP, Member, Switch, attach, block, first_leads, members, snapshot};
use holdfast_replica::administration::{self, ShardRequest, StoreReport};
use holdfast_replica::messages::{DataReply, DataRequest, ReplicaReport};
use holdfast_session::Session;
use holdfast_types::{BlockIndex, BlockRange};

/// Bytes that each file below a directory takes, as `du` counts them, by its name from there.
fn du(root: &Path) -> BTreeMap<String, u64> {
    let mut out = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            // Files come and go while a store works.
            let Ok(found) = std::fs::symlink_metadata(&path) else { continue };
            if found.is_dir() {
                pending.push(path);
                continue;
            }
            let name = path.strip_prefix(root).expect("below it").to_string_lossy().into_owned();
            out.insert(name, found.blocks() * 512);
        }
    }
    out
}

fn sum(files: &BTreeMap<String, u64>, counts: impl Fn(&str) -> bool) -> u64 {
    files.iter().filter(|(name, _)| counts(name)).map(|(_, bytes)| bytes).sum()
}

/// The layer that a file belongs to.
fn layer_of(name: &str) -> Option<u64> {
    name.split('/').find_map(|part| part.strip_prefix("layer-")).map(|id| id.parse().expect("an index"))
}

async fn report_of(member: &Member) -> StoreReport {
    let asked = administration::carry_out(&member.host, ShardRequest::Report);
    asked.await.expect("is told").expect("a report")
}

async fn replica_of(member: &Member) -> ReplicaReport {
    let volume = member.host.volume(GROUP).expect("runs");
    match volume.answer(DataRequest::Report { group: GROUP }, Bytes::new()).await.0 {
        DataReply::Report(report) => *report,
        other => panic!("it answered {other:?}"),
    }
}

async fn fill(session: &Session, from: u64, blocks: u64, value: u8) {
    for start in (from..from + blocks).step_by(256) {
        let range = BlockRange::new(BlockIndex(start), 256);
        within(30, "a write", session.write(range, block(value, 256)))
            .await
            .expect("in time")
            .expect("writes");
    }
}

/// Everything is home, and what is told is what stands.
async fn tells_the_truth(member: &Member, store: &Path) -> bool {
    let volume = member.host.volume(GROUP).expect("runs");
    if volume.data().dirty().any {
        return false;
    }
    let (before, report, replica) = (du(store), report_of(member).await, replica_of(member).await);
    if du(store) != before {
        return false;
    }
    let last = before.keys().filter_map(|name| layer_of(name)).max().expect("layers");
    let of_snapshots = |name: &str| layer_of(name).is_some_and(|layer| layer > 0 && layer < last);
    let snapshots = sum(&before, of_snapshots);
    let used = snapshots + sum(&before, |name| name.ends_with("/home") && !of_snapshots(name));
    let of_replicas = sum(&before, |name| name.starts_with("replicas/"));
    let expected = (
        sum(&before, |_| true),
        sum(&before, |name| name.starts_with("journal/")),
        sum(&before, |name| name == "reserve"),
        used,
        snapshots,
    );
    let told = (
        report.allocated_bytes,
        report.journal_bytes,
        report.reserve_bytes,
        report.used_bytes,
        report.snapshot_bytes,
    );
    let of_one = (replica.allocated_bytes, replica.used_bytes, replica.snapshot_bytes);
    let is_true = told == expected && of_one == (of_replicas, used, snapshots);
    if is_true {
        assert!(snapshots >= 1 << 20 && used >= snapshots + (2 << 20), "{expected:?}");
        assert_eq!(replica.journal_bytes, volume.log().held_bytes());
        assert!(report.allocated_bytes >= report.journal_bytes + report.reserve_bytes + report.used_bytes);
    } else {
        println!("told {told:?} and {of_one:?} of {expected:?} and {of_replicas}");
    }
    is_true
}

#[test]
fn what_is_told_is_what_the_file_system_has_given() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let all = members(place.path(), &switch).await;
        within(30, "the first leads", first_leads(&all)).await.expect("in time");
        let session = attach(&all[2], false).await.expect("attaches");
        fill(&session, 0, 1024, 1).await;
        snapshot(&all[0], 1).await;
        fill(&session, 256, 512, 2).await;
        snapshot(&all[0], 2).await;
        fill(&session, 2048, 256, 3).await;
        for (number, member) in (1..).zip(&all) {
            let store = place.path().join(format!("n{number}"));
            let told = async {
                while !tells_the_truth(member, &store).await {
                    holdfast_env::sleep(Duration::from_millis(100)).await;
                }
            };
            within(40, "the truth is told", told).await.expect("in time");
        }
        for member in &all {
            member.host.stop().await;
        }
    });
}
