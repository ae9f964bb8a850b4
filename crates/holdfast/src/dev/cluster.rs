//! The node processes of a development cluster.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use holdfast_env::real::replace_file;
use holdfast_node::admin::pb;
use holdfast_node::cluster::create_loopback;
use holdfast_node::config::{Layout, NodeConfig};
use holdfast_types::{ErrorCode, UserError};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use super::faults::{Faults, duration};
use crate::cli::{DevOptions, usage};
use crate::client::{connect, reply};

/// How long the daemons may take until all serve.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long a daemon may take to stop before it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// Between looks at a process that tells of no event.
const LOOK: Duration = Duration::from_millis(20);

/// `dev.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// The cluster's id.
    pub cluster: String,
    /// The supervisor's admin socket.
    pub admin: String,
    /// The nodes.
    pub nodes: Vec<NodeDescription>,
}

/// A node in `dev.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeDescription {
    /// Its name.
    pub name: String,
    /// Its region.
    pub region: String,
    /// Its zone.
    pub zone: String,
    /// Its daemon's process; 0 while it does not run.
    pub pid: u32,
    /// Its admin socket.
    pub admin: String,
    /// Its CSI socket.
    pub csi: String,
    /// Where its metrics are; empty for a cluster that was made before there were any.
    pub metrics: String,
    /// Its data directory.
    pub data_dir: String,
    /// Whether it is a witness.
    pub witness: bool,
}

struct Node {
    config: NodeConfig,
    path: PathBuf,
    child: Option<Child>,
    paused: bool,
}

/// The cluster.
pub struct Cluster {
    directory: PathBuf,
    nodes: Vec<Node>,
    faults: Faults,
    /// Held for as long as the supervisor runs.
    _lock: std::fs::File,
}

fn failed(what: &str, error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("{what}: {error}"))
}

fn metrics_url(address: &String) -> String {
    format!("http://{address}/metrics")
}

fn random() -> u128 {
    holdfast_node::cluster::random_id()
}

impl Cluster {
    /// The cluster of a directory; made anew if there is none.
    pub fn open(directory: &Path, options: &DevOptions) -> Result<Self, UserError> {
        let lock = std::fs::File::create(directory.join("lock")).map_err(|error| failed("lock", error))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            UserError::new(ErrorCode::Refused, format!("a cluster runs in {}", directory.display()))
                .hint("stop it first, or give this one another --dir")
        })?;
        // What one that was killed left behind: nobody serves there yet.
        match std::fs::remove_file(directory.join("dev.json")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed("dev.json", error));
            }
            _ => {}
        }
        let list = directory.join("nodes.json");
        let names: Vec<String> = match std::fs::read(&list) {
            Ok(json) => serde_json::from_slice(&json).map_err(|error| failed("nodes.json", error))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => create(directory, options)?,
            Err(error) => return Err(failed("nodes.json", error)),
        };
        let nodes = names
            .into_iter()
            .map(|name| {
                let path = directory.join(name);
                let config = NodeConfig::load(&Layout::new(&path))?;
                Ok(Node { config, path, child: None, paused: false })
            })
            .collect::<Result<_, UserError>>()?;
        Ok(Self { directory: directory.to_owned(), nodes, faults: Faults::default(), _lock: lock })
    }

    /// Starts every daemon that does not run.
    pub fn start_all(&mut self) -> Result<(), UserError> {
        self.nodes.iter_mut().try_for_each(Node::start)
    }

    /// Ends when every daemon answers and the catalog knows them all.
    pub async fn wait_until_serving(&mut self) -> Result<(), UserError> {
        let until = Instant::now() + START_DEADLINE;
        loop {
            for node in &mut self.nodes {
                node.check_running()?;
            }
            if self.all_known().await {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(UserError::new(ErrorCode::TimedOut, "the daemons do not all serve in time")
                    .hint(format!("look at {}/*/log", self.directory.display())));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn all_known(&self) -> bool {
        for node in &self.nodes {
            let Ok(mut client) = connect(&node.layout().admin_socket()).await else { return false };
            let Ok(known) = reply(client.list_nodes(pb::ListNodesRequest {}).await) else { return false };
            let ready = known.nodes.iter().filter(|node| node.state == "ready").count();
            if ready < self.nodes.len() {
                return false;
            }
        }
        true
    }

    /// What `dev.json` says.
    pub fn description(&self) -> Description {
        let nodes = self.nodes.iter().map(|node| NodeDescription {
            name: node.name().into(),
            region: node.config.location.region.clone(),
            zone: node.config.location.zone.clone(),
            pid: node.pid().unwrap_or(0),
            admin: format!("unix:{}", node.layout().admin_socket().display()),
            metrics: node.config.metrics.as_ref().map_or_else(String::new, metrics_url),
            csi: format!("unix:{}", node.path.join("csi.sock").display()),
            data_dir: node.path.display().to_string(),
            witness: node.config.witness,
        });
        Description {
            cluster: self.nodes.first().map(|node| node.config.cluster.to_string()).unwrap_or_default(),
            admin: format!("unix:{}", self.directory.join("admin.sock").display()),
            nodes: nodes.collect(),
        }
    }

    /// Writes `dev.json`: whole or not at all.
    pub fn write_description(&self) -> Result<(), UserError> {
        let json = serde_json::to_vec_pretty(&self.description()).map_err(|e| failed("dev.json", e))?;
        replace_file(&self.directory.join("dev.json"), &json).map_err(|error| failed("dev.json", error))
    }

    /// Names of the nodes that a word means: a node, a zone or a region.
    pub fn select(&self, word: &str) -> Result<BTreeSet<String>, UserError> {
        let meant = |node: &&Node| {
            let at = &node.config.location;
            at.node.as_str() == word || at.zone == word || at.region == word
        };
        let names: BTreeSet<String> =
            self.nodes.iter().filter(meant).map(|node| node.name().to_owned()).collect();
        if names.is_empty() {
            return Err(UserError::new(
                ErrorCode::NotFound,
                format!("there is no node, zone or region {word}"),
            )
            .hint("`holdfast node list` shows them all"));
        }
        Ok(names)
    }

    fn chosen(&mut self, word: &str) -> Result<Vec<&mut Node>, UserError> {
        let names = self.select(word)?;
        Ok(self.nodes.iter_mut().filter(|node| names.contains(node.name())).collect())
    }

    /// SIGKILL; ends when the processes are gone.
    pub async fn kill(&mut self, word: &str) -> Result<(), UserError> {
        for node in self.chosen(word)? {
            node.signal(Signal::KILL)?;
        }
        for node in self.chosen(word)? {
            node.wait().await?;
        }
        for name in self.select(word)? {
            // Its next daemon finds disks that are whole, as if they had been replaced by good ones with their content.
            self.faults.mend_disks(&name);
        }
        self.write_description()
    }

    /// Starts what was killed; ends when the daemons serve.
    pub async fn start(&mut self, word: &str) -> Result<(), UserError> {
        let mut sockets = Vec::new();
        for node in self.chosen(word)? {
            node.start()?;
            sockets.push((node.name().to_owned(), node.layout().admin_socket()));
        }
        let until = Instant::now() + START_DEADLINE;
        for (name, socket) in sockets {
            loop {
                if let Ok(mut client) = connect(&socket).await
                    && client.get_info(pb::GetInfoRequest {}).await.is_ok()
                {
                    break;
                }
                for node in self.chosen(&name)? {
                    node.check_running()?;
                }
                if Instant::now() > until {
                    return Err(UserError::new(
                        ErrorCode::TimedOut,
                        format!("{name} does not serve in time"),
                    )
                    .hint(format!("look at {}/{name}/log", self.directory.display())));
                }
                tokio::time::sleep(LOOK).await;
            }
        }
        self.apply_faults().await?;
        self.write_description()
    }

    /// SIGSTOP or SIGCONT. Who slept through a change of the faults learns of it.
    pub async fn pause(&mut self, word: &str, paused: bool) -> Result<(), UserError> {
        for node in self.chosen(word)? {
            node.signal(if paused { Signal::STOP } else { Signal::CONT })?;
            node.paused = paused;
        }
        if paused { Ok(()) } else { self.apply_faults().await }
    }

    fn names(&self) -> BTreeSet<String> {
        self.nodes.iter().map(|node| node.name().to_owned()).collect()
    }

    /// Cuts nodes off, both ways or only what they hear.
    pub async fn cut(&mut self, word: &str, both_ways: bool) -> Result<(), UserError> {
        let (inside, all) = (self.select(word)?, self.names());
        if both_ways {
            self.faults.partition(&inside, &all);
        } else {
            self.faults.deafen(&inside, &all);
        }
        self.apply_faults().await
    }

    /// Drops what one set sends to the other.
    pub async fn cut_one_way(&mut self, from: &str, to: &str) -> Result<(), UserError> {
        let (from, to) = (self.select(from)?, self.select(to)?);
        self.faults.cut_one_way(&from, &to);
        self.apply_faults().await
    }

    /// Lets the disk of one store of a node fail, or hang.
    pub async fn break_disk(&mut self, node: &str, store: &str, hang: bool) -> Result<(), UserError> {
        let runs = self.nodes.iter().any(|known| known.name() == node && known.child.is_some());
        if !runs {
            return Err(UserError::new(ErrorCode::NotFound, format!("no daemon of a node {node} runs"))
                .hint("`holdfast node list` shows the nodes; name one of them"));
        }
        let before = self.faults.clone();
        self.faults.break_disk(node, store, hang);
        let applied = self.apply_faults().await;
        if applied.is_err() {
            self.faults = before;
        }
        applied
    }

    /// Ends partitions, cuts and delays, and mends disks.
    pub async fn heal(&mut self) -> Result<(), UserError> {
        self.faults.heal();
        self.apply_faults().await
    }

    /// Delays traffic between two sets.
    pub async fn delay(&mut self, a: &str, b: &str, delay: &str) -> Result<(), UserError> {
        let by = duration(delay)
            .ok_or_else(|| usage(format!("'{delay}' is no delay"), "write for example 30ms"))?;
        let (a, b) = (self.select(a)?, self.select(b)?);
        self.faults.delay(&a, &b, by);
        self.apply_faults().await
    }

    /// Delays traffic between all regions.
    pub async fn delay_regions(&mut self, delay: &str) -> Result<(), UserError> {
        let regions: BTreeSet<String> =
            self.nodes.iter().map(|node| node.config.location.region.clone()).collect();
        for a in &regions {
            for b in regions.iter().filter(|b| *b > a) {
                self.delay(a, b, delay).await?;
            }
        }
        Ok(())
    }

    /// Tells every daemon that runs and is not paused.
    async fn apply_faults(&self) -> Result<(), UserError> {
        for node in self.nodes.iter().filter(|node| node.child.is_some() && !node.paused) {
            let mut client = connect(&node.layout().admin_socket()).await?;
            reply(client.set_faults(self.faults.of(node.name())).await)?;
        }
        Ok(())
    }

    /// Admin sockets of nodes that run, those first that are cut off from the fewest others.
    pub fn live_sockets(&self) -> Vec<PathBuf> {
        let mut live: Vec<&Node> =
            self.nodes.iter().filter(|node| node.child.is_some() && !node.paused).collect();
        live.sort_by_key(|node| self.faults.cuts_of(node.name()));
        live.into_iter().map(|node| node.layout().admin_socket()).collect()
    }

    /// Stops everything.
    pub async fn stop(&mut self) {
        for node in &mut self.nodes {
            // A paused process would not hear the end.
            let resumed = node.signal(Signal::CONT).and_then(|()| node.signal(Signal::TERM));
            if let Err(error) = resumed {
                tracing::debug!(%error, "a daemon had ended already");
            }
        }
        for node in &mut self.nodes {
            if let Some(child) = &mut node.child
                && tokio::time::timeout(STOP_DEADLINE, child.wait()).await.is_err()
                && let Err(error) = child.kill().await
            {
                tracing::warn!(%error, "a daemon could not be killed");
            }
            node.child = None;
            node.clean_devices().await;
        }
        for name in ["dev.json", "admin.sock", "ctl.sock"] {
            match std::fs::remove_file(self.directory.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, name, "a file stays behind");
                }
                _ => {}
            }
        }
    }
}

fn create(directory: &Path, options: &DevOptions) -> Result<Vec<String>, UserError> {
    let made = create_loopback(directory, &options.plan(), random)?;
    let names: Vec<String> = made.iter().map(|(_, config)| config.location.node.to_string()).collect();
    let json = serde_json::to_vec(&names).map_err(|error| failed("nodes.json", error))?;
    // Last, so that an interrupted creation begins anew.
    replace_file(&directory.join("nodes.json"), &json).map_err(|error| failed("nodes.json", error))?;
    Ok(names)
}

impl Node {
    fn name(&self) -> &str {
        self.config.location.node.as_str()
    }
    fn layout(&self) -> Layout {
        Layout::new(&self.path)
    }
    fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Removes what a daemon that was killed left mounted: it will not be there to do so.
    async fn clean_devices(&self) {
        let path = self.path.clone();
        match tokio::task::spawn_blocking(move || holdfast_node::clean_devices(&path)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "a mount stays behind"),
            Err(error) => tracing::warn!(%error, "a mount may stay behind"),
        }
    }

    fn start(&mut self) -> Result<(), UserError> {
        if self.child.is_some() {
            return Ok(());
        }
        let wrong = |error: std::io::Error| failed("a daemon cannot be started", error);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path.join("log"));
        let log = log.map_err(wrong)?;
        let program = std::env::current_exe().map_err(wrong)?;
        let child = Command::new(program)
            .args(["node", "--follow-parent", "--data-dir"])
            .arg(&self.path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(wrong)?)
            .stderr(log)
            // An interrupt at the terminal is for the supervisor alone, which stops the daemons in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(wrong)?;
        self.child = Some(child);
        self.paused = false;
        Ok(())
    }

    /// An error if the daemon has ended by itself.
    fn check_running(&mut self) -> Result<(), UserError> {
        let Some(child) = &mut self.child else { return Ok(()) };
        match child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => {
                self.child = None;
                let log = std::fs::read_to_string(self.path.join("log")).unwrap_or_default();
                let last = log.lines().last().unwrap_or("nothing was logged").to_owned();
                Err(failed(&format!("{} has ended ({status})", self.name()), last)
                    .hint(format!("look at {}/log", self.path.display())))
            }
            Err(error) => Err(failed("a daemon's state", error)),
        }
    }

    fn signal(&mut self, signal: Signal) -> Result<(), UserError> {
        let Some(pid) = self.pid().and_then(|pid| Pid::from_raw(pid as i32)) else { return Ok(()) };
        kill_process(pid, signal).map_err(|error| failed(self.name(), error))
    }

    async fn wait(&mut self) -> Result<(), UserError> {
        if let Some(mut child) = self.child.take() {
            child.wait().await.map_err(|error| failed("a daemon's end", error))?;
        }
        self.paused = false;
        Ok(())
    }
}
