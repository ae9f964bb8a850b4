//! INV-MEMBER: whatever is moved, joins, gives way and leaves in whatever order, a volume keeps its voters.

use std::collections::BTreeSet;

use holdfast_types::ReplicaId;

use super::*;

const WANTED: usize = 3;

/// A volume's record and the group that the reconciler makes match it.
struct World {
    state: CatalogState,
    id: VolumeId,
    voting: BTreeSet<ReplicaId>,
    destroyed: BTreeSet<ReplicaId>,
    stores: u128,
}

#[derive(Clone, Copy, Debug)]
enum Do {
    /// Move a replica to a store of its own.
    Move(usize),
    /// A replica is faulty, and another is to take its place on its store.
    InPlace(usize),
    Join(usize),
    Leave(usize),
}

impl World {
    fn new() -> Self {
        let mut state = CatalogState::new(CLUSTER);
        let made = volume(state.apply(&create("m", 1)));
        let ready = CatalogCommand::VolumeReady { id: made.id, revision: made.revision };
        let record = volume(state.apply(&ready));
        let voting = record.replicas.iter().map(|replica| replica.id).collect();
        Self { state, id: record.id, voting, destroyed: BTreeSet::new(), stores: 1000 }
    }

    fn record(&self) -> VolumeRecord {
        self.state.volumes[&self.id].clone()
    }

    fn voters(&self) -> Vec<ReplicaId> {
        self.voting.iter().copied().collect()
    }

    fn find(&self, at: usize, phase: impl Fn(ReplicaPhase) -> bool) -> Option<ReplicaRecord> {
        let found: Vec<_> = self.record().replicas.into_iter().filter(|r| phase(r.phase)).collect();
        found.get(at % found.len().max(1)).cloned()
    }

    fn apply(&mut self, command: CatalogCommand) {
        // What the catalog refuses changes nothing.
        drop(self.state.apply(&command));
    }

    fn replace(&mut self, old: &ReplicaRecord, store: StoreId) {
        let (id, revision) = (self.id, self.record().revision);
        let placed = Placed { store, location: location(7, store.0 as usize, 0), witness: false };
        self.apply(CatalogCommand::ReplaceReplica { id, revision, old: old.id, placed });
    }

    fn change(&mut self, voters: Vec<ReplicaId>) {
        self.voting = voters.into_iter().collect();
    }

    fn step(&mut self, step: Do) {
        match step {
            Do::Move(at) => {
                if let Some(old) = self.find(at, |phase| phase != ReplicaPhase::Leaving) {
                    self.stores += 1;
                    self.replace(&old, StoreId(self.stores));
                }
            }
            Do::InPlace(at) => {
                let nobody_joins = self.find(0, |phase| phase == ReplicaPhase::Joining).is_none();
                let faulty = self.find(at, |phase| phase == ReplicaPhase::Voter);
                if let Some(old) = faulty.filter(|_| nobody_joins) {
                    self.replace(&old, old.store);
                }
            }
            Do::Join(at) => {
                if let Some(joining) = self.find(at, |phase| phase == ReplicaPhase::Joining) {
                    self.join(&joining);
                }
            }
            Do::Leave(at) => {
                if let Some(leaving) = self.find(at, |phase| phase == ReplicaPhase::Leaving) {
                    self.leave(&leaving);
                }
            }
        }
    }

    fn join(&mut self, joining: &ReplicaRecord) {
        let record = self.record();
        for old in record.replicas.iter().filter(|old| gives_way(&record, old) && old.store == joining.store)
        {
            let others: Vec<_> = self.voters().into_iter().filter(|id| *id != old.id).collect();
            if self.voting.contains(&old.id) {
                if others.len() <= self.voting.len() / 2 {
                    return;
                }
                self.change(others);
            }
            self.destroyed.insert(old.id);
        }
        self.change(target_voters(&record, &self.voters(), Some(joining.id), WANTED, |_| true));
        let (id, revision, phase) = (self.id, record.revision, ReplicaPhase::Voter);
        self.apply(CatalogCommand::SetReplica { id, revision, replica: joining.id, phase });
    }

    fn leave(&mut self, leaving: &ReplicaRecord) {
        let record = self.record();
        if gives_way(&record, leaving) {
            return;
        }
        if self.voting.contains(&leaving.id) {
            let target = target_voters(&record, &self.voters(), None, WANTED, |_| true);
            if target.contains(&leaving.id) {
                return;
            }
            self.change(target);
        }
        self.destroyed.insert(leaving.id);
        let (id, revision, replica) = (self.id, record.revision, leaving.id);
        self.apply(CatalogCommand::DropReplica { id, revision, replica });
    }

    fn check(&self, what: &str) {
        let lost: Vec<_> = self.voting.intersection(&self.destroyed).collect();
        assert!(lost.is_empty(), "{what}: {lost:?} vote and are destroyed");
        let record = self.record();
        let in_place = record.replicas.iter().any(|old| gives_way(&record, old))
            || record.replicas.iter().filter(|r| r.phase == ReplicaPhase::Joining).count() > 0;
        let least = if in_place { WANTED - 1 } else { WANTED };
        assert!(self.voting.len() >= least, "{what}: only {:?} vote; {record:?}", self.voting);
    }

    /// Everybody joins and leaves that is to.
    fn settle(&mut self) {
        for _ in 0..100 {
            self.step(Do::Join(0));
            self.check("a join");
            for at in 0..self.record().replicas.len() {
                self.step(Do::Leave(at));
                self.check("a departure");
            }
        }
        let voters: BTreeSet<_> = self.record().replicas.iter().map(|replica| replica.id).collect();
        assert_eq!(self.voting, voters, "the group is what the catalog says: {:?}", self.record());
        assert!(self.record().replicas.iter().all(|replica| replica.phase == ReplicaPhase::Voter));
        assert!(voters.len() >= WANTED);
    }
}

fn any_step() -> impl Strategy<Value = Do> {
    prop_oneof![
        (0usize..8).prop_map(Do::Move),
        (0usize..8).prop_map(Do::InPlace),
        (0usize..8).prop_map(Do::Join),
        (0usize..8).prop_map(Do::Leave),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_volume_keeps_its_voters_in_every_order_of_moves_joins_and_departures(
        steps in proptest::collection::vec(any_step(), 1..24)
    ) {
        let mut world = World::new();
        for (number, step) in steps.iter().enumerate() {
            world.step(*step);
            world.check(&format!("step {number}, {step:?}"));
        }
        world.settle();
    }
}

#[test]
fn two_that_are_moved_at_once_leave_only_when_both_have_successors() {
    let mut world = World::new();
    let [first, second] = [0, 1].map(|at| world.find(at, |_| true).expect("a replica"));
    world.replace(&first, StoreId(2001));
    world.replace(&second, StoreId(2002));
    world.step(Do::Join(0));
    assert_eq!(world.voting.len(), 3, "{:?}", world.voting);
    world.step(Do::Join(0));
    assert!(!world.voting.contains(&first.id) && !world.voting.contains(&second.id));
    world.settle();
}

#[test]
fn of_those_that_leave_the_one_that_answers_stays_longer() {
    let mut world = World::new();
    let [dead, alive] = [0, 1].map(|at| world.find(at, |_| true).expect("a replica"));
    world.replace(&dead, StoreId(2001));
    world.replace(&alive, StoreId(2002));
    let joining = world.find(0, |phase| phase == ReplicaPhase::Joining).expect("one joins");
    let answers = |replica: &ReplicaRecord| replica.id != dead.id;
    let next = target_voters(&world.record(), &world.voters(), Some(joining.id), WANTED, answers);
    assert!(next.contains(&alive.id) && !next.contains(&dead.id), "{next:?}");
}

#[test]
fn one_that_is_no_member_any_more_holds_up_nobody() {
    let world = World::new();
    let stray = world.find(0, |_| true).expect("a replica");
    let others: Vec<ReplicaId> = world.voters().into_iter().filter(|id| *id != stray.id).collect();
    let next = target_voters(&world.record(), &others, Some(ReplicaId(77)), WANTED, |_| true);
    assert!(!next.contains(&stray.id), "it is no learner, so nobody can make it a voter: {next:?}");
    assert_eq!(next.len(), WANTED, "{next:?}");
}

#[test]
fn what_runs_again_is_kept_in_one_step() {
    let mut world = World::new();
    let old = world.find(0, |_| true).expect("a replica");
    world.replace(&old, old.store);
    let joining = world.find(0, |phase| phase == ReplicaPhase::Joining).expect("one joins");
    let (id, revision) = (world.id, world.record().revision);
    let keep = |revision| CatalogCommand::KeepReplica { id, revision, old: old.id, joining: joining.id };
    assert!(world.state.apply(&keep(revision - 1)).is_err(), "decided on an older state");
    let kept = volume(world.state.apply(&keep(revision)));
    let phase_of = |id| kept.replicas.iter().find(|r| r.id == id).map(|r| r.phase);
    assert_eq!(phase_of(old.id), Some(ReplicaPhase::Voter));
    assert_eq!(phase_of(joining.id), Some(ReplicaPhase::Leaving));
    assert!(world.state.apply(&keep(kept.revision)).is_err(), "once only");
}
