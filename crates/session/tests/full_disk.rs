//! A medium that fills up (INV-SPACE, FAULTS row 16): data waits and nobody sees an error, reads and trims go on, and
//! what waits goes on by itself when there is room.

mod group;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use group::{GROUP, Member, Switch, attach, begin, first_leads, start_on};
use holdfast_env::Instant;
use holdfast_replica::administration::{self, ShardRequest, StoreReport};
use holdfast_replica::{Group, Volume};
use holdfast_session::Session;
use holdfast_store::testing::MemoryDisk;
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, StoreId};

const LONG: Duration = Duration::from_secs(60);
/// Requests of 1 MiB that the volume has room for.
const REQUESTS: u64 = 64;
const REQUEST_BLOCKS: u64 = 256;
/// What a store may take that may not take all: its journal and its reserve of 24 MiB each, and this.
const BUDGET: u64 = 48 * MIB + 20 * MIB;
const MIB: u64 = 1 << 20;
/// What is left on a medium that is to fill up.
const LEFT: u64 = 5 << 20;

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    holdfast_env::timeout(LONG, work).await.unwrap_or_else(|_| panic!("{what}: not within {LONG:?}"))
}

/// Ends when it is so. What is looked at tells nobody of its changes.
async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let look = async {
        while !so() {
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
    };
    within(what, look).await;
}

fn volume(member: &Member) -> Rc<Volume> {
    member.host.volume(GROUP).expect("runs")
}

fn group_of(member: &Member) -> Rc<Group> {
    volume(member).group().clone()
}

fn is_full(member: &Member) -> bool {
    member.host.journal().is_full()
}

/// Three members, each on a disk in memory; the first leads.
async fn members(place: &Path, switch: &Rc<Switch>, disks: &[MemoryDisk]) -> Vec<Member> {
    let mut members = Vec::new();
    for (number, disk) in (1..).zip(disks) {
        let path = place.join(format!("n{number}"));
        members.push(start_on(&path, switch, number, true, |_| disk.directory()).await);
    }
    begin(&members).await;
    within("the first leads", first_leads(&members)).await;
    members
}

fn disks() -> Vec<MemoryDisk> {
    (1..=3).map(MemoryDisk::new).collect()
}

fn fill_up(disk: &MemoryDisk) {
    disk.limit_space(Some(disk.used() + LEFT));
}

fn range_of(request: u64) -> BlockRange {
    BlockRange::new(BlockIndex(request % REQUESTS * REQUEST_BLOCKS), REQUEST_BLOCKS as u32)
}

fn data(request: u64) -> bytes::Bytes {
    vec![request as u8 + 1; REQUEST_BLOCKS as usize * BLOCK_BYTES].into()
}

/// A guest that writes one request after another, `stride` apart, and notes how long each took.
struct Guest {
    end: Rc<Cell<bool>>,
    took: Rc<RefCell<Vec<Duration>>>,
    ended: tokio::sync::oneshot::Receiver<()>,
}

impl Guest {
    fn start(session: Rc<Session>, requests: u64) -> Self {
        let (end, took) = (Rc::new(Cell::new(false)), Rc::new(RefCell::new(Vec::new())));
        let (ending, ended) = tokio::sync::oneshot::channel();
        let (stop, noted) = (end.clone(), took.clone());
        holdfast_env::spawn("guest", async move {
            for request in 0..requests {
                if stop.get() {
                    break;
                }
                let began = Instant::now();
                session.write(range_of(request), data(request)).await.expect("a write never fails");
                noted.borrow_mut().push(Instant::now().since(began));
                // A breath that leaves the members their turn.
                holdfast_env::sleep(Duration::from_millis(2)).await;
            }
            ending.send(()).expect("somebody waits");
        });
        Self { end, took, ended }
    }

    fn count(&self) -> u64 {
        self.took.borrow().len() as u64
    }

    fn longest(&self) -> Duration {
        self.took.borrow().iter().max().copied().unwrap_or_default()
    }

    /// Ends it after the request that it is at; awaited, when that is done.
    fn give_up(self) -> tokio::sync::oneshot::Receiver<()> {
        self.end.set(true);
        self.ended
    }

    async fn end(self) -> u64 {
        self.end.set(true);
        within("the guest's last write", self.ended).await.expect("it ends");
        self.took.borrow().len() as u64
    }

    /// Nothing is written for a while.
    async fn stands_still(&self, long: Duration) -> u64 {
        let before = self.count();
        let until = Instant::now() + long;
        while Instant::now() < until {
            assert!(self.count() <= before + 1, "data is written that there is no room for");
            holdfast_env::sleep(Duration::from_millis(20)).await;
        }
        self.count()
    }
}

/// What was acknowledged and not trimmed reads right.
async fn check(session: &Session, requests: std::ops::Range<u64>) {
    for request in requests {
        let read = within("a read", session.read(range_of(request))).await.expect("reads");
        assert_eq!(read, data(request), "request {request}");
    }
}

/// Every member has applied everything, and holds the same.
async fn are_equal(members: &[Member]) {
    let last = members.iter().map(|member| group_of(member).position().applied_index()).max();
    let mut digests = Vec::new();
    for member in members {
        assert_eq!(member.host.journal().failed(), None);
        assert_eq!(volume(member).fault(), None);
        within("it catches up", group_of(member).position().reached(last.expect("three"))).await;
        digests.push(volume(member).data().digest().await.expect("a digest").to_string());
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

async fn stop(members: &[Member]) {
    for member in members {
        member.host.stop().await;
    }
}

/// The medium of the leader alone fills up.
#[test]
fn a_leader_whose_medium_is_full_lets_data_wait_and_trims_make_room() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, disks) = (Rc::new(Switch::default()), disks());
        let members = members(place.path(), &switch, &disks).await;
        let session = attach(&members[2], false).await.expect("attaches");
        fill_up(&disks[0]);
        let guest = Guest::start(session.clone(), REQUESTS);
        until("the medium is full", || volume(&members[0]).waits_for_room()).await;
        assert!(is_full(&members[0]) && !is_full(&members[1]));
        let written = guest.stands_still(Duration::from_secs(3)).await;
        assert!(written < REQUESTS - 8, "{written} requests were written: the medium was to be full before");
        assert!(group_of(&members[0]).is_leader(), "nothing has moved");
        check(&session, 0..written).await;
        // What is in the journal comes home in the reserve's room.
        until("the journal is home", || volume(&members[0]).data().dirty().bytes == 0).await;
        // A third of what was written is given back.
        let trimmed = (written / 3).max(8);
        for request in 0..trimmed {
            within("a trim", session.trim(range_of(request))).await.expect("trims");
        }
        until("there is room again", || !is_full(&members[0])).await;
        until("writes go on by themselves", || guest.count() > written + 1).await;
        disks[0].limit_space(None);
        let written = guest.end().await;
        check(&session, trimmed..written).await;
        are_equal(&members).await;
        stop(&members).await;
    });
}

/// FAULTS row 16: it only stops counting. More is written than its journal holds, and than the others' do.
#[test]
fn a_follower_whose_medium_is_full_slows_nobody_and_catches_up() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, disks) = (Rc::new(Switch::default()), disks());
        let members = members(place.path(), &switch, &disks).await;
        let session = attach(&members[2], false).await.expect("attaches");
        fill_up(&disks[1]);
        let guest = Guest::start(session.clone(), 2 * REQUESTS);
        until("everything is written", || guest.count() == 2 * REQUESTS).await;
        assert!(guest.longest() < Duration::from_secs(1), "{:?} beside a full follower", guest.longest());
        assert!(is_full(&members[1]), "the medium was to be full");
        assert!(!volume(&members[0]).waits_for_room());
        let behind = group_of(&members[1]).position().applied_index();
        assert!(behind < group_of(&members[0]).position().applied_index(), "it was to fall behind");
        guest.end().await;
        disks[1].limit_space(None);
        within("it has room", async {
            while is_full(&members[1]) {
                holdfast_env::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        are_equal(&members).await;
        check(&session, REQUESTS..2 * REQUESTS).await;
        stop(&members).await;
    });
}

/// The leader has room, and nobody else.
#[test]
fn data_waits_while_the_media_of_a_majority_are_full() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, disks) = (Rc::new(Switch::default()), disks());
        let members = members(place.path(), &switch, &disks).await;
        let session = attach(&members[0], false).await.expect("attaches");
        disks[1..].iter().for_each(fill_up);
        let guest = Guest::start(session.clone(), REQUESTS);
        until("two media are full", || volume(&members[0]).waits_for_room()).await;
        assert!(!is_full(&members[0]) && is_full(&members[1]) && is_full(&members[2]));
        let written = guest.stands_still(Duration::from_secs(3)).await;
        assert!(written < REQUESTS - 8, "{written} requests were written");
        check(&session, 0..written).await;
        // An administrator's commands go on, too: somebody else takes the volume, and the guest goes with it.
        within("a trim", session.trim(range_of(0))).await.expect("trims");
        // Room on one of them makes a majority.
        disks[2].limit_space(None);
        until("writes go on by themselves", || guest.count() > written + 1).await;
        disks[1].limit_space(None);
        let written = guest.end().await;
        check(&session, 1..written).await;
        are_equal(&members).await;
        stop(&members).await;
    });
}

/// A daemon that starts on a full medium finds its replicas whole, and data waits as before.
#[test]
fn a_daemon_starts_on_a_full_medium_and_trims_make_room() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, disks) = (Rc::new(Switch::default()), disks());
        let mut all = members(place.path(), &switch, &disks).await;
        let session = attach(&all[2], false).await.expect("attaches");
        disks.iter().for_each(fill_up);
        let guest = Guest::start(session.clone(), REQUESTS);
        until("the media are full", || volume(&all[0]).waits_for_room()).await;
        let written = guest.stands_still(Duration::from_secs(1)).await;
        all[0].host.stop().await;
        drop(all.remove(0));
        let path = place.path().join("n1");
        let again = start_on(&path, &switch, 1, false, |_| disks[0].directory()).await;
        assert_eq!(again.host.faulty(), []);
        assert!(is_full(&again), "nobody has made room");
        all.insert(0, again);
        guest.stands_still(Duration::from_secs(1)).await;
        let trimmed = written - 2;
        for request in 0..trimmed {
            within("a trim", session.trim(range_of(request))).await.expect("trims");
        }
        until("there is room again", || all.iter().all(|member| !is_full(member))).await;
        until("writes go on by themselves", || guest.count() > written).await;
        disks.iter().for_each(|disk| disk.limit_space(None));
        let written_by_now = guest.end().await;
        check(&session, trimmed..written_by_now).await;
        are_equal(&all).await;
        stop(&all).await;
    });
}

/// How the store of a member is, as it says itself.
async fn report_of(member: &Member) -> StoreReport {
    let asked = administration::carry_out(&member.host, ShardRequest::Report);
    within("a report", asked).await.expect("is told").expect("a report")
}

/// INV-BUDGET: the leader's store may take no more, and its medium has room for ever.
#[test]
fn a_store_that_has_used_up_its_budget_lets_data_wait_and_trims_make_room() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, disks) = (Rc::new(Switch::default()), disks());
        switch.capacity.borrow_mut().insert(StoreId(1), BUDGET);
        let members = members(place.path(), &switch, &disks).await;
        let session = attach(&members[2], false).await.expect("attaches");
        let guest = Guest::start(session.clone(), REQUESTS);
        until("the budget is used up", || {
            assert!(disks[0].used() <= BUDGET, "{} bytes stand", disks[0].used());
            volume(&members[0]).waits_for_room()
        })
        .await;
        let written = guest.stands_still(Duration::from_secs(1)).await;
        assert!(
            written < REQUESTS - 8,
            "{written} requests were written: the budget was to be used up before"
        );
        assert!(group_of(&members[0]).is_leader(), "nothing has moved");
        let report = report_of(&members[0]).await;
        assert!(report.full_ms > 0 && report.is_beyond_budget && report.waiting == 1, "{report:?}");
        assert_eq!((report.capacity_bytes, report.total_bytes), (BUDGET, BUDGET));
        assert_eq!(report_of(&members[1]).await.capacity_bytes, 0);
        check(&session, 0..written).await;
        until("the journal is home", || volume(&members[0]).data().dirty().bytes == 0).await;
        let trimmed = (written / 2).max(8);
        for request in 0..trimmed {
            within("a trim", session.trim(range_of(request))).await.expect("trims");
        }
        until("there is room again", || !is_full(&members[0])).await;
        until("writes go on by themselves", || guest.count() > written + 1).await;
        assert!(disks[0].used() <= BUDGET);
        // What is left is not enough for all that the guest wants to write.
        let end = guest.give_up();
        let trims = async {
            for request in trimmed..written {
                session.trim(range_of(request)).await.expect("trims");
            }
        };
        within("trims", trims).await;
        within("the guest's last write", end).await.expect("it ends");
        are_equal(&members).await;
        assert!(disks[0].used() <= BUDGET);
        stop(&members).await;
    });
}

/// More stands than the store may take since its daemon was started anew: it is full, not dead.
#[test]
fn a_store_that_may_take_less_than_stands_makes_room_by_trims() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, disks) = (Rc::new(Switch::default()), disks());
        let mut all = members(place.path(), &switch, &disks).await;
        let session = attach(&all[2], false).await.expect("attaches");
        for request in 0..REQUESTS / 2 {
            session.write(range_of(request), data(request)).await.expect("writes");
        }
        all[0].host.stop().await;
        drop(all.remove(0));
        switch.capacity.borrow_mut().insert(StoreId(1), BUDGET);
        assert!(disks[0].used() > BUDGET, "{} bytes stand", disks[0].used());
        let path = place.path().join("n1");
        let again = start_on(&path, &switch, 1, false, |_| disks[0].directory()).await;
        assert_eq!(again.host.faulty(), []);
        assert!(is_full(&again), "more stands than it may take");
        assert!(report_of(&again).await.is_beyond_budget);
        all.insert(0, again);
        within("the first leads", first_leads(&all)).await;
        // As many as fit once there is room again.
        let guest = Guest::start(session.clone(), 8);
        guest.stands_still(Duration::from_secs(1)).await;
        assert_eq!(guest.count(), 0, "no data is taken");
        // Not where the guest's first write waits: what overlaps waits for it.
        for request in 1..REQUESTS / 2 {
            within("a trim", session.trim(range_of(request))).await.expect("trims");
        }
        until("there is room again", || !is_full(&all[0])).await;
        until("writes go on by themselves", || guest.count() == 8).await;
        assert!(disks[0].used() <= BUDGET, "{} bytes stand", disks[0].used());
        guest.end().await;
        are_equal(&all).await;
        stop(&all).await;
    });
}

/// What the tests above rest on: without it they would fail.
fn goes_on_after_trims(planted: &[&str]) -> bool {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, disks) = (Rc::new(Switch::default()), disks());
        let members = members(place.path(), &switch, &disks).await;
        let session = attach(&members[2], false).await.expect("attaches");
        holdfast_protocol::planted::plant(planted);
        disks.iter().for_each(fill_up);
        let guest = Guest::start(session.clone(), REQUESTS);
        let (mut before, mut trimmed) = (u64::MAX, 0);
        while before != guest.count() {
            before = guest.count();
            // Whoever comes to the end of the journal is slowed: to the brim is when nothing comes for long.
            holdfast_env::sleep(Duration::from_secs(5)).await;
        }
        let trims = async {
            while trimmed < before {
                session.trim(range_of(trimmed)).await.expect("trims");
                trimmed += 1;
            }
        };
        let trimmed = holdfast_env::timeout(Duration::from_secs(10), trims).await.is_ok();
        let goes_on = async {
            while guest.count() < before + 2 {
                holdfast_env::sleep(Duration::from_millis(20)).await;
            }
        };
        let went_on = holdfast_env::timeout(Duration::from_secs(10), goes_on).await.is_ok() && trimmed;
        holdfast_protocol::planted::plant(&[]);
        disks.iter().for_each(|disk| disk.limit_space(None));
        // What stands still would not stop, either.
        if went_on {
            guest.end().await;
            stop(&members).await;
        }
        went_on
    })
}

#[test]
fn a_store_that_is_filled_to_the_brim_is_noticed() {
    assert!(goes_on_after_trims(&[]));
    assert!(!goes_on_after_trims(&["fill-up", "hoard-the-reserve"]), "trims make room without any of it");
}
