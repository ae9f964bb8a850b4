//! PostgreSQL as the demonstration drives it: its programs, a server whose data stands on the volume, and a client that
//! remembers which of its transactions were acknowledged.
//!
//! The server runs as an ordinary user, as it must; everything it was given is killed when it is dropped.

use std::collections::BTreeSet;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_types::{ErrorCode, UserError};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;

use super::failed;

/// Where Debian and its kin put the server's programs, a directory for each version.
const VERSIONS: &str = "/usr/lib/postgresql";
/// Users that the server may run as, best first.
const USERS: &[&str] = &["postgres", "nobody"];
/// How long the server may take to answer after a crash.
const START_PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);
/// The database.
pub(super) const NAME: &str = "bench";

/// What the demonstration needs of this machine.
pub(super) struct Tools {
    directory: PathBuf,
    uid: u32,
    gid: u32,
    /// The user that the server runs as.
    pub(super) user: String,
}

fn missing(what: &str, hint: &str) -> UserError {
    UserError::new(ErrorCode::Refused, format!("the demonstration postgres needs {what}")).hint(hint)
}

/// The directories of PATH.
fn path() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

/// A program's path, by its name.
fn program(name: &str) -> Option<PathBuf> {
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    path().into_iter().chain(system).map(|directory| directory.join(name)).find(|path| path.exists())
}

/// The newest installation that has everything.
fn installation() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = match std::fs::read_dir(VERSIONS) {
        Ok(listed) => listed.flatten().map(|entry| entry.path().join("bin")).collect(),
        Err(_) => Vec::new(),
    };
    versions.sort();
    versions.reverse();
    let whole =
        |bin: &PathBuf| ["initdb", "postgres", "psql", "pgbench"].iter().all(|name| bin.join(name).exists());
    versions.into_iter().chain(path()).find(whole)
}

/// Name, uid and gid of a user, from the lines of /etc/passwd.
fn account(passwd: &str, name: &str) -> Option<(u32, u32)> {
    let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

impl Tools {
    /// Finds them, or says precisely what is missing.
    pub(super) fn find() -> Result<Self, UserError> {
        if !rustix::process::geteuid().is_root() {
            return Err(missing("root, to mount a file system", "run it with sudo, or play zone-loss"));
        }
        let directory = installation().ok_or_else(|| {
            missing(
                "PostgreSQL: initdb, postgres, psql and pgbench",
                "apt install postgresql (Debian, Ubuntu), dnf install postgresql-server postgresql-contrib (Fedora)",
            )
        })?;
        for name in ["mkfs.ext4", "fsck.ext4"] {
            program(name).ok_or_else(|| missing(name, "install e2fsprogs"))?;
        }
        for device in ["/dev/fuse", "/dev/loop-control"] {
            if !Path::new(device).exists() {
                return Err(missing(device, "load the kernel's fuse and loop modules (modprobe fuse loop)"));
            }
        }
        let passwd = std::fs::read_to_string("/etc/passwd").map_err(|error| failed("/etc/passwd", error))?;
        let found = USERS.iter().find_map(|name| Some((name, account(&passwd, name)?)));
        let (user, (uid, gid)) =
            found.ok_or_else(|| missing("a user postgres or nobody", "add one: PostgreSQL refuses root"))?;
        Ok(Self { directory, uid, gid, user: (*user).to_owned() })
    }

    /// Gives a directory to the server's user.
    pub(super) fn give(&self, path: &Path) -> Result<(), UserError> {
        chown(path, Some(self.uid), Some(self.gid))
            .map_err(|error| failed(&path.display().to_string(), error))
    }

    /// A program of PostgreSQL, as its user.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.directory.join(name));
        command
            .uid(self.uid)
            .gid(self.gid)
            .current_dir("/")
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C")
            .env("PGUSER", &self.user)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// Whether a program of PostgreSQL that not everybody has is there.
    fn has(&self, name: &str) -> bool {
        self.directory.join(name).exists()
    }
}

/// Runs a command to its end; what it printed.
async fn run(mut command: Command, what: &str) -> Result<String, UserError> {
    let done = command.output().await.map_err(|error| failed(what, error))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&done.stderr);
    let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
    Err(failed(what, format!("{}: {last}", done.status)))
}

/// Runs a program of the system to its end.
pub(super) async fn system(name: &str, arguments: &[&str]) -> Result<String, UserError> {
    let path = program(name).ok_or_else(|| failed(name, "it is not installed"))?;
    let mut command = Command::new(path);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    run(command, name).await
}

/// A server whose data stands in `data`.
pub(super) struct Database<'t> {
    tools: &'t Tools,
    sockets: PathBuf,
    log: PathBuf,
    server: Option<Child>,
}

impl<'t> Database<'t> {
    /// Not running yet; its socket and log are in `place`.
    pub(super) fn new(tools: &'t Tools, place: &Path) -> Result<Self, UserError> {
        let sockets = place.join("pg");
        std::fs::create_dir_all(&sockets).map_err(|error| failed("the server's socket", error))?;
        tools.give(&sockets)?;
        Ok(Self { tools, log: sockets.join("log"), sockets, server: None })
    }

    /// Makes a new cluster with checksums in `data`, which must not exist.
    pub(super) async fn init(&self, data: &Path) -> Result<(), UserError> {
        let mut command = self.tools.command("initdb");
        command.args(["--data-checksums", "--auth=trust", "--encoding=UTF8", "--pgdata"]).arg(data);
        run(command, "initdb").await.map(drop)
    }

    fn client(&self, name: &str) -> Command {
        let mut command = self.tools.command(name);
        command.arg("-h").arg(&self.sockets);
        command
    }

    /// Starts the server; returns when it answers, after whatever recovery it needs.
    pub(super) async fn start(&mut self, data: &Path) -> Result<Duration, UserError> {
        let began = Instant::now();
        loop {
            if self.running()?.is_none() {
                // A server that was killed leaves processes that take a moment to notice.
                self.spawn(data)?;
            }
            if self.query("postgres", "SELECT 1").await.is_ok() {
                return Ok(began.elapsed());
            }
            if began.elapsed() > START_PATIENCE {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                let last = log.lines().last().unwrap_or("nothing was logged");
                return Err(failed("PostgreSQL does not answer", last));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn spawn(&mut self, data: &Path) -> Result<(), UserError> {
        let wrong = |error: std::io::Error| failed("PostgreSQL cannot be started", error);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log).map_err(wrong)?;
        let mut command = self.tools.command("postgres");
        command.arg("-D").arg(data).arg("-k").arg(&self.sockets);
        for setting in
            ["listen_addresses=", "shared_buffers=64MB", "max_wal_size=128MB", "data_sync_retry=off"]
        {
            command.args(["-c", setting]);
        }
        command.stdout(log.try_clone().map_err(wrong)?).stderr(log).process_group(0);
        self.server = Some(command.spawn().map_err(wrong)?);
        Ok(())
    }

    /// The server's process, if it runs.
    fn running(&mut self) -> Result<Option<Pid>, UserError> {
        let Some(server) = &mut self.server else { return Ok(None) };
        match server.try_wait() {
            Ok(None) => Ok(server.id().and_then(|pid| Pid::from_raw(pid as i32))),
            Ok(Some(_)) => {
                self.server = None;
                Ok(None)
            }
            Err(error) => Err(failed("PostgreSQL", error)),
        }
    }

    /// Stops the server as an administrator would.
    pub(super) async fn stop(&mut self) -> Result<(), UserError> {
        self.end(Signal::INT).await
    }

    /// The server's machine is gone.
    pub(super) async fn kill(&mut self) -> Result<(), UserError> {
        self.end(Signal::KILL).await
    }

    async fn end(&mut self, signal: Signal) -> Result<(), UserError> {
        if let Some(pid) = self.running()? {
            kill_process(pid, signal).map_err(|error| failed("PostgreSQL", error))?;
        }
        match self.server.take() {
            Some(mut server) => server.wait().await.map(drop).map_err(|error| failed("PostgreSQL", error)),
            None => Ok(()),
        }
    }

    /// One statement; its rows.
    pub(super) async fn query(&self, database: &str, statement: &str) -> Result<String, UserError> {
        let mut command = self.client("psql");
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", statement]);
        run(command, "psql").await
    }

    /// Makes the tables of pgbench and the ledger.
    pub(super) async fn fill(&self, scale: u32) -> Result<(), UserError> {
        self.query("postgres", &format!("CREATE DATABASE {NAME}")).await?;
        let mut command = self.client("pgbench");
        command.args(["-i", "-q", "-s", &scale.to_string(), NAME]);
        run(command, "pgbench").await?;
        self.query(NAME, "CREATE TABLE ledger (n bigint PRIMARY KEY)").await.map(drop)
    }

    /// Starts pgbench for so many seconds.
    pub(super) fn bench(&self, seconds: u64) -> JoinHandle<Result<Bench, UserError>> {
        let mut command = self.client("pgbench");
        command.args(["-n", "-c", "4", "-T", &seconds.to_string(), NAME]);
        tokio::spawn(async move { Bench::read(&run(command, "pgbench").await?) })
    }

    /// Compares every table and index with itself, where amcheck is installed.
    pub(super) async fn check(&self) -> Result<String, String> {
        if !self.tools.has("pg_amcheck") {
            return Ok("pg_amcheck is not installed; passed over".into());
        }
        let mut command = self.client("pg_amcheck");
        command.args(["--install-missing", "--heapallindexed", NAME]);
        run(command, "pg_amcheck").await.map(|_| "by pg_amcheck".into()).map_err(|error| error.to_string())
    }

    /// Checks the checksum of every page of a server that does not run.
    pub(super) async fn check_pages(&self, data: &Path) -> Result<String, String> {
        if !self.tools.has("pg_checksums") {
            return Ok("pg_checksums is not installed; passed over".into());
        }
        let mut command = self.tools.command("pg_checksums");
        command.args(["--check", "-D"]).arg(data);
        let said = run(command, "pg_checksums").await.map_err(|error| error.to_string())?;
        let count = |label: &str| {
            said.lines().find_map(|line| line.strip_prefix(label)).unwrap_or("").trim().to_owned()
        };
        Ok(format!("{} pages, {} bad", count("Blocks scanned:"), count("Bad checksums:")))
    }
}

/// What pgbench says of itself.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Bench {
    /// Transactions that were committed.
    pub(super) transactions: u64,
    /// Those that failed.
    pub(super) failed: u64,
    /// A second.
    pub(super) rate: f64,
}

impl Bench {
    fn read(said: &str) -> Result<Self, UserError> {
        fn number<T: std::str::FromStr>(said: &str, label: &str) -> Option<T> {
            let rest = said.lines().find_map(|line| line.strip_prefix(label))?;
            rest.split_whitespace().next()?.split('/').next()?.parse().ok()
        }
        let read = || {
            Some(Self {
                transactions: number(said, "number of transactions actually processed: ")?,
                failed: number(said, "number of failed transactions: ")?,
                rate: number(said, "tps = ")?,
            })
        };
        read().ok_or_else(|| failed("pgbench's report is not understood", said))
    }
}

#[derive(Default)]
struct Acknowledged {
    numbers: BTreeSet<u64>,
    last: Option<Instant>,
    gap: Duration,
}

/// The transactions of one client that were acknowledged to it. It outlives its clients.
#[derive(Default)]
pub(super) struct Ledger(Mutex<Acknowledged>);

impl Ledger {
    fn with<T>(&self, change: impl FnOnce(&mut Acknowledged) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.with(|known| known.numbers.len())
    }

    /// The longest time without an acknowledgement is counted from now.
    pub(super) fn begin_gap(&self) {
        self.with(|known| (known.last, known.gap) = (Some(Instant::now()), Duration::ZERO));
    }

    /// The longest time without one.
    pub(super) fn gap(&self) -> Duration {
        self.with(|known| known.gap)
    }

    fn acknowledge(&self, number: u64) {
        self.with(|known| {
            let now = Instant::now();
            known.gap = known.gap.max(known.last.map_or(Duration::ZERO, |last| now - last));
            known.last = Some(now);
            known.numbers.insert(number);
        });
    }

    /// Inserts numbers over one connection, from the first that was never tried, until that ends or `stop` does.
    pub(super) fn keep(self: &Arc<Self>, database: &Database<'_>) -> Result<JoinHandle<()>, UserError> {
        let mut command = database.client("psql");
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", NAME]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|error| failed("psql", error))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or_else(|| failed("psql", "it has no pipes"))?;
        // Numbers of unknown outcome are never tried again: each stands for one transaction.
        let next = self.with(|known| known.numbers.last().map_or(1, |last| last + 1000));
        let ledger = self.clone();
        Ok(tokio::spawn(async move {
            let _alive = child;
            ledger.insert(next, input, BufReader::new(output).lines()).await;
        }))
    }

    async fn insert(&self, first: u64, mut input: ChildStdin, mut output: Lines<BufReader<ChildStdout>>) {
        for number in first.. {
            let statement = format!("INSERT INTO ledger VALUES ({number}) RETURNING n;\n");
            if input.write_all(statement.as_bytes()).await.is_err() {
                return;
            }
            match output.next_line().await {
                Ok(Some(line)) if line.trim() == number.to_string() => self.acknowledge(number),
                _ => return,
            }
        }
    }

    /// Whether everything that was acknowledged is in a table's rows.
    fn compare(&self, rows: &str) -> Result<String, String> {
        let found: BTreeSet<u64> = rows.lines().filter_map(|row| row.trim().parse().ok()).collect();
        self.with(|known| {
            let lost: Vec<&u64> = known.numbers.difference(&found).collect();
            match lost.first() {
                None if known.numbers.is_empty() => Err("nothing was acknowledged".into()),
                None => Ok(format!("{} acknowledged transactions, none lost", known.numbers.len())),
                Some(first) => Err(format!(
                    "{} of {} acknowledged transactions are lost, the first is {first}",
                    lost.len(),
                    known.numbers.len()
                )),
            }
        })
    }

    /// Whether everything that was acknowledged is there.
    pub(super) async fn check(&self, database: &Database<'_>) -> Result<String, String> {
        let rows = database.query(NAME, "SELECT n FROM ledger").await.map_err(|error| error.to_string())?;
        self.compare(&rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_transaction_is_noticed_and_an_unacknowledged_one_may_be_there() {
        let ledger = Ledger::default();
        assert!(ledger.compare("").is_err(), "nothing was shown");
        [1, 2, 5].into_iter().for_each(|number| ledger.acknowledge(number));
        assert!(ledger.compare("1\n2\n5\n6\n").is_ok());
        assert!(ledger.compare("1\n5\n").is_err());
        assert_eq!(ledger.len(), 3);
    }

    #[test]
    fn what_pgbench_says_is_read() {
        let said = "transaction type: <builtin: TPC-B (sort of)>\nnumber of clients: 4\n\
            number of transactions actually processed: 1234\nnumber of failed transactions: 2 (0.162%)\n\
            latency average = 3.1 ms\ntps = 410.5 (without initial connection time)\n";
        assert_eq!(Bench::read(said).ok(), Some(Bench { transactions: 1234, failed: 2, rate: 410.5 }));
        assert!(Bench::read("pgbench: error").is_err());
    }

    #[test]
    fn accounts_are_found_by_their_whole_name() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\npostgresql:x:7:7::/:\npostgres:x:101:104::/var:/bin/sh\n";
        assert_eq!(account(passwd, "postgres"), Some((101, 104)));
        assert_eq!(account(passwd, "nobody"), None);
    }
}
