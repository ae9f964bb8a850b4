//! One life of a journal: it is opened and checked, works, and ends at some operation of its disk.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::testing::{Image, MemoryDisk, Random, simulate};
use holdfast_store::{ReplicaIdentity, StoreIdentity};
use holdfast_types::{ClusterId, LogIndex, NodeName, StoreId};

use crate::model::{self, Acknowledged, GroupModel, Groups, LogStep, entry, id, who};

pub fn identity() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(2) }
}

pub fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 2 << 20, segments: 5 }
}

/// A disk with an empty store.
pub fn formatted() -> Image {
    let disk = MemoryDisk::new(0);
    simulate(1, async {
        Journal::format(disk.directory(), &identity(), &options()).await.expect("formats");
    });
    disk.image()
}

/// A journal at work, with its reference beside it.
#[derive(Clone)]
pub struct Life {
    pub journal: Journal,
    pub groups: Groups,
}

/// Starts an operation now, so that its place in line is that of the reference, and lets it end by itself.
fn start(mut work: LocalBoxFuture<'static, ()>) {
    let waker = std::task::Waker::noop();
    if work.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending() {
        holdfast_env::spawn("operation", work);
    }
}

impl Life {
    fn log(&self, who: ReplicaIdentity) -> holdfast_store::journal::GroupLog {
        self.journal.group(who).expect("the group is there")
    }

    fn note<T>(
        &self,
        who: ReplicaIdentity,
        change: impl FnOnce(&mut GroupModel, Acknowledged) -> T,
    ) -> Acknowledged {
        let flag = Acknowledged::default();
        let mut groups = self.groups.borrow_mut();
        change(groups.entry(who).or_default(), flag.clone());
        flag
    }

    pub fn create(&self, number: u64) {
        let flag = self.note(who(number), |model, flag| model.created = flag);
        let journal = self.journal.clone();
        start(Box::pin(async move {
            if journal.create_group(who(number)).await.is_ok() {
                flag.set(true);
            }
        }));
    }

    pub fn drop_group(&self, who: ReplicaIdentity) {
        let flag = self.note(who, |model, flag| model.dropping = Some(flag));
        let journal = self.journal.clone();
        start(Box::pin(async move {
            if journal.drop_group(who).await.is_ok() {
                flag.set(true);
            }
        }));
    }

    pub fn append(&self, who: ReplicaIdentity, count: u64) {
        let log = self.log(who);
        let first = log.last().map_or(0, |id| id.index.0 + 1);
        let flag = Acknowledged::default();
        let mut entries = Vec::new();
        if let Some(model) = self.groups.borrow_mut().get_mut(&who) {
            for index in first..first + count {
                let id = id(model.term, index);
                model.steps.push((LogStep::Append(id), flag.clone()));
                entries.push(entry(who, id));
            }
        }
        log.append(entries, Box::new(move |result| flag.set(result.is_ok())));
    }

    pub fn vote(&self, who: ReplicaIdentity, text: String) {
        let vote = Bytes::from(text);
        let flag = self.note(who, |model, flag| model.votes.push((vote.clone(), flag)));
        let log = self.log(who);
        start(Box::pin(async move { flag.set(log.save_vote(vote).await.is_ok()) }));
    }

    /// Cuts off what is above `from`, if that is above what is committed or purged.
    pub fn truncate(&self, who: ReplicaIdentity, from: u64) {
        let log = self.log(who);
        let flag = self.note(who, |model, flag| {
            model.steps.push((LogStep::TruncateFrom(from), flag));
            model.term += 1;
        });
        let keep = from.checked_sub(1).map(LogIndex);
        start(Box::pin(async move { flag.set(log.truncate_after(keep).await.is_ok()) }));
    }

    pub fn commit(&self, who: ReplicaIdentity) -> Option<u64> {
        let log = self.log(who);
        let id = log.entry_id(log.flushed())?;
        log.note_committed(id);
        self.note(who, |model, _| model.committed = model.committed.max(id.index.0));
        Some(id.index.0)
    }

    /// Purges up to what is committed, or less.
    pub fn purge(&self, who: ReplicaIdentity, upto: u64) {
        let log = self.log(who);
        let Some(id) = log.entry_id(LogIndex(upto)) else { return };
        let flag = self.note(who, |model, flag| model.purges.push((id, flag)));
        start(Box::pin(async move { flag.set(log.purge(id).await.is_ok()) }));
    }

    /// Ends when everything was acknowledged, or when nothing moves any more because the journal is full.
    pub async fn settle(&self) {
        let all = async {
            while !self.groups.borrow().values().all(GroupModel::all_acknowledged) {
                holdfast_env::sleep(Duration::from_millis(1)).await;
            }
        };
        // A full journal waits for a purge; what waits is not acknowledged, and the next step makes room.
        let _full = holdfast_env::timeout(Duration::from_secs(1), all).await;
    }

    pub fn alive(&self) -> Vec<ReplicaIdentity> {
        let groups = self.groups.borrow();
        groups.iter().filter(|(_, m)| m.dropping.is_none() && m.created.get()).map(|(who, _)| *who).collect()
    }

    /// One operation, drawn at random.
    pub async fn step(&self, random: &Random, next_group: &Cell<u64>, purge_above: u32) {
        let alive = self.alive();
        if alive.is_empty() || (alive.len() < 3 && random.one_in(20)) {
            self.create(next_group.replace(next_group.get() + 1));
            return self.settle().await;
        }
        if self.journal.pressure().used_percent >= purge_above {
            for who in &alive {
                if let Some(committed) = self.commit(*who) {
                    self.purge(*who, committed);
                }
            }
            return self.settle().await;
        }
        let who = alive[random.below(alive.len() as u64) as usize];
        match random.below(20) {
            0..9 => self.append(who, random.below(4) + 1),
            9..11 => self.vote(who, format!("vote {}", random.next())),
            11..13 => {
                let log = self.log(who);
                let floor = self.groups.borrow().get(&who).map_or(0, |model| model.committed);
                let lowest = log.purged().map_or(0, |id| id.index.0 + 1).max(floor + 1);
                if let Some(last) = log.last().filter(|last| last.index.0 >= lowest) {
                    self.truncate(who, lowest + random.below(last.index.0 + 1 - lowest));
                }
            }
            13..15 => {
                self.commit(who);
            }
            15 => {
                let committed = self.groups.borrow().get(&who).map_or(0, |model| model.committed);
                let first = self.log(who).purged().map_or(0, |id| id.index.0 + 1);
                // What is purged is flushed: the checkpoint that allows it says so.
                let most = committed.min(self.log(who).flushed().0);
                if most >= first && most > 0 {
                    self.purge(who, first + random.below(most + 1 - first));
                }
            }
            16..18 => self.settle().await,
            18 => holdfast_env::sleep(Duration::from_millis(250)).await,
            _ if alive.len() > 1 && random.one_in(4) => self.drop_group(who),
            _ => holdfast_env::yield_now().await,
        }
    }
}

/// Opens the journal, checks what is there, and works until the work is done or the world stops.
pub fn live<W: Future<Output = ()>>(
    disk: &MemoryDisk,
    groups: &Groups,
    seed: u64,
    work: impl FnOnce(Life) -> W,
) -> Result<(), String> {
    simulate(seed, async {
        let (identity, options) = (identity(), options());
        let opened = Journal::open(disk.directory(), &identity, &options);
        let opened = futures_util::future::select(Box::pin(opened), Box::pin(disk.frozen())).await;
        let futures_util::future::Either::Left((opened, _)) = opened else { return Ok(()) };
        let (journal, recovered) = opened.map_err(|error| error.to_string())?;
        let checked = {
            // Checking reads; a stop in the middle of it is the end of this life.
            let check = Box::pin(model::check(groups, &recovered, false));
            futures_util::future::select(check, Box::pin(disk.frozen())).await
        };
        match checked {
            futures_util::future::Either::Left((result, _)) => drop(result?),
            futures_util::future::Either::Right(_) => return Ok(()),
        }
        let life = Life { journal, groups: groups.clone() };
        let work = Box::pin(work(life));
        drop(futures_util::future::select(work, Box::pin(disk.frozen())).await);
        Ok(())
    })
}

/// A few operations drawn at random.
pub async fn wander(life: Life, seed: u64, next_group: Rc<Cell<u64>>) {
    let random = Random::new(seed);
    // Early, or not before nothing more can be written.
    let purge_above = if random.one_in(2) { 40 } else { 80 };
    for _ in 0..10 + random.below(40) {
        life.step(&random, &next_group, purge_above).await;
        for _ in 0..random.below(6) {
            holdfast_env::yield_now().await;
        }
    }
}
