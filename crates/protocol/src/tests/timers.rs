//! Timers that change while sessions renew, leaders come and go, and clocks run at different rates.

use std::time::Duration;

use holdfast_types::{LogIndex, TimersPolicy};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::{DUPLICATE, FRESH, attach, forced, volume};
use crate::command::VolumeCommand;
use crate::lease::{HolderWatch, LeaseTerms, SessionLease, SettleWait};
use crate::planted;
use crate::timers::{ChangeWatch, LADDER, TIGHT, Timers, VolumeTimers, choose};
use crate::volume::{Refusal, Unsettled, VolumeReply, VolumeState};

const MILLISECOND: u64 = 1_000_000;

fn timers(heartbeat_ms: u64) -> Timers {
    Timers::of_heartbeat(Duration::from_millis(heartbeat_ms))
}

fn begin(heartbeat_ms: u64) -> VolumeCommand {
    VolumeCommand::ChangeTimers { to: timers(heartbeat_ms) }
}

fn end(since: u64) -> VolumeCommand {
    VolumeCommand::TimersSettled { since: LogIndex(since) }
}

#[test]
fn a_change_has_two_steps_and_runs_beside_both() {
    let mut state = volume();
    assert_eq!(state.timers().run(), Timers::default());
    assert_eq!(state.apply(LogIndex(1), &begin(50)), DUPLICATE, "they are the defaults");
    assert_eq!(state.apply(LogIndex(2), &begin(20)), FRESH);
    assert_eq!(state.apply(LogIndex(3), &begin(20)), DUPLICATE);
    assert_eq!(state.apply(LogIndex(4), &begin(100)), VolumeReply::Refused(Refusal::TimersChanging));
    let now = state.timers();
    assert_eq!((now.settled(), now.wanted()), (Timers::default(), timers(20)));
    assert_eq!(now.granted_lease(), timers(20).session_lease, "the shorter");
    assert_eq!(now.waited_lease(), Timers::default().session_lease, "the longer");
    let run = now.run();
    assert_eq!(run.heartbeat, timers(20).heartbeat, "the faster");
    assert_eq!(run.election_min, Timers::default().election_min, "the slower");
    assert_eq!(run.election_max, Timers::default().election_max, "the slower");
    assert_eq!(state.apply(LogIndex(5), &end(1)), DUPLICATE, "that is another change");
    assert_eq!(state.timers(), now);
    assert_eq!(VolumeState::decode(&state.encode()), Ok(state.clone()));
    assert_eq!(state.apply(LogIndex(6), &end(2)), FRESH);
    assert_eq!((state.timers().run(), state.timers().change()), (timers(20), None));
    assert_eq!(state.apply(LogIndex(7), &end(2)), DUPLICATE);
    assert_eq!(VolumeState::decode(&state.encode()), Ok(state));
}

#[test]
fn timers_with_which_a_group_flaps_are_refused() {
    let mut state = volume();
    for bad in [
        timers(5),
        timers(4000),
        Timers { election_min: Duration::from_millis(99), ..timers(50) },
        Timers { election_max: Duration::from_millis(150), ..timers(50) },
        Timers { session_lease: Duration::from_millis(299), ..timers(50) },
    ] {
        let reply = state.apply(LogIndex(1), &VolumeCommand::ChangeTimers { to: bad });
        assert!(matches!(reply, VolumeReply::Refused(Refusal::Malformed(_))), "{bad:?}: {reply:?}");
    }
    assert_eq!(state, volume());
}

/// Between any two timers a leader with either, or with those of the change, is heard in time by followers with any.
#[test]
fn no_two_replicas_of_a_change_make_each_other_flap() {
    for (a, b) in [(10, 50), (50, 10), (50, 400), (400, 10), (20, 50)] {
        let (from, to) = (timers(a), timers(b));
        let mut state = volume();
        state.apply(LogIndex(1), &begin(a));
        state.apply(LogIndex(2), &end(1));
        state.apply(LogIndex(3), &begin(b));
        let run = state.timers().run();
        // The steps of a change: from the old ones to those between, and from there to the new ones.
        for (leader, follower) in [(from, run), (run, from), (run, to), (to, run), (run, run)] {
            assert!(leader.heartbeat * 3 <= follower.election_min, "{a} {b}: {leader:?} {follower:?}");
        }
    }
}

#[test]
fn timers_follow_the_network_and_do_not_swing() {
    let ms = Duration::from_millis;
    let auto = |trip, now| choose(TimersPolicy::Auto, trip, now).0;
    for (trip, heartbeat) in
        [(0, 50), (1, 50), (25, 50), (26, 100), (61, 200), (100, 200), (151, 400), (5000, 400)]
    {
        assert_eq!(auto(ms(trip), timers(50)), timers(heartbeat), "{trip} ms");
    }
    assert_eq!(auto(ms(20), timers(100)), timers(100), "on the border it stays");
    assert_eq!(auto(ms(12), timers(100)), timers(50));
    assert_eq!(auto(ms(12), timers(400)), timers(50), "over more than one step");
    assert_eq!(auto(Duration::ZERO, timers(400)), timers(400), "nothing is known");
    assert_eq!(choose(TimersPolicy::Tight, ms(1), timers(50)), (timers(15), true));
    assert_eq!(choose(TimersPolicy::Tight, ms(1), timers(15)), (timers(15), false));
    assert_eq!(
        choose(TimersPolicy::Tight, ms(6), timers(15)),
        (timers(50), false),
        "the network is too slow"
    );
    assert_eq!(choose(TimersPolicy::Tight, ms(4), timers(50)), (timers(50), false), "on the border it stays");
    assert_eq!(choose(TimersPolicy::Tight, ms(100), timers(50)), (timers(200), false));
    assert_eq!(choose(TimersPolicy::Auto, ms(1), timers(15)), (timers(50), true), "not tight any more");
    // A round trip anywhere, whatever the timers are: the next look changes nothing.
    for trip in 0..300 {
        for (heartbeat, _) in [TIGHT].iter().chain(&LADDER) {
            for policy in [TimersPolicy::Auto, TimersPolicy::Tight] {
                let first = choose(policy, ms(trip), timers(*heartbeat)).0;
                assert_eq!(choose(policy, ms(trip), first).0, first, "{policy:?} {trip} {heartbeat}");
            }
        }
    }
}

/// A clock: an unknown offset, and a rate within one percent of true time.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Clock {
    offset: u64,
    rate_permille: u64,
}

impl Clock {
    fn at(self, true_time: u64) -> u64 {
        self.offset + true_time / 1000 * self.rate_permille
    }
}

fn any_clock() -> impl Strategy<Value = Clock> {
    let rate = prop_oneof![Just(990_u64), Just(1010), 990_u64..=1010];
    (0_u64..1 << 40, rate).prop_map(|(offset, rate_permille)| Clock { offset, rate_permille })
}

#[derive(Clone, PartialEq, Debug)]
enum Op {
    Pause {
        milliseconds: u64,
    },
    Send,
    Grant,
    /// A leader that was replaced grants what it confirmed before that, by the timers that it knew then.
    LateGrant,
    Begin {
        heartbeat: u64,
    },
    /// The leader is asked to end the change, and does if it may.
    End,
    Elect {
        clock: Clock,
    },
    /// Another node takes the volume by force.
    Force,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => prop_oneof![0_u64..50, 0_u64..1500].prop_map(|milliseconds| Op::Pause { milliseconds }),
        5 => Just(Op::Send),
        5 => Just(Op::Grant),
        1 => Just(Op::LateGrant),
        2 => prop_oneof![Just(10_u64), Just(50), Just(100)].prop_map(|heartbeat| Op::Begin { heartbeat }),
        5 => Just(Op::End),
        1 => any_clock().prop_map(|clock| Op::Elect { clock }),
        1 => Just(Op::Force),
    ]
}

struct World {
    now: u64,
    session: Clock,
    lease: SessionLease,
    leader: Clock,
    /// When it was elected, by its clock.
    since: u64,
    /// Made at its first use, as a leader does.
    watch: Option<HolderWatch>,
    timers: VolumeTimers,
    index: u64,
    asked: Vec<u64>,
    late: Vec<(u64, VolumeTimers)>,
    unsettled: Option<(Unsettled, SettleWait)>,
    changes: u32,
}

fn terms(timers: &VolumeTimers) -> LeaseTerms {
    LeaseTerms { lease: timers.waited_lease(), drift_permille: 10 }
}

impl World {
    fn new(session: Clock, leader: Clock) -> Self {
        let timers = VolumeTimers::default();
        Self {
            now: MILLISECOND,
            session,
            lease: SessionLease::new(terms(&timers)),
            leader,
            since: leader.at(MILLISECOND),
            watch: None,
            timers,
            index: 10,
            asked: Vec::new(),
            late: Vec::new(),
            unsettled: None,
            changes: 0,
        }
    }

    fn leader_now(&self) -> u64 {
        self.leader.at(self.now)
    }

    fn with_watch<T>(&mut self, with: impl FnOnce(&mut HolderWatch) -> T) -> T {
        let (terms, since) = (terms(&self.timers), self.since);
        let watch = self.watch.get_or_insert_with(|| {
            let mut watch = HolderWatch::new(terms);
            watch.began_leading(since);
            watch
        });
        watch.follow(terms);
        with(watch)
    }

    fn step(&mut self, op: &Op) {
        self.index += 1;
        let now = self.leader_now();
        match op {
            Op::Pause { .. } => {}
            Op::Send => self.asked.push(self.lease.on_sent(self.session.at(self.now))),
            // Only the holder is granted a lease.
            Op::Grant if self.unsettled.is_none() => {
                if let Some(number) = self.asked.pop() {
                    self.with_watch(|watch| watch.granted(now));
                    self.lease.on_renewed(number, self.timers.granted_lease());
                }
            }
            Op::Grant => {}
            Op::LateGrant => {
                if let Some((number, known)) = self.late.pop() {
                    self.lease.on_renewed(number, known.granted_lease());
                }
            }
            Op::Begin { heartbeat } => {
                // Refused while another change is under way.
                let _begun = self.timers.begin(LogIndex(self.index), timers(*heartbeat));
            }
            Op::End => {
                let Some(change) = self.timers.change() else { return };
                if self.with_watch(|watch| watch.may_end(change, now)) {
                    assert!(self.timers.end(change.since), "it is this change");
                    self.changes += 1;
                }
            }
            Op::Elect { clock } => {
                if self.unsettled.is_none() {
                    self.late = self.asked.drain(..).map(|number| (number, self.timers)).collect();
                }
                (self.leader, self.watch) = (*clock, None);
                self.since = self.leader_now();
                let since = self.since;
                if let Some((unsettled, wait)) = &mut self.unsettled {
                    *wait = SettleWait::new(&terms(&self.timers), unsettled, since);
                }
            }
            Op::Force => {
                let mut state = volume();
                state.apply(LogIndex(1), &attach(0, 1, 1));
                state.apply(LogIndex(2), &forced(attach(1, 2, 2)));
                let unsettled = state.unsettled().expect("the change was forced").clone();
                let wait = SettleWait::new(&terms(&self.timers), &unsettled, now);
                self.unsettled.get_or_insert((unsettled, wait));
            }
        }
    }

    /// INV-TIMERS, INV-LEASE: whoever takes the session for dead, at the same instant of true time, is right.
    fn check(&mut self) -> Result<(), TestCaseError> {
        if !self.lease.valid(self.session.at(self.now)) {
            return Ok(());
        }
        let now = self.leader_now();
        let dead = self.with_watch(|watch| watch.presumed_dead(now));
        prop_assert!(!dead, "INV-TIMERS: the holder is taken for dead and reads");
        let settled = self.unsettled.as_ref().is_some_and(|(_, wait)| wait.is_over(now));
        prop_assert!(!settled, "INV-TIMERS: the volume settles and the former holder reads");
        Ok(())
    }
}

fn run(session: Clock, leader: Clock, ops: &[Op]) -> Result<u32, TestCaseError> {
    let mut world = World::new(session, leader);
    for op in ops {
        if let Op::Pause { milliseconds } = op {
            for _ in 0..*milliseconds {
                world.now += MILLISECOND;
                world.check()?;
            }
        }
        world.step(op);
        world.check()?;
    }
    Ok(world.changes)
}

fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

fn any_case() -> impl Strategy<Value = (Clock, Clock, Vec<Op>)> {
    (any_clock(), any_clock(), prop::collection::vec(any_op(), 1..80))
}

#[test]
fn no_lease_outlives_its_wait_whatever_timers_change() {
    planted::plant(&[]);
    let ended = std::cell::Cell::new(0);
    let result = runner(1000).run(&any_case(), |(session, leader, ops)| {
        ended.set(ended.get() + run(session, leader, &ops)?);
        Ok(())
    });
    assert_eq!(result, Ok(()));
    assert!(ended.get() > 100, "{} changes came to their end: the runs prove little", ended.get());
}

#[test]
fn a_lease_that_is_granted_by_the_longer_timers_is_found() {
    planted::plant(&["timers-unequal"]);
    let result = runner(1000).run(&any_case(), |(session, leader, ops)| run(session, leader, &ops).map(drop));
    planted::plant(&[]);
    assert!(
        matches!(&result, Err(TestError::Fail(why, _)) if why.message().starts_with("INV-TIMERS")),
        "{result:?}"
    );
}

/// A change that is ended at once is found, too: the wait is what makes it right.
#[test]
fn the_end_of_a_change_waits_for_the_longer_lease() {
    let mut timers = VolumeTimers::default();
    timers.begin(LogIndex(7), self::timers(10)).expect("they make sense");
    let change = timers.change().expect("it has begun");
    let mut watch = ChangeWatch::default();
    let wait = terms(&timers).waited();
    assert_eq!(wait, Duration::from_millis(1010), "the longer lease, and the drift");
    let until = watch.until(change, 5, wait);
    assert_eq!(until, 5 + 1010 * MILLISECOND);
    assert_eq!(watch.until(change, 900 * MILLISECOND, wait), until, "it counts from the first time");
    assert!(ChangeWatch::default().until(change, until, wait) > until, "a new leader counts anew");
}
