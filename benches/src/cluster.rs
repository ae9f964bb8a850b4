//! A development cluster of real daemons, driven by its command line.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;

/// How long the cluster, or what is waited for, may take to be ready.
const START: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// A daemon of the cluster, as it was when the cluster began.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Where its metrics are.
    pub metrics: String,
}

/// A running cluster. Stopped when dropped.
pub struct DevCluster {
    program: PathBuf,
    directory: PathBuf,
    supervisor: Child,
}

/// Looks until something is there.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Outcome<Option<T>>) -> Outcome<T> {
    let deadline = Instant::now() + START;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(format!("{what}: not in {START:?}"));
        }
        std::thread::sleep(LOOK);
    }
}

impl DevCluster {
    /// Starts three zones of one daemon each.
    pub fn start(program: &Path, directory: &Path, options: &[&str]) -> Outcome<Self> {
        let wrong = |error: std::io::Error| format!("{} cannot be started: {error}", program.display());
        let supervisor = Command::new(program)
            .args(["dev", "--dir"])
            .arg(directory)
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(wrong)?;
        let mut cluster = Self { program: program.to_owned(), directory: directory.to_owned(), supervisor };
        until("the cluster", || {
            if let Some(status) = cluster.supervisor.try_wait().map_err(wrong)? {
                return Err(format!("the cluster has ended: {status}"));
            }
            let serves =
                ["dev.json", "admin.sock", "ctl.sock"].iter().all(|name| directory.join(name).exists());
            Ok(serves.then_some(()))
        })?;
        Ok(cluster)
    }

    /// Its nodes.
    pub fn nodes(&self) -> Outcome<Vec<Node>> {
        let text = std::fs::read(self.directory.join("dev.json")).map_err(|error| error.to_string())?;
        let description: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        let nodes = description["nodes"].as_array().ok_or("dev.json has no nodes")?;
        let node = |node: &Value| {
            let text = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
            let pid = node["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            let pid = pid.ok_or("a node has no process")?;
            Ok(Node { name: text("name"), pid, metrics: text("metrics") })
        };
        nodes.iter().map(node).collect()
    }

    /// A node's NBD socket.
    pub fn nbd(&self, node: &str) -> PathBuf {
        self.directory.join(node).join("nbd.sock")
    }

    /// A command that must succeed; its result as JSON.
    pub fn command(&self, arguments: &[&str]) -> Outcome<Value> {
        let admin = format!("unix:{}", self.directory.join("admin.sock").display());
        let output =
            Command::new(&self.program).args(["--admin", &admin, "-o", "json"]).args(arguments).output();
        let output = output.map_err(|error| error.to_string())?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{} failed: {}", arguments.join(" "), why.trim()));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
    }

    /// A fault.
    pub fn fault(&self, arguments: &[&str]) -> Outcome<()> {
        let directory = self.directory.display().to_string();
        self.command(&[&["dev", "ctl", "--dir", &directory], arguments].concat()).map(drop)
    }

    /// Asks for a volume until `wanted` holds of it. That nobody can answer for a moment is no failure.
    pub fn volume_until(&self, volume: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Outcome<Value> {
        until(what, || {
            let shown = self.command(&["volume", "show", volume]);
            Ok(shown.ok().filter(|shown| wanted(shown)))
        })
    }

    /// Makes a volume of three replicas, attaches it to a node with the leader beside it.
    pub fn attached(&self, volume: &str, size: u64, node: &str, more: &[&str]) -> Outcome<()> {
        self.command(&[&["volume", "create", volume, "--size", &size.to_string()], more].concat())?;
        self.volume_until(volume, "the volume", |shown| shown["health"] == "healthy")?;
        self.command(&["volume", "attach", volume, "--node", node, "--frontend", "nbd"])?;
        self.volume_until(volume, "the leader beside the attachment", |shown| shown["leader"] == node)?;
        Ok(())
    }
}

impl Drop for DevCluster {
    fn drop(&mut self) {
        let terminated = Command::new("kill").args(["-TERM", &self.supervisor.id().to_string()]).status();
        if terminated.is_err() || self.supervisor.wait().is_err() {
            eprintln!("the cluster in {} was not stopped", self.directory.display());
        }
    }
}
