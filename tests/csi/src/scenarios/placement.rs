//! Topology and capacity.

use holdfast_csi::admin::pb;
use holdfast_csi::proto;
use tonic::Code;

use crate::Outcome;
use crate::cluster::{Cluster, NodeAt};
use crate::csi::{SIZE, accepted, create, refused, topology};

const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";

fn place(node: &NodeAt) -> proto::Topology {
    topology(&[(REGION, &node.region), (ZONE, &node.zone)])
}

fn within(
    name: &str,
    requisite: Vec<proto::Topology>,
    preferred: Vec<proto::Topology>,
) -> proto::CreateVolumeRequest {
    let mut request = create(name, SIZE);
    request.accessibility_requirements = Some(proto::TopologyRequirement { requisite, preferred });
    request
}

/// Nodes of a volume's replicas, the first one first.
async fn replicas(cluster: &Cluster, id: &str) -> Outcome<Vec<String>> {
    let asked = cluster.admin(0).get_volume(pb::GetVolumeRequest { name: id.into() }).await;
    let volume = asked.map_err(|error| error.to_string())?;
    let mut replicas = volume.replicas;
    replicas.sort_by_key(|replica| replica.id);
    Ok(replicas.into_iter().map(|replica| replica.node).collect())
}

pub async fn requisite_and_preferred_place_the_replicas(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let info = accepted("NodeGetInfo", csi.node.node_get_info(proto::NodeGetInfoRequest {}).await)?;
    if info.node_id != cluster.node(0).name || info.accessible_topology != Some(place(cluster.node(0))) {
        return Err(format!("NodeGetInfo answered {info:?}"));
    }
    let all: Vec<proto::Topology> = (0..3).map(|index| place(cluster.node(index))).collect();
    for first in 0..3 {
        // As the provisioner sends it for a pod on a node: everything, beginning with that node's place.
        let mut rotated = all.clone();
        rotated.rotate_left(first);
        let volume = csi.make(within("first", all.clone(), rotated)).await?;
        let at = replicas(cluster, &volume.volume_id).await?;
        if at.len() != 3 || at[0] != cluster.node(first).name || !volume.accessible_topology.is_empty() {
            return Err(format!("preferred in {}: {at:?}, {volume:?}", cluster.node(first).name));
        }
        csi.delete(&volume.volume_id).await?;
        // As it sends it with strict topology: that place alone.
        let strict = csi.make(within("strict", vec![place(cluster.node(first))], vec![])).await?;
        let at = replicas(cluster, &strict.volume_id).await?;
        if at.len() != 3 || at[0] != cluster.node(first).name {
            return Err(format!("strict in {}: {at:?}", cluster.node(first).name));
        }
        csi.delete(&strict.volume_id).await?;
    }
    // A copy that stands alone stays where it is allowed.
    let mut alone = within("alone", vec![place(cluster.node(2))], vec![]);
    alone.parameters.insert("survive".into(), "none".into());
    let volume = csi.make(alone).await?;
    let at = replicas(cluster, &volume.volume_id).await?;
    csi.delete(&volume.volume_id).await?;
    if at != [cluster.node(2).name.clone()] {
        return Err(format!("one copy allowed in {}: {at:?}", cluster.node(2).name));
    }
    // Terms may leave the region out; two zones cannot hold what survives one of three.
    let two = vec![topology(&[(ZONE, &cluster.node(0).zone)]), topology(&[(ZONE, &cluster.node(1).zone)])];
    let answer = csi.controller.create_volume(within("two-zones", two, vec![])).await;
    refused("three zones of two", answer, Code::ResourceExhausted, &["zone"])?;
    let nowhere = vec![topology(&[(ZONE, "moon")])];
    let answer = csi.controller.create_volume(within("nowhere", nowhere, vec![])).await;
    refused("a zone that does not exist", answer, Code::ResourceExhausted, &[])?;
    let unknown = vec![topology(&[("example.com/rack", "7")])];
    let answer = csi.controller.create_volume(within("unknown-key", unknown, vec![])).await;
    refused("an unknown key", answer, Code::InvalidArgument, &["example.com/rack"])
}

pub async fn a_retry_from_another_node_finds_the_volume(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let all: Vec<proto::Topology> = (0..3).map(|index| place(cluster.node(index))).collect();
    let first = csi.make(within("retried", all.clone(), vec![])).await?;
    for request in [
        within("retried", vec![place(cluster.node(1))], vec![place(cluster.node(1))]),
        within("retried", all[1..].to_vec(), vec![]),
        create("retried", SIZE),
    ] {
        let again = csi.make(request).await?;
        if again.volume_id != first.volume_id {
            return Err("a retry made another volume".into());
        }
    }
    csi.delete(&first.volume_id).await
}

pub async fn accessible_topology_is_what_access_from_says(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let zones: Vec<proto::Topology> = (0..3).map(|index| place(cluster.node(index))).collect();
    let region = vec![topology(&[(REGION, &cluster.node(0).region)])];
    for (access, expected) in [("anywhere", vec![]), ("region", region), ("zone", zones)] {
        let mut request = create(&format!("from-{access}"), SIZE);
        request.parameters.insert("accessFrom".into(), access.into());
        let volume = csi.make(request).await?;
        csi.delete(&volume.volume_id).await?;
        let given = &volume.accessible_topology;
        if given.len() != expected.len() || !expected.iter().all(|topology| given.contains(topology)) {
            return Err(format!("accessFrom: {access} gives {given:?}"));
        }
    }
    // One copy in the second zone is not accessible from the first.
    let mut request = within("one-zone", vec![place(cluster.node(1))], vec![]);
    request.parameters.insert("accessFrom".into(), "zone".into());
    request.parameters.insert("survive".into(), "none".into());
    let volume = csi.make(request.clone()).await?;
    if volume.accessible_topology != [place(cluster.node(1))] {
        return Err(format!("one copy is accessible from {:?}", volume.accessible_topology));
    }
    request.accessibility_requirements =
        Some(proto::TopologyRequirement { requisite: vec![place(cluster.node(0))], preferred: vec![] });
    let answer = csi.controller.create_volume(request).await;
    refused("the same from another zone", answer, Code::AlreadyExists, &["accessible"])?;
    csi.delete(&volume.volume_id).await
}

pub async fn capacity_is_what_can_be_made(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let asked =
        proto::GetCapacityRequest { accessible_topology: Some(place(cluster.node(1))), ..Default::default() };
    let capacity = accepted("GetCapacity", csi.controller.get_capacity(asked.clone()).await)?;
    let largest = capacity.maximum_volume_size.ok_or("GetCapacity tells no maximum")?;
    if largest <= 0 || capacity.available_capacity < largest {
        return Err(format!("GetCapacity answered {capacity:?}"));
    }
    let volume = csi.make(create("half", largest / 2)).await?;
    csi.delete(&volume.volume_id).await?;
    let beyond = (2 * largest).min(16 << 40);
    let answer = csi.controller.create_volume(create("beyond", beyond)).await;
    refused("twice the capacity", answer, Code::ResourceExhausted, &[])?;
    let mut impossible = asked.clone();
    impossible.parameters.insert("survive".into(), "region".into());
    let none = accepted("GetCapacity", csi.controller.get_capacity(impossible).await)?;
    if none.available_capacity != 0 {
        return Err(format!("one region has capacity to survive a region: {none:?}"));
    }
    // One copy that is used in its own zone needs room there, and there is no such zone.
    let mut elsewhere = asked;
    elsewhere.parameters.insert("survive".into(), "none".into());
    elsewhere.parameters.insert("accessFrom".into(), "zone".into());
    elsewhere.accessible_topology = Some(topology(&[(REGION, &cluster.node(0).region), (ZONE, "moon")]));
    let none = accepted("GetCapacity", csi.controller.get_capacity(elsewhere).await)?;
    if none.available_capacity != 0 {
        return Err(format!("a zone without nodes has capacity: {none:?}"));
    }
    let mut unknown = proto::GetCapacityRequest::default();
    unknown.parameters.insert("colour".into(), "red".into());
    refused(
        "an unknown parameter",
        csi.controller.get_capacity(unknown).await,
        Code::InvalidArgument,
        &["colour"],
    )
}
