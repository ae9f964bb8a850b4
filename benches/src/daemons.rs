//! A development cluster of real daemons, and an NBD client on a volume of it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use crate::Outcome;
use crate::child::{Worker, cpu_ns};
use crate::cluster::{DevCluster, Node};
use crate::load::{Figures, Work};
use crate::usage::Usage;

/// How long the client may take for what nobody measures: connecting, answering a scrape.
const ANSWER: Duration = Duration::from_secs(30);
const VOLUME: &str = "bench";

/// The cluster and its client.
pub struct Daemons {
    nodes: Vec<Node>,
    /// Gone before the cluster: fields are dropped in order.
    client: Worker,
    _cluster: DevCluster,
}

impl Daemons {
    /// Starts three zones of one daemon each, makes a volume, attaches it to the first and connects a client.
    pub fn start(program: &Path, directory: &Path, size: u64) -> Outcome<Self> {
        let cluster = DevCluster::start(program, directory, &[])?;
        let nodes = cluster.nodes()?;
        let first = &nodes.first().ok_or("the cluster has no nodes")?.name;
        cluster.attached(VOLUME, size, first, &[])?;
        let socket = cluster.nbd(first).display().to_string();
        let client = Worker::start("the client", &["client", "--socket", &socket, "--export", VOLUME])?;
        Ok(Self { nodes, client, _cluster: cluster })
    }

    /// Runs a load.
    pub fn work(&mut self, work: &Work) -> Outcome<Figures> {
        self.client.ask(work)
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
        cpu_ns(self.client.pid())
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
