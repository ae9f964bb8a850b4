//! What there is: the sites with what stands on their disks, the catalogs, and requests on their way.

use std::collections::BTreeSet;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use holdfast_protocol::catalog::{CatalogState, VolumePhase, VolumeRecord};
use holdfast_store::recovery_file::{Lines, Order};
use holdfast_store::{EntryId, ReplicaIdentity};
use holdfast_types::{GroupId, LogIndex, RecoveryId, ReplicaId, Term};

/// Sites that there are at most; each is a store with one replica.
pub(crate) const SITES: usize = 4;
/// The group that the volume was made with.
pub(crate) const OLD: GroupId = GroupId(1000);

/// A set of sites, one bit each.
pub type Mask = u8;

/// The group that a recovery begins.
pub(crate) fn group_of(by: u8) -> GroupId {
    GroupId(5000 + u128::from(by))
}

pub(crate) fn replica_of(site: usize) -> ReplicaId {
    ReplicaId(site as u64 + 1)
}

pub(crate) fn site_of(replica: ReplicaId) -> usize {
    replica.0 as usize - 1
}

/// The identity of a site's files, which never changes.
pub(crate) fn files(site: usize) -> ReplicaIdentity {
    ReplicaIdentity { group: OLD, replica: replica_of(site) }
}

/// An entry; its index is its place. A term has one leader.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Entry {
    pub(crate) term: u8,
    pub(crate) leader: u8,
}

/// As what a replica runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Runs {
    /// Its node is down, or it waits for others to answer, or it rests.
    Not,
    /// As one of the volume's first group.
    Old,
    /// As the only one of the group that this recovery began.
    New(u8),
}

/// A store and its replica.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Site {
    pub(crate) up: bool,
    pub(crate) runs: Runs,
    /// The disk is gone.
    pub(crate) lost: bool,
    /// The product's: what forced recoveries have made of the replica.
    pub(crate) lines: Arc<Lines>,
    /// On which revision it was taken back: what was decided before does not end it.
    pub(crate) kept: u8,
    pub(crate) vote: u8,
    pub(crate) log: Vec<Entry>,
    pub(crate) flushed: u8,
    /// How much it knows to be committed; kept only where that is what is broken.
    pub(crate) committed: u8,
    /// It leads the first group; how far each has come.
    pub(crate) leads: Option<[u8; SITES]>,
    /// Told apart from what the store says: it has answered that it is sealed, as one of the first group.
    pub(crate) ended: bool,
    /// As which incarnations it went on, one bit each.
    pub(crate) went_on: Mask,
}

impl Site {
    pub(crate) fn end(&self) -> EntryId {
        let Some(last) = self.log.last() else { return EntryId::default() };
        let index = LogIndex(self.log.len() as u64);
        EntryId { term: Term(last.term.into()), leader: replica_of(last.leader.into()), index }
    }
    pub(crate) fn last(&self) -> (u8, usize) {
        (self.log.last().map_or(0, |entry| entry.term), self.log.len())
    }
    pub(crate) fn has(&self, at: usize, entry: Entry) -> bool {
        at < usize::from(self.flushed) && self.log[at] == entry
    }
    /// Whether it was sealed for this recovery, and has not gone on.
    pub(crate) fn is_sealed_for(&self, of: GroupId, order: Order) -> bool {
        self.lines
            .known()
            .iter()
            .any(|(id, line)| id.group == of && line.sealed.is_some_and(|sealed| sealed.order == order))
    }
}

/// A request of a reconciler. None is ever forgotten: it arrives at any later moment, any number of times, or never.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[expect(missing_docs, reason = "as in the product")]
pub enum Request {
    Seal { to: u8, of: GroupId, order: (u64, u8), revision: u8 },
    Keep { to: u8, of: GroupId, revision: u8 },
    TakeOver { to: u8, of: GroupId, order: (u64, u8), above: u8 },
}

pub(crate) fn order(of: (u64, u8)) -> Order {
    Order { number: of.0, id: RecoveryId(of.1.into()) }
}

/// Replicas by their numbers, as in the counter-examples of the other models.
pub(crate) fn named(mask: Mask) -> String {
    let all: Vec<String> = (0..SITES).filter(|n| mask & (1 << n) != 0).map(|n| format!("r{n}")).collect();
    all.join("+")
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seal { to, order, .. } => write!(f, "r{to} is sealed for recovery {}", order.1),
            Self::Keep { to, .. } => write!(f, "r{to} hears that it is kept"),
            Self::TakeOver { to, order, .. } => write!(f, "r{to} goes on for recovery {}", order.1),
        }
    }
}

/// A catalog: the product's state, with one volume.
#[derive(Clone, Debug)]
pub struct Catalog(pub(crate) Arc<CatalogState>);

impl Catalog {
    pub(crate) fn record(&self) -> &VolumeRecord {
        self.0.volumes.values().next().expect("the volume is never deleted")
    }

    /// What tells two apart.
    fn key(&self) -> impl Hash + PartialEq {
        let record = self.record();
        let recovery = record.recovery.as_ref();
        let recovery = recovery.map(|recovery| (recovery.id, recovery.survivors.clone(), recovery.sealing));
        let replicas: Vec<ReplicaId> = record.replicas.iter().map(|replica| replica.id).collect();
        let quarantined: Vec<(GroupId, ReplicaId, RecoveryId)> =
            record.quarantined.iter().map(|kept| (kept.group, kept.replica, kept.by)).collect();
        let is_ready = record.phase == VolumePhase::Ready;
        (is_ready, record.revision, record.group, recovery, replicas, quarantined, record.incarnation.number)
    }
}

impl PartialEq for Catalog {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Catalog {}

impl Hash for Catalog {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

/// A recovery, as its operator asked for it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Asked {
    pub(crate) survivors: Mask,
    pub(crate) called_off: bool,
    /// The log that it goes on with, once it does.
    pub(crate) log: Option<Vec<Entry>>,
    /// The new group has acknowledged something.
    pub(crate) acknowledged: bool,
}

/// What must never happen, and did.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Wrong {
    /// Survivors are sealed though somebody else answers.
    pub(crate) answered: bool,
    /// One that was sealed votes, answers or runs as what it was.
    pub(crate) acts: bool,
    /// What a survivor took part in and was acknowledged is not in the new group.
    pub(crate) mixed: bool,
    /// The first group has acknowledged what a new one that serves does not have.
    pub(crate) both_serve: bool,
    /// What was acknowledged and stands on a survivor is lost.
    pub(crate) lost: bool,
    /// What comes back runs though one that was sealed answers it.
    pub(crate) returned: bool,
    /// A replica goes on for two recoveries of the same volume's life.
    pub(crate) two_lives: bool,
    /// The log of the first group is not one line: the model itself is wrong, or what is broken broke Raft.
    pub(crate) raft: bool,
}

/// What the model has used up of its scope.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Used {
    pub(crate) elections: u8,
    pub(crate) writes: u8,
    pub(crate) disasters: u8,
    pub(crate) crashes: u8,
    pub(crate) lost: u8,
}

/// Everything.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    pub(crate) sites: Vec<Site>,
    pub(crate) catalogs: Vec<Catalog>,
    pub(crate) sent: BTreeSet<Request>,
    /// By number, from 1.
    pub(crate) asked: Vec<Asked>,
    /// What the first group has acknowledged.
    pub(crate) acknowledged: Vec<Entry>,
    pub(crate) wrong: Wrong,
    pub(crate) used: Used,
}

impl World {
    pub(crate) fn quorum(&self) -> usize {
        self.sites.len() / 2 + 1
    }
    /// Those that run as the first group.
    pub(crate) fn running(&self) -> Mask {
        let runs = |n: &usize| self.sites[*n].runs == Runs::Old;
        (0..self.sites.len()).filter(runs).fold(0, |mask, n| mask | 1 << n)
    }
    /// Whether it leads the first group, and whoever it needs runs.
    pub(crate) fn leads_with_quorum(&self, n: usize) -> bool {
        let site = &self.sites[n];
        site.runs == Runs::Old
            && site.leads.is_some()
            && self.running().count_ones() as usize >= self.quorum()
    }
    pub(crate) fn hears_leader(&self, n: usize) -> bool {
        let leads = |l: &Site| l.runs == Runs::Old && l.leads.is_some() && l.vote == self.sites[n].vote;
        let site = &self.sites[n];
        site.runs == Runs::Old && site.leads.is_none() && self.sites.iter().any(leads)
    }
}
