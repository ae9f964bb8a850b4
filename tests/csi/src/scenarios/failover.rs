//! Nodes and daemons that die, and a driver that does.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use holdfast_csi::proto;
use rustix::mount::UnmountFlags;
use tokio::process::Command;
use tonic::Code;

use super::filesystems::{Pod, has, pattern, write};
use crate::Outcome;
use crate::cluster::Cluster;
use crate::csi::{As, Csi, SIZE, create, refused};

const EXT4: As = As::Filesystem("ext4");

pub async fn a_volume_attached_elsewhere_names_its_holder(cluster: &Cluster) -> Outcome<()> {
    let (here, there) = (cluster.node(0).name.clone(), cluster.node(1).name.clone());
    let mut csi = cluster.csi(0)?;
    let staging = cluster.path("elsewhere.stage");
    let id = csi.make(create("elsewhere", SIZE)).await?.volume_id;
    let answer = csi.node.node_stage_volume(Csi::stage_request(&id, &staging, EXT4)).await;
    refused("staging without publishing", answer, Code::FailedPrecondition, &["not published", &here])?;
    // Somebody attached it by hand.
    cluster.command(&["volume", "attach", "elsewhere", "--node", &there, "--frontend", "nbd"]).await?;
    csi.publish(&id, &here, EXT4).await?;
    let answer = csi.node.node_stage_volume(Csi::stage_request(&id, &staging, EXT4)).await;
    refused("staging what is attached elsewhere", answer, Code::FailedPrecondition, &[&there])?;
    cluster.command(&["volume", "detach", "elsewhere"]).await?;
    csi.stage(&id, &staging, EXT4).await?;
    // Published to this node only, and so it stays.
    let mut other = cluster.csi(1)?;
    let answer = other.node.node_stage_volume(Csi::stage_request(&id, &staging, EXT4)).await;
    refused("staging on a second node", answer, Code::FailedPrecondition, &[&there])?;
    csi.unstage(&id, &staging).await?;
    csi.unpublish(&id, &here).await?;
    csi.delete(&id).await
}

pub async fn a_dead_mount_is_replaced(cluster: &Cluster) -> Outcome<()> {
    let node = cluster.node(0).name.clone();
    for (used, name) in [(EXT4, "dead-ext4"), (As::Filesystem("xfs"), "dead-xfs"), (As::Block, "dead-raw")] {
        let mut pod = Pod::start(cluster, name, used).await?;
        if used != As::Block {
            write(&pod.target.join("data"), &pattern(5))?;
        }
        cluster.ctl(&["kill", &node]).await?;
        cluster.ctl(&["start", &node]).await?;
        // As the kubelet does for a pod that stays.
        pod.up().await?;
        if used == As::Block {
            if pod.csi.total_bytes(&pod.id, &pod.target).await? != SIZE {
                return Err("the device is not the volume's".into());
            }
        } else {
            has(&pod.target.join("data"), &pattern(5))?;
            write(&pod.target.join("more"), &pattern(6))?;
            has(&pod.target.join("more"), &pattern(6))?;
        }
        pod.end().await?;
    }
    Ok(())
}

pub async fn a_killed_node_is_fenced_and_the_data_is_elsewhere(cluster: &Cluster) -> Outcome<()> {
    let (dead, alive) = (cluster.node(0).name.clone(), cluster.node(1).name.clone());
    let mut pod = Pod::start(cluster, "failover", EXT4).await?;
    write(&pod.target.join("data"), &pattern(8))?;
    cluster.ctl(&["kill", &dead]).await?;
    let mut csi = cluster.csi(1)?;
    let began = Instant::now();
    // A second node may not have it before the first one is fenced.
    let request = Csi::publish_request(&pod.id, &alive, EXT4);
    let answer = csi.controller.controller_publish_volume(request).await;
    refused("publishing before the fence", answer, Code::FailedPrecondition, &[&dead])?;
    csi.unpublish(&pod.id, &dead).await?;
    let fenced = began.elapsed();
    csi.publish(&pod.id, &alive, EXT4).await?;
    let (staging, target) = (cluster.path("failover.stage2"), cluster.path("failover.pod2"));
    csi.stage(&pod.id, &staging, EXT4).await?;
    csi.publish_at(&pod.id, &staging, &target, EXT4).await?;
    println!(
        "    fenced after {:.1} s, mounted elsewhere after {:.1} s",
        fenced.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    has(&target.join("data"), &pattern(8))?;
    write(&target.join("more"), &pattern(4))?;
    // The node returns: it has no permission, its old mounts answer with errors and can be taken away.
    cluster.ctl(&["start", &dead]).await?;
    let answer = pod.csi.node.node_stage_volume(Csi::stage_request(&pod.id, &pod.staging, EXT4)).await;
    refused("staging where it was unpublished", answer, Code::FailedPrecondition, &["not published"])?;
    pod.down().await?;
    has(&target.join("data"), &pattern(8))?;
    has(&target.join("more"), &pattern(4))?;
    csi.unpublish_at(&pod.id, &target).await?;
    csi.unstage(&pod.id, &staging).await?;
    csi.unpublish(&pod.id, &alive).await?;
    csi.delete(&pod.id).await
}

async fn served(csi: &mut Csi) -> Outcome<()> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match csi.identity.probe(proto::ProbeRequest {}).await {
            Ok(answer) if answer.get_ref().ready == Some(true) => return Ok(()),
            answer if Instant::now() > until => return Err(format!("the driver is not ready: {answer:?}")),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

fn serve(cluster: &Cluster, endpoint: &Path) -> Outcome<tokio::process::Child> {
    Command::new(cluster.program())
        .args(["csi", "node", "--endpoint", &format!("unix:{}", endpoint.display())])
        .args(["--admin", &format!("unix:{}", cluster.node(0).admin.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| error.to_string())
}

pub async fn io_goes_on_without_the_driver(cluster: &Cluster) -> Outcome<()> {
    let endpoint = cluster.path("csi.sock");
    let mut driver = serve(cluster, &endpoint)?;
    let mut pod = Pod::start(cluster, "no-driver", EXT4).await?;
    pod.csi.node = Csi::at(&endpoint)?.node;
    served(&mut Csi::at(&endpoint)?).await?;
    pod.down().await?;
    pod.up().await?;
    driver.kill().await.map_err(|error| error.to_string())?;
    write(&pod.target.join("data"), &pattern(11))?;
    has(&pod.target.join("data"), &pattern(11))?;
    let _again = serve(cluster, &endpoint)?;
    let mut fresh = Csi::at(&endpoint)?;
    served(&mut fresh).await?;
    pod.csi.node = fresh.node;
    // The new one finds what the old one did, and a target that somebody unmounted meanwhile.
    rustix::mount::unmount(&pod.target, UnmountFlags::empty()).map_err(|error| error.to_string())?;
    pod.up().await?;
    has(&pod.target.join("data"), &pattern(11))?;
    pod.end().await
}
