//! A leader stands on a disk that answers (INV-GRAY): who gives way when a disk hangs or is slow, and who does not.

mod group;

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use group::stalling::Stall;
use group::{GROUP, Member, Switch, attach, begin, block, first_leads, start_on};
use holdfast_env::Instant;
use holdfast_replica::{Group, SLOW_FLOOR};
use holdfast_session::Session;
use holdfast_store::journal::HUNG_AFTER;
use holdfast_types::{BlockIndex, BlockRange};

const LONG: Duration = Duration::from_secs(30);
/// How soon after the bound somebody else must lead.
const ELECTED_WITHIN: Duration = Duration::from_secs(2);

async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = T>) -> T {
    holdfast_env::timeout(limit, work).await.unwrap_or_else(|_| panic!("{what}: not within {limit:?}"))
}

fn group_of(member: &Member) -> Rc<Group> {
    member.host.volume(GROUP).expect("runs").group().clone()
}

/// Three members, each on a disk that can stall; the first leads.
async fn members(place: &Path, switch: &Rc<Switch>, stalls: &[Stall; 3]) -> Vec<Member> {
    let mut members = Vec::new();
    for (number, stall) in (1..).zip(stalls) {
        let path = place.join(format!("n{number}"));
        members.push(start_on(&path, switch, number, true, |inner| stall.over(inner)).await);
    }
    begin(&members).await;
    within(LONG, "the first leads", first_leads(&members)).await;
    members
}

/// Ends when one of these members leads, with its place among them.
async fn another_leads(members: &[Member]) -> usize {
    let mut found = None;
    until(|| {
        found = members.iter().position(|member| group_of(member).is_leader());
        found.is_some()
    })
    .await;
    found.expect("was waited for")
}

/// Ends when it is so. What is looked at tells nobody of its changes.
async fn until(mut so: impl FnMut() -> bool) {
    while !so() {
        holdfast_env::sleep(Duration::from_millis(5)).await;
    }
}

/// A guest that writes one block after another, with a breath in between that leaves the members their turn, and notes
/// how long each took.
struct Guest {
    stop: Rc<Cell<bool>>,
    took: Rc<std::cell::RefCell<Vec<Duration>>>,
    ended: tokio::sync::oneshot::Receiver<()>,
}

impl Guest {
    fn start(session: Rc<Session>) -> Self {
        let (stop, took) = (Rc::new(Cell::new(false)), Rc::new(std::cell::RefCell::new(Vec::new())));
        let (ending, ended) = tokio::sync::oneshot::channel();
        let (stopped, noted) = (stop.clone(), took.clone());
        holdfast_env::spawn("guest", async move {
            let mut n = 0u64;
            while !stopped.get() {
                let began = Instant::now();
                let range = BlockRange::new(BlockIndex(n % 64), 1);
                session.write(range, block((n / 64) as u8, 1)).await.expect("a write never fails");
                noted.borrow_mut().push(Instant::now().since(began));
                n += 1;
                holdfast_env::sleep(Duration::from_millis(2)).await;
            }
            ending.send(()).expect("somebody waits");
        });
        Self { stop, took, ended }
    }

    async fn end(self) {
        self.stop.set(true);
        within(LONG, "the guest's last write", self.ended).await.expect("it ends");
    }

    /// Ends after so many more writes.
    async fn more(&self, count: usize) {
        let enough = self.count() + count;
        until(|| self.count() >= enough).await;
    }

    /// The 99th of a hundred among the writes since the `from`th.
    fn p99_since(&self, from: usize) -> Duration {
        let mut took = self.took.borrow()[from..].to_vec();
        took.sort_unstable();
        took[took.len() * 99 / 100]
    }

    fn longest_since(&self, from: usize) -> Duration {
        self.took.borrow()[from..].iter().max().copied().unwrap_or_default()
    }

    fn count(&self) -> usize {
        self.took.borrow().len()
    }
}

/// The guest writes for so long.
async fn write_for(guest: &Guest, long: Duration) {
    let until = Instant::now() + long;
    while Instant::now() < until {
        within(LONG, "writes", guest.more(50)).await;
    }
}

/// FAULTS row 18.
#[test]
fn a_leader_whose_disk_hangs_for_good_is_replaced_and_writes_go_on() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, stalls) = (Rc::new(Switch::default()), <[Stall; 3]>::default());
        let members = members(place.path(), &switch, &stalls).await;
        let guest = Guest::start(attach(&members[2], false).await.expect("attaches"));
        within(LONG, "writes", guest.more(20)).await;
        let before = guest.count();
        stalls[0].begin();
        let began = Instant::now();
        within(HUNG_AFTER + ELECTED_WITHIN, "another leads", another_leads(&members[1..])).await;
        assert!(Instant::now().since(began) > HUNG_AFTER, "it was not given away before the bound");
        within(LONG, "writes go on", guest.more(200)).await;
        assert!(guest.longest_since(before) < ELECTED_WITHIN, "{:?}", guest.longest_since(before));
        assert!(!group_of(&members[0]).is_leader(), "the old leader does not take itself for one");
        assert!(group_of(&members[0]).confirm_leadership().await.is_err());
        // When the disk answers again it is a follower like any other.
        stalls[0].end();
        guest.end().await;
        let last = within(LONG, "a leader", another_leads(&members)).await;
        let last = group_of(&members[last]).position().applied_index();
        within(LONG, "it catches up", group_of(&members[0]).position().reached(last)).await;
        within(LONG, "it speaks again", until(|| !group_of(&members[0]).is_silent())).await;
        for member in &members {
            member.host.stop().await;
        }
    });
}

#[test]
fn a_disk_that_hangs_for_a_moment_moves_nothing() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, stalls) = (Rc::new(Switch::default()), <[Stall; 3]>::default());
        let members = members(place.path(), &switch, &stalls).await;
        let guest = Guest::start(attach(&members[2], false).await.expect("attaches"));
        within(LONG, "writes", guest.more(20)).await;
        write_for(&guest, Duration::from_secs(2)).await;
        stalls[0].begin();
        holdfast_env::sleep(HUNG_AFTER * 3 / 4).await;
        stalls[0].end();
        write_for(&guest, Duration::from_secs(4)).await;
        guest.end().await;
        for member in &members {
            assert_eq!(group_of(member).usage().leaderships_given, 0);
        }
        for member in &members {
            member.host.stop().await;
        }
    });
}

/// A voter whose disk hangs, too, cannot save a vote: the leadership waits for one that can.
#[test]
fn leadership_is_not_given_to_voters_that_cannot_write() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, stalls) = (Rc::new(Switch::default()), <[Stall; 3]>::default());
        let members = members(place.path(), &switch, &stalls).await;
        let session = attach(&members[2], false).await.expect("attaches");
        let guest = Guest::start(session.clone());
        within(LONG, "writes", guest.more(20)).await;
        let term = group_of(&members[0]).leading_since().map(|(term, _)| term);
        stalls[0].begin();
        stalls[1].begin();
        let until = Instant::now() + HUNG_AFTER + 2 * ELECTED_WITHIN;
        while Instant::now() < until {
            assert!(!group_of(&members[0]).is_silent(), "nobody else could lead");
            assert!(group_of(&members[0]).is_leader());
            holdfast_env::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(group_of(&members[0]).leading_since().map(|(term, _)| term), term);
        // A majority hears the leader still, so what was acknowledged can be read.
        let first = BlockRange::new(BlockIndex(0), 1);
        within(LONG, "a read", session.read(first)).await.expect("reads");
        stalls[1].end();
        within(HUNG_AFTER + ELECTED_WITHIN, "another leads", another_leads(&members[1..])).await;
        within(LONG, "writes go on", guest.more(100)).await;
        guest.end().await;
        stalls[0].end();
        for member in &members {
            member.host.stop().await;
        }
    });
}

/// A hundred times slower than the others, and not hung.
#[test]
fn a_leader_whose_disk_is_slow_hands_over_once() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, stalls) = (Rc::new(Switch::default()), <[Stall; 3]>::default());
        let members = members(place.path(), &switch, &stalls).await;
        let guest = Guest::start(attach(&members[2], false).await.expect("attaches"));
        within(LONG, "writes", guest.more(200)).await;
        stalls[0].slow(3 * SLOW_FLOOR);
        within(LONG, "another leads", another_leads(&members[1..])).await;
        let given = || group_of(&members[0]).usage().leaderships_given == 1;
        within(LONG, "it was given away", until(given)).await;
        within(LONG, "writes go on", guest.more(50)).await;
        let from = guest.count();
        within(LONG, "writes go on", guest.more(500)).await;
        assert!(
            guest.p99_since(from) < SLOW_FLOOR,
            "{:?} with a leader on a quick disk",
            guest.p99_since(from)
        );
        guest.end().await;
        assert!(!group_of(&members[0]).is_leader());
        let given = members.iter().map(|member| group_of(member).usage().leaderships_given).sum::<u64>();
        assert_eq!(given, 1, "it goes to and fro");
        for member in &members {
            member.host.stop().await;
        }
    });
}

/// FAULTS row 17: it only stops counting.
#[test]
fn a_follower_whose_disk_is_slow_slows_nobody_and_catches_up() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, stalls) = (Rc::new(Switch::default()), <[Stall; 3]>::default());
        let members = members(place.path(), &switch, &stalls).await;
        let guest = Guest::start(attach(&members[2], false).await.expect("attaches"));
        within(LONG, "writes", guest.more(200)).await;
        stalls[1].slow(3 * SLOW_FLOOR);
        let from = guest.count();
        write_for(&guest, Duration::from_secs(5)).await;
        assert!(guest.p99_since(from) < SLOW_FLOOR, "{:?} beside a slow follower", guest.p99_since(from));
        assert!(group_of(&members[0]).is_leader(), "nothing has moved");
        stalls[1].slow(Duration::ZERO);
        guest.end().await;
        let last = group_of(&members[0]).position().applied_index();
        within(LONG, "it catches up", group_of(&members[1]).position().reached(last)).await;
        for member in &members {
            member.host.stop().await;
        }
    });
}

/// FAULTS row 14: a flush that fails once and would then succeed. What it left behind is unknown.
#[test]
fn a_disk_that_fails_once_stops_its_store_and_comes_back_by_recovery() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, stalls) = (Rc::new(Switch::default()), <[Stall; 3]>::default());
        let mut members = members(place.path(), &switch, &stalls).await;
        let guest = Guest::start(attach(&members[2], false).await.expect("attaches"));
        within(LONG, "writes", guest.more(50)).await;
        let before = guest.count();
        stalls[0].fail_once();
        within(ELECTED_WITHIN, "another leads", another_leads(&members[1..])).await;
        within(LONG, "writes go on", guest.more(200)).await;
        assert!(guest.longest_since(before) < ELECTED_WITHIN, "{:?}", guest.longest_since(before));
        let failed = members[0].host.journal().failed().expect("the store has stopped");
        assert!(failed.to_string().contains("os error 5"), "{failed}");
        assert!(!group_of(&members[0]).is_leader());
        assert_eq!(stalls[0].asked_since_failure(), Some(0), "it was tried again");
        // The daemon starts anew: what is there is read, and what is missing comes from the others.
        let old = members.remove(0);
        old.host.stop().await;
        drop(old);
        let path = place.path().join("n1");
        let again = start_on(&path, &switch, 1, false, |inner| stalls[0].over(inner)).await;
        assert_eq!(again.host.faulty(), []);
        guest.end().await;
        let leader = within(LONG, "a leader", another_leads(&members)).await;
        let last = group_of(&members[leader]).position().applied_index();
        within(LONG, "it catches up", group_of(&again).position().reached(last)).await;
        assert!(again.host.journal().failed().is_none());
        let content = [again.host.volume(GROUP), members[leader].host.volume(GROUP)];
        let mut digests = Vec::new();
        for volume in content.into_iter().map(|volume| volume.expect("runs")) {
            digests.push(volume.data().digest().await.expect("a digest").to_string());
        }
        assert_eq!(digests[0], digests[1]);
        for member in members.iter().chain([&again]) {
            member.host.stop().await;
        }
    });
}

/// What the tests above rest on: without it they would fail.
#[test]
fn a_leader_that_stays_on_a_hung_disk_is_noticed() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        holdfast_protocol::planted::plant(&["lead-on-a-hung-disk"]);
        let (switch, stalls) = (Rc::new(Switch::default()), <[Stall; 3]>::default());
        let members = members(place.path(), &switch, &stalls).await;
        let guest = Guest::start(attach(&members[2], false).await.expect("attaches"));
        within(LONG, "writes", guest.more(20)).await;
        stalls[0].begin();
        let others = another_leads(&members[1..]);
        let found = holdfast_env::timeout(HUNG_AFTER + ELECTED_WITHIN, others).await;
        assert!(found.is_err(), "another leads for another reason");
        stalls[0].end();
        guest.end().await;
        for member in &members {
            member.host.stop().await;
        }
        holdfast_protocol::planted::plant(&[]);
    });
}

#[test]
fn a_leadership_that_is_given_to_a_hung_voter_is_noticed() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        holdfast_protocol::planted::plant(&["give-to-who-cannot-write"]);
        let (switch, stalls) = (Rc::new(Switch::default()), <[Stall; 3]>::default());
        let members = members(place.path(), &switch, &stalls).await;
        let guest = Guest::start(attach(&members[2], false).await.expect("attaches"));
        within(LONG, "writes", guest.more(20)).await;
        stalls[0].begin();
        stalls[1].begin();
        let silent = until(|| group_of(&members[0]).is_silent());
        within(HUNG_AFTER + ELECTED_WITHIN, "it gives away what nobody can take", silent).await;
        let nobody = holdfast_env::timeout(ELECTED_WITHIN, another_leads(&members)).await;
        assert!(nobody.is_err(), "somebody could lead: this shows nothing");
        stalls.iter().for_each(Stall::end);
        guest.end().await;
        for member in &members {
            member.host.stop().await;
        }
        holdfast_protocol::planted::plant(&[]);
    });
}
