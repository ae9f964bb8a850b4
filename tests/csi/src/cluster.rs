//! A development cluster as a child process, with its CSI sockets and a place for mounts.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use holdfast_csi::admin::Admin;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::Outcome;
use crate::csi::Csi;

const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(60);
const COMMAND: Duration = Duration::from_secs(90);

/// A node, as `dev.json` tells of it.
#[derive(Clone, Debug)]
pub struct NodeAt {
    /// Its name.
    pub name: String,
    /// Its region.
    pub region: String,
    /// Its zone.
    pub zone: String,
    /// Its CSI socket.
    pub csi: PathBuf,
    /// Its admin socket.
    pub admin: PathBuf,
}

/// A running cluster of three zones with one node each.
pub struct Cluster {
    program: PathBuf,
    place: TempDir,
    child: Child,
    nodes: Vec<NodeAt>,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Cluster {
    /// Starts one in a directory of its own.
    pub async fn start(program: &Path) -> Outcome<Self> {
        let place = tempfile::Builder::new().prefix("hfc").tempdir().map_err(text)?;
        let directory = place.path().join("c");
        let child = Command::new(program)
            .args(["dev", "--journal", "64MiB", "--dir"])
            .arg(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("{}: {error}", program.display()))?;
        let mut cluster = Self { program: program.to_owned(), place, child, nodes: Vec::new() };
        let until = Instant::now() + START;
        let description = cluster.directory().join("dev.json");
        while !description.exists() || !cluster.directory().join("ctl.sock").exists() {
            if let Some(status) = cluster.child.try_wait().map_err(text)? {
                return Err(format!("the cluster has ended: {status}"));
            }
            if Instant::now() > until {
                return Err("the cluster does not serve in time".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let json: Value = serde_json::from_slice(&std::fs::read(description).map_err(text)?).map_err(text)?;
        let nodes = json["nodes"].as_array().ok_or("dev.json has no nodes")?;
        for node in nodes {
            let word = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
            let socket = |key: &str| PathBuf::from(word(key).trim_start_matches("unix:"));
            cluster.nodes.push(NodeAt {
                name: word("name"),
                region: word("region"),
                zone: word("zone"),
                csi: socket("csi"),
                admin: socket("admin"),
            });
        }
        if cluster.nodes.len() < 3 {
            return Err(format!("dev.json has {} nodes", cluster.nodes.len()));
        }
        Ok(cluster)
    }

    fn directory(&self) -> PathBuf {
        self.place.path().join("c")
    }

    /// The program under test.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// A path of this run, for staging and targets.
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// A node.
    pub fn node(&self, index: usize) -> &NodeAt {
        &self.nodes[index]
    }

    /// The CSI services of a node.
    pub fn csi(&self, index: usize) -> Outcome<Csi> {
        Csi::at(&self.nodes[index].csi)
    }

    /// The admin API of a node.
    pub fn admin(&self, index: usize) -> Admin {
        Admin::new(&self.nodes[index].admin)
    }

    /// A `holdfast` command; its result as JSON.
    pub async fn command(&self, arguments: &[&str]) -> Outcome<Value> {
        let admin = format!("unix:{}", self.directory().join("admin.sock").display());
        let run = Command::new(&self.program)
            .args(["--admin", &admin, "-o", "json"])
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(COMMAND, run)
            .await
            .map_err(|_| format!("{} hangs", arguments.join(" ")))?
            .map_err(text)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{} failed: {}", arguments.join(" "), said.trim()));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| format!("{}: {error}", arguments.join(" ")))
    }

    /// A fault of `dev ctl`.
    pub async fn ctl(&self, arguments: &[&str]) -> Outcome<()> {
        let directory = self.directory().display().to_string();
        let all = [&["dev", "ctl", "--dir", &directory], arguments].concat();
        self.command(&all).await.map(drop)
    }

    /// Stops it; mounts that were left under its directory, which are taken away then.
    pub async fn stop(mut self) -> Outcome<Vec<String>> {
        let left = mounts_under(self.place.path())?;
        for mount in left.iter().rev() {
            if let Err(error) = rustix::mount::unmount(mount, UnmountFlags::DETACH) {
                println!("  {mount} cannot be unmounted: {error}");
            }
        }
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id as i32)) {
            kill_process(pid, Signal::TERM).map_err(text)?;
        }
        let ended = tokio::time::timeout(STOP, self.child.wait()).await;
        ended.map_err(|_| "the cluster does not stop")?.map_err(text)?;
        // Files that show attached volumes are the daemon's own.
        Ok(left.into_iter().filter(|mount| !mount.contains("/devices/")).collect())
    }
}

/// Mounts under a directory, in the order in which they were made; attached volumes' files among them are left out.
fn mounts_under(directory: &Path) -> Outcome<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(text)?;
    let targets = table.lines().filter_map(|line| line.split(' ').nth(4));
    let under =
        targets.filter(|target| Path::new(target).starts_with(directory) && !target.contains("/devices/"));
    Ok(under.map(str::to_owned).collect())
}
