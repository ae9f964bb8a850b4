//! Followers whose part of the log a leader keeps no longer: its journal needs the room (INV-ADMIT).
//!
//! openraft purges nothing that an append under way may read, and one to a follower that is away is under way until its
//! deadline. Beyond a fill of the journal nobody waits for that: such an append is given up, the log goes, and the
//! follower is healed by chunks when it is back, as if it had been away for longer. One that answers has a grace: what is
//! merely on its way to it arrives, and the log goes then.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::{GroupLog, OTHERS_WAIT_MAX};
use holdfast_types::LogIndex;
use tokio::sync::Notify;

use crate::config::LogId;
use crate::group::Group;
use crate::network::STREAM_IN_FLIGHT_MAX;

/// How long what goes is waited for by those who answer, at least.
const GRACE_MIN: Duration = Duration::from_millis(500);
/// Between two purges of a part of a log, at least.
const IN_PART_EVERY: Duration = Duration::from_secs(1);
// All of a stream may be slowed, one after the other, by a journal that fills up where it arrives.
const _: () = assert!(GRACE_MIN.as_millis() > STREAM_IN_FLIGHT_MAX as u128 * OTHERS_WAIT_MAX.as_millis());

/// Up to where a log is to go, whoever lacks it. Cheap to clone; shared by a replica's clients.
#[derive(Clone)]
pub(crate) struct GivenUp(Rc<Inner>);

struct Inner {
    /// When what nobody needs was last purged of a log that others need the rest of.
    purged_in_part: Cell<Option<Instant>>,
    log: GroupLog,
    wanted: Cell<Wanted>,
    told: Notify,
}

/// Up to where the log is to go, since when, and how long who answers is waited for.
#[derive(Clone, Copy, Default)]
struct Wanted {
    upto: LogIndex,
    since: Instant,
    grace: Duration,
}

impl Group {
    /// As leader: the last entry that every follower has which can still be healed by the log, purged up to `purged`. One that
    /// lacks more than that needs chunks, and none of the log. A voter that has not answered this leader yet may lack all that is
    /// left: it may be the leader before, that is being restarted.
    pub(crate) fn lacked_after(&self, purged: LogIndex) -> Option<LogIndex> {
        if is_planted("purge-what-others-lack") {
            return None;
        }
        let voters: BTreeSet<u64> = self.membership_as_leader()?.voter_ids().collect();
        let may_lack = |(id, matched): (u64, Option<LogId>)| match matched {
            Some(matched) => Some(LogIndex(matched.index)).filter(|matched| *matched >= purged),
            None => voters.contains(&id).then_some(purged),
        };
        self.matched().into_iter().filter_map(may_lack).min()
    }
}

impl GivenUp {
    pub(crate) fn new(log: GroupLog) -> Self {
        Self(Rc::new(Inner {
            purged_in_part: Cell::default(),
            log,
            wanted: Cell::default(),
            told: Notify::new(),
        }))
    }

    /// Whether what is to go is still waited for. Then nothing more is to go: openraft purges all that it was asked for or
    /// nothing, and a follower that is a moment behind would never have all of what grows.
    pub(crate) fn is_pending(&self) -> bool {
        let Wanted { since, grace, .. } = self.0.wanted.get();
        self.is_there() && Instant::now().since(since) < grace
    }

    /// Whether a part of the log may go now, of which others need the rest: what they need moves with each of their answers, and a
    /// purge is a batch of the journal.
    pub(crate) fn may_go_in_part(&self) -> bool {
        let before = self.0.purged_in_part.get();
        let is_due = before.is_none_or(|before| Instant::now().since(before) >= IN_PART_EVERY);
        if is_due {
            self.0.purged_in_part.set(Some(Instant::now()));
        }
        is_due
    }

    /// The log is to go up to `index`, in a group whose elections take so long.
    pub(crate) fn give_up(&self, index: LogIndex, election_max: Duration) {
        let grace = GRACE_MIN.max(2 * election_max);
        self.0.wanted.set(Wanted { upto: index, since: Instant::now(), grace });
        self.0.told.notify_waiters();
    }

    fn is_there(&self) -> bool {
        self.0.log.purged().is_none_or(|purged| purged.index < self.0.wanted.get().upto)
            && self.0.wanted.get().upto > LogIndex::ZERO
    }

    /// When an append under way since `sent`, whose first entry is `first`, is given up; `None` while it stays. One that
    /// was sent long ago has had its time.
    pub(crate) fn when(&self, sent: Instant, first: LogIndex) -> Option<Instant> {
        let Wanted { upto, since, grace } = self.0.wanted.get();
        if first > upto || !self.is_there() || is_planted("keep-the-log-for-the-absent") {
            return None;
        }
        Some(sent.min(since) + grace)
    }

    /// Ends when more is to go, since this call.
    pub(crate) fn changed(&self) -> impl Future<Output = ()> + '_ {
        self.0.told.notified()
    }
}
