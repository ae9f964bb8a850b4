//! Programs that know nothing of Holdfast, on a real cluster of processes: the NBD tools, QEMU's, fio, and file systems
//! of the kernel over kills. Each step says what it did. Nothing stays mounted, whatever happens.

mod ext4;
mod files;
mod images;
mod tools;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::dev::Dev;

/// How much is done.
#[derive(Clone, Copy)]
struct Amount {
    /// Bytes that each fio job writes and verifies, in MiB.
    fio_mib: u32,
    /// Kills of the leader under ext4.
    leader_kills: u32,
    /// Kills of the attached node under ext4.
    holder_kills: u32,
    /// Where the image's directory tree comes from.
    tree: &'static str,
}

const BRIEF: Amount = Amount { fio_mib: 24, leader_kills: 2, holder_kills: 1, tree: "/usr/share/doc" };
const FULL: Amount = Amount { fio_mib: 128, leader_kills: 6, holder_kills: 3, tree: "/usr/share" };

/// Bytes of every volume.
const VOLUME_MIB: u64 = 512;

/// The cluster and a place for files.
struct Ground {
    dev: Dev,
    place: PathBuf,
    amount: Amount,
}

/// A volume that is attached.
struct Volume {
    name: String,
    node: String,
    device: String,
}

type Step = for<'g> fn(&'g Ground) -> Pin<Box<dyn Future<Output = Outcome<String>> + 'g>>;

const STEPS: &[(&str, Step)] = &[
    ("nbdinfo", |ground| Box::pin(images::nbdinfo(ground))),
    ("nbdcopy", |ground| Box::pin(images::nbdcopy(ground))),
    ("qemu-io", |ground| Box::pin(images::qemu_io(ground))),
    ("fio-nbd", |ground| Box::pin(images::fio_nbd(ground))),
    ("fio-fuse", |ground| Box::pin(images::fio_fuse(ground))),
    ("xfs-loop", |ground| Box::pin(images::xfs_loop(ground))),
    ("ext4-leader", |ground| Box::pin(ext4::leader_killed(ground))),
    ("ext4-holder", |ground| Box::pin(ext4::holder_killed(ground))),
];

/// Runs all steps, or those whose name contains `only`.
pub async fn run(program: &Path, keep: Option<PathBuf>, brief: bool, only: Option<&str>) -> Outcome<()> {
    holdfast_frontend::kernel::loop_available().map_err(|error| format!("{error} ({})", error.hint()))?;
    let chosen: Vec<_> =
        STEPS.iter().filter(|(name, _)| only.is_none_or(|only| name.contains(only))).collect();
    if chosen.is_empty() {
        let known: Vec<&str> = STEPS.iter().map(|(name, _)| *name).collect();
        return Err(format!("no step has that name; there are {}", known.join(", ")));
    }
    let place = tempfile::Builder::new().prefix("hf").tempdir().map_err(|error| error.to_string())?;
    let keep = keep.unwrap_or_else(|| place.path().join("c"));
    // Four zones: a guest in the fourth has no replica beside it, so the leader can be killed without it.
    let options = ["--zones", "4", "--nodes-per-zone", "1"];
    let dev = Dev::start(program, Some(keep.clone()), &options).await?;
    let amount = if brief { BRIEF } else { FULL };
    let ground = Ground { dev, place: place.path().to_owned(), amount };
    let mut result = Ok(());
    for (name, step) in &chosen {
        let began = Instant::now();
        match step(&ground).await {
            Ok(figures) => println!("  {name:12} {:6.1} s  {figures}", began.elapsed().as_secs_f64()),
            Err(why) => {
                result = Err(format!("{name}: {why}"));
                break;
            }
        }
    }
    let guests = files::unmount_under(place.path());
    let stopped = ground.dev.stop().await;
    let left = holdfast_frontend::kernel::clean(&keep).map_err(|error| error.to_string())?;
    result?;
    guests?;
    stopped?;
    match left {
        0 => Ok(()),
        left => Err(format!("the stopped cluster left {left} mounts and devices")),
    }
}

impl Ground {
    /// The node without a replica of volumes that [`Ground::volume`] makes.
    fn far(&self) -> Outcome<String> {
        self.dev.nodes()?.pop().ok_or_else(|| "the cluster has no nodes".into())
    }

    /// A new volume in the first three zones, attached.
    async fn volume(&self, name: &str, node: &str, frontend: &str) -> Outcome<Volume> {
        let size = format!("{VOLUME_MIB}MiB");
        let zones = "r1-z1,r1-z2,r1-z3";
        self.dev.command(&["volume", "create", name, "--size", &size, "--zones", zones]).await?;
        self.attach(name, node, frontend, false).await
    }

    async fn attach(&self, name: &str, node: &str, frontend: &str, force: bool) -> Outcome<Volume> {
        let mut attach = vec!["volume", "attach", name, "--node", node, "--frontend", frontend];
        attach.extend(force.then_some("--force"));
        let attached = self.dev.insist(&attach, Duration::from_secs(30)).await?;
        let device = attached["device"].as_str().ok_or("no device was told")?.to_owned();
        if attached["frontend"] != frontend || attached["node"] != node {
            return Err(format!("asked for {frontend} on {node}, got {attached}"));
        }
        Ok(Volume { name: name.to_owned(), node: node.to_owned(), device })
    }

    /// Detaches a volume in order and deletes it once its replicas are equal. The log index at which they are.
    async fn done_with(&self, volume: Volume) -> Outcome<u64> {
        self.dev.insist(&["volume", "detach", &volume.name], Duration::from_secs(30)).await?;
        let verified = self.dev.insist(&["volume", "verify", &volume.name], Duration::from_secs(60)).await?;
        if verified["equal"] != Value::Bool(true) {
            return Err(format!("the replicas of {} differ: {verified}", volume.name));
        }
        self.dev.insist(&["volume", "delete", &volume.name, "--yes"], Duration::from_secs(30)).await?;
        Ok(verified["index"].as_u64().unwrap_or_default())
    }

    /// The node whose replica leads.
    async fn leader(&self, volume: &str) -> Outcome<String> {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            if let Ok(shown) = self.dev.try_command(&["volume", "show", volume]).await
                && let Some(leader) = shown["leader"].as_str()
            {
                return Ok(leader.to_owned());
            }
            if Instant::now() > until {
                return Err(format!("volume {volume} has no leader"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until every replica of a volume is healthy.
    async fn healthy(&self, volume: &str) -> Outcome<()> {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let shown = self.dev.try_command(&["volume", "show", volume]).await;
            if shown.as_ref().is_ok_and(|shown| shown["health"] == "healthy") {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("volume {volume} does not become healthy: {shown:?}"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
