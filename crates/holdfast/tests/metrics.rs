//! The metrics of a running cluster: what a scraper gets, and that the counters count what was done.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK: u64 = 4096;
const WRITES: u64 = 100;

struct Dev {
    child: Child,
    directory: PathBuf,
    description: Value,
}

impl Dev {
    fn start(place: &Path) -> Self {
        let directory = place.join("c");
        let child = Command::new(env!("CARGO_BIN_EXE_holdfast"))
            // The ring where the kernel gives one; other tests run on threads.
            .args(["dev", "--journal", "64MiB", "--io-engine", "auto", "--dir"])
            .arg(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("holdfast dev starts");
        let mut dev = Self { child, directory, description: Value::Null };
        let (json, control) = (dev.directory.join("dev.json"), dev.directory.join("ctl.sock"));
        until("the cluster serves", || {
            assert!(dev.child.try_wait().expect("a state").is_none(), "the cluster has ended");
            json.exists() && control.exists()
        });
        let text = std::fs::read(json).expect("dev.json");
        dev.description = serde_json::from_slice(&text).expect("dev.json is JSON");
        dev
    }

    fn command(&self, arguments: &[&str]) -> Value {
        let admin = self.description["admin"].as_str().expect("an address");
        let output = Command::new(env!("CARGO_BIN_EXE_holdfast"))
            .args(["--admin", admin, "-o", "json"])
            .args(arguments)
            .output()
            .expect("runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("prints JSON")
    }

    /// Name and metrics address of every node.
    fn nodes(&self) -> Vec<(String, String)> {
        let nodes = self.description["nodes"].as_array().expect("nodes");
        let text = |node: &Value, key: &str| node[key].as_str().expect("a text").to_owned();
        nodes.iter().map(|node| (text(node, "name"), text(node, "metrics"))).collect()
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let terminated = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        if terminated.is_err() || self.child.wait().is_err() {
            eprintln!("the cluster was not stopped");
        }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn http(url: &str, method: &str) -> (u16, String) {
    let rest = url.strip_prefix("http://").expect("an http URL");
    let (host, path) = rest.split_once('/').expect("a path");
    let mut stream = TcpStream::connect(host).expect("the metrics are served");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    write!(stream, "{method} /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("asks");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, body.to_owned())
}

/// Samples by name and labels, as they are written.
fn scrape(url: &str) -> BTreeMap<String, f64> {
    let (status, text) = http(url, "GET");
    assert_eq!(status, 200, "{text}");
    let mut samples = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (name, value) = line.rsplit_once(' ').expect("a sample");
        let value = value.parse().unwrap_or_else(|_| panic!("a number in: {line}"));
        assert!(samples.insert(name.to_owned(), value).is_none(), "{name} is there twice");
    }
    samples
}

/// All samples of a name, whatever their other labels, that carry all of these.
fn sum(samples: &BTreeMap<String, f64>, name: &str, labels: &[&str]) -> f64 {
    let of_it = |key: &str| key == name || key.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
    let found: Vec<f64> = samples
        .iter()
        .filter(|(key, _)| of_it(key) && labels.iter().all(|label| key.contains(label)))
        .map(|(_, value)| *value)
        .collect();
    assert!(!found.is_empty(), "no sample of {name} with {labels:?}");
    found.iter().sum()
}

fn write_and_read(socket: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = NbdClient::connect(socket, "v").await.expect("connects");
        for n in 0..WRITES {
            let data = vec![n as u8; BLOCK as usize].into();
            client.write(n * BLOCK, data).await.expect("writes");
        }
        for n in 0..WRITES / 2 {
            client.read(n * BLOCK, BLOCK as u32).await.expect("reads");
        }
        client.trim(0, BLOCK as u32).await.expect("trims");
    });
}

#[test]
fn counters_count_what_was_done() {
    let place = tempfile::tempdir().expect("a place");
    let dev = Dev::start(place.path());
    let nodes = dev.nodes();
    dev.command(&["volume", "create", "v", "--size", "16MiB"]);
    let home = &nodes[0].0;
    until("the volume is ready", || dev.command(&["volume", "show", "v"])["health"] == "healthy");
    dev.command(&["volume", "attach", "v", "--node", home, "--frontend", "nbd"]);
    let before: Vec<_> = nodes.iter().map(|(_, url)| scrape(url)).collect();
    write_and_read(&dev.directory.join(home).join("nbd.sock"));

    let here = scrape(&nodes[0].1);
    let read = [r#"volume="v""#, r#"operation="read""#];
    let write = [r#"volume="v""#, r#"operation="write""#];
    let clear = [r#"volume="v""#, r#"operation="clear""#];
    assert_eq!(sum(&here, "holdfast_session_request_seconds_count", &write), WRITES as f64);
    assert_eq!(sum(&here, "holdfast_session_request_seconds_count", &read), (WRITES / 2) as f64);
    assert_eq!(sum(&here, "holdfast_session_request_seconds_count", &clear), 1.0);
    assert_eq!(sum(&here, "holdfast_session_bytes_total", &write), (WRITES * BLOCK) as f64);
    assert_eq!(sum(&here, "holdfast_session_bytes_total", &read), (WRITES / 2 * BLOCK) as f64);
    assert_eq!(sum(&here, "holdfast_session_errors_total", &[]), 0.0);
    let last = format!(
        "{}{{volume=\"v\",operation=\"write\",le=\"+Inf\"}}",
        "holdfast_session_request_seconds_bucket"
    );
    assert_eq!(here[&last], WRITES as f64, "the buckets are cumulative");

    // A follower may be one append behind: what was acknowledged is on two of three.
    let mut leaders = 0.0;
    for ((name, url), before) in nodes.iter().zip(&before) {
        until(&format!("{name} has journalled and applied it all"), || {
            let now = scrape(url);
            let moved = |name: &str| sum(&now, name, &[]) - sum(before, name, &[]);
            moved("holdfast_journal_payload_bytes_total") == (WRITES * BLOCK) as f64
                && moved("holdfast_raft_applied_entries_total") >= (WRITES + 1) as f64
        });
        let now = scrape(url);
        let moved = |name: &str| sum(&now, name, &[]) - sum(before, name, &[]);
        assert!(moved("holdfast_journal_entries_total") >= (WRITES + 1) as f64);
        assert!(moved("holdfast_journal_written_bytes_total") > (WRITES * BLOCK) as f64);
        assert!(moved("holdfast_journal_flushes_total") > 0.0);
        assert!(moved("holdfast_journal_flush_seconds_count") > 0.0);
        let (ended, begun) = (
            sum(&now, "holdfast_journal_flush_seconds_count", &[]),
            sum(&now, "holdfast_journal_flushes_total", &[]),
        );
        assert!(ended <= begun, "{ended} flushes ended of {begun} that began");
        assert!(moved("process_cpu_seconds_total") > 0.0);
        assert!(sum(&now, "process_resident_memory_bytes", &[]) > 1e6);
        assert!(sum(&now, "holdfast_raft_term", &[r#"volume="v""#]) >= 1.0);
        leaders += sum(&now, "holdfast_raft_leader", &[r#"volume="v""#]);
        assert!(moved("holdfast_peer_sent_bytes_total") > 0.0);
        assert!(moved("holdfast_peer_received_bytes_total") > 0.0);
        assert_eq!(sum(&now, "holdfast_store_failed", &[]), 0.0);
    }
    assert_eq!(leaders, 1.0);
    the_medium_is_told_as_it_is(&dev, &nodes[0]);
}

/// Bytes that a file takes, or the files below a directory.
fn du(path: &Path) -> u64 {
    // Files come and go while a store works.
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            let entries = std::fs::read_dir(path).expect("a directory");
            entries.map(|entry| du(&entry.expect("an entry").path())).sum()
        }
        Ok(found) => std::os::unix::fs::MetadataExt::blocks(&found) * 512,
        Err(_) => 0,
    }
}

/// What stands on the medium is what the file system says, in metrics and on the command line.
fn the_medium_is_told_as_it_is(dev: &Dev, (name, url): &(String, String)) {
    let store = dev.directory.join(name).join("store");
    until("the store's files are told", || {
        let (before, samples) = (du(&store), scrape(url));
        let node = dev.command(&["node", "show", name]);
        let shown = &node["stores"][0];
        let told = |metric: &str, field: &str, bytes: u64| {
            let metric = format!("holdfast_store_{metric}_bytes");
            samples.get(&metric) == Some(&(bytes as f64)) && shown[field] == bytes
        };
        told("allocated", "allocated_bytes", before)
            && told("journal", "journal_bytes", du(&store.join("journal")))
            && told("reserve", "reserve_bytes", du(&store.join("reserve")))
            && told("snapshot", "snapshot_bytes", 0)
            && shown["blocks_bytes"].as_u64().is_some_and(|blocks| blocks > 0)
            && du(&store) == before
    });
    let samples = scrape(url);
    assert!(!samples.contains_key("holdfast_store_capacity_bytes"), "only the medium limits it");
    let replica = |part: &str| sum(&samples, "holdfast_replica_bytes", &[r#"volume="v""#, part]);
    assert!(replica(r#"part="allocated""#) >= replica(r#"part="used""#));
    assert!(replica(r#"part="journal""#) >= 0.0);
}

#[test]
fn what_makes_no_sense_is_refused_and_counted() {
    let place = tempfile::tempdir().expect("a place");
    let dev = Dev::start(place.path());
    let (name, url) = &dev.nodes()[0];
    assert_eq!(http(&url.replace("/metrics", "/"), "GET").0, 404);
    assert_eq!(http(url, "POST").0, 405);

    let before = scrape(url);
    let refused = "holdfast_peer_refused_total";
    let text = std::fs::read(dev.directory.join(name).join("node.json")).expect("node.json");
    let config: Value = serde_json::from_slice(&text).expect("JSON");
    let mut peer = TcpStream::connect(config["listen"].as_str().expect("an address")).expect("connects");
    peer.write_all(b"this is no TLS hello\r\n\r\n").expect("sends");
    until("the peer is refused", || sum(&scrape(url), refused, &[]) == sum(&before, refused, &[]) + 1.0);

    let malformed =
        |samples: &BTreeMap<String, f64>| sum(samples, "holdfast_peer_malformed_total", &[r#"part="nbd""#]);
    let mut nbd = UnixStream::connect(dev.directory.join(name).join("nbd.sock")).expect("connects");
    nbd.write_all(&[0xff; 64]).expect("sends");
    until("the client is refused", || malformed(&scrape(url)) == malformed(&before) + 1.0);
}
