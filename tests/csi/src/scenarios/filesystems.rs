//! Staging and publishing: file systems, raw block, and what must never be formatted.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use holdfast_csi::proto::volume_capability::access_mode::Mode;
use tonic::Code;

use crate::Outcome;
use crate::cluster::Cluster;
use crate::csi::{As, Csi, SIZE, accepted, capability, create, refused};

const KINDS: [As; 2] = [As::Filesystem("ext4"), As::Filesystem("xfs")];

/// A volume published to the first node, with the paths of a pod.
pub(super) struct Pod {
    pub(super) csi: Csi,
    pub(super) id: String,
    pub(super) staging: PathBuf,
    pub(super) target: PathBuf,
    used: As,
    node: String,
}

impl Pod {
    /// Makes the volume and stages it.
    pub(super) async fn start(cluster: &Cluster, name: &str, used: As) -> Outcome<Self> {
        let mut pod = Self::new(cluster, name, used).await?;
        pod.up().await?;
        Ok(pod)
    }

    async fn new(cluster: &Cluster, name: &str, used: As) -> Outcome<Self> {
        let mut csi = cluster.csi(0)?;
        let mut request = create(name, SIZE);
        request.volume_capabilities = vec![capability(used, Mode::SingleNodeWriter)];
        let id = csi.make(request).await?.volume_id;
        let node = cluster.node(0).name.clone();
        csi.publish(&id, &node, used).await?;
        let (staging, target) =
            (cluster.path(&format!("{name}.stage")), cluster.path(&format!("{name}.pod")));
        std::fs::create_dir_all(&staging).map_err(|error| error.to_string())?;
        Ok(Self { csi, id, staging, target, used, node })
    }

    /// Stages and publishes; twice, as a CO may.
    pub(super) async fn up(&mut self) -> Outcome<()> {
        for _ in 0..2 {
            self.csi.stage(&self.id, &self.staging, self.used).await?;
        }
        for _ in 0..2 {
            self.csi.publish_at(&self.id, &self.staging, &self.target, self.used).await?;
        }
        Ok(())
    }

    /// Unpublishes and unstages; twice, as a CO may.
    pub(super) async fn down(&mut self) -> Outcome<()> {
        for _ in 0..2 {
            self.csi.unpublish_at(&self.id, &self.target).await?;
        }
        if self.target.exists() {
            return Err(format!("{} is still there", self.target.display()));
        }
        for _ in 0..2 {
            self.csi.unstage(&self.id, &self.staging).await?;
        }
        Ok(())
    }

    /// Ends everything.
    pub(super) async fn end(mut self) -> Outcome<()> {
        self.down().await?;
        self.csi.unpublish(&self.id, &self.node).await?;
        self.csi.delete(&self.id).await
    }
}

/// Writes a file durably.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Outcome<()> {
    let written = (|| {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    written.map_err(|error: std::io::Error| format!("{}: {error}", path.display()))
}

/// A file must have these bytes.
pub(super) fn has(path: &Path, bytes: &[u8]) -> Outcome<()> {
    match std::fs::read(path) {
        Ok(found) if found == bytes => Ok(()),
        Ok(found) => Err(format!("{} has {} other bytes", path.display(), found.len())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

pub(super) fn pattern(seed: u8) -> Vec<u8> {
    (0..3 << 20).map(|at: usize| (at % 251) as u8 ^ seed).collect()
}

/// Writes durably into a device.
fn write_device(path: &Path, at: u64, bytes: &[u8]) -> Outcome<()> {
    let written = (|| {
        let mut device = OpenOptions::new().write(true).open(path)?;
        device.seek(SeekFrom::Start(at))?;
        device.write_all(bytes)?;
        device.sync_all()
    })();
    written.map_err(|error: std::io::Error| format!("{}: {error}", path.display()))
}

fn read_device(path: &Path, at: u64, count: usize) -> Outcome<Vec<u8>> {
    let mut bytes = vec![0; count];
    let read = (|| {
        let mut device = File::open(path)?;
        device.seek(SeekFrom::Start(at))?;
        device.read_exact(&mut bytes)
    })();
    read.map_err(|error: std::io::Error| format!("{}: {error}", path.display()))?;
    Ok(bytes)
}

pub async fn data_outlives_staging(cluster: &Cluster) -> Outcome<()> {
    for (kind, name) in KINDS.into_iter().zip(["outlives-ext4", "outlives-xfs"]) {
        let mut pod = Pod::start(cluster, name, kind).await?;
        write(&pod.target.join("data"), &pattern(7))?;
        pod.down().await?;
        pod.up().await?;
        has(&pod.target.join("data"), &pattern(7))?;
        let total = pod.csi.total_bytes(&pod.id, &pod.target).await?;
        if !(SIZE / 2..=SIZE).contains(&total) {
            return Err(format!("{kind:?} has {total} bytes on a volume of {SIZE}"));
        }
        pod.end().await?;
    }
    Ok(())
}

pub async fn a_raw_block_volume_keeps_its_data(cluster: &Cluster) -> Outcome<()> {
    let mut pod = Pod::start(cluster, "raw", As::Block).await?;
    write_device(&pod.target, 1 << 20, &pattern(3))?;
    pod.down().await?;
    pod.up().await?;
    if read_device(&pod.target, 1 << 20, pattern(3).len())? != pattern(3) {
        return Err("the device has other bytes".into());
    }
    if pod.csi.total_bytes(&pod.id, &pod.target).await? != SIZE {
        return Err("the stats do not tell the device's size".into());
    }
    pod.end().await
}

pub async fn foreign_data_is_never_formatted(cluster: &Cluster) -> Outcome<()> {
    let luks = b"LUKS\xba\xbe\x00\x02".to_vec();
    let mut partitions = vec![0u8; 512];
    partitions[446 + 4] = 0x83;
    partitions[446 + 8] = 8;
    partitions[446 + 13] = 1;
    partitions[510..].copy_from_slice(&[0x55, 0xaa]);
    let last = SIZE as u64 - 5;
    for (name, at, bytes) in [
        ("luks", 0, luks),
        ("partitions", 0, partitions),
        ("no-signature", 70_000, b"rows of a database".to_vec()),
        ("at-the-end", last, b"x".to_vec()),
    ] {
        let name = format!("foreign-{name}");
        let mut raw = Pod::start(cluster, &name, As::Block).await?;
        write_device(&raw.target, at, &bytes)?;
        raw.down().await?;
        for kind in KINDS {
            let request = Csi::stage_request(&raw.id, &raw.staging, kind);
            let answer = raw.csi.node.node_stage_volume(request).await;
            refused(&format!("{kind:?} over {name}"), answer, Code::FailedPrecondition, &["not formatted"])?;
            raw.csi.unstage(&raw.id, &raw.staging).await?;
        }
        raw.up().await?;
        if read_device(&raw.target, at, bytes.len())? != bytes {
            return Err(format!("{name} was overwritten"));
        }
        raw.end().await?;
    }
    // Nor is one file system made over another.
    let mut pod = Pod::start(cluster, "foreign-ext4", KINDS[0]).await?;
    write(&pod.target.join("data"), &pattern(1))?;
    pod.down().await?;
    let answer = pod.csi.node.node_stage_volume(Csi::stage_request(&pod.id, &pod.staging, KINDS[1])).await;
    refused("xfs over ext4", answer, Code::FailedPrecondition, &["ext4"])?;
    pod.csi.unstage(&pod.id, &pod.staging).await?;
    pod.up().await?;
    has(&pod.target.join("data"), &pattern(1))?;
    pod.end().await
}

/// Whether the kernel lets this process's like grow a mounted ext4.
fn may_grow_ext4() -> Outcome<bool> {
    use holdfast_csi::mounter::programs::Programs;
    Programs::may_grow_mounted_ext4().map_err(|error| error.to_string())
}

pub async fn volumes_grow_while_they_are_used(cluster: &Cluster) -> Outcome<()> {
    for (used, name) in [(KINDS[0], "grow-ext4"), (KINDS[1], "grow-xfs"), (As::Block, "grow-raw")] {
        let mut pod = Pod::start(cluster, name, used).await?;
        let before = pod.csi.total_bytes(&pod.id, &pod.target).await?;
        if used != As::Block {
            write(&pod.target.join("data"), &pattern(9))?;
        }
        if used == KINDS[0] && !may_grow_ext4()? {
            // The kernel forbids it here; it is said, and made up for when the volume is staged again.
            println!("    no CAP_SYS_RESOURCE: ext4 grows when it is staged");
            let refused = pod.csi.expand(&pod.id, &pod.target, 2 * SIZE).await;
            if !refused.as_ref().is_err_and(|why| why.contains("CAP_SYS_RESOURCE")) {
                return Err(format!("growing a mounted ext4 without permission: {refused:?}"));
            }
            pod.down().await?;
            pod.up().await?;
        }
        let grown = pod.csi.expand(&pod.id, &pod.target, 2 * SIZE).await?;
        let after = pod.csi.total_bytes(&pod.id, &pod.target).await?;
        if grown != 2 * SIZE || after < before + SIZE / 2 {
            return Err(format!(
                "{name}: NodeExpandVolume says {grown}; {before} bytes before, {after} after"
            ));
        }
        // Again, and to less: never an error, never smaller.
        if pod.csi.expand(&pod.id, &pod.target, 2 * SIZE).await? != 2 * SIZE {
            return Err(format!("{name} does not stay as large as it is"));
        }
        if used != As::Block {
            has(&pod.target.join("data"), &pattern(9))?;
        }
        pod.end().await?;
    }
    // What grew while it was not staged is used whole when it is.
    let mut pod = Pod::start(cluster, "grow-offline", KINDS[0]).await?;
    let before = pod.csi.total_bytes(&pod.id, &pod.target).await?;
    pod.down().await?;
    cluster.command(&["volume", "resize", "grow-offline", "--size", &(2 * SIZE).to_string()]).await?;
    pod.up().await?;
    let after = pod.csi.total_bytes(&pod.id, &pod.target).await?;
    if after < before + SIZE / 2 {
        return Err(format!("{before} bytes before growing while not staged, {after} after"));
    }
    pod.end().await
}

pub async fn read_only_is_read_only(cluster: &Cluster) -> Outcome<()> {
    let mut pod = Pod::start(cluster, "read-only", KINDS[0]).await?;
    write(&pod.target.join("data"), &pattern(2))?;
    pod.csi.unpublish_at(&pod.id, &pod.target).await?;
    let mut request = Csi::target_request(&pod.id, &pod.staging, &pod.target, KINDS[0]);
    request.readonly = true;
    accepted("NodePublishVolume", pod.csi.node.node_publish_volume(request).await)?;
    has(&pod.target.join("data"), &pattern(2))?;
    match File::create(pod.target.join("more")) {
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {}
        other => return Err(format!("writing through a read-only mount: {other:?}")),
    }
    let writable = Csi::target_request(&pod.id, &pod.staging, &pod.target, KINDS[0]);
    let answer = pod.csi.node.node_publish_volume(writable).await;
    refused("the same path in another mode", answer, Code::AlreadyExists, &[])?;
    pod.end().await
}

pub async fn one_path_unless_several_are_asked_for(cluster: &Cluster) -> Outcome<()> {
    for (used, name) in [(KINDS[0], "paths-ext4"), (As::Block, "paths-raw")] {
        let mut pod = Pod::start(cluster, name, used).await?;
        let other = cluster.path(&format!("{name}.other"));
        let mut request = Csi::target_request(&pod.id, &pod.staging, &other, used);
        request.volume_capability = Some(capability(used, Mode::SingleNodeSingleWriter));
        let answer = pod.csi.node.node_publish_volume(request.clone()).await;
        let target = pod.target.display().to_string();
        refused("a second path", answer, Code::FailedPrecondition, &[&target])?;
        request.volume_capability = Some(capability(used, Mode::SingleNodeMultiWriter));
        accepted("a second path", pod.csi.node.node_publish_volume(request).await)?;
        pod.csi.unpublish_at(&pod.id, &other).await?;
        pod.end().await?;
    }
    Ok(())
}

pub async fn two_stages_at_once_do_not_disturb_each_other(cluster: &Cluster) -> Outcome<()> {
    let mut pod = Pod::new(cluster, "at-once-staged", KINDS[0]).await?;
    let (mut one, mut two) = (cluster.csi(0)?, cluster.csi(0)?);
    let request = Csi::stage_request(&pod.id, &pod.staging, KINDS[0]);
    let (a, b) = tokio::join!(
        one.node.node_stage_volume(request.clone()),
        two.node.node_stage_volume(request.clone())
    );
    for answer in [a, b] {
        match answer {
            Err(status) if status.code() != Code::Aborted => {
                return Err(format!("staging twice: {status:?}"));
            }
            _ => {}
        }
    }
    // A caller that gives up leaves a call that goes on; the next one finds what it did, or ABORTED until then.
    pod.down().await?;
    let gave_up =
        tokio::time::timeout(std::time::Duration::from_millis(5), one.node.node_stage_volume(request)).await;
    if gave_up.is_ok() {
        return Err("staging took less than 5 ms: nothing was given up".into());
    }
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        match pod.csi.node.node_stage_volume(Csi::stage_request(&pod.id, &pod.staging, KINDS[0])).await {
            Ok(_) => break,
            Err(status) if status.code() == Code::Aborted && std::time::Instant::now() < until => {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            Err(status) => return Err(format!("staging after a caller gave up: {status:?}")),
        }
    }
    pod.up().await?;
    pod.end().await
}
