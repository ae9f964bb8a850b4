//! What a store does: it starts, asks others, and obeys requests, or does not. The rules are the product's `Lines`; the
//! order of steps is that of `replica/src/recover.rs`, `destroy.rs` and `repair/mod.rs`.

use std::sync::Arc;

use holdfast_store::recovery_file::{Lines, Order};
use holdfast_store::{EntryId, ReplicaIdentity};
use holdfast_types::GroupId;

use super::world::{Entry, OLD, Request, Runs, SITES, Site, World, files, group_of, order, replica_of};
use super::{Broken, Recovery};

fn revised(site: &mut Site, change: impl FnOnce(&mut Lines) -> bool) -> bool {
    let mut lines = (*site.lines).clone();
    let done = change(&mut lines);
    site.lines = Arc::new(lines);
    done
}

impl Recovery {
    /// Up again. What went on runs at once, since it is alone; who belongs to the first group asks others first.
    pub(super) fn start(&self, world: &mut World, n: usize) {
        let site = &mut world.sites[n];
        site.up = true;
        if let Ok(id) = site.lines.may_run(files(n))
            && let Some(by) = (1..=SITES as u8).find(|by| group_of(*by) == id.group)
        {
            site.runs = Runs::New(by);
        }
    }

    /// Whether it waits for others to answer.
    pub(super) fn asks(&self, world: &World, n: usize) -> bool {
        let site = &world.sites[n];
        site.up && site.runs == Runs::Not && site.lines.may_run(files(n)) == Ok(files(n))
    }

    /// What another store says of the first group.
    fn told_by(&self, world: &World, other: usize) -> Option<Order> {
        let silent = self.broken == Some(Broken::SupersededUntold);
        world.sites[other].lines.superseded(OLD).filter(|_| !silent)
    }

    /// It has asked, and heard those of the others that are up; with a partition perhaps only those that know nothing.
    pub(super) fn asked(&self, world: &mut World, n: usize, hears: bool) -> bool {
        let others = || (0..world.sites.len()).filter(|other| *other != n && world.sites[*other].up);
        let told = others().find_map(|other| self.told_by(world, other));
        if let (Some(by), true) = (told, hears) {
            return self.seal(world, n, OLD, by, u8::MAX);
        }
        let heard: Vec<usize> =
            others().filter(|other| hears || self.told_by(world, *other).is_none()).collect();
        if heard.len() + 1 < world.quorum() {
            return false;
        }
        world.wrong.returned |= heard.iter().any(|other| world.sites[*other].ended);
        world.wrong.acts |= world.sites[n].ended;
        world.sites[n].runs = Runs::Old;
        true
    }

    pub(super) fn obey(&self, world: &mut World, request: Request) -> bool {
        match request {
            Request::Seal { to, of, order: by, revision } => {
                self.seal(world, to.into(), of, order(by), revision)
            }
            Request::Keep { to, of, revision } => self.keep(world, to.into(), of, revision),
            Request::TakeOver { to, of, order: by, above } => self.take_over(world, to.into(), of, by, above),
        }
    }

    /// As `Host::seal`.
    pub(super) fn seal(&self, world: &mut World, n: usize, of: GroupId, by: Order, revision: u8) -> bool {
        let site = &mut world.sites[n];
        let id = ReplicaIdentity { group: of, replica: replica_of(n) };
        if site.lines.knows(id) && site.lines.superseded(of).is_some() {
            if self.broken == Some(Broken::RivalObeyed) {
                site.lines = Arc::default();
            }
            revised(site, |lines| lines.seal(id, by, EntryId::default()).is_ok());
            if matches!(site.runs, Runs::New(_)) && site.lines.may_run(files(n)).is_err() {
                site.runs = Runs::Not;
            }
            return true;
        }
        let is_late = revision < site.kept && self.broken != Some(Broken::CalledOffUnsaid);
        if is_late || site.lines.known_as(files(n)).group != of {
            return false;
        }
        site.flushed = site.log.len() as u8;
        let last = site.end();
        let done = revised(site, |lines| lines.seal(id, by, last).is_ok());
        if self.broken == Some(Broken::SealedAnswers) {
            return done;
        }
        (site.runs, site.leads) = (Runs::Not, None);
        site.ended |= done && of == OLD;
        done
    }

    /// As `Host::keep`: whoever was sealed is not kept, or a recovery that has begun would be called off.
    fn keep(&self, world: &mut World, n: usize, of: GroupId, revision: u8) -> bool {
        let site = &mut world.sites[n];
        let id = ReplicaIdentity { group: of, replica: replica_of(n) };
        let is_ended = site.lines.is_over(id) && self.broken != Some(Broken::SealedKept);
        if is_ended || site.lines.known_as(files(n)).group != of || site.kept >= revision {
            return false;
        }
        site.kept = revision;
        true
    }

    /// As `Host::take_over`, up to where the entry is durable by which it votes alone.
    pub(super) fn begin(&self, world: &mut World, request: Request) -> bool {
        let Request::TakeOver { to, of, order: by, above } = request else { return false };
        let site = &mut world.sites[usize::from(to)];
        if !site.is_sealed_for(of, order(by)) {
            return false;
        }
        let sealed = site.lines.known().into_iter().find_map(|(_, line)| line.sealed);
        let sealed = sealed.map_or(0, |sealed| sealed.last.index.0 as usize);
        if site.log.len() > sealed {
            return false;
        }
        site.vote = site.vote.max(above) + 1;
        site.log.push(Entry { term: site.vote, leader: to });
        site.flushed = site.log.len() as u8;
        true
    }

    fn take_over(&self, world: &mut World, n: usize, of: GroupId, by: (u64, u8), above: u8) -> bool {
        let next = ReplicaIdentity { group: group_of(by.1), replica: replica_of(n) };
        let id = ReplicaIdentity { group: of, replica: replica_of(n) };
        if world.sites[n].runs == Runs::New(by.1) {
            return false;
        }
        let before = world.sites[n].clone();
        if before.lines.may_run(files(n)) != Ok(next) {
            let to = n as u8;
            let has_begun = self.begin(world, Request::TakeOver { to, of, order: by, above });
            let site = &mut world.sites[n];
            let group = if self.broken == Some(Broken::SameGroup) { of } else { next.group };
            if !revised(site, |lines| lines.take_over(id, group, order(by)).is_ok()) {
                return has_begun;
            }
            self.goes_on(world, n, by);
        }
        let site = &mut world.sites[n];
        let is_next = site.lines.may_run(files(n)) == Ok(next);
        if is_next || self.broken == Some(Broken::SameGroup) {
            site.runs = Runs::New(by.1);
        }
        true
    }

    /// INV-RECOVER: it goes on with everything that its log held when it was sealed.
    fn goes_on(&self, world: &mut World, n: usize, (number, by): (u64, u8)) {
        let site = &mut world.sites[n];
        world.wrong.two_lives |= site.went_on & (1 << number) != 0;
        site.went_on |= 1 << number;
        let mut log = site.log.clone();
        log.pop();
        if self.broken == Some(Broken::CommittedOnly) {
            log.truncate(site.committed.into());
        }
        let survivors = world.asked[usize::from(by) - 1].survivors;
        let stood = |at: usize, entry: Entry| {
            let mut named = (0..world.sites.len()).filter(|other| survivors & (1 << other) != 0);
            named.any(|other| world.sites[other].has(at, entry))
        };
        let mut acknowledged = world.acknowledged.iter().enumerate();
        world.wrong.lost |= acknowledged.any(|(at, entry)| stood(at, *entry) && log.get(at) != Some(entry));
        world.asked[usize::from(by) - 1].log = Some(log);
    }
}
