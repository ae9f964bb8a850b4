//! Codes and idempotency of the controller.

use holdfast_csi::proto;
use tonic::Code;

use crate::Outcome;
use crate::cluster::Cluster;
use crate::csi::{As, Csi, SIZE, accepted, create, refused};

fn sized(name: &str, required_bytes: i64, limit_bytes: i64) -> proto::CreateVolumeRequest {
    let mut request = create(name, 0);
    request.capacity_range = Some(proto::CapacityRange { required_bytes, limit_bytes });
    request
}

pub async fn sizes_are_rounded_and_bounded(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    for (required, limit, code) in [
        (0, 0, Code::InvalidArgument),
        (-1, 0, Code::InvalidArgument),
        (4096, -1, Code::InvalidArgument),
        (4097, 8000, Code::OutOfRange),
        (8192, 4096, Code::OutOfRange),
        ((16 << 40) + 1, 0, Code::OutOfRange),
        (i64::MAX, 0, Code::OutOfRange),
        // Within the limit of a volume, but no store has that much.
        (15 << 40, 0, Code::ResourceExhausted),
    ] {
        let answer = csi.controller.create_volume(sized("sizes", required, limit)).await;
        refused(&format!("a volume of {required}, at most {limit}"), answer, code, &[])?;
    }
    for (name, required, limit, expected) in
        [("odd", 4097, 0, 8192), ("exact", 8192, 8192, 8192), ("only-limit", 0, 10_000, 8192)]
    {
        let volume = csi.make(sized(name, required, limit)).await?;
        if volume.capacity_bytes != expected {
            return Err(format!("{name} has {} bytes, not {expected}", volume.capacity_bytes));
        }
        csi.delete(&volume.volume_id).await?;
    }
    let mut unsized_request = create("unsized", 0);
    unsized_request.capacity_range = None;
    let volume = csi.make(unsized_request).await?;
    csi.delete(&volume.volume_id).await
}

pub async fn a_name_is_taken_or_the_same_volume(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let volume = csi.make(create("named", SIZE)).await?;
    // From another controller, too.
    let again = cluster.csi(1)?.make(create("named", SIZE)).await?;
    if again.volume_id != volume.volume_id {
        return Err("the same request made another volume".into());
    }
    let larger = csi.controller.create_volume(create("named", 2 * SIZE)).await;
    refused("a larger one", larger, Code::AlreadyExists, &["named"])?;
    let limited = csi.controller.create_volume(sized("named", 4096, SIZE / 2)).await;
    refused("a limited one", limited, Code::AlreadyExists, &["named"])?;
    let mut other = create("named", SIZE);
    other.parameters.insert("survive".into(), "node".into());
    let other = csi.controller.create_volume(other).await;
    refused("one with other parameters", other, Code::AlreadyExists, &["survive"])?;
    csi.delete(&volume.volume_id).await?;

    let longest = "ж".repeat(64);
    let odd = csi.make(create(&longest, SIZE)).await?;
    if csi.make(create(&longest, SIZE)).await?.volume_id != odd.volume_id {
        return Err("a name beyond ASCII is not the same twice".into());
    }
    csi.delete(&odd.volume_id).await?;
    let long = csi.controller.create_volume(create(&"a".repeat(129), SIZE)).await;
    refused("a name of 129 bytes", long, Code::InvalidArgument, &["name"])?;
    let nameless = csi.controller.create_volume(create("", SIZE)).await;
    refused("no name", nameless, Code::InvalidArgument, &["name"])
}

pub async fn parameters_are_refused_by_name(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    for (key, value) in
        [("colour", "red"), ("survive", "comet"), ("encryption", "aes-xts"), ("replicas", "many")]
    {
        let mut request = create("parameters", SIZE);
        request.parameters.insert(key.into(), value.into());
        let answer = csi.controller.create_volume(request).await;
        refused(&format!("{key}: {value}"), answer, Code::InvalidArgument, &[key])?;
    }
    let mut request = create("parameters", SIZE);
    request.parameters.insert("a".repeat(3000), "b".repeat(3000));
    let answer = csi.controller.create_volume(request).await;
    refused("parameters of 6000 bytes", answer, Code::InvalidArgument, &["parameters"])?;
    let mut small = create("small-xfs", 100 << 20);
    small.parameters.insert("csi.storage.k8s.io/fstype".into(), "xfs".into());
    small.volume_capabilities[0] = crate::csi::capability(
        As::Filesystem(""),
        proto::volume_capability::access_mode::Mode::SingleNodeWriter,
    );
    refused("a small xfs", csi.controller.create_volume(small).await, Code::OutOfRange, &["xfs"])?;
    let mut claimed = create("claimed", SIZE);
    claimed.parameters.insert("csi.storage.k8s.io/pvc/name".into(), "claim".into());
    let volume = csi.make(claimed).await?;
    csi.delete(&volume.volume_id).await
}

pub async fn publishing_is_for_one_node_at_a_time(cluster: &Cluster) -> Outcome<()> {
    let (first, second) = (cluster.node(0).name.clone(), cluster.node(1).name.clone());
    let mut csi = cluster.csi(0)?;
    let id = csi.make(create("published", SIZE)).await?.volume_id;
    csi.publish(&id, &first, As::Block).await?;
    csi.publish(&id, &first, As::Block).await?;
    let mut publish = async |request: proto::ControllerPublishVolumeRequest| {
        csi.controller.controller_publish_volume(request).await
    };
    let elsewhere = publish(Csi::publish_request(&id, &second, As::Block)).await;
    refused("a second node", elsewhere, Code::FailedPrecondition, &[&first])?;
    let mut read_only = Csi::publish_request(&id, &first, As::Block);
    read_only.readonly = true;
    refused("another mode", publish(read_only).await, Code::AlreadyExists, &[&first])?;
    let nowhere = publish(Csi::publish_request(&id, "no-such-node", As::Block)).await;
    refused("a node that does not exist", nowhere, Code::NotFound, &["no-such-node"])?;
    let nothing = publish(Csi::publish_request("no-such-volume", &first, As::Block)).await;
    refused("a volume that does not exist", nothing, Code::NotFound, &["no-such-volume"])?;
    csi.unpublish(&id, &first).await?;
    csi.unpublish(&id, &first).await?;
    csi.unpublish(&id, "no-such-node").await?;
    csi.unpublish("no-such-volume", &first).await?;
    csi.publish(&id, &second, As::Block).await?;
    csi.unpublish(&id, "").await?;
    csi.delete(&id).await
}

pub async fn deletion_is_of_ids_and_not_of_what_is_in_use(cluster: &Cluster) -> Outcome<()> {
    let node = cluster.node(0).name.clone();
    let mut csi = cluster.csi(0)?;
    let id = csi.make(create("kept", SIZE)).await?.volume_id;
    // A name is no id: this deletes nothing.
    csi.delete("kept").await?;
    csi.publish(&id, &node, As::Block).await?;
    let request = proto::DeleteVolumeRequest { volume_id: id.clone(), ..Default::default() };
    let answer = csi.controller.delete_volume(request).await;
    refused("deleting what is published", answer, Code::FailedPrecondition, &[&node])?;
    csi.unpublish(&id, &node).await?;
    csi.delete(&id).await?;
    csi.delete(&id).await?;
    csi.delete("never-was").await?;
    let request = proto::ControllerGetVolumeRequest { volume_id: id };
    let answer = csi.controller.controller_get_volume(request).await;
    refused("showing what is deleted", answer, Code::NotFound, &[])
}

pub async fn lists_have_pages(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let mut made = Vec::new();
    for index in 0..3 {
        made.push(csi.make(create(&format!("page-{index}"), SIZE)).await?.volume_id);
    }
    made.sort();
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let request = proto::ListVolumesRequest { max_entries: 1, starting_token: token.clone() };
        let page = accepted("ListVolumes", csi.controller.list_volumes(request).await)?;
        if page.entries.len() > 1 {
            return Err(format!("a page of one has {} volumes", page.entries.len()));
        }
        for entry in page.entries {
            seen.push(entry.volume.ok_or("an entry without a volume")?.volume_id);
        }
        token = page.next_token;
        if seen.len() == 1 {
            // A token goes on to hold when the volume that it names is gone.
            csi.delete(&seen[0]).await?;
        }
        if token.is_empty() {
            break;
        }
    }
    seen.sort();
    if !made.iter().all(|id| seen.contains(id)) {
        return Err(format!("the pages show {seen:?}, and {made:?} were made"));
    }
    for id in &made {
        csi.delete(id).await?;
    }
    let request = proto::ListVolumesRequest { max_entries: 0, starting_token: "invalid-token".into() };
    refused("a wrong token", csi.controller.list_volumes(request).await, Code::Aborted, &[])
}

pub async fn what_is_not_built_says_so(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let info = accepted("GetPluginInfo", csi.identity.get_plugin_info(proto::GetPluginInfoRequest {}).await)?;
    if info.name != holdfast_csi::DRIVER_NAME {
        return Err(format!("the driver is called {}", info.name));
    }
    let probe = accepted("Probe", csi.identity.probe(proto::ProbeRequest {}).await)?;
    if probe.ready != Some(true) {
        return Err("the driver is not ready".into());
    }
    let one = proto::GetSnapshotRequest::default();
    refused("a snapshot by itself", csi.controller.get_snapshot(one).await, Code::Unimplemented, &[])?;
    let modify = proto::ControllerModifyVolumeRequest::default();
    refused("a change", csi.controller.controller_modify_volume(modify).await, Code::Unimplemented, &[])?;
    use proto::controller_service_capability::Type;
    use proto::controller_service_capability::rpc::Type as Kind;
    let request = proto::ControllerGetCapabilitiesRequest {};
    let answer = csi.controller.controller_get_capabilities(request).await;
    for capability in accepted("ControllerGetCapabilities", answer)?.capabilities {
        let Some(Type::Rpc(rpc)) = capability.r#type else {
            return Err("a capability without a type".into());
        };
        let missing = [Kind::ModifyVolume, Kind::GetSnapshot];
        if missing.iter().any(|kind| rpc.r#type == *kind as i32) {
            return Err(format!("{:?} is advertised and not built", rpc.r#type()));
        }
    }
    let mut clone = create("clone", SIZE);
    clone.volume_content_source = Some(proto::VolumeContentSource::default());
    refused("a copy of nothing", csi.controller.create_volume(clone).await, Code::InvalidArgument, &[])
}

pub async fn two_calls_at_once_make_one_volume(cluster: &Cluster) -> Outcome<()> {
    let (mut one, mut two, mut three) = (cluster.csi(0)?, cluster.csi(0)?, cluster.csi(1)?);
    let request = || create("at-once", SIZE);
    let (a, b, c) = tokio::join!(
        one.controller.create_volume(request()),
        two.controller.create_volume(request()),
        three.controller.create_volume(request()),
    );
    let mut ids = Vec::new();
    for answer in [a, b, c] {
        match answer {
            Ok(made) => ids.push(made.into_inner().volume.unwrap_or_default().volume_id),
            Err(status) if [Code::Aborted, Code::Unavailable].contains(&status.code()) => {}
            Err(status) => return Err(format!("one of three calls failed: {status:?}")),
        }
    }
    let after = one.make(request()).await?.volume_id;
    if ids.iter().any(|id| *id != after) {
        return Err(format!("three calls made {ids:?}, a fourth {after}"));
    }
    one.delete(&after).await
}
