//! What stands on a store's medium and what is free there, for whoever asks how the store is.
//!
//! It is looked at by one task at a time, in one go, so that the figures of a survey fit together; and who asks never waits
//! for a disk that does not answer, but is told what was found last.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_env::disk::{Directory, Space};
use holdfast_store::volume::SpaceUsed;
use holdfast_store::{Budget, Standing, StoreError};
use tokio::sync::Notify;

use crate::host::Host;
use crate::volume::Volume;

/// A survey that is older than this is made anew when somebody asks.
const FRESH: Duration = Duration::from_millis(500);
/// One that took long lasts so many times as long, as far as the one before took as long: surveys look at every file, of a store
/// with ten thousand replicas, too, and somebody may always ask.
const LASTS: u32 = 100;
const FRESH_MAX: Duration = Duration::from_secs(10);
/// How long a disk is waited for before the last survey is told instead.
const PATIENCE: Duration = Duration::from_secs(1);

/// What stands on a medium, and what is free there.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The medium, as far as the store may use it.
    pub space: Space,
    /// The store's files.
    pub standing: Rc<Standing>,
    /// How long it took to look.
    took: Duration,
    /// How long it lasts.
    lasts: Duration,
}

impl Survey {
    fn is_fresh(&self) -> bool {
        Instant::now().since(self.standing.at()) < self.lasts
    }
}

/// Bytes of a store on its medium, by what they are for, as of one survey.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StoreSpace {
    /// All of its files.
    pub allocated: u64,
    /// Of these, the blocks of replicas, those of snapshots included.
    pub used: u64,
    /// Of these, what only snapshots hold.
    pub snapshots: u64,
    /// The journal.
    pub journal: u64,
    /// What is kept back for a full medium; none while it is given up.
    pub reserve: u64,
}

#[derive(Default)]
struct Inner {
    last: RefCell<Option<Survey>>,
    is_under_way: Cell<bool>,
    ended: Notify,
}

/// The surveys of one store.
pub(crate) struct Surveys {
    inner: Rc<Inner>,
    budget: Budget,
}

impl Surveys {
    pub(crate) fn new(budget: Budget) -> Self {
        Self { inner: Rc::default(), budget }
    }

    /// Begins one, unless one is under way.
    fn begin(&self, directory: &Rc<dyn Directory>) {
        let (inner, budget, directory) = (self.inner.clone(), self.budget.clone(), directory.clone());
        if inner.is_under_way.replace(true) {
            return;
        }
        holdfast_env::spawn("survey", async move {
            let began = Instant::now();
            let found = async {
                let standing = budget.count_now().await?;
                let space = directory.space().await?;
                let took = Instant::now().since(began);
                let before = inner.last.borrow().as_ref().map_or(Duration::ZERO, |last| last.took);
                let lasts = (took.min(before) * LASTS).clamp(FRESH, FRESH_MAX);
                Ok::<_, std::io::Error>(Survey { space, standing, took, lasts })
            };
            match found.await {
                Ok(survey) => drop(inner.last.borrow_mut().replace(survey)),
                Err(error) => tracing::warn!(%error, "what stands on the medium is not known"),
            }
            inner.is_under_way.set(false);
            inner.ended.notify_waiters();
        });
    }
}

impl Host {
    /// How many bytes the store may take, and whether that is what it last wanted in vain.
    pub fn budget(&self) -> &Budget {
        &self.surveys.budget
    }

    /// The last survey, if there was one; if it is not fresh another one is begun.
    pub fn last_survey(&self) -> Option<Survey> {
        let last = self.surveys.inner.last.borrow().clone();
        if last.as_ref().is_none_or(|last| !last.is_fresh()) {
            self.surveys.begin(self.directory());
        }
        last
    }

    /// A fresh survey, or the last one if the disk does not answer in time; none if there is none yet.
    pub async fn survey(&self) -> Option<Survey> {
        let ended = self.surveys.inner.ended.notified();
        let last = self.last_survey();
        if last.as_ref().is_some_and(Survey::is_fresh) {
            return last;
        }
        // Either way the last one is told.
        let _in_time = holdfast_env::timeout(PATIENCE, ended).await;
        self.surveys.inner.last.borrow().clone()
    }

    /// The store's bytes by what they are for.
    pub fn space_of(&self, survey: &Survey) -> StoreSpace {
        let standing = &survey.standing;
        let mut space = StoreSpace {
            allocated: standing.total(),
            journal: standing.journal(),
            reserve: standing.reserve(),
            ..StoreSpace::default()
        };
        for (_, volume) in self.volumes() {
            let used = volume.data().space_in(standing);
            space.used += used.blocks + used.snapshots;
            space.snapshots += used.snapshots;
        }
        space
    }
}

impl Volume {
    /// The replica's space on the medium, as it was last if the disk does not answer in time.
    pub(crate) async fn space_told(&self) -> Result<SpaceUsed, StoreError> {
        if let Ok(found) = holdfast_env::timeout(PATIENCE, self.data().space()).await {
            self.last_space.set(found?);
        }
        Ok(self.last_space.get())
    }
}
