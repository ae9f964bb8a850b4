//! Every model in its two sizes, and every way in which it is broken on purpose.

use crate::check::{Outcome, check};
use crate::fence::{Broken as FenceBroken, Fence, Scope as FenceScope};
use crate::membership::{Broken as MembershipBroken, Membership};
use crate::silence::{Broken as SilenceBroken, Silence};
use crate::witness::{Broken as WitnessBroken, Witness};

/// A model.
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// What it is about.
    pub what: &'static str,
    /// Its sizes for the unit suite.
    pub small: &'static [fn() -> Outcome],
    /// Its sizes for whoever has more time, beside those.
    pub deep: &'static [fn() -> Outcome],
    /// How to break it.
    pub broken: &'static [Variant],
}

/// One way to break a model.
pub struct Variant {
    /// Its name.
    pub name: &'static str,
    /// What is broken.
    pub what: &'static str,
    /// How the name of the property that fails begins.
    pub breaks: &'static str,
    /// Looks for a counter-example to it.
    pub run: fn(until: &str) -> Outcome,
}

const fn scope(numbers: [u8; 6]) -> FenceScope {
    let [ticks, elections, attaches, renewals, writes, detaches] = numbers;
    FenceScope { all_rates: false, ticks, elections, attaches, renewals, writes, detaches }
}

fn fence(numbers: [u8; 6]) -> Outcome {
    check(Fence { scope: scope(numbers), broken: None }, None)
}

fn fence_at_all_rates(numbers: [u8; 6]) -> Outcome {
    check(Fence { scope: FenceScope { all_rates: true, ..scope(numbers) }, broken: None }, None)
}

fn broken_fence(numbers: [u8; 6], broken: FenceBroken, until: &str) -> Outcome {
    check(Fence { scope: scope(numbers), broken: Some(broken) }, Some(until))
}

fn silence(ticks: u8, restarts: u8, broken: Option<SilenceBroken>) -> Outcome {
    check(Silence { ticks, restarts, broken }, broken.map(|_| "INV-LEASE"))
}

/// Campaigns, crashes, lost disks, writes, changes of voters.
fn membership(numbers: [u8; 5], learner_first: bool) -> Outcome {
    check(sized_membership(numbers, learner_first, None), None)
}

fn broken_membership(numbers: [u8; 5], broken: MembershipBroken, until: &str) -> Outcome {
    check(sized_membership(numbers, false, Some(broken)), Some(until))
}

fn sized_membership(numbers: [u8; 5], learner_first: bool, broken: Option<MembershipBroken>) -> Membership {
    let [campaigns, crashes, lost, writes, changes] = numbers;
    Membership { campaigns, crashes, lost, writes, changes, learner_first, broken }
}

/// Campaigns, crashes, lost disks, writes; and whether the witness has a budget of one entry.
fn witness(numbers: [u8; 4], budget: bool) -> Outcome {
    let [campaigns, crashes, lost, writes] = numbers;
    check(Witness { campaigns, crashes, lost, writes, budget, broken: None }, None)
}

fn broken_witness(numbers: [u8; 4], budget: bool, broken: WitnessBroken, until: &str) -> Outcome {
    let [campaigns, crashes, lost, writes] = numbers;
    check(Witness { campaigns, crashes, lost, writes, budget, broken: Some(broken) }, Some(until))
}

/// All of them.
pub const CASES: &[Case] = &[
    Case {
        name: "fence",
        what: "attach, lease and fence, over changes of leader",
        small: &[|| fence([3, 0, 2, 1, 1, 0]), || fence([2, 1, 2, 1, 1, 0])],
        deep: &[
            || fence([4, 0, 3, 1, 1, 0]),
            || fence([2, 0, 2, 1, 2, 1]),
            || fence([3, 1, 2, 2, 1, 0]),
            || fence_at_all_rates([3, 1, 2, 1, 1, 0]),
        ],
        broken: &[
            Variant {
                name: "skip-epoch-check",
                what: "the state machine does not compare the epoch of a write (planted)",
                breaks: "INV-FENCE",
                run: |until| {
                    broken_fence([1, 0, 2, 0, 1, 0], FenceBroken::Planted("skip-epoch-check"), until)
                },
            },
            Variant {
                name: "attach-without-compare",
                what: "an attach takes the next epoch whatever it expected (planted)",
                breaks: "INV-FENCE",
                run: |until| {
                    broken_fence([1, 0, 2, 0, 1, 0], FenceBroken::Planted("attach-without-compare"), until)
                },
            },
            Variant {
                name: "retry-applied-twice",
                what: "a write that was applied is applied again (planted)",
                breaks: "INV-ONCE",
                run: |until| {
                    broken_fence([1, 0, 1, 0, 1, 0], FenceBroken::Planted("retry-applied-twice"), until)
                },
            },
            Variant {
                name: "late-write-applied",
                what: "a write below the oldest that is waited for is applied (planted)",
                breaks: "INV-LATE",
                run: |until| {
                    broken_fence([1, 0, 1, 0, 2, 0], FenceBroken::Planted("late-write-applied"), until)
                },
            },
            Variant {
                name: "unsettled-ignored",
                what: "writes and reads of a new epoch do not wait until the former holder's lease has ended (planted)",
                breaks: "INV-LEASE",
                run: |until| {
                    broken_fence([3, 0, 2, 1, 1, 0], FenceBroken::Planted("unsettled-ignored"), until)
                },
            },
            Variant {
                name: "drift-ignored",
                what: "clocks are taken to go at one rate (planted)",
                breaks: "INV-LEASE",
                run: |until| broken_fence([3, 0, 2, 1, 1, 0], FenceBroken::Planted("drift-ignored"), until),
            },
            Variant {
                name: "lease-from-answer",
                what: "a session counts its lease from when the answer came",
                breaks: "INV-LEASE",
                run: |until| broken_fence([3, 0, 2, 1, 1, 0], FenceBroken::LeaseFromAnswer, until),
            },
            Variant {
                name: "settle-at-once",
                what: "the leader settles without waiting",
                breaks: "INV-LEASE",
                run: |until| broken_fence([3, 0, 2, 1, 1, 0], FenceBroken::SettleAtOnce, until),
            },
            Variant {
                name: "renew-unconfirmed",
                what: "a deposed leader renews without asking who follows it",
                breaks: "INV-LEASE",
                run: |until| broken_fence([0, 1, 2, 1, 1, 0], FenceBroken::RenewUnconfirmed, until),
            },
            Variant {
                name: "confirm-without-ending",
                what: "a session confirms its end and goes on serving",
                breaks: "INV-LEASE",
                run: |until| broken_fence([3, 0, 2, 1, 1, 0], FenceBroken::ConfirmWithoutEnding, until),
            },
            Variant {
                name: "new-leader-presumes-dead",
                what: "a new leader does not wait for leases that the one before granted",
                breaks: "courtesy",
                run: |until| broken_fence([3, 1, 2, 1, 0, 0], FenceBroken::NewLeaderPresumesDead, until),
            },
        ],
    },
    Case {
        name: "silence",
        what: "the voters' lease for their leader, over restarts of voters",
        small: &[|| silence(3, 2, None)],
        deep: &[|| silence(4, 2, None)],
        broken: &[
            Variant {
                name: "no-silence",
                what: "a voter whose daemon starts again votes at once",
                breaks: "INV-LEASE",
                run: |_| silence(4, 2, Some(SilenceBroken::NoSilence)),
            },
            Variant {
                name: "forgotten-when-unloaded",
                what: "a group that is loaded again owes nothing of what its daemon answered",
                breaks: "INV-LEASE",
                run: |_| silence(6, 2, Some(SilenceBroken::ForgottenWhenUnloaded)),
            },
            Variant {
                name: "leader-counts-from-answer",
                what: "a leader counts its lease from when the answers came",
                breaks: "INV-LEASE",
                run: |_| silence(4, 2, Some(SilenceBroken::LeaseFromAnswer)),
            },
            Variant {
                name: "drift-ignored-by-voters",
                what: "clocks are taken to go at one rate (planted)",
                breaks: "INV-LEASE",
                run: |_| silence(4, 2, Some(SilenceBroken::Planted("drift-ignored"))),
            },
        ],
    },
    Case {
        name: "membership",
        what: "changes of membership, over crashes, lost disks and removed replicas that come back",
        small: &[|| membership([1, 1, 0, 1, 0], false), || membership([1, 0, 0, 0, 1], false)],
        deep: &[
            || membership([1, 1, 0, 0, 1], false),
            || membership([2, 0, 0, 1, 0], false),
            || membership([1, 0, 1, 0, 1], false),
            || membership([1, 0, 0, 0, 1], true),
        ],
        broken: &[
            Variant {
                name: "single-step",
                what: "a replica is replaced in one step, without a joint membership",
                breaks: "INV-MEMBER: no committed",
                run: |until| broken_membership([1, 0, 0, 0, 1], MembershipBroken::SingleStep, until),
            },
            Variant {
                name: "single-step-quorums",
                what: "the same, by what could happen next",
                breaks: "INV-MEMBER: no two",
                run: |until| broken_membership([1, 0, 0, 0, 1], MembershipBroken::SingleStep, until),
            },
            Variant {
                name: "finish-early",
                what: "the second half of a change does not wait for the first to be committed",
                breaks: "INV-MEMBER: no committed",
                run: |until| broken_membership([1, 0, 0, 0, 1], MembershipBroken::FinishEarly, until),
            },
            Variant {
                name: "leader-restore",
                what: "a leader that starts again leads on under its ballot",
                breaks: "INV-TERM: no log id",
                run: |until| broken_membership([0, 1, 0, 2, 0], MembershipBroken::LeaderRestore, until),
            },
            Variant {
                name: "id-reused",
                what: "a replica whose disk was lost comes back empty under its id",
                breaks: "INV-MEMBER: no committed",
                run: |until| broken_membership([1, 0, 1, 1, 0], MembershipBroken::IdReused, until),
            },
            Variant {
                name: "vote-unflushed",
                what: "a vote is told before it is flushed, and a crash forgets it",
                breaks: "INV-MEMBER: no committed",
                run: |until| broken_membership([1, 1, 0, 1, 0], MembershipBroken::VoteUnflushed, until),
            },
            Variant {
                name: "answer-unflushed",
                what: "a follower answers before it has flushed",
                breaks: "INV-MEMBER: no committed",
                run: |until| broken_membership([1, 1, 0, 1, 0], MembershipBroken::AnswerUnflushed, until),
            },
            Variant {
                name: "logs-not-compared",
                what: "votes are granted whatever the candidate's log",
                breaks: "INV-MEMBER: no committed",
                run: |until| broken_membership([1, 0, 0, 1, 0], MembershipBroken::LogsNotCompared, until),
            },
            Variant {
                name: "older-committed",
                what: "a leader commits an older ballot's entry because a quorum has it",
                breaks: "INV-MEMBER: no committed",
                run: |until| {
                    let broken = Some(MembershipBroken::OlderCommitted);
                    check(sized_membership([3, 0, 0, 0, 0], true, broken), Some(until))
                },
            },
        ],
    },
    Case {
        name: "witness",
        what: "two data replicas and a witness, over lost disks and a full budget",
        small: &[
            || witness([1, 0, 1, 1], false),
            || witness([1, 0, 1, 1], true),
            || witness([1, 1, 1, 1], true),
        ],
        deep: &[
            || witness([2, 0, 1, 1], true),
            || witness([2, 1, 1, 1], false),
            || witness([1, 1, 1, 2], true),
        ],
        broken: &[
            Variant {
                name: "purges-early",
                what: "the witness purges what is committed, whoever has it",
                breaks: "INV-WITNESS: no acknowledged",
                run: |until| broken_witness([1, 0, 1, 1], false, WitnessBroken::PurgesEarly, until),
            },
            Variant {
                name: "told-uncommitted",
                what: "the witness believes that a data replica has what was not committed when it was told",
                breaks: "INV-WITNESS: two media",
                run: |until| broken_witness([1, 1, 0, 1], false, WitnessBroken::ToldUncommitted, until),
            },
            Variant {
                name: "overrun-without-leader",
                what: "beyond its budget the witness lets go whatever it holds, though no data replica leads",
                breaks: "INV-WITNESS: what goes beyond",
                run: |until| broken_witness([1, 0, 1, 1], true, WitnessBroken::OverrunWithoutLeader, until),
            },
            Variant {
                name: "campaigns-past-budget",
                what: "the witness campaigns though it has purged what a data replica lacks",
                breaks: "INV-WITNESS: a witness",
                run: |until| broken_witness([1, 0, 0, 1], true, WitnessBroken::CampaignsPastBudget, until),
            },
            Variant {
                name: "snapshot-taken",
                what: "the same, and a data replica takes its snapshot for data",
                breaks: "INV-WITNESS: no leader",
                run: |until| broken_witness([2, 0, 0, 1], true, WitnessBroken::SnapshotTaken, until),
            },
            Variant {
                name: "end-forgotten",
                what: "a witness that has purged forgets where its log ended, and votes as if it were empty",
                breaks: "INV-WITNESS: no leader",
                run: |until| broken_witness([1, 0, 0, 1], true, WitnessBroken::EndForgotten, until),
            },
        ],
    },
];
