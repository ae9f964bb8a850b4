//! Every model in its two sizes, and every way in which it is broken on purpose.

use crate::check::{Outcome, check};
use crate::fence::{Broken as FenceBroken, Fence, Scope as FenceScope};
use crate::membership::{Broken as MembershipBroken, Membership};
use crate::reach::everywhere;
use crate::recovery::{Broken as RecoveryBroken, Recovery};
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

/// One survivor of three, so that the others are a majority.
const ONE_OF_THREE: Recovery = Recovery {
    replicas: 3,
    survivors: &[0b001],
    unsettled: false,
    partitions: false,
    catalogs: 1,
    recoveries: 1,
    elections: 1,
    writes: 1,
    crashes: 1,
    lost: 0,
    broken: None,
};

/// Two survivors of four, so that the others are none.
const TWO_OF_FOUR: Recovery =
    Recovery { replicas: 4, survivors: &[0b0011], elections: 0, writes: 1, crashes: 0, ..ONE_OF_THREE };

/// Two survivors of three, who take a change of the voters to be under way and so do not know that they are a majority.
const TWO_OF_THREE: Recovery =
    Recovery { survivors: &[0b011], unsettled: true, writes: 0, crashes: 1, ..ONE_OF_THREE };

/// Two catalogs, one of them put back, which name the same survivor or different ones.
const TWO_CATALOGS: Recovery = Recovery {
    survivors: &[0b001, 0b010],
    catalogs: 2,
    recoveries: 2,
    elections: 0,
    writes: 0,
    crashes: 0,
    ..ONE_OF_THREE
};

const STUCK: &str = "INV-RECOVER: from everywhere a volume can be served again";

const RIVALS: &str = "INV-RECOVER: two that both go on can be halted";

fn recovery(model: Recovery) -> Outcome {
    check(model, None)
}

fn recovery_ends(model: Recovery) -> Outcome {
    everywhere(&model, STUCK, |world| model.is_settled(world))
}

fn rivals_halt(model: Recovery) -> Outcome {
    everywhere(&model, RIVALS, |world| !model.two_go_on(world))
}

fn broken_recovery(model: Recovery, broken: RecoveryBroken, until: &str) -> Outcome {
    let model = Recovery { broken: Some(broken), ..model };
    match until {
        _ if STUCK.starts_with(until) => recovery_ends(model),
        _ if RIVALS.starts_with(until) => rivals_halt(model),
        _ => check(model, Some(until)),
    }
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
    Case {
        name: "recovery",
        what: "forced recovery, over crashes, partitions, late requests and two operators",
        small: &[
            || recovery(Recovery { elections: 0, ..ONE_OF_THREE }),
            || recovery(Recovery { writes: 0, crashes: 0, ..ONE_OF_THREE }),
            || recovery_ends(Recovery { elections: 0, ..ONE_OF_THREE }),
            || recovery(TWO_OF_FOUR),
            || recovery_ends(TWO_OF_FOUR),
            || recovery(Recovery { partitions: true, ..TWO_OF_FOUR }),
            || recovery(Recovery { recoveries: 2, writes: 0, ..TWO_OF_FOUR }),
            || recovery(TWO_CATALOGS),
            || rivals_halt(Recovery { partitions: true, ..TWO_CATALOGS }),
        ],
        deep: &[
            || recovery(ONE_OF_THREE),
            || recovery_ends(ONE_OF_THREE),
            || recovery(Recovery { crashes: 0, partitions: true, ..ONE_OF_THREE }),
            || recovery(Recovery { crashes: 1, ..TWO_OF_FOUR }),
            || recovery_ends(Recovery { crashes: 1, ..TWO_OF_FOUR }),
            || recovery(Recovery { elections: 1, writes: 0, ..TWO_OF_FOUR }),
            || recovery_ends(Recovery { recoveries: 2, ..TWO_OF_FOUR }),
            || recovery(TWO_OF_THREE),
            || recovery(Recovery { crashes: 1, ..TWO_CATALOGS }),
            || rivals_halt(Recovery { crashes: 1, ..TWO_CATALOGS }),
        ],
        broken: &[
            Variant {
                name: "recover-while-answered",
                what: "a volume is recovered while a replica that is not named answers (planted)",
                breaks: "INV-RECOVER: nobody is sealed",
                run: |until| {
                    let planted = RecoveryBroken::Planted("recover-while-answered");
                    broken_recovery(Recovery { crashes: 0, ..ONE_OF_THREE }, planted, until)
                },
            },
            Variant {
                name: "recover-from-the-shorter",
                what: "it goes on from the survivor whose log ends first (planted)",
                breaks: "INV-RECOVER: nothing that",
                run: |until| {
                    broken_recovery(TWO_OF_FOUR, RecoveryBroken::Planted("recover-from-the-shorter"), until)
                },
            },
            Variant {
                name: "seal-forgotten",
                what: "a store does not know after a restart whom it has sealed (the store's forget-recovery)",
                breaks: "INV-RECOVER: who was sealed",
                run: |until| {
                    let model = Recovery { crashes: 1, ..TWO_OF_FOUR };
                    broken_recovery(model, RecoveryBroken::SealForgotten, until)
                },
            },
            Variant {
                name: "sealed-answers",
                what: "a replica that was sealed answers on",
                breaks: "INV-RECOVER: nothing that",
                run: |until| broken_recovery(TWO_OF_THREE, RecoveryBroken::SealedAnswers, until),
            },
            Variant {
                name: "ends-before-seal",
                what: "the reconciler looks at which log ends last before it seals",
                breaks: "INV-RECOVER: nothing that",
                run: |until| broken_recovery(TWO_OF_THREE, RecoveryBroken::EndsBeforeSeal, until),
            },
            Variant {
                name: "one-sealed",
                what: "the reconciler does not wait until every survivor is sealed",
                breaks: "INV-RECOVER: nothing that",
                run: |until| broken_recovery(TWO_OF_THREE, RecoveryBroken::OneSealed, until),
            },
            Variant {
                name: "committed-only",
                what: "what goes on has what it knows to be committed, not all that its log holds",
                breaks: "INV-RECOVER: nothing that",
                run: |until| {
                    broken_recovery(
                        Recovery { crashes: 0, ..ONE_OF_THREE },
                        RecoveryBroken::CommittedOnly,
                        until,
                    )
                },
            },
            Variant {
                name: "superseded-not-told",
                what: "a store does not say that a group was replaced (the product's fault of that name)",
                breaks: "INV-RECOVER: what comes back",
                run: |until| {
                    broken_recovery(
                        Recovery { crashes: 0, ..ONE_OF_THREE },
                        RecoveryBroken::SupersededUntold,
                        until,
                    )
                },
            },
            Variant {
                name: "recover-without-incarnation",
                what: "what goes on is the same group with other members (the product's fault of that name)",
                breaks: "INV-RECOVER: what comes back",
                run: |until| {
                    broken_recovery(Recovery { crashes: 0, ..ONE_OF_THREE }, RecoveryBroken::SameGroup, until)
                },
            },
            Variant {
                name: "rival-obeyed",
                what: "of two recoveries a store obeys the later",
                breaks: "INV-RECOVER: one replica",
                run: |until| broken_recovery(TWO_CATALOGS, RecoveryBroken::RivalObeyed, until),
            },
            Variant {
                name: "called-off-unsaid",
                what: "a recovery is called off, and the survivors do not hear of it first",
                breaks: "INV-RECOVER: a recovery that",
                run: |until| {
                    broken_recovery(
                        Recovery { crashes: 0, ..ONE_OF_THREE },
                        RecoveryBroken::CalledOffUnsaid,
                        until,
                    )
                },
            },
            Variant {
                name: "sealed-is-kept",
                what: "one that was sealed is kept all the same (the product's fault of that name)",
                breaks: "INV-RECOVER: a recovery that",
                run: |until| {
                    broken_recovery(
                        Recovery { crashes: 0, ..ONE_OF_THREE },
                        RecoveryBroken::SealedKept,
                        until,
                    )
                },
            },
            Variant {
                name: "sealed-on-an-old-revision",
                what: "once one is sealed the others are sealed as was decided when none was",
                breaks: "INV-RECOVER: from everywhere",
                run: |until| broken_recovery(TWO_OF_FOUR, RecoveryBroken::SealedOnOldRevision, until),
            },
            Variant {
                name: "replaced-unheard",
                what: "a catalog does not hear that a replica goes on for a recovery of another catalog",
                breaks: "INV-RECOVER: two groups",
                run: |until| broken_recovery(TWO_CATALOGS, RecoveryBroken::ReplacedUnheard, until),
            },
            Variant {
                name: "rivals-not-compared",
                what: "a catalog does not compare its recovery with what went on for another",
                breaks: "INV-RECOVER: two that",
                run: |until| {
                    let model = Recovery { partitions: true, ..TWO_CATALOGS };
                    broken_recovery(model, RecoveryBroken::NotCompared, until)
                },
            },
            Variant {
                name: "known: a majority comes back",
                what: "not promised: those that are not named are a majority, and reach no survivor",
                breaks: "INV-RECOVER: two groups",
                run: |until| {
                    let model = Recovery { crashes: 0, writes: 0, ..ONE_OF_THREE };
                    broken_recovery(model, RecoveryBroken::Known, until)
                },
            },
            Variant {
                name: "known: two catalogs",
                what: "not promised: two catalogs recover a volume from different survivors",
                breaks: "INV-RECOVER: two groups",
                run: |until| {
                    let model = Recovery { partitions: true, ..TWO_CATALOGS };
                    broken_recovery(model, RecoveryBroken::Known, until)
                },
            },
            Variant {
                name: "known: two catalogs are stuck",
                what: "not promised: each of two catalogs has sealed a survivor that the other needs",
                breaks: "INV-RECOVER: from everywhere",
                run: |until| {
                    let model = Recovery { catalogs: 2, recoveries: 2, writes: 0, ..TWO_OF_FOUR };
                    broken_recovery(model, RecoveryBroken::Known, until)
                },
            },
            Variant {
                name: "known: a survivor is lost",
                what: "not promised: a survivor is lost after the recovery was to be carried out",
                breaks: "INV-RECOVER: from everywhere",
                run: |until| {
                    let model = Recovery { lost: 1, crashes: 0, elections: 0, writes: 0, ..ONE_OF_THREE };
                    broken_recovery(model, RecoveryBroken::Known, until)
                },
            },
        ],
    },
];
