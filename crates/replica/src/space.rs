//! A volume takes data while its media have room (INV-SPACE).
//!
//! Every answer to an append tells whether the medium below it is full. A leader lets data wait while its own medium is
//! full, or while those of its voters whose media are not are no majority of every configuration. What makes room goes
//! on: trims, drops of snapshots, everything that is no data. One full follower of three is waited for by nobody; it
//! falls behind when its journal has taken what it takes.
//!
//! Whoever waits is woken by the next answer, and asked to repeat its call after a while: nothing piles up.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::planted::is_planted;
use holdfast_types::ReplicaId;
use tokio::sync::Notify;

use crate::confirm;
use crate::group::Group;
use crate::host::Host;
use crate::volume::Volume;

/// How long data waits for room before its sender is asked to repeat it.
const ROOM_PATIENCE: Duration = Duration::from_secs(2);
/// Between looks whether a full medium has room again: others make it, too, and tell nobody.
pub(crate) const FULL_PAUSE: Duration = Duration::from_secs(1);

/// What the other replicas last said of their media. Cheap to clone; shared by a replica's clients.
#[derive(Clone, Default)]
pub(crate) struct Fulls(Rc<(RefCell<BTreeMap<ReplicaId, Heard>>, Notify)>);

#[derive(Clone, Copy)]
struct Heard {
    is_full: bool,
    at: Instant,
}

impl Fulls {
    pub(crate) fn heard(&self, from: ReplicaId, is_full: bool) {
        let before = self.0.0.borrow_mut().insert(from, Heard { is_full, at: Instant::now() });
        if before.is_none_or(|before| before.is_full != is_full) {
            self.0.1.notify_waiters();
        }
    }

    pub(crate) fn is_full(&self, replica: ReplicaId) -> bool {
        self.0.0.borrow().get(&replica).is_some_and(|heard| heard.is_full)
    }

    /// Whether it has said for certain, within so long, that it has room.
    fn has_room(&self, replica: ReplicaId, within: Duration) -> bool {
        let heard = self.0.0.borrow().get(&replica).copied();
        heard.is_some_and(|heard| !heard.is_full && Instant::now().since(heard.at) <= within)
    }

    /// Ends when one of them says something else than before, since this call.
    fn changed(&self) -> impl Future<Output = ()> + '_ {
        self.0.1.notified()
    }
}

/// Whether a command brings data, which takes room.
pub(crate) fn brings_data(command: &VolumeCommand) -> bool {
    matches!(command, VolumeCommand::Write { .. } | VolumeCommand::Zero { .. })
}

impl Group {
    /// Whether this leader takes data now.
    pub(crate) fn takes_data(&self) -> bool {
        let own_is_full = self.log().is_full();
        if is_planted("fill-up")
            || !own_is_full && !self.fulls().0.0.borrow().values().any(|heard| heard.is_full)
        {
            return true;
        }
        let Some(membership) = self.membership_as_leader() else { return true };
        let is_full = |voter: u64| match ReplicaId(voter) {
            voter if voter == self.id().replica => own_is_full,
            voter => self.fulls().is_full(voter),
        };
        if own_is_full || !membership.voter_ids().any(is_full) {
            return !own_is_full;
        }
        let lately = self.timers().election_max;
        let mut able: BTreeSet<u64> = membership.voter_ids().collect();
        able.retain(|voter| {
            *voter == self.id().replica.0 || self.fulls().has_room(ReplicaId(*voter), lately)
        });
        confirm::is_quorum(&membership, &able)
    }

    /// Ends when it may take data again, or leads no more.
    async fn until_it_takes_data(&self) {
        loop {
            let others = std::pin::pin!(self.fulls().changed());
            let leadership = std::pin::pin!(self.leadership_changed());
            let own = async {
                match self.log().reserve() {
                    Some(reserve) => reserve.changed().await,
                    None => std::future::pending().await,
                }
            };
            let own = std::pin::pin!(own);
            if self.takes_data() || !self.is_leader() {
                return;
            }
            let woken = futures_util::future::select(others, leadership);
            futures_util::future::select(woken, own).await;
        }
    }
}

impl Volume {
    /// Waits a while until data may be taken; whether it may.
    pub(crate) async fn has_room(&self) -> bool {
        let group = self.group();
        group.takes_data() || {
            // No answer in time is as good as one: the caller looks again.
            let _woken = holdfast_env::timeout(ROOM_PATIENCE, group.until_it_takes_data()).await;
            group.takes_data()
        }
    }

    /// Whether it leads here, and lets data wait for room.
    pub fn waits_for_room(&self) -> bool {
        self.group().is_leader() && !self.group().takes_data()
    }
}

/// Looks for room while the medium of a store is full, until the store is dropped or has failed.
pub(crate) async fn watch(host: Weak<Host>) {
    loop {
        holdfast_env::sleep(FULL_PAUSE).await;
        let Some(journal) = host.upgrade().map(|host| host.journal().clone()) else { return };
        let Some(reserve) = journal.reserve().filter(|_| journal.failed().is_none()) else { return };
        if let Err(error) = reserve.refill().await {
            return journal.stop(&error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_heard_last_counts_and_only_for_a_while() {
        holdfast_env::real::run(async {
            let (fulls, one) = (Fulls::default(), ReplicaId(1));
            assert!(!fulls.is_full(one) && !fulls.has_room(one, Duration::from_secs(60)));
            let mut changed = std::pin::pin!(fulls.changed());
            fulls.heard(one, true);
            changed.as_mut().await;
            assert!(fulls.is_full(one) && !fulls.has_room(one, Duration::from_secs(60)));
            let mut changed = std::pin::pin!(fulls.changed());
            fulls.heard(one, true);
            assert!(futures_util::poll!(&mut changed).is_pending(), "it has said nothing new");
            fulls.heard(one, false);
            changed.await;
            assert!(!fulls.is_full(one) && fulls.has_room(one, Duration::from_secs(60)));
            holdfast_env::sleep(Duration::from_millis(5)).await;
            assert!(!fulls.has_room(one, Duration::from_millis(1)), "that was long ago");
        });
    }
}
