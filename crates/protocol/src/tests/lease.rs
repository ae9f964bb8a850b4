//! Leases under clocks that run at different rates, and the decisions that rest on them.

use std::time::Duration;

use holdfast_types::{Epoch, LogIndex, NodeName, SessionId};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::{attach, forced, volume};
use crate::command::VolumeCommand;
use crate::lease::{
    AttachDecision, HolderWatch, LeaseTerms, SessionLease, SettleWait, StartupSilence, decide_attach,
};
use crate::planted;
use crate::volume::{Refusal, VolumeState};

const TERMS: LeaseTerms = LeaseTerms { lease: Duration::from_secs(1), drift_permille: 10 };
const SECOND: u64 = 1_000_000_000;
const MILLISECOND: u64 = 1_000_000;

/// A clock: an unknown offset, and a rate within one percent of true time.
#[derive(Clone, Copy, Debug)]
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

/// One renewal: sent after a pause, granted and answered after delays; all in true time.
#[derive(Clone, Copy, Debug)]
struct Renewal {
    pause: u64,
    to_grant: u64,
    to_answer: u64,
}

fn any_renewal() -> impl Strategy<Value = Renewal> {
    let delay = || prop_oneof![Just(0), 0..20 * MILLISECOND, 0..3 * SECOND];
    (0..400 * MILLISECOND, delay(), delay()).prop_map(|(pause, to_grant, to_answer)| Renewal {
        pause,
        to_grant,
        to_answer,
    })
}

#[derive(Clone, Debug)]
struct Case {
    session: Clock,
    leaders: [Clock; 2],
    renewals: Vec<Renewal>,
    /// The change of holder commits so long after the last grant.
    to_commit: u64,
    /// And a new leader is elected so long after that.
    to_election: Option<u64>,
}

fn any_case() -> impl Strategy<Value = Case> {
    let gap = || prop_oneof![Just(0), 0..10 * MILLISECOND, 0..2 * SECOND];
    let clocks = (any_clock(), [any_clock(), any_clock()]);
    (clocks, prop::collection::vec(any_renewal(), 1..6), gap(), prop::option::of(gap())).prop_map(
        |((session, leaders), renewals, to_commit, to_election)| Case {
            session,
            leaders,
            renewals,
            to_commit,
            to_election,
        },
    )
}

fn unsettled_state() -> VolumeState {
    let mut state = volume();
    state.apply(LogIndex(1), &attach(0, 1, 1));
    state.apply(LogIndex(2), &forced(attach(1, 2, 2)));
    state
}

/// INV-LEASE, INV-SETTLE: whenever a leader takes the former holder for dead, or would propose `Settled`, that
/// holder's own lease has ended, at the same instant of true time.
fn no_lease_outlives_its_wait(case: &Case) -> Result<(), TestCaseError> {
    let mut lease = SessionLease::new(TERMS);
    let mut watch = HolderWatch::new(TERMS);
    watch.began_leading(case.leaders[0].at(0));
    let (mut now, mut granted, mut answers) = (0, 0, Vec::new());
    for renewal in &case.renewals {
        now += renewal.pause;
        let number = lease.on_sent(case.session.at(now));
        granted = granted.max(now + renewal.to_grant);
        watch.granted(case.leaders[0].at(granted));
        answers.push((granted + renewal.to_answer, number));
    }
    let committed = granted + case.to_commit;
    // The old leader granted nothing after the commit; a new one is elected after the last grant.
    let (leader, since) = match case.to_election {
        None => (case.leaders[0], committed),
        Some(gap) => (case.leaders[1], committed + gap),
    };
    let state = unsettled_state();
    let unsettled = state.unsettled().expect("the change was forced");
    let wait = SettleWait::new(&TERMS, unsettled, leader.at(since));
    answers.sort_unstable();
    let end = since + 3 * SECOND;
    let mut answers = answers.into_iter().peekable();
    for true_time in (0..end).step_by(usize::try_from(MILLISECOND).expect("small")) {
        while let Some((_, number)) = answers.next_if(|(at, _)| *at <= true_time) {
            lease.on_renewed(number, TERMS.lease);
        }
        if !lease.valid(case.session.at(true_time)) {
            continue;
        }
        let over = true_time >= since && wait.is_over(leader.at(true_time));
        prop_assert!(!over, "INV-LEASE: settled at {} while the lease lives", true_time);
        let dead = true_time >= granted && watch.presumed_dead(case.leaders[0].at(true_time));
        prop_assert!(!dead, "INV-LEASE: presumed dead at {} while the lease lives", true_time);
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_holder_reads_after_it_was_given_up(case in any_case()) {
        planted::plant(&[]);
        no_lease_outlives_its_wait(&case)?;
    }
}

#[test]
fn clocks_that_drift_unaccounted_for_are_found() {
    planted::plant(&["drift-ignored"]);
    let config = Config { cases: 400, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let result =
        TestRunner::new_with_rng(config, rng).run(&any_case(), |case| no_lease_outlives_its_wait(&case));
    planted::plant(&[]);
    let Err(TestError::Fail(why, _)) = result else { panic!("drift-ignored was not found: {result:?}") };
    assert!(why.message().starts_with("INV-LEASE"), "{}", why.message());
}

#[test]
fn a_session_counts_from_when_it_sent() {
    let mut lease = SessionLease::new(TERMS);
    assert!(!lease.valid(0));
    let first = lease.on_sent(SECOND);
    let second = lease.on_sent(SECOND * 3 / 2);
    lease.on_renewed(second, TERMS.lease);
    lease.on_renewed(first, TERMS.lease);
    assert!(lease.valid(SECOND * 2), "the older answer does not shorten the lease");
    assert!(lease.valid(SECOND * 3 / 2 + SECOND * 98 / 100));
    assert!(!lease.valid(SECOND * 5 / 2 - SECOND / 200), "one percent of drift is taken off");
    lease.on_renewed(77, TERMS.lease);
    assert!(!lease.valid(SECOND * 5 / 2), "an answer to nothing renews nothing");
    lease.end();
    let last = lease.on_sent(SECOND * 3);
    lease.on_renewed(last, TERMS.lease);
    assert!(!lease.valid(SECOND * 3), "a session that has ended serves nothing, whatever arrives");
}

#[test]
fn pending_renewals_are_bounded() {
    let mut lease = SessionLease::new(TERMS);
    let first = lease.on_sent(0);
    let numbers: Vec<u64> = (1..=16).map(|at| lease.on_sent(at)).collect();
    lease.on_renewed(first, TERMS.lease);
    assert!(!lease.valid(1), "forgotten: the lease is shorter for it, never longer");
    lease.on_renewed(numbers[15], TERMS.lease);
    assert!(lease.valid(17));
}

#[test]
fn a_new_leader_waits_one_full_lease() {
    let mut watch = HolderWatch::new(TERMS);
    assert!(!watch.presumed_dead(u64::MAX), "before it leads it gives nobody up");
    assert!(!watch.may_renew());
    watch.began_leading(5 * SECOND);
    assert!(watch.may_renew());
    assert!(!watch.presumed_dead(6 * SECOND), "one percent of drift is added");
    assert!(watch.presumed_dead(6 * SECOND + 10 * MILLISECOND));
    watch.stop_renewing();
    assert!(!watch.may_renew(), "a transfer has begun");
}

fn decide(state: &VolumeState, watch: &mut HolderWatch, command: &VolumeCommand, now: u64) -> AttachDecision {
    decide_attach(state, watch, command, now)
}

const CONFIRMED: AttachDecision = AttachDecision::Propose { confirmed: true };
const UNCONFIRMED: AttachDecision = AttachDecision::Propose { confirmed: false };

fn held_state() -> (VolumeState, HolderWatch) {
    let mut state = volume();
    state.apply(LogIndex(1), &attach(0, 1, 1));
    let mut watch = HolderWatch::new(TERMS);
    watch.began_leading(0);
    (state, watch)
}

#[test]
fn a_live_holder_is_not_stolen_from_without_force() {
    let (state, mut watch) = held_state();
    let held = AttachDecision::Refuse(Refusal::HeldBy { node: NodeName::new("n1"), epoch: Epoch(1) });
    assert_eq!(decide(&state, &mut watch, &attach(1, 2, 2), SECOND), held);
    assert_eq!(decide(&state, &mut watch, &attach(0, 2, 2), SECOND), held, "also with an old expectation");
    assert_eq!(decide(&state, &mut watch, &forced(attach(1, 2, 2)), SECOND), UNCONFIRMED);
    assert_eq!(
        decide(&state, &mut watch, &attach(1, 1, 3), SECOND),
        UNCONFIRMED,
        "its own node needs no force"
    );
    assert_eq!(decide(&state, &mut watch, &attach(0, 1, 1), SECOND), UNCONFIRMED, "the same Attach again");
    let mismatch = AttachDecision::Refuse(state.mismatch());
    assert_eq!(decide(&state, &mut watch, &forced(attach(0, 2, 2)), SECOND), mismatch);
    assert_eq!(decide(&state, &mut watch, &attach(0, 1, 3), SECOND), mismatch);
}

#[test]
fn a_dead_lease_frees_the_volume_but_confirms_nothing() {
    let (mut state, mut watch) = held_state();
    let command = attach(1, 2, 2);
    assert_eq!(decide(&state, &mut watch, &command, 2 * SECOND), UNCONFIRMED);
    // The holder is renewed between the decision and the commit: its reads are waited for all the same.
    watch.granted(2 * SECOND);
    state.apply(LogIndex(2), &command.admitted(false));
    assert_eq!(state.unsettled().map(|u| u.holders[0].session), Some(SessionId(1)), "INV-SETTLE");
}

#[test]
fn what_the_holder_confirmed_is_known_and_nobody_needs_to_confirm_an_empty_seat() {
    let (mut state, mut watch) = held_state();
    watch.confirmed_end(SessionId(9));
    assert_eq!(decide(&state, &mut watch, &forced(attach(1, 2, 2)), SECOND), UNCONFIRMED);
    watch.confirmed_end(SessionId(1));
    assert_eq!(decide(&state, &mut watch, &attach(1, 2, 2), SECOND), CONFIRMED);
    state.apply(LogIndex(2), &VolumeCommand::Detach { epoch: Epoch(1), force: false, confirmed: true });
    assert_eq!(decide(&state, &mut watch, &attach(1, 2, 2), 0), CONFIRMED);
    assert_eq!(decide(&state, &mut watch, &attach(0, 2, 2), 0), AttachDecision::Refuse(state.mismatch()));
    let settled = VolumeCommand::Settled { epoch: Epoch(1) };
    assert!(matches!(decide(&state, &mut watch, &settled, 0), AttachDecision::Refuse(Refusal::Malformed(_))));
}

#[test]
fn a_holder_whose_first_answer_was_lost_has_a_full_lease() {
    let (mut state, mut watch) = held_state();
    let command = forced(attach(1, 2, 2));
    assert_eq!(decide(&state, &mut watch, &command, 10 * SECOND), UNCONFIRMED);
    state.apply(LogIndex(2), &command);
    // Nobody told the watch; the next decision notices the new epoch.
    let third = attach(2, 3, 3);
    assert!(matches!(
        decide(&state, &mut watch, &third, 10 * SECOND),
        AttachDecision::Refuse(Refusal::HeldBy { .. })
    ));
    assert_eq!(decide(&state, &mut watch, &third, 12 * SECOND), UNCONFIRMED);
}

#[test]
fn settling_ends_with_the_confirmations_or_the_lease() {
    let state = unsettled_state();
    let unsettled = state.unsettled().expect("the change was forced");
    let mut wait = SettleWait::new(&TERMS, unsettled, SECOND);
    assert_eq!(wait.epoch(), Epoch(2));
    assert!(!wait.is_over(2 * SECOND));
    assert!(wait.is_over(wait.until()));
    assert_eq!(wait.until(), 2 * SECOND + 10 * MILLISECOND);
    wait.confirmed_end(SessionId(7));
    assert!(!wait.is_over(SECOND));
    wait.confirmed_end(SessionId(1));
    assert!(wait.is_over(SECOND));
}

#[test]
fn a_voter_is_silent_for_one_lease_after_its_daemon_started() {
    let silence = StartupSilence::existing(&TERMS, 5 * SECOND, None);
    assert!(silence.is_silent(6 * SECOND));
    assert!(!silence.is_silent(silence.until()));
    let renewed = StartupSilence::existing(&TERMS, 5 * SECOND, Some(9 * SECOND));
    assert!(renewed.is_silent(10 * SECOND), "INV-LEASE: a lease that this process acknowledged may live");
    let older = StartupSilence::existing(&TERMS, 5 * SECOND, Some(SECOND));
    assert_eq!(older, silence);
    assert!(!StartupSilence::new_group().is_silent(0));
}
