//! A development cluster of real daemons, and an NBD client on a volume of it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::child::{Worker, cpu_ns};
use crate::load::{Figures, Work};
use crate::usage::Usage;

/// How long the cluster and its volume may take to be ready.
const START: Duration = Duration::from_secs(60);
/// How long the client may take for what nobody measures: connecting, answering a scrape.
const ANSWER: Duration = Duration::from_secs(30);
const VOLUME: &str = "bench";

struct Node {
    pid: u32,
    metrics: String,
}

/// The cluster and its client.
pub struct Daemons {
    program: PathBuf,
    directory: PathBuf,
    supervisor: Child,
    nodes: Vec<Node>,
    client: Option<Worker>,
}

fn until<T>(what: &str, mut look: impl FnMut() -> Outcome<Option<T>>) -> Outcome<T> {
    let deadline = Instant::now() + START;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(format!("{what}: not in {START:?}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl Daemons {
    /// Starts three zones of one daemon each, makes a volume, attaches it to the first and connects a client.
    pub fn start(program: &Path, directory: &Path, size: u64) -> Outcome<Self> {
        let wrong = |error: std::io::Error| format!("{} cannot be started: {error}", program.display());
        let supervisor = Command::new(program)
            .args(["dev", "--dir"])
            .arg(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(wrong)?;
        let mut daemons = Self {
            program: program.to_owned(),
            directory: directory.to_owned(),
            supervisor,
            nodes: Vec::new(),
            client: None,
        };
        until("the cluster", || {
            if let Some(status) = daemons.supervisor.try_wait().map_err(wrong)? {
                return Err(format!("the cluster has ended: {status}"));
            }
            let serves = directory.join("dev.json").exists() && directory.join("admin.sock").exists();
            Ok(serves.then_some(()))
        })?;
        let first = daemons.read_nodes()?;
        daemons.command(&["volume", "create", VOLUME, "--size", &size.to_string()])?;
        until("the volume", || {
            let healthy = daemons.command(&["volume", "show", VOLUME])?["health"] == "healthy";
            Ok(healthy.then_some(()))
        })?;
        daemons.command(&["volume", "attach", VOLUME, "--node", &first, "--frontend", "nbd"])?;
        until("the leader beside the attachment", || {
            Ok((daemons.command(&["volume", "show", VOLUME])?["leader"] == first.as_str()).then_some(()))
        })?;
        let socket = directory.join(&first).join("nbd.sock").display().to_string();
        daemons.client =
            Some(Worker::start("the client", &["client", "--socket", &socket, "--export", VOLUME])?);
        Ok(daemons)
    }

    fn read_nodes(&mut self) -> Outcome<String> {
        let text = std::fs::read(self.directory.join("dev.json")).map_err(|error| error.to_string())?;
        let description: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        let nodes = description["nodes"].as_array().ok_or("dev.json has no nodes")?;
        for node in nodes {
            let pid = node["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            let metrics = node["metrics"].as_str().unwrap_or_default().to_owned();
            self.nodes.push(Node { pid: pid.ok_or("a node has no process")?, metrics });
        }
        nodes.first().and_then(|node| node["name"].as_str()).map(str::to_owned).ok_or("no nodes".into())
    }

    fn command(&self, arguments: &[&str]) -> Outcome<Value> {
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

    /// Runs a load.
    pub fn work(&mut self, work: &Work) -> Outcome<Figures> {
        self.client.as_mut().ok_or("there is no client")?.ask(work)
    }

    /// Counters of all daemons.
    pub fn usage(&self) -> Outcome<Usage> {
        self.nodes.iter().try_fold(Usage::default(), |sum, node| Ok(sum.plus(scrape(&node.metrics)?)))
    }

    /// Processor time of the daemons so far.
    pub fn cpu_ns(&self) -> Outcome<u64> {
        self.nodes.iter().map(|node| cpu_ns(node.pid)).sum()
    }

    /// Processor time of the client so far.
    pub fn client_cpu_ns(&self) -> Outcome<u64> {
        cpu_ns(self.client.as_ref().ok_or("there is no client")?.pid())
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        self.client = None;
        let terminated = Command::new("kill").args(["-TERM", &self.supervisor.id().to_string()]).status();
        if terminated.is_err() || self.supervisor.wait().is_err() {
            eprintln!("the cluster in {} was not stopped", self.directory.display());
        }
    }
}

fn fetch(url: &str) -> std::io::Result<String> {
    let broken = || std::io::Error::other(format!("'{url}' is no metrics URL"));
    let (host, path) =
        url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).ok_or_else(broken)?;
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A node's counters, from its metrics.
fn scrape(url: &str) -> Outcome<Usage> {
    let text = fetch(url).map_err(|error| format!("{url}: {error}"))?;
    let sum = |name: &str, label: &str| -> f64 {
        let of_it = |line: &&str| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with([' ', '{'])) && line.contains(label)
        };
        let values = text.lines().filter(of_it).filter_map(|line| line.rsplit_once(' '));
        values.filter_map(|(_, value)| value.parse::<f64>().ok()).sum()
    };
    if !text.contains("holdfast_journal_flushes_total") {
        return Err(format!("{url} does not show a journal"));
    }
    let stored = "holdfast_store_written_bytes_total";
    Ok(Usage {
        journal_flushes: sum("holdfast_journal_flushes_total", ""),
        flush_seconds: sum("holdfast_journal_flush_seconds_sum", ""),
        other_flushes: sum("holdfast_store_flushes_total", ""),
        journal_bytes: sum("holdfast_journal_written_bytes_total", ""),
        home_bytes: sum(stored, r#"part="home""#),
        table_bytes: sum(stored, r#"part="table""#) + sum(stored, r#"part="manifest""#),
        appends: sum("holdfast_raft_received_appends_total", ""),
        appended: sum("holdfast_raft_received_entries_total", ""),
        dirty_bytes: sum("holdfast_store_dirty_bytes", ""),
    })
}
