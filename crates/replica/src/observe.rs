//! What replicas apply, for tests that watch over all of them at once. Without the feature `observed` nobody can watch,
//! and nothing is spent on it.

use holdfast_store::{EntryId, ReplicaIdentity};
use holdfast_types::LogIndex;

use crate::config::{AppData, AppReply};

/// What an applied entry brought.
#[derive(Debug)]
pub enum Brought<'e> {
    /// Nothing: a leader's first entry.
    Blank,
    /// The voters of every configuration, and the learners.
    Membership {
        /// One set of voters, or two while a change is under way.
        voters: Vec<Vec<u64>>,
        /// Who only listens.
        learners: Vec<u64>,
    },
    /// A command of the state machine and what it answered.
    Command(&'e AppData, &'e AppReply),
}

/// Sees what every replica of this thread applies.
pub trait Observer {
    /// A replica has applied an entry; `state` encodes its state machine as of then.
    fn applied(&self, who: ReplicaIdentity, id: EntryId, brought: &Brought<'_>, state: &[u8]);
    /// A replica has taken over the state as of an entry, from its own checkpoint or from another replica.
    fn installed(&self, who: ReplicaIdentity, id: EntryId, state: &[u8]);
    /// The blocks of a replica may become another one's at any moment from here on, which may show what was written up
    /// to an index. Followed by [`Self::installed`], then [`Self::rebuilt`], or by its end.
    fn rebuilding(&self, who: ReplicaIdentity, up_to: LogIndex);
    /// The blocks of a replica are another one's now, which may show what was written up to an index.
    fn rebuilt(&self, who: ReplicaIdentity, up_to: LogIndex);
    /// Told after each of these: a replica that has applied so far would serve readers.
    fn serves(&self, who: ReplicaIdentity, applied: LogIndex);
}

#[cfg(feature = "observed")]
mod watched {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::Observer;

    thread_local! {
        static OBSERVER: RefCell<Option<Rc<dyn Observer>>> = const { RefCell::new(None) };
    }

    /// Lets `observer` see what replicas of this thread apply, instead of whoever did.
    pub fn observe(observer: Option<Rc<dyn Observer>>) {
        OBSERVER.with(|slot| *slot.borrow_mut() = observer);
    }

    pub(crate) fn observed(tell: impl FnOnce(&dyn Observer)) {
        let observer = OBSERVER.with(|slot| slot.borrow().clone());
        if let Some(observer) = observer {
            tell(&*observer);
        }
    }
}

#[cfg(feature = "observed")]
pub use watched::observe;
#[cfg(feature = "observed")]
pub(crate) use watched::observed;

/// Nobody watches.
#[cfg(not(feature = "observed"))]
pub(crate) fn observed(_tell: impl FnOnce(&dyn Observer)) {}
