//! Nodes with several stores: what the catalog keeps of them, and where replicas go.

use super::*;
use crate::placement::total;
use crate::planted;

const GIB: u64 = 1 << 30;

fn other(store: u128) -> StoreRecord {
    StoreRecord {
        store: StoreId(store),
        peer_address: format!("127.0.0.1:{store}"),
        directory: format!("/disk/{store}"),
    }
}

/// A node with a first store and others.
fn with(number: usize, first: u128, others: &[u128]) -> CatalogCommand {
    let mut command = node(number, first);
    if let CatalogCommand::PutNode { node, .. } = &mut command {
        node.others = others.iter().map(|store| other(*store)).collect();
    }
    command
}

fn others_of(state: &CatalogState) -> Vec<u128> {
    let node = state.nodes.values().next().expect("a node");
    node.others.iter().map(|other| other.store.0).collect()
}

fn spread(zones: usize, nodes: usize, stores: usize) -> Vec<Candidate> {
    let one = candidates(1, zones, nodes).into_iter();
    let all = one.flat_map(|c| {
        (0..stores).map(move |n| Candidate { store: StoreId(c.store.0 * 100 + n as u128), ..c.clone() })
    });
    all.collect()
}

#[test]
fn stores_come_to_a_node_and_one_that_is_used_does_not_go_unnoticed() {
    let mut state = CatalogState::new(CLUSTER);
    assert_eq!(state.apply(&with(0, 1, &[])), Ok(CatalogReply::Done));
    assert_eq!(state.apply(&with(0, 1, &[11, 12])), Ok(CatalogReply::Done));
    assert_eq!(others_of(&state), [11, 12]);
    assert_eq!(state.home_of(StoreId(12)), StoreId(1));
    assert_eq!(state.home_of(StoreId(99)), StoreId(99), "nobody's");
    let mut create = create("v", 5);
    if let CatalogCommand::CreateVolume { placed, .. } = &mut create {
        placed[0].store = StoreId(12);
    }
    volume(state.apply(&create));
    assert_eq!(state.apply(&with(0, 1, &[])), Ok(CatalogReply::Done));
    assert_eq!(others_of(&state), [12], "its replica is to be replaced, and destroyed when it is back");
    let first_gone = state.apply(&with(0, 12, &[1])).map_err(|error| error.code);
    assert_eq!(first_gone, Err(ErrorCode::Refused), "sessions are reached at the first store");
}

#[test]
fn a_store_is_of_one_node_and_once() {
    let mut state = CatalogState::new(CLUSTER);
    let refused = |state: &mut CatalogState, command| state.apply(&command).map_err(|error| error.code);
    assert_eq!(state.apply(&with(0, 1, &[11])), Ok(CatalogReply::Done));
    for wrong in
        [with(1, 11, &[]), with(1, 2, &[11]), with(1, 2, &[1]), with(1, 2, &[3, 3]), with(1, 2, &[2])]
    {
        assert_eq!(refused(&mut state, wrong.clone()), Err(ErrorCode::Refused), "{wrong:?}");
    }
    let many: Vec<u128> = (100..100 + STORES_MAX as u128).collect();
    assert_eq!(refused(&mut state, with(1, 2, &many)), Err(ErrorCode::Refused));
    let mut witness = with(1, 2, &[3]);
    if let CatalogCommand::PutNode { node, .. } = &mut witness {
        node.witness = true;
    }
    assert_eq!(refused(&mut state, witness), Err(ErrorCode::Refused));
    assert_eq!(state.nodes.len(), 1);
}

#[test]
fn stores_of_one_node_are_one_place() {
    let five = VolumeSpec { replicas: Some(5), ..spec("a", Survive::Zone) };
    let refused = place(&five, &spread(3, 1, 2)).expect_err("three nodes take three voters");
    assert!(refused.message.contains("r0/z0: 1 nodes"), "{}", refused.message);
    let placed = place(&five, &spread(3, 2, 2)).expect("six nodes take five");
    let nodes: BTreeSet<_> = placed.iter().map(|at| at.location.node.clone()).collect();
    assert_eq!(nodes.len(), 5);
}

#[test]
fn volumes_spread_over_the_stores_of_a_node() {
    let mut world = spread(3, 1, 4);
    for _ in 0..8 {
        for at in place(&spec("a", Survive::Zone), &world).expect("is placed") {
            let store = world.iter_mut().find(|c| c.store == at.store).expect("a candidate");
            store.replicas += 1;
            store.available_bytes -= GIB;
        }
    }
    assert!(world.iter().all(|c| c.replicas == 2), "{world:?}");
}

#[test]
fn a_replica_fits_into_one_store_and_room_counts_together() {
    let asked = spec("a", Survive::Zone);
    let mut world = spread(3, 1, 2);
    world.iter_mut().filter(|c| c.store.0 % 100 == 1).for_each(|c| c.available_bytes = 4 * GIB);
    assert_eq!(largest(&asked, &world, &[]), 10 * GIB);
    assert_eq!(total(&asked, &world, &[]), 14 * GIB);
    assert_eq!(total(&asked, &candidates(1, 3, 1), &[]), 10 * GIB, "as it was with one store each");
    assert_eq!(total(&asked, &candidates(1, 2, 2), &[]), 0);
}

#[test]
fn a_replica_of_a_dead_store_may_go_to_its_neighbour() {
    let asked = spec("a", Survive::Zone);
    let mut world = spread(3, 1, 2);
    let placed = place(&asked, &world).expect("is placed");
    let dead = placed[0].clone();
    world.iter_mut().filter(|c| c.store == dead.store).for_each(|c| c.usable = false);
    let again = place_one(&asked, &world, &placed[1..], false).expect("its node has another store");
    assert_eq!(again.location.node, dead.location.node);
    assert_ne!(again.store, dead.store);
}

/// Proves that the tests would see two replicas on one node.
#[test]
fn two_replicas_on_one_node_are_found() {
    let five = VolumeSpec { replicas: Some(5), ..spec("a", Survive::Zone) };
    let on_nodes = || {
        let placed = place(&five, &spread(3, 2, 2)).expect("is placed");
        placed.into_iter().map(|at| at.location.node).collect::<BTreeSet<_>>().len()
    };
    assert_eq!(on_nodes(), 5);
    planted::plant(&["two-on-a-node"]);
    let with_fault = std::panic::catch_unwind(|| {
        let mut world = spread(3, 1, 2);
        world[0].replicas = 1;
        let placed = place(&five, &world).expect("six stores");
        placed.into_iter().map(|at| at.location.node).collect::<BTreeSet<_>>().len()
    });
    planted::plant(&[]);
    assert!(with_fault.is_err() || with_fault.is_ok_and(|nodes| nodes < 5));
}

/// One replica moves to its node's other store while another moves away: whoever joins first, no configuration has two
/// voters on one node.
#[test]
fn moves_at_once_never_leave_two_voters_on_one_node() {
    let mut state = CatalogState::new(CLUSTER);
    let made = volume(state.apply(&create("m", 1)));
    let record = volume(state.apply(&CatalogCommand::VolumeReady { id: made.id, revision: made.revision }));
    let (one, two) = (record.replicas[0].clone(), record.replicas[1].clone());
    let mut replace = |revision, old: &ReplicaRecord, location: Location, store| {
        let placed = Placed { store: StoreId(store), location, witness: false };
        volume(state.apply(&CatalogCommand::ReplaceReplica { id: made.id, revision, old: old.id, placed }))
    };
    let record = replace(record.revision, &one, one.location.clone(), 901);
    let record = replace(record.revision, &two, location(7, 7, 7), 902);
    let voting: Vec<_> = record.replicas[..3].iter().map(|replica| replica.id).collect();
    for (joining, away) in [(3, None), (4, None), (3, Some(two.id)), (4, Some(one.id))] {
        let joining = record.replicas[joining].id;
        let answers = |replica: &ReplicaRecord| Some(replica.id) != away;
        let target = target_voters(&record, &voting, Some(joining), 3, answers);
        assert_eq!(target.len(), 3);
        assert!(!share_a_node(&record, &target), "{joining}: {target:?}");
    }
    let both = [record.replicas[0].id, record.replicas[3].id];
    assert!(share_a_node(&record, &both));
}
