//! A development cluster as a user runs it: `holdfast dev` as a child, everything else by its command line.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::process::{Child, Command};

use crate::Outcome;

const START: Duration = Duration::from_secs(60);
/// No command may hang: far beyond what any is allowed to take.
const COMMAND: Duration = Duration::from_secs(120);

/// A running cluster.
pub struct Dev {
    program: PathBuf,
    directory: PathBuf,
    child: Child,
    _place: Option<tempfile::TempDir>,
}

/// A refused command.
#[derive(Debug)]
pub struct Refused {
    /// What it said.
    pub message: String,
}

impl Dev {
    /// Starts a cluster of three zones.
    pub async fn start(program: &Path, keep: Option<PathBuf>, options: &[&str]) -> Outcome<Self> {
        let wrong = |error: std::io::Error| format!("the cluster cannot be started: {error}");
        let (directory, place) = match keep {
            Some(directory) => (directory, None),
            None => {
                let place = tempfile::Builder::new().prefix("hf").tempdir().map_err(wrong)?;
                (place.path().join("c"), Some(place))
            }
        };
        std::fs::create_dir_all(&directory).map_err(wrong)?;
        let child = Command::new(program)
            .args(["dev", "--dir"])
            .arg(&directory)
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(wrong)?;
        let mut dev = Self { program: program.to_owned(), directory, child, _place: place };
        let until = Instant::now() + START;
        while !dev.directory.join("dev.json").exists() || !dev.directory.join("ctl.sock").exists() {
            if let Some(status) = dev.child.try_wait().map_err(wrong)? {
                return Err(format!("the cluster has ended: {status}"));
            }
            if Instant::now() > until {
                return Err("the cluster does not serve in time".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(dev)
    }

    /// Stops the cluster.
    pub async fn stop(mut self) -> Outcome<()> {
        if let Some(pid) = self.child.id() {
            let killed = Command::new("kill").args(["-TERM", &pid.to_string()]).status().await;
            killed.map_err(|error| format!("kill: {error}"))?;
        }
        let ended = tokio::time::timeout(Duration::from_secs(60), self.child.wait()).await;
        ended.map_err(|_| "the cluster does not stop")?.map_err(|error| error.to_string())?;
        Ok(())
    }

    /// A command of the cluster; its result as JSON.
    pub async fn try_command(&self, arguments: &[&str]) -> Result<Value, Refused> {
        let failed = |message: String| Refused { message };
        let admin = format!("unix:{}", self.directory.join("admin.sock").display());
        let run = Command::new(&self.program)
            .args(["--admin", &admin, "-o", "json"])
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(COMMAND, run)
            .await
            .map_err(|_| failed(format!("{arguments:?} hangs")))?
            .map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Refused { message });
        }
        serde_json::from_slice(&output.stdout).map_err(|error| failed(format!("{arguments:?}: {error}")))
    }

    /// A command that must succeed.
    pub async fn command(&self, arguments: &[&str]) -> Outcome<Value> {
        self.try_command(arguments)
            .await
            .map_err(|refused| format!("{} failed: {}", arguments.join(" "), refused.message))
    }

    /// A command that is repeated while there is no quorum, for `patience`.
    pub async fn insist(&self, arguments: &[&str], patience: Duration) -> Outcome<Value> {
        let until = Instant::now() + patience;
        loop {
            match self.try_command(arguments).await {
                Ok(value) => return Ok(value),
                Err(refused) if Instant::now() > until => {
                    let what = arguments.join(" ");
                    return Err(format!("{what} does not succeed in {patience:?}: {}", refused.message));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// A fault.
    pub async fn ctl(&self, arguments: &[&str]) -> Outcome<()> {
        let directory = self.directory.display().to_string();
        let mut all = vec!["dev", "ctl", "--dir", &directory];
        all.extend(arguments);
        self.command(&all).await.map(drop)
    }

    /// Names of the nodes.
    pub fn nodes(&self) -> Outcome<Vec<String>> {
        let json = std::fs::read(self.directory.join("dev.json")).map_err(|error| error.to_string())?;
        let description: Value = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
        let nodes = description["nodes"].as_array().ok_or("dev.json has no nodes")?;
        Ok(nodes.iter().filter_map(|node| node["name"].as_str().map(str::to_owned)).collect())
    }

    /// A node's NBD socket.
    pub fn nbd(&self, node: &str) -> PathBuf {
        self.directory.join(node).join("nbd.sock")
    }
}
