//! A development cluster as a user runs it: `holdfast dev` as a child, everything else by its command line.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
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

/// A command that did not succeed.
#[derive(Debug, Clone)]
pub struct Refused {
    /// What it said.
    pub message: String,
    /// Its exit code, if it ended by itself.
    pub exit: Option<i32>,
}

impl Refused {
    /// The error as the command line's contract has it: code, message and hint.
    pub fn error(&self) -> Outcome<(String, String, String)> {
        let wrong = |error: &dyn std::fmt::Display| format!("'{}' is no typed error: {error}", self.message);
        let line = self.message.lines().last().unwrap_or_default();
        let value: Value = serde_json::from_str(line).map_err(|error| wrong(&error))?;
        let part = |name: &str| {
            let text = value["error"][name].as_str().map(str::to_owned);
            text.ok_or_else(|| wrong(&format!("it has no {name}")))
        };
        Ok((part("code")?, part("message")?, part("hint")?))
    }
}

async fn run(mut command: Command, what: &[&str]) -> Result<Value, Refused> {
    let failed = |message: String| Refused { message, exit: None };
    let run = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(COMMAND, run)
        .await
        .map_err(|_| failed(format!("{what:?} hangs")))?
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        // A verification that found a difference ends with 1, and says what it found where results stand.
        let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
        let message = String::from_utf8_lossy(said).trim().to_owned();
        return Err(Refused { message, exit: output.status.code() });
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(format!("{what:?}: {error}")))
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
        // One that lost its power left it behind.
        match std::fs::remove_file(directory.join("dev.json")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(wrong(error)),
            _ => {}
        }
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
        self.try_at(&self.directory.join("admin.sock"), arguments).await
    }

    /// A command that one node's daemon carries out.
    pub async fn try_command_at(&self, node: &str, arguments: &[&str]) -> Result<Value, Refused> {
        self.try_at(&self.node(node).join("admin.sock"), arguments).await
    }

    async fn try_at(&self, socket: &Path, arguments: &[&str]) -> Result<Value, Refused> {
        let mut command = Command::new(&self.program);
        command.args(["--admin", &format!("unix:{}", socket.display()), "-o", "json"]).args(arguments);
        // Guests speak NBD to the node's socket; left to itself, a node may choose a device of the kernel.
        if arguments.starts_with(&["volume", "attach"]) && !arguments.contains(&"--frontend") {
            command.args(["--frontend", "nbd"]);
        }
        run(command, arguments).await
    }

    /// The program by itself, without a cluster: what it says when it is refused.
    pub async fn program_refuses(&self, arguments: &[&str]) -> Outcome<Refused> {
        let mut command = Command::new(&self.program);
        command.args(["-o", "json"]).args(arguments);
        match run(command, arguments).await {
            Ok(value) => Err(format!("{} was not refused: {value}", arguments.join(" "))),
            Err(refused) => Ok(refused),
        }
    }

    /// A command that must be refused.
    pub async fn refused(&self, arguments: &[&str]) -> Outcome<Refused> {
        match self.try_command(arguments).await {
            Ok(value) => Err(format!("{} was not refused: {value}", arguments.join(" "))),
            Err(refused) => Ok(refused),
        }
    }

    /// A command that must succeed.
    pub async fn command(&self, arguments: &[&str]) -> Outcome<Value> {
        self.try_command(arguments)
            .await
            .map_err(|refused| format!("{} failed: {}", arguments.join(" "), refused.message))
    }

    /// A command that is repeated while there is no quorum, for `patience`.
    pub async fn insist(&self, arguments: &[&str], patience: Duration) -> Outcome<Value> {
        self.insist_on(&self.directory.join("admin.sock"), arguments, patience).await
    }

    /// As [`Self::insist`], at one node's daemon.
    pub async fn insist_at(&self, node: &str, arguments: &[&str], patience: Duration) -> Outcome<Value> {
        self.insist_on(&self.node(node).join("admin.sock"), arguments, patience).await
    }

    async fn insist_on(&self, socket: &Path, arguments: &[&str], patience: Duration) -> Outcome<Value> {
        let until = Instant::now() + patience;
        loop {
            match self.try_at(socket, arguments).await {
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
        let done = self.try_ctl(arguments).await;
        done.map_err(|refused| format!("{} failed: {}", arguments.join(" "), refused.message))
    }

    /// As [`Self::ctl`], where the fault itself may be refused.
    pub async fn try_ctl(&self, arguments: &[&str]) -> Result<(), Refused> {
        let directory = self.directory.display().to_string();
        let mut all = vec!["dev", "ctl", "--dir", &directory];
        all.extend(arguments);
        self.try_command(&all).await.map(drop)
    }

    /// Asks for a volume until `wanted` holds of it.
    pub async fn until(
        &self,
        volume: &str,
        patience: Duration,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Outcome<Value> {
        let until = Instant::now() + patience;
        loop {
            let shown = self.try_command(&["volume", "show", volume]).await;
            match shown {
                Ok(shown) if wanted(&shown) => return Ok(shown),
                other if Instant::now() > until => {
                    return Err(format!("{what}: not within {patience:?}; at the end: {other:?}"));
                }
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Verifies a volume's replicas; the index at which they are equal.
    pub async fn verified(&self, volume: &str, patience: Duration) -> Outcome<u64> {
        let report = self.insist(&["volume", "verify", volume], patience).await?;
        if report["equal"] != true {
            return Err(format!("the replicas of {volume} differ: {report}"));
        }
        report["index"].as_u64().ok_or_else(|| format!("no index in {report}"))
    }

    /// A node's data directory.
    pub fn node(&self, node: &str) -> PathBuf {
        self.directory.join(node)
    }

    /// What a node's daemon has logged.
    pub fn log(&self, node: &str) -> String {
        std::fs::read_to_string(self.node(node).join("log")).unwrap_or_default()
    }

    /// A counter of a node that runs, by its whole name.
    pub async fn counter(&self, node: &str, name: &str) -> Outcome<u64> {
        let nodes = self.described()?;
        let url = nodes.iter().find(|described| described["name"] == node);
        let url = url.and_then(|described| described["metrics"].as_str()).ok_or("no metrics are served")?;
        let (host, path) =
            url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).ok_or("no address")?;
        let wrong = |error: std::io::Error| format!("the metrics of {node}: {error}");
        let mut stream = tokio::net::TcpStream::connect(host).await.map_err(wrong)?;
        let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.map_err(wrong)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.map_err(wrong)?;
        let value = answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        value.map(|value| value as u64).ok_or_else(|| format!("{node} has no counter {name}"))
    }

    /// Names of the nodes.
    pub fn nodes(&self) -> Outcome<Vec<String>> {
        let nodes = self.described()?;
        Ok(nodes.iter().filter_map(|node| node["name"].as_str().map(str::to_owned)).collect())
    }

    fn described(&self) -> Outcome<Vec<Value>> {
        let json = std::fs::read(self.directory.join("dev.json")).map_err(|error| error.to_string())?;
        let description: Value = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
        description["nodes"].as_array().cloned().ok_or_else(|| "dev.json has no nodes".to_owned())
    }

    /// Where everything of a node is.
    pub fn data_dir(&self, node: &str) -> PathBuf {
        self.directory.join(node)
    }

    /// A node's NBD socket.
    pub fn nbd(&self, node: &str) -> PathBuf {
        self.node(node).join("nbd.sock")
    }
}
