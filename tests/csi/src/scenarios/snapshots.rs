//! Snapshots and volumes that begin with one, or with another volume.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use holdfast_csi::proto;
use holdfast_csi::proto::volume_capability::access_mode::Mode;
use holdfast_csi::proto::volume_content_source::{SnapshotSource, Type, VolumeSource};
use tonic::Code;

use super::filesystems::{Pod, has, pattern, write};
use crate::Outcome;
use crate::cluster::Cluster;
use crate::csi::{As, Csi, SIZE, accepted, capability, create, refused};

const SMALL: i64 = 16 << 20;
/// How long a copy of a test's volume may take.
const COPY: Duration = Duration::from_secs(60);

fn take(name: &str, volume: &str) -> proto::CreateSnapshotRequest {
    proto::CreateSnapshotRequest { name: name.into(), source_volume_id: volume.into(), ..Default::default() }
}

async fn snapshot(csi: &mut Csi, name: &str, volume: &str) -> Outcome<proto::Snapshot> {
    let answer = csi.controller.create_snapshot(take(name, volume)).await;
    let made = accepted("CreateSnapshot", answer)?.snapshot.ok_or("CreateSnapshot answered nothing")?;
    let time = made.creation_time.as_ref().map_or(0, |time| time.seconds);
    if !made.ready_to_use || made.source_volume_id != volume || time < 1_700_000_000 {
        return Err(format!("a snapshot is {made:?}"));
    }
    Ok(made)
}

async fn delete_snapshot(csi: &mut Csi, id: &str) -> Outcome<()> {
    let request = proto::DeleteSnapshotRequest { snapshot_id: id.into(), ..Default::default() };
    accepted("DeleteSnapshot", csi.controller.delete_snapshot(request).await).map(drop)
}

async fn list(csi: &mut Csi, request: proto::ListSnapshotsRequest) -> Outcome<(Vec<String>, String)> {
    let page = accepted("ListSnapshots", csi.controller.list_snapshots(request).await)?;
    let ids = page.entries.into_iter().filter_map(|entry| entry.snapshot).map(|one| one.snapshot_id);
    Ok((ids.collect(), page.next_token))
}

fn of_snapshot(id: &str) -> proto::VolumeContentSource {
    proto::VolumeContentSource { r#type: Some(Type::Snapshot(SnapshotSource { snapshot_id: id.into() })) }
}

fn of_volume(id: &str) -> proto::VolumeContentSource {
    proto::VolumeContentSource { r#type: Some(Type::Volume(VolumeSource { volume_id: id.into() })) }
}

fn copy(name: &str, bytes: i64, source: &proto::VolumeContentSource) -> proto::CreateVolumeRequest {
    proto::CreateVolumeRequest { volume_content_source: Some(source.clone()), ..create(name, bytes) }
}

/// Makes a copy as a CO does: ABORTED means that it is being worked on.
async fn make_copy(csi: &mut Csi, request: proto::CreateVolumeRequest) -> Outcome<proto::Volume> {
    let until = Instant::now() + COPY;
    loop {
        match csi.controller.create_volume(request.clone()).await {
            Err(status) if status.code() == Code::Aborted && Instant::now() < until => {
                if !status.message().contains("being filled") {
                    return Err(format!("a copy was put off because {}", status.message()));
                }
            }
            answer => {
                let volume = accepted("CreateVolume of a copy", answer)?.volume.unwrap_or_default();
                if volume.content_source != request.volume_content_source {
                    return Err(format!("the copy answers {:?}", volume.content_source));
                }
                return Ok(volume);
            }
        }
    }
}

pub async fn a_snapshot_is_one_by_its_name(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let (a, b) = (csi.make(create("snap-a", SMALL)).await?, csi.make(create("snap-b", 2 * SMALL)).await?);
    let (a, b) = (a.volume_id, b.volume_id);
    let first = snapshot(&mut csi, "größe", &a).await?;
    if first.size_bytes != SMALL {
        return Err(format!("a snapshot of {SMALL} bytes has {}", first.size_bytes));
    }
    let again = snapshot(&mut cluster.csi(1)?, "größe", &a).await?;
    if again != first {
        return Err(format!("the same request made {again:?}"));
    }
    let other = csi.controller.create_snapshot(take("größe", &b)).await;
    refused("the name of another volume's", other, Code::AlreadyExists, &[])?;
    let mut odd = take("s", &a);
    odd.parameters.insert("colour".into(), "red".into());
    refused(
        "an unknown parameter",
        csi.controller.create_snapshot(odd).await,
        Code::InvalidArgument,
        &["colour"],
    )?;
    for (what, request, code) in [
        ("no name", take("", &a), Code::InvalidArgument),
        ("no volume", take("s", ""), Code::InvalidArgument),
        ("a name of 129 bytes", take(&"s".repeat(129), &a), Code::InvalidArgument),
        ("an unknown volume", take("s", &"0".repeat(32)), Code::NotFound),
        ("a volume by its name", take("s", "snap-a"), Code::NotFound),
    ] {
        refused(what, csi.controller.create_snapshot(request).await, code, &[])?;
    }
    let request = proto::DeleteVolumeRequest { volume_id: a.clone(), ..Default::default() };
    refused(
        "its volume",
        csi.controller.delete_volume(request).await,
        Code::FailedPrecondition,
        &["snapshots"],
    )?;
    let nothing = proto::DeleteSnapshotRequest::default();
    refused("no id", csi.controller.delete_snapshot(nothing).await, Code::InvalidArgument, &["snapshot_id"])?;
    // Another volume's id before the snapshot's is no id of anything.
    let foreign = format!("{b}@{}", first.snapshot_id.split('@').nth(1).unwrap_or_default());
    for id in [&foreign, "fake-snap-id"] {
        delete_snapshot(&mut csi, id).await?;
    }
    let by_id = |id: &str| proto::ListSnapshotsRequest { snapshot_id: id.into(), ..Default::default() };
    if list(&mut csi, by_id(&first.snapshot_id)).await?.0.len() != 1 {
        return Err("a deletion of another id deleted the snapshot".into());
    }
    for _ in 0..2 {
        delete_snapshot(&mut csi, &first.snapshot_id).await?;
    }
    if !list(&mut csi, by_id(&first.snapshot_id)).await?.0.is_empty() {
        return Err("a deleted snapshot is listed".into());
    }
    csi.delete(&a).await?;
    csi.delete(&b).await
}

pub async fn snapshots_are_listed_in_pages_and_by_what_they_are_of(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let (a, b) = (csi.make(create("list-a", SMALL)).await?, csi.make(create("list-b", SMALL)).await?);
    let (a, b) = (a.volume_id, b.volume_id);
    let mut made = Vec::new();
    for at in 0..5 {
        let of = if at < 3 { &a } else { &b };
        made.push(snapshot(&mut csi, &format!("list-{at}"), of).await?.snapshot_id);
    }
    let of =
        |volume: &str| proto::ListSnapshotsRequest { source_volume_id: volume.into(), ..Default::default() };
    for (volume, count) in [(a.as_str(), 3), (b.as_str(), 2), (&"0".repeat(32), 0), ("list-a", 0)] {
        let found = list(&mut csi, of(volume)).await?.0;
        if found.len() != count {
            return Err(format!("volume {volume} has {found:?}, not {count} snapshots"));
        }
    }
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let request =
            proto::ListSnapshotsRequest { max_entries: 2, starting_token: token, ..Default::default() };
        let (page, next) = list(&mut csi, request).await?;
        if page.len() > 2 || (page.len() < 2 && !next.is_empty()) {
            return Err(format!("a page of two is {page:?}"));
        }
        seen.extend(page);
        if next.is_empty() {
            break;
        }
        token = next;
    }
    seen.sort();
    made.sort();
    if seen != made {
        return Err(format!("the pages have {seen:?}, not {made:?}"));
    }
    let wrong = proto::ListSnapshotsRequest { starting_token: "invalid-token".into(), ..Default::default() };
    refused("a wrong token", csi.controller.list_snapshots(wrong).await, Code::Aborted, &[])?;
    let negative = proto::ListSnapshotsRequest { max_entries: -1, ..Default::default() };
    refused("a negative page", csi.controller.list_snapshots(negative).await, Code::InvalidArgument, &[])?;
    for id in &made {
        delete_snapshot(&mut csi, id).await?;
    }
    csi.delete(&a).await?;
    csi.delete(&b).await
}

pub async fn a_copy_says_what_it_began_with_and_is_refused_if_it_cannot_be(cluster: &Cluster) -> Outcome<()> {
    let mut csi = cluster.csi(0)?;
    let a = csi.make(create("copied", SMALL)).await?.volume_id;
    let s = snapshot(&mut csi, "copied-s", &a).await?.snapshot_id;
    let ghost = format!("{}@{}", "0".repeat(32), "1".repeat(32));
    for (what, request, code) in [
        ("too small for a snapshot", copy("k", SMALL - 4096, &of_snapshot(&s)), Code::OutOfRange),
        ("too small for a volume", copy("k", SMALL - 4096, &of_volume(&a)), Code::OutOfRange),
        ("no such snapshot", copy("k", SMALL, &of_snapshot(&ghost)), Code::NotFound),
        ("a snapshot's id that is none", copy("k", SMALL, &of_snapshot("s")), Code::NotFound),
        ("no such volume", copy("k", SMALL, &of_volume(&"0".repeat(32))), Code::NotFound),
        ("a source without id", copy("k", SMALL, &of_volume("")), Code::InvalidArgument),
    ] {
        refused(what, csi.controller.create_volume(request).await, code, &[])?;
    }
    let mut unsized_request = copy("of-snapshot", 0, &of_snapshot(&s));
    unsized_request.capacity_range = None;
    let one = make_copy(&mut csi, unsized_request.clone()).await?;
    if one.capacity_bytes != SMALL {
        return Err(format!("a copy whose size nobody asks for has {} bytes", one.capacity_bytes));
    }
    let again = make_copy(&mut cluster.csi(1)?, unsized_request.clone()).await?;
    if again.volume_id != one.volume_id {
        return Err("the same request made another copy".into());
    }
    let two = make_copy(&mut csi, copy("of-volume", 2 * SMALL, &of_volume(&a))).await?;
    for (what, request) in [
        ("the name with another source", copy("of-snapshot", SMALL, &of_volume(&a))),
        ("the name without a source", create("of-snapshot", SMALL)),
        ("the source with a taken name", copy("copied", SMALL, &of_snapshot(&s))),
    ] {
        refused(what, csi.controller.create_volume(request).await, Code::AlreadyExists, &[])?;
    }
    // What it was copied from may go, and the request still finds the copy.
    delete_snapshot(&mut csi, &s).await?;
    csi.delete(&a).await?;
    let late = make_copy(&mut csi, unsized_request).await?;
    if late.volume_id != one.volume_id {
        return Err("the request made another copy when its source was gone".into());
    }
    csi.delete(&one.volume_id).await?;
    csi.delete(&two.volume_id).await
}

/// Appends to files for as long as it is not stopped, without syncing.
fn keep_writing(directory: &Path, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<std::io::Result<u64>> {
    let directory = directory.to_owned();
    std::thread::spawn(move || {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            std::fs::write(directory.join(format!("busy-{}", count % 50)), vec![count as u8; 20_000])?;
            count += 1;
        }
        Ok(count)
    })
}

/// A copy staged on the second node; the file system must be whole and have grown to its volume.
async fn check_elsewhere(cluster: &Cluster, volume: &proto::Volume, name: &str, byte: u8) -> Outcome<()> {
    let used = As::Filesystem("ext4");
    let (id, node) = (volume.volume_id.as_str(), &cluster.node(1).name);
    let mut csi = cluster.csi(1)?;
    csi.publish(id, node, used).await?;
    let (staging, target) = (cluster.path(&format!("{name}.stage")), cluster.path(&format!("{name}.pod")));
    std::fs::create_dir_all(&staging).map_err(|error| error.to_string())?;
    csi.stage(id, &staging, used).await?;
    csi.publish_at(id, &staging, &target, used).await?;
    has(&target.join("data"), &pattern(byte))?;
    has(&target.join("kept"), &pattern(3))?;
    let total = csi.total_bytes(id, &target).await?;
    if total < volume.capacity_bytes / 2 {
        return Err(format!("the file system has {total} bytes on a volume of {}", volume.capacity_bytes));
    }
    csi.unpublish_at(id, &target).await?;
    csi.unstage(id, &staging).await?;
    let attached = cluster.command(&["volume", "attach", id, "--node", node, "--frontend", "loop"]).await?;
    let device = attached["device"].as_str().unwrap_or_default().to_owned();
    let checked = tokio::process::Command::new("e2fsck").args(["-f", "-n", &device]).output().await;
    let checked = checked.map_err(|error| error.to_string())?;
    cluster.command(&["volume", "detach", id]).await?;
    if !checked.status.success() {
        return Err(format!("{name} is not whole: {}", String::from_utf8_lossy(&checked.stdout)));
    }
    csi.unpublish(id, node).await
}

pub async fn a_mounted_volume_is_copied_while_it_is_written(cluster: &Cluster) -> Outcome<()> {
    let used = As::Filesystem("ext4");
    let mut pod = Pod::start(cluster, "source-ext4", used).await?;
    write(&pod.target.join("data"), &pattern(7))?;
    write(&pod.target.join("kept"), &pattern(3))?;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = keep_writing(&pod.target, stop.clone());
    let id = pod.id.clone();
    let taken = snapshot(&mut pod.csi, "source-ext4-s", &id).await;
    stop.store(true, Ordering::Relaxed);
    let written = writer.join().map_err(|_| "the writer panicked")?.map_err(|error| error.to_string())?;
    let taken = taken?.snapshot_id;
    if written == 0 {
        return Err("nothing was written during the snapshot".into());
    }
    write(&pod.target.join("data"), &pattern(9))?;
    let request = |name: &str, bytes, source: proto::VolumeContentSource| proto::CreateVolumeRequest {
        volume_capabilities: vec![capability(used, Mode::SingleNodeWriter)],
        ..copy(name, bytes, &source)
    };
    // A larger one: its file system grows when it is staged.
    let restored = make_copy(&mut pod.csi, request("restored", 2 * SIZE, of_snapshot(&taken))).await?;
    let cloned = make_copy(&mut pod.csi, request("cloned", SIZE, of_volume(&id))).await?;
    check_elsewhere(cluster, &restored, "restored", 7).await?;
    check_elsewhere(cluster, &cloned, "cloned", 9).await?;
    has(&pod.target.join("data"), &pattern(9))?;
    delete_snapshot(&mut pod.csi, &taken).await?;
    for copy in [restored, cloned] {
        pod.csi.delete(&copy.volume_id).await?;
    }
    pod.end().await
}
