//! INV-REST: who rests, and who wakes.

use std::time::Duration;

use holdfast_types::{LogIndex, ReplicaId};
use proptest::prelude::*;

use crate::planted;
use crate::rest::{
    Busy, FAILURES_MAX, Followed, HEARD_LATELY, LEFT_ALONE, Led, QUIET_BEFORE, Quiet, Standing, UNHEARD_MAX,
    was_stopped,
};

fn at(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).expect("is short")
}

fn seconds(seconds: u64) -> u64 {
    at(Duration::from_secs(seconds))
}

fn settled() -> Standing {
    let last = LogIndex(7);
    Standing {
        last,
        flushed: last,
        committed: last,
        applied: last,
        matched: vec![last, last],
        ..Standing::default()
    }
}

#[test]
fn only_what_is_whole_rests() {
    planted::plant(&[]);
    assert_eq!(settled().may_rest(), Ok(()));
    let unless = |change: fn(&mut Standing)| {
        let mut standing = settled();
        change(&mut standing);
        standing.may_rest()
    };
    assert_eq!(unless(|standing| standing.is_held = true), Err(Busy::Held));
    assert_eq!(unless(|standing| standing.is_unsettled = true), Err(Busy::Unsettled));
    assert_eq!(unless(|standing| standing.changes_timers = true), Err(Busy::Changing));
    assert_eq!(unless(|standing| standing.changes_members = true), Err(Busy::Changing));
    assert_eq!(unless(|standing| standing.is_busy = true), Err(Busy::Busy));
    assert_eq!(unless(|standing| standing.flushed = LogIndex(6)), Err(Busy::Behind));
    assert_eq!(unless(|standing| standing.committed = LogIndex(6)), Err(Busy::Behind));
    assert_eq!(unless(|standing| standing.applied = LogIndex(6)), Err(Busy::Behind));
    assert_eq!(unless(|standing| standing.matched[1] = LogIndex(6)), Err(Busy::Behind));
    assert_eq!(Standing::default().may_rest(), Err(Busy::Behind), "a group that has not begun");
}

#[test]
fn a_member_that_rests_while_it_lacks_an_entry_is_found() {
    planted::plant(&["rest-while-behind"]);
    let behind = Standing { applied: LogIndex(6), ..settled() };
    let rested = behind.may_rest();
    planted::plant(&[]);
    assert_eq!(rested, Ok(()), "the planted fault is there");
    assert_eq!(behind.may_rest(), Err(Busy::Behind));
}

#[test]
fn a_group_is_asked_when_it_was_quiet_and_left_alone_when_one_refused() {
    let (mut quiet, before) = (Quiet::default(), at(QUIET_BEFORE));
    assert!(!quiet.look(LogIndex(1), 0));
    assert!(!quiet.look(LogIndex(1), before - 1));
    assert!(quiet.look(LogIndex(1), before));
    assert!(!quiet.look(LogIndex(2), before), "an entry has come");
    assert!(quiet.look(LogIndex(2), 2 * before));
    quiet.refused(2 * before);
    assert!(!quiet.look(LogIndex(2), 2 * before + at(LEFT_ALONE) - 1));
    assert!(quiet.look(LogIndex(2), 3 * before + at(LEFT_ALONE)));
    quiet.disturbed();
    assert!(!quiet.look(LogIndex(2), 4 * before + at(LEFT_ALONE)));
}

#[test]
fn who_does_not_ask_is_missed_and_a_stopped_store_misses_nobody() {
    let (one, other) = (ReplicaId(2), ReplicaId(3));
    let mut led = Led::new([one, other], 0);
    led.heard(one, seconds(4));
    led.heard(ReplicaId(9), seconds(4));
    assert_eq!(led.missing(at(UNHEARD_MAX)), None);
    assert_eq!(led.missing(at(UNHEARD_MAX) + 1), Some(other));
    assert_eq!(led.lately(at(HEARD_LATELY) + 1), [one].into());
    led.was_stopped(seconds(60));
    assert_eq!(led.missing(seconds(60) + at(UNHEARD_MAX)), None);
    assert!(
        led.lately(seconds(60)).is_empty(),
        "nobody was heard meanwhile, and it is not said that anybody was"
    );
    assert!(led.missing(seconds(61) + at(UNHEARD_MAX)).is_some());
}

#[test]
fn one_lost_question_wakes_nobody() {
    planted::plant(&[]);
    let mut followed = Followed::new(0);
    assert!(!followed.unanswered());
    followed.answered(seconds(2));
    assert!(!followed.unanswered());
    followed.was_stopped();
    assert!(!followed.unanswered());
    assert!(followed.unanswered(), "two in a row");
    assert!(followed.hears(seconds(2) + at(HEARD_LATELY)));
    assert!(!followed.hears(seconds(2) + at(HEARD_LATELY) + 1));
}

#[test]
fn who_sleeps_much_too_long_was_stopped() {
    assert!(!was_stopped(seconds(100), seconds(100)));
    assert!(!was_stopped(seconds(100), seconds(102)));
    assert!(was_stopped(seconds(100), seconds(103)));
}

proptest! {
    /// Whatever is lost on the way: as long as every second question is answered nobody wakes, and when the leader's
    /// store has fallen silent everybody does, at the second question.
    #[test]
    fn a_silent_leader_is_found_out_and_no_other(lost in prop::collection::vec(any::<bool>(), 1..60)) {
        planted::plant(&[]);
        let mut followed = Followed::new(0);
        let mut before = false;
        for (second, lost) in lost.into_iter().enumerate() {
            // Two in a row are not lost.
            let lost = lost && !before;
            if lost {
                prop_assert!(!followed.unanswered());
            } else {
                followed.answered(seconds(second as u64));
            }
            before = lost;
        }
        let mut silent = 0;
        while !followed.unanswered() {
            silent += 1;
        }
        prop_assert!(silent < FAILURES_MAX);
    }
}
