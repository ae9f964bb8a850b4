//! What a catalog's reconciler does: the steps of `catalog/src/recovery.rs`, each with whatever it hears at that moment. The
//! record and its rules are the product's `CatalogState`, `may_recover` and `source_of`. A leader of the catalog that was
//! deposed does nothing that its successor may not do: what it has sent is on its way for ever, and what it writes down is
//! refused by the record's revision.

use std::collections::BTreeMap;
use std::sync::Arc;

use holdfast_protocol::catalog::recovery::{
    Heard, may_recover, order_of, recover, revision_of_seals, source_of,
};
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogState, Placed, Recovery as UnderWay, VolumePhase, VolumeRecord,
};
use holdfast_types::{
    AccessFrom, ByteSize, ClusterId, Location, LogIndex, NodeName, OnQuorumLoss, ReadPolicy, RecoveryId,
    ReplicaId, StoreId, Survive, Term, TimersPolicy, VolumeId, VolumeSpec,
};

use super::world::{Asked, Catalog, Mask, OLD, Request, Runs, World, files, group_of, replica_of, site_of};
use super::{Broken, Recovery};

const CLUSTER: ClusterId = ClusterId(1);
const VOLUME: VolumeId = VolumeId(1);

/// One with a volume of so many replicas.
pub(super) fn with_replicas(count: usize) -> Catalog {
    let spec = VolumeSpec {
        name: "a".into(),
        size: ByteSize(1 << 20),
        survive: Survive::None,
        replicas: None,
        allowed: Vec::new(),
        preferred: Vec::new(),
        on_quorum_loss: OnQuorumLoss::Suspend,
        read_policy: ReadPolicy::Nearest,
        access_from: AccessFrom::Anywhere,
        timers: TimersPolicy::Auto,
        snapshot_quota: None,
    };
    let place = |n: usize| Placed {
        location: Location {
            region: "r".into(),
            zone: format!("z{n}"),
            node: NodeName::new(format!("n{n}")),
        },
        store: StoreId(n as u128 + 1),
        witness: false,
    };
    let placed = (0..count).map(place).collect();
    let (parameters, source) = (BTreeMap::new(), None);
    let mut state = CatalogState::new(CLUSTER);
    let create = CatalogCommand::CreateVolume { id: VOLUME, group: OLD, spec, parameters, placed, source };
    state.apply(&create).expect("a volume is created");
    let revision = state.volumes[&VOLUME].revision;
    state.apply(&CatalogCommand::VolumeReady { id: VOLUME, revision }).expect("it is ready");
    let known: Vec<ReplicaId> = state.volumes[&VOLUME].replicas.iter().map(|replica| replica.id).collect();
    assert_eq!(known, (0..count).map(replica_of).collect::<Vec<_>>(), "replicas are known by their sites");
    Catalog(Arc::new(state))
}

fn order(record: &VolumeRecord) -> (u64, u8) {
    order_of(record).map_or((0, 0), |(number, id)| (number, id.0 as u8))
}

fn sites(survivors: &[ReplicaId]) -> impl Iterator<Item = usize> {
    survivors.iter().map(|id| site_of(*id))
}

impl World {
    /// Whether the command was obeyed and has changed something.
    fn apply(&mut self, catalog: usize, command: &CatalogCommand) -> bool {
        let mut state = (*self.catalogs[catalog].0).clone();
        let before = state.volumes[&VOLUME].revision;
        let is_changed = state.apply(command).is_ok() && state.volumes[&VOLUME].revision != before;
        self.catalogs[catalog] = Catalog(Arc::new(state));
        is_changed
    }

    fn revision(&self, catalog: usize) -> u64 {
        self.catalogs[catalog].record().revision
    }

    fn under_way(&self, catalog: usize) -> Option<&UnderWay> {
        self.catalogs[catalog].record().recovery.as_ref()
    }

    fn all_up(&self, survivors: &[ReplicaId]) -> bool {
        sites(survivors).all(|n| self.sites[n].up)
    }

    /// Whether a store says that it has sealed one of the survivors.
    fn is_any_sealed(&self, catalog: usize) -> bool {
        let record = self.catalogs[catalog].record();
        let Some(recovery) = &record.recovery else { return false };
        let by = super::world::order(order(record));
        sites(&recovery.survivors).any(|n| self.sites[n].is_sealed_for(record.group, by))
    }
}

impl Recovery {
    /// What one site says of a replica of this group; nothing if its store is down or says that it is not there.
    fn says(&self, world: &World, n: usize, record: &VolumeRecord) -> Heard {
        let site = &world.sites[n];
        if !site.up {
            return Heard::default();
        }
        let silent = Heard { lives: true, ..Heard::default() };
        if site.lines.known_as(files(n)).group != record.group {
            if self.broken == Some(Broken::ReplacedUnheard) {
                return Heard::default();
            }
            return Heard { unfit: "it is of another group by now".into(), ..silent };
        }
        match site.runs {
            Runs::Old => Heard {
                hears_leader: world.hears_leader(n),
                leads: world.leads_with_quorum(n),
                voters: (0..world.sites.len()).map(replica_of).collect(),
                settled: !self.unsettled,
                ..silent
            },
            Runs::New(_) => Heard { leads: true, voters: vec![replica_of(n)], settled: true, ..silent },
            // It has halted between two recoveries, or waits for others.
            Runs::Not if !site.lines.known().iter().any(|(_, line)| line.sealed.is_some()) => silent,
            Runs::Not => Heard { unfit: "it rests".into(), ..silent },
        }
    }

    /// What the catalog hears: all that answer, or with a partition perhaps only the survivors, and those hear no leader.
    fn heard(&self, world: &World, catalog: usize, hears: bool) -> BTreeMap<ReplicaId, Heard> {
        let record = world.catalogs[catalog].record();
        let named = world.under_way(catalog).map(|recovery| recovery.survivors.clone()).unwrap_or_default();
        let of = |id: ReplicaId| match (hears, named.contains(&id)) {
            (true, _) => self.says(world, site_of(id), record),
            (false, true) => Heard { hears_leader: false, ..self.says(world, site_of(id), record) },
            (false, false) => Heard::default(),
        };
        record.replicas.iter().map(|replica| (replica.id, of(replica.id))).collect()
    }

    fn may_go_on(&self, world: &World, catalog: usize, hears: bool) -> bool {
        let record = world.catalogs[catalog].record();
        let Some(recovery) = &record.recovery else { return false };
        may_recover(record, &recovery.survivors, &self.heard(world, catalog, hears)).is_ok()
    }

    /// An operator names survivors. Nothing is looked at here: the reconciler does so again, twice.
    pub(super) fn ask(&self, world: &mut World, catalog: usize, survivors: Mask) -> bool {
        let record = world.catalogs[catalog].record();
        let is_there = |n: &usize| record.replicas.iter().any(|replica| replica.id == replica_of(*n));
        let named: Vec<usize> = (0..world.sites.len()).filter(|n| survivors & (1 << n) != 0).collect();
        if record.phase != VolumePhase::Ready || !named.iter().all(is_there) {
            return false;
        }
        let number = world.asked.len() as u8 + 1;
        let ids = (RecoveryId(number.into()), group_of(number));
        let command = recover(record, ids, named.into_iter().map(replica_of).collect());
        world.asked.push(Asked { survivors, called_off: false, log: None, acknowledged: false });
        world.apply(catalog, &command)
    }

    fn call_off(&self, world: &mut World, catalog: usize, kept: bool) -> bool {
        let by = order(world.catalogs[catalog].record()).1;
        let revision = world.revision(catalog);
        let done = world.apply(catalog, &CatalogCommand::RecoveryAbandoned { id: VOLUME, revision, kept });
        if done {
            world.asked[usize::from(by) - 1].called_off = true;
        }
        done
    }

    /// Before anybody is sealed: it goes on, or is called off.
    pub(super) fn look(&self, world: &mut World, catalog: usize, hears: bool) -> bool {
        if world.under_way(catalog).is_none_or(|recovery| recovery.sealing) {
            return false;
        }
        if !self.may_go_on(world, catalog, hears) {
            return self.call_off(world, catalog, false);
        }
        let revision = world.revision(catalog);
        world.apply(catalog, &CatalogCommand::RecoverySealing { id: VOLUME, revision })
    }

    /// The survivors are told that they are sealed; or, if somebody has come back before the first of them was, that they
    /// are kept.
    pub(super) fn look_again(&self, world: &mut World, catalog: usize, hears: bool) -> bool {
        let record = world.catalogs[catalog].record().clone();
        let Some(recovery) = record.recovery.as_ref().filter(|recovery| recovery.sealing) else {
            return false;
        };
        if !world.all_up(&recovery.survivors) {
            return false;
        }
        let (of, by, revision) = (record.group, order(&record), record.revision as u8);
        let is_any_sealed = world.is_any_sealed(catalog);
        if !is_any_sealed && !self.may_go_on(world, catalog, hears) {
            let keep = |n: usize| Request::Keep { to: n as u8, of, revision: revision + 1 };
            world.sent.extend(sites(&recovery.survivors).map(keep));
            return true;
        }
        if !is_any_sealed && !self.partitions {
            let is_excluded = |n: &usize| !recovery.survivors.contains(&replica_of(*n));
            let mut excluded = (0..world.sites.len()).filter(is_excluded);
            world.wrong.answered |= excluded.any(|n| self.says(world, n, &record).lives);
            world.wrong.answered |= (0..world.sites.len()).any(|n| world.leads_with_quorum(n));
        }
        let revision = match self.broken {
            Some(Broken::SealedOnOldRevision) => revision,
            _ => revision_of_seals(&record, is_any_sealed) as u8,
        };
        let seal = |n: usize| Request::Seal { to: n as u8, of, order: by, revision };
        world.sent.extend(sites(&recovery.survivors).map(seal));
        if self.broken == Some(Broken::EndsBeforeSeal) {
            self.send_take_over(world, &record, recovery);
        }
        true
    }

    /// Every survivor is sealed: the one that has most goes on, unless a leader is heard.
    pub(super) fn choose(&self, world: &mut World, catalog: usize, hears: bool) -> bool {
        let record = world.catalogs[catalog].record().clone();
        let Some(recovery) = record.recovery.as_ref().filter(|recovery| recovery.sealing) else {
            return false;
        };
        let by = super::world::order(order(&record));
        let is_sealed = |n: usize| world.sites[n].is_sealed_for(record.group, by);
        let are_sealed = match self.broken {
            Some(Broken::EndsBeforeSeal) => return false,
            Some(Broken::OneSealed) => sites(&recovery.survivors).any(is_sealed),
            _ => sites(&recovery.survivors).all(is_sealed),
        };
        let leads = hears && (0..world.sites.len()).any(|n| world.leads_with_quorum(n));
        if !world.all_up(&recovery.survivors) || !are_sealed || leads {
            return false;
        }
        self.send_take_over(world, &record, recovery);
        true
    }

    fn send_take_over(&self, world: &mut World, record: &VolumeRecord, recovery: &UnderWay) {
        let end = |n: usize| {
            let (term, index) = world.sites[n].last();
            (replica_of(n), Term(term.into()), LogIndex(index as u64))
        };
        let ends: Vec<(ReplicaId, Term, LogIndex)> = sites(&recovery.survivors).map(end).collect();
        let Some(source) = source_of(&ends) else { return };
        let above = sites(&recovery.survivors).map(|n| world.sites[n].vote).max().unwrap_or_default();
        let (to, of, order) = (site_of(source) as u8, record.group, order(record));
        world.sent.insert(Request::TakeOver { to, of, order, above });
    }

    /// Every survivor has heard that it is kept, and none is sealed.
    pub(super) fn give_up(&self, world: &mut World, catalog: usize) -> bool {
        let record = world.catalogs[catalog].record();
        let Some(recovery) = record.recovery.as_ref().filter(|recovery| recovery.sealing) else {
            return false;
        };
        let is_kept = |n: usize| u64::from(world.sites[n].kept) > record.revision;
        let unsaid = self.broken == Some(Broken::CalledOffUnsaid) && !self.may_go_on(world, catalog, true);
        let may = sites(&recovery.survivors).all(|n| is_kept(n) || unsaid);
        if !may || !world.all_up(&recovery.survivors) || world.is_any_sealed(catalog) {
            return false;
        }
        self.call_off(world, catalog, true)
    }

    /// One of the survivors runs as the new group.
    pub(super) fn finish(&self, world: &mut World, catalog: usize) -> bool {
        let Some(recovery) = world.under_way(catalog) else { return false };
        let runs = |n: &usize| world.sites[*n].runs == Runs::New(recovery.id.0 as u8);
        let Some(source) = sites(&recovery.survivors).find(runs) else { return false };
        let (revision, source) = (world.revision(catalog), replica_of(source));
        world.apply(catalog, &CatalogCommand::VolumeRecovered { id: VOLUME, revision, source })
    }

    /// What is left of a former group is sealed where the reconciler finds it.
    pub(super) fn quarantine(&self, world: &mut World, catalog: usize, n: usize) -> bool {
        let record = world.catalogs[catalog].record();
        let Some(kept) = record.quarantined.iter().find(|kept| site_of(kept.replica) == n) else {
            return false;
        };
        let site = &world.sites[n];
        let goes_on = site.lines.known_as(files(n)).group != kept.group;
        let is_sealed = site.lines.known().iter().any(|(_, line)| line.sealed.is_some());
        if !site.up || is_sealed || goes_on && self.broken == Some(Broken::NotCompared) {
            return false;
        }
        let (of, by, revision) = (kept.group, (kept.number, kept.by.0 as u8), record.revision as u8);
        let order = super::world::order(by);
        self.seal(world, n, of, order, revision)
    }

    /// Whether a recovery that is ended only when nobody leads the former group any more says so to its operator.
    pub(super) fn waits_for_a_leader(&self, world: &World) -> bool {
        (0..world.catalogs.len()).any(|catalog| world.is_any_sealed(catalog))
    }

    /// Whether the catalog's volume is served, or can be by whoever runs.
    pub(super) fn serves(&self, world: &World, catalog: usize) -> bool {
        let record = world.catalogs[catalog].record();
        let number = (1..=world.asked.len() as u8).find(|by| group_of(*by) == record.group);
        let runs = match number {
            None => world.running().count_ones() as usize >= world.quorum(),
            Some(by) => world.sites.iter().any(|site| site.runs == Runs::New(by)),
        };
        record.phase == VolumePhase::Ready && runs
    }
}
