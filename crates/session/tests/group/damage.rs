//! Damage to the files of a group's replicas and to what is on its way between them, and what shows whether it is mended.

use std::cell::Cell;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use holdfast_env::net::Frame;
use holdfast_replica::Volume;
use holdfast_replica::scrub::ScrubOptions;
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, LogIndex, StoreId};
use holdfast_wire::rpc::{CallHead, CallKind, Service};

use super::{GROUP, Member, Switch, start};

pub const LONG: Duration = Duration::from_secs(20);

pub async fn within<T>(work: impl Future<Output = T>) -> T {
    holdfast_env::timeout(LONG, work).await.expect("within 20 s")
}

pub fn volume(member: &Member) -> Rc<Volume> {
    member.host.volume(GROUP).expect("runs")
}

pub fn range(start: u64, count: u32) -> BlockRange {
    BlockRange::new(BlockIndex(start), count)
}

/// A replica's file in the oldest layer.
pub fn file_of(place: &Path, number: u64, name: &str) -> PathBuf {
    file_in(place, number, LogIndex::ZERO, name)
}

/// A replica's file in the layer that began at an index.
pub fn file_in(place: &Path, number: u64, began: LogIndex, name: &str) -> PathBuf {
    let replicas = std::fs::read_dir(place.join(format!("n{number}/replicas"))).expect("is there");
    let replica = replicas.map(|entry| entry.expect("is read").path()).next().expect("one stands there");
    replica.join(format!("layer-{}", began.0)).join(name)
}

pub fn bytes_at(path: &Path, place: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    let file = std::fs::File::open(path).expect("opens");
    file.read_exact_at(&mut bytes, place * BLOCK_BYTES as u64).expect("is read");
    bytes
}

pub fn put_bytes(path: &Path, place: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).expect("opens");
    file.write_all_at(bytes, place * BLOCK_BYTES as u64).expect("is written");
    file.sync_all().expect("is synced");
}

/// Flips a bit of a block of a file; what it was before.
pub fn flip(path: &Path, place: u64) -> Vec<u8> {
    let before = bytes_at(path, place);
    let mut rotten = before.clone();
    rotten[40] ^= 8;
    put_bytes(path, place, &rotten);
    before
}

/// Every replica has applied everything and brought it home.
pub async fn all_home(members: &[Member]) {
    let last = volume(&members[0]).group().report().last_log;
    for member in members {
        let volume = volume(member);
        within(volume.group().position().reached(last)).await;
        while volume.data().dirty().any {
            within(volume.data().clean(volume.group().machine())).await.expect("cleans");
        }
    }
}

pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let look = async {
        while !is_so() {
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
    };
    holdfast_env::timeout(LONG, look).await.unwrap_or_else(|_| panic!("not within 20 s: {what}"));
}

/// Stops a member and starts it on what it left.
pub async fn again(place: &Path, switch: &Rc<Switch>, members: &mut Vec<Member>, number: u64) {
    let at = number as usize - 1;
    let old = members.remove(at);
    old.host.stop().await;
    drop(old);
    members.insert(at, start(place, switch, number, false).await);
}

pub async fn stop(members: &[Member]) {
    for member in members {
        member.host.stop().await;
    }
}

/// Calls and answers of a service whose block data is damaged on the way, so many times.
pub fn damaging(
    switch: &Switch,
    service: Service,
    kind: CallKind,
    times: u32,
    between: impl Fn(StoreId, StoreId) -> bool + 'static,
) -> Rc<Cell<u32>> {
    let damaged = Rc::new(Cell::new(0));
    let count = damaged.clone();
    *switch.damage.borrow_mut() = Some(Box::new(move |from, to, frame: &mut Frame| {
        let Some(head) = CallHead::read(&frame.head) else { return };
        let is_it = head.service == service && head.kind == kind && between(from, to);
        if !is_it || frame.body.iter().all(Bytes::is_empty) || count.get() >= times {
            return;
        }
        count.set(count.get() + 1);
        let part = frame.body.iter_mut().find(|part| !part.is_empty()).expect("one is not empty");
        let mut bytes = BytesMut::from(&part[..]);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 16;
        *part = bytes.freeze();
    }));
    damaged
}

/// What every replica holds, from its disk.
pub async fn all_equal(members: &[Member]) -> bool {
    all_home(members).await;
    let mut digests = Vec::new();
    for member in members {
        digests.push(volume(member).data().digest().await.expect("is read"));
    }
    digests.iter().all(|digest| *digest == digests[0] && digest.bad_blocks == 0)
}

/// As fast as the disk allows, again after an hour.
pub const SCRUB: ScrubOptions = ScrubOptions { period: Duration::from_secs(3600), bytes_per_second: 1 << 30 };
