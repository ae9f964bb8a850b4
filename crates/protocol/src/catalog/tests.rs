//! The catalog's rules, and placement's promise, attacked with whatever a user could ask.

mod clones;
mod members;
mod recovery;
mod snapshots;
mod stores;

use std::collections::{BTreeMap, BTreeSet};

use holdfast_types::{
    AccessFrom, ByteSize, ClusterId, ErrorCode, GroupId, Location, NodeName, OnQuorumLoss, ReadPolicy,
    StoreId, Survive, TimersPolicy, TopologyTerm, VolumeId, VolumeSpec,
};
use proptest::prelude::*;

use super::*;
use crate::placement::{Candidate, largest, place, place_one};

const CLUSTER: ClusterId = ClusterId(1);

fn spec(name: &str, survive: Survive) -> VolumeSpec {
    VolumeSpec {
        name: name.into(),
        size: ByteSize(1 << 30),
        survive,
        replicas: None,
        allowed: Vec::new(),
        preferred: Vec::new(),
        on_quorum_loss: OnQuorumLoss::Suspend,
        read_policy: ReadPolicy::Nearest,
        access_from: AccessFrom::Anywhere,
        timers: TimersPolicy::Auto,
        snapshot_quota: None,
    }
}

fn location(region: usize, zone: usize, node: usize) -> Location {
    Location {
        region: format!("r{region}"),
        zone: format!("z{zone}"),
        node: NodeName::new(format!("r{region}-z{zone}-n{node}")),
    }
}

fn candidates(regions: usize, zones: usize, nodes: usize) -> Vec<Candidate> {
    let mut all = Vec::new();
    for region in 0..regions {
        for zone in 0..zones {
            for node in 0..nodes {
                all.push(Candidate {
                    store: StoreId(all.len() as u128 + 1),
                    location: location(region, zone, node),
                    usable: true,
                    witness: false,
                    available_bytes: 10 << 30,
                    replicas: 0,
                });
            }
        }
    }
    all
}

fn placed(count: usize) -> Vec<Placed> {
    place(&spec("p", Survive::Zone), &candidates(1, 3, 1))
        .expect("is placed")
        .into_iter()
        .take(count)
        .collect()
}

fn create(name: &str, id: u128) -> CatalogCommand {
    CatalogCommand::CreateVolume {
        id: VolumeId(id),
        group: GroupId(id + 1000),
        spec: spec(name, Survive::Zone),
        parameters: BTreeMap::new(),
        placed: placed(3),
        source: None,
    }
}

fn node(number: usize, store: u128) -> CatalogCommand {
    CatalogCommand::PutNode {
        cluster: CLUSTER,
        node: NodeRecord {
            location: location(0, number, 0),
            store: StoreId(store),
            peer_address: format!("127.0.0.{number}:1"),
            admin: String::new(),
            cordoned: false,
            witness: false,
            directory: String::new(),
            others: Vec::new(),
        },
    }
}

fn volume(reply: CatalogResult) -> VolumeRecord {
    match reply {
        Ok(CatalogReply::Volume { record }) => *record,
        other => panic!("not a volume: {other:?}"),
    }
}

#[test]
fn creation_bears_repetition_and_a_taken_name_is_refused() {
    let mut state = CatalogState::new(CLUSTER);
    let first = volume(state.apply(&create("a", 1)));
    let again = volume(state.apply(&create("a", 2)));
    assert_eq!(first, again, "the same request finds the same volume");
    let mut larger = create("a", 3);
    if let CatalogCommand::CreateVolume { spec, .. } = &mut larger {
        spec.size = ByteSize(2 << 30);
    }
    assert_eq!(state.apply(&larger).map_err(|e| e.code), Err(ErrorCode::AlreadyExists));
    assert_eq!(state.volumes.len(), 1);
}

#[test]
fn ids_of_replicas_never_come_back() {
    let mut state = CatalogState::new(CLUSTER);
    let mut seen = BTreeSet::new();
    for round in 0..5 {
        let record = volume(state.apply(&create("a", round)));
        for replica in &record.replicas {
            assert!(seen.insert(replica.id), "{} was given out before", replica.id);
        }
        let mut record = volume(state.apply(&CatalogCommand::DeleteVolume { id: record.id }));
        assert!(state.find("a").is_none(), "the name is free at once");
        while let Some(replica) = record.replicas.first() {
            let (id, revision, replica) = (record.id, record.revision, replica.id);
            record = volume(state.apply(&CatalogCommand::DropReplica { id, revision, replica }));
        }
        let forget = CatalogCommand::ForgetVolume { id: record.id, revision: record.revision };
        assert_eq!(state.apply(&forget), Ok(CatalogReply::Done));
    }
    assert!(state.volumes.is_empty());
}

#[test]
fn a_decision_on_an_old_revision_changes_nothing() {
    let mut state = CatalogState::new(CLUSTER);
    let record = volume(state.apply(&create("a", 1)));
    let ready = CatalogCommand::VolumeReady { id: record.id, revision: record.revision };
    let record = volume(state.apply(&ready));
    assert_eq!(record.phase, VolumePhase::Ready);
    let before = state.clone();
    let extra = candidates(1, 4, 1).pop().expect("a fourth zone");
    let late = [
        ready,
        CatalogCommand::AddReplica {
            id: record.id,
            revision: record.revision - 1,
            placed: Placed { store: extra.store, location: extra.location, witness: false },
        },
        CatalogCommand::ForgetVolume { id: record.id, revision: record.revision },
        CatalogCommand::DropReplica {
            id: record.id,
            revision: record.revision,
            replica: record.replicas[0].id,
        },
    ];
    for command in late {
        assert!(state.apply(&command).is_err(), "{command:?}");
        assert_eq!(state, before, "{command:?}");
    }
}

/// A daemon may end between any two commands, and the reconciler acts between any two.
#[test]
fn a_replica_is_replaced_in_one_step() {
    let mut state = CatalogState::new(CLUSTER);
    let record = volume(state.apply(&create("a", 1)));
    let ready = CatalogCommand::VolumeReady { id: record.id, revision: record.revision };
    let record = volume(state.apply(&ready));
    let (id, revision, old) = (record.id, record.revision, record.replicas[0].id);
    let extra = candidates(1, 4, 1).pop().expect("a fourth zone");
    let placed = Placed { store: extra.store, location: extra.location, witness: false };
    let replace =
        |revision, old| CatalogCommand::ReplaceReplica { id, revision, old, placed: placed.clone() };
    let before = state.clone();
    assert!(state.apply(&replace(revision - 1, old)).is_err(), "it was decided on an old revision");
    assert_eq!(state, before);
    assert!(state.apply(&replace(revision, ReplicaId(999))).is_err());
    assert_eq!(state.volumes, before.volumes);
    let record = volume(state.apply(&replace(revision, old)));
    let phases: Vec<_> = record.replicas.iter().map(|replica| replica.phase).collect();
    use ReplicaPhase::{Joining, Leaving, Voter};
    assert_eq!(phases, [Leaving, Voter, Voter, Joining]);
    let again = state.apply(&replace(record.revision, old));
    assert_eq!(again.map_err(|error| error.code), Err(ErrorCode::Refused), "it is leaving already");
}

#[test]
fn a_volume_is_published_to_one_writer() {
    let mut state = CatalogState::new(CLUSTER);
    for number in 1..=2 {
        assert_eq!(state.apply(&node(number, number as u128)), Ok(CatalogReply::Done));
    }
    let id = volume(state.apply(&create("a", 1))).id;
    let publish =
        |number, read_only| CatalogCommand::Publish { id, node: location(0, number, 0).node, read_only };
    volume(state.apply(&publish(1, false)));
    volume(state.apply(&publish(1, false)));
    assert_eq!(state.apply(&publish(2, false)).map_err(|e| e.code), Err(ErrorCode::Refused));
    assert_eq!(state.apply(&publish(1, true)).map_err(|e| e.code), Err(ErrorCode::AlreadyExists));
    assert_eq!(state.apply(&publish(9, false)).map_err(|e| e.code), Err(ErrorCode::NotFound));
    let delete = CatalogCommand::DeleteVolume { id };
    assert_eq!(state.apply(&delete).map_err(|e| e.code), Err(ErrorCode::Refused));
    volume(state.apply(&CatalogCommand::Unpublish { id, node: None }));
    volume(state.apply(&delete));
}

#[test]
fn a_node_of_another_cluster_and_a_copied_disk_are_refused() {
    let mut state = CatalogState::new(CLUSTER);
    assert_eq!(state.apply(&node(1, 1)), Ok(CatalogReply::Done));
    assert_eq!(state.apply(&node(1, 1)), Ok(CatalogReply::Done));
    assert_eq!(state.apply(&node(2, 1)).map_err(|e| e.code), Err(ErrorCode::Refused));
    assert_eq!(state.apply(&node(1, 2)).map_err(|e| e.code), Err(ErrorCode::Refused));
    let mut foreign = node(3, 3);
    if let CatalogCommand::PutNode { cluster, .. } = &mut foreign {
        *cluster = ClusterId(99);
    }
    assert_eq!(state.apply(&foreign).map_err(|e| e.code), Err(ErrorCode::Refused));
    assert_eq!(state.nodes.len(), 1);
}

/// A witness node in a region and zone of its own.
fn witness_at(region: usize, zone: usize) -> Candidate {
    Candidate {
        store: StoreId(1000 + region as u128 * 10 + zone as u128),
        location: location(region, zone, 9),
        usable: true,
        witness: true,
        available_bytes: 1 << 20,
        replicas: 0,
    }
}

fn zone_term(zone: usize) -> TopologyTerm {
    TopologyTerm { region: String::new(), zone: format!("z{zone}"), node: String::new() }
}

#[test]
fn two_zones_and_a_witness_are_enough_without_any_parameter() {
    let mut world = candidates(1, 2, 2);
    assert!(place(&spec("a", Survive::Zone), &world).is_err());
    world.push(witness_at(7, 7));
    let mut asked = spec("a", Survive::Zone);
    // What is allowed bounds the data; the witness stands elsewhere.
    asked.allowed = vec![zone_term(0), zone_term(1)];
    for asked in [spec("a", Survive::Zone), asked.clone()] {
        let placed = place(&asked, &world).expect("is placed");
        let shape: Vec<_> = placed.iter().map(|p| (p.location.zone.as_str(), p.witness)).collect();
        assert_eq!(shape, [("z0", false), ("z1", false), ("z7", true)]);
    }
    // Three zones with data need none, unless two replicas are asked for.
    let mut three = candidates(1, 3, 1);
    three.push(witness_at(7, 7));
    let placed = place(&spec("a", Survive::Zone), &three).expect("is placed");
    assert!(placed.iter().all(|p| !p.witness));
    assert!(place(&asked, &three).expect("is placed")[2].witness, "two of the three are allowed");
    let two = VolumeSpec { replicas: Some(2), ..spec("a", Survive::Zone) };
    assert_eq!(place(&two, &three).expect("is placed").iter().filter(|p| p.witness).count(), 1);
    // A witness beside the data of one of the two zones is no third one.
    let mut beside = candidates(1, 2, 1);
    beside.push(witness_at(0, 1));
    assert!(place(&spec("a", Survive::Zone), &beside).is_err());
    // The only domain with a witness is kept free for it.
    let mut shared = candidates(1, 3, 1);
    shared.push(witness_at(0, 1));
    let placed = place(&two, &shared).expect("is placed");
    assert_eq!(placed.iter().map(|p| p.location.zone.as_str()).collect::<Vec<_>>(), ["z0", "z2", "z1"]);
    assert_eq!(largest(&spec("a", Survive::Zone), &world, &[]), 10 << 30, "a witness needs no room for data");
}

#[test]
fn a_replica_is_replaced_by_one_of_its_kind() {
    let mut world = candidates(1, 2, 2);
    world.extend([witness_at(7, 7), witness_at(8, 8)]);
    let asked = spec("a", Survive::Zone);
    let placed = place(&asked, &world).expect("is placed");
    let again = place_one(&asked, &world, &placed[1..], false).expect("data");
    assert!(!again.witness && again.location.zone == "z0");
    world.retain(|c| c.store != placed[2].store);
    let again = place_one(&asked, &world, &placed[..2], true).expect("a witness");
    assert!(again.witness && again.store != placed[2].store);
    world.retain(|c| !c.witness);
    assert!(place_one(&asked, &world, &placed[..2], true).is_err());
}

#[test]
fn a_missing_witness_is_named_with_the_command_that_starts_one() {
    let refused = place(&spec("a", Survive::Zone), &candidates(1, 2, 3)).expect_err("two zones are too few");
    assert!(
        refused.hint.contains("start a witness in a third zone (`holdfast node --witness`)"),
        "{}",
        refused.hint
    );
    let asked = VolumeSpec { replicas: Some(2), ..spec("a", Survive::Region) };
    let refused = place(&asked, &candidates(2, 2, 1)).expect_err("there is no witness");
    assert!(refused.hint.contains("start a witness in a third region"), "{}", refused.hint);
    let mut away = candidates(1, 2, 1);
    away.push(Candidate { usable: false, ..witness_at(7, 7) });
    let refused = place(&spec("a", Survive::Zone), &away).expect_err("the witness is away");
    assert_eq!(refused.code, ErrorCode::Unavailable);
    assert!(refused.message.contains("of 1 witness nodes 0 take a new witness"), "{}", refused.message);
}

#[test]
fn a_node_does_not_become_another_kind() {
    let mut state = CatalogState::new(CLUSTER);
    assert_eq!(state.apply(&node(1, 1)), Ok(CatalogReply::Done));
    let mut other = node(1, 1);
    if let CatalogCommand::PutNode { node, .. } = &mut other {
        node.witness = true;
    }
    assert_eq!(state.apply(&other).map_err(|e| e.code), Err(ErrorCode::Refused));
}

#[test]
fn refusals_teach() {
    let two_zones = candidates(1, 2, 3);
    let refused = place(&spec("a", Survive::Zone), &two_zones).expect_err("two zones are too few");
    assert_eq!(
        refused.message,
        "survive: zone with 3 voters needs 3 zones; this cluster has 2 (r0/z0: 3 nodes, r0/z1: 3 nodes)"
    );
    let full: Vec<_> =
        candidates(1, 3, 1).into_iter().map(|c| Candidate { available_bytes: 1, ..c }).collect();
    let refused = place(&spec("a", Survive::Zone), &full).expect_err("there is no room");
    assert_eq!(refused.code, ErrorCode::ResourceExhausted);
    assert_eq!(largest(&spec("a", Survive::Zone), &candidates(1, 3, 1), &[]), 10 << 30);
    assert_eq!(largest(&spec("a", Survive::Zone), &two_zones, &[]), 0);
}

prop_compose! {
    fn world()(
        regions in 1..4usize, zones in 1..4usize, nodes in 1..4usize, stores in 1..4usize,
        mask in any::<u64>(), rooms in any::<u64>(),
        witnesses in prop::collection::vec((0..5usize, 0..5usize, any::<bool>()), 0..3),
    ) -> Vec<Candidate> {
        let mut all: Vec<Candidate> = candidates(regions, zones, nodes)
            .into_iter()
            .flat_map(|c| (0..stores).map(move |n| Candidate {
                store: StoreId(c.store.0 + 10_000 * n as u128),
                ..c.clone()
            }))
            .collect();
        for (n, candidate) in all.iter_mut().enumerate() {
            candidate.usable = mask >> (n % 64) & 3 != 0;
            candidate.available_bytes = if rooms >> (n % 64) & 7 == 0 { 0 } else { 10 << 30 };
            candidate.replicas = n % 3;
        }
        for (region, zone, usable) in witnesses {
            let witness = Candidate { usable, ..witness_at(region, zone) };
            if !all.iter().any(|c| c.store == witness.store) {
                all.push(witness);
            }
        }
        all
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn one_lost_domain_never_takes_the_quorum(
        world in world(),
        survive in prop::sample::select(vec![Survive::None, Survive::Node, Survive::Zone, Survive::Region]),
        replicas in prop::sample::select(vec![None, Some(1), Some(2), Some(3), Some(5)]),
        zone in prop::option::of(0..3usize),
        preferred in 0..3usize,
    ) {
        let mut asked = spec("a", survive);
        asked.replicas = replicas;
        if let Some(zone) = zone {
            asked.allowed =
                vec![TopologyTerm { region: String::new(), zone: format!("z{zone}"), node: String::new() }];
        }
        asked.preferred =
            vec![TopologyTerm { region: String::new(), zone: format!("z{preferred}"), node: String::new() }];
        let placed = place(&asked, &world);
        prop_assert_eq!(&placed, &place(&asked, &world), "placement is deterministic");
        if let Ok(placed) = placed {
            let find = |store| world.iter().find(|c| c.store == store).expect("a candidate");
            prop_assert!(placed.iter().all(|p| find(p.store).usable && find(p.store).available_bytes > 0));
            prop_assert!(placed.iter().all(|p| find(p.store).witness == p.witness), "INV-PLACE: each on its kind");
            let nodes: BTreeSet<&NodeName> = placed.iter().map(|p| &p.location.node).collect();
            prop_assert_eq!(nodes.len(), placed.len(), "INV-PLACE: no two on one node");
            let witnesses = placed.iter().filter(|p| p.witness).count();
            prop_assert!(witnesses <= 1 && (witnesses == 0 || placed.len() == 3));
            prop_assert!(placed.iter().position(|p| p.witness).is_none_or(|at| at == placed.len() - 1));
            let bounded = zone.is_none_or(|zone| placed.iter().all(|p| p.witness || p.location.zone == format!("z{zone}")));
            prop_assert!(bounded, "data stands where it is allowed");
            if let Some(domain) = survive.domain() {
                let mut per_domain: BTreeMap<String, usize> = BTreeMap::new();
                for p in &placed {
                    *per_domain.entry(p.location.domain(domain)).or_default() += 1;
                }
                prop_assert!(per_domain.values().all(|held| placed.len() - held > placed.len() / 2));
                let staying = &placed[1..];
                if let Ok(one) = place_one(&asked, &world, staying, false) {
                    prop_assert!(!one.witness);
                    prop_assert!(staying.iter().all(|p| p.location.node != one.location.node));
                    let again = staying.iter().filter(|p| p.location.domain(domain) == one.location.domain(domain));
                    prop_assert!(placed.len() - (again.count() + 1) > placed.len() / 2);
                }
            }
            let zone_there = world.iter().any(|c| {
                !c.witness && c.usable && c.available_bytes > 0 && c.location.zone == format!("z{preferred}")
                    && zone.is_none_or(|allowed| allowed == preferred)
            });
            // A witness's only domain is kept free for it, whatever is preferred.
            if zone_there && witnesses == 0 {
                prop_assert_eq!(&placed[0].location.zone, &format!("z{preferred}"));
            }
        }
    }
}
