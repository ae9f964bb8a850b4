//! `--demo postgres`: the same loss under a database. PostgreSQL on ext4 on the volume's block device, pgbench as its load,
//! and a client that remembers every transaction that was acknowledged to it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_types::{ByteSize, UserError};
use serde_json::json;

use super::acts;
use super::database::{self, Bench, Database, Ledger, Tools};
use super::failed;
use super::mounted::Mounted;
use super::report::{Report, millis, span};
use super::stage::{self, Stage};

/// Seconds of load before something happens to it.
const BEFORE: Duration = Duration::from_secs(3);
/// Seconds that pgbench runs in act 1.
const BENCH_SECONDS: u64 = 10;
/// Seconds of load between looks at whether the log has been purged.
const ROUND_SECONDS: u64 = 3;
/// Rounds until it must have been.
const ROUNDS_MAX: usize = 20;
/// Size of the database, in units of pgbench: about 15 MiB each.
const SCALE: u32 = 5;

/// Plays it.
pub(super) async fn play(
    stage: &Stage,
    report: &mut Report<'_>,
    tools: Option<&Tools>,
) -> Result<(), UserError> {
    let tools = tools.ok_or_else(|| failed("the demonstration", "its tools were not looked for"))?;
    let mut show = prologue(stage, report, tools).await?;
    let died = show.act_one(report).await?;
    let lost = show.act_two(report, &died).await?;
    show.return_of(report, &lost).await?;
    show.epilogue(report).await
}

/// The database is declared before its file system: the server ends before its files go.
struct Show<'s> {
    database: Database<'s>,
    mounted: Option<Mounted>,
    stage: &'s Stage,
    ledger: Arc<Ledger>,
    node: String,
    device: String,
    mounts: usize,
}

struct Lost {
    zone: String,
    index: u64,
}

async fn prologue<'s>(
    stage: &'s Stage,
    report: &mut Report<'_>,
    tools: &'s Tools,
) -> Result<Show<'s>, UserError> {
    report.act("A database on a volume that survives a zone");
    report.step("creating the volume");
    let volume = stage.create().await?;
    let on: Vec<&str> = volume.replicas.iter().map(|replica| replica.node.as_str()).collect();
    report.fact(
        "volume",
        format!("{}, replicas on {}", ByteSize(volume.size_bytes), on.join(", ")),
        json!({"size_bytes": volume.size_bytes, "replicas": on}),
    );
    let without = stage.nodes().iter().find(|node| !on.contains(&node.name.as_str()));
    let node = without.ok_or_else(|| failed("the cluster", "every node has a replica"))?.name.clone();
    let database = Database::new(tools, stage.directory())?;
    let mut show = Show {
        database,
        mounted: None,
        stage,
        ledger: Arc::default(),
        node,
        device: String::new(),
        mounts: 0,
    };
    show.device = show.stage.attach(&show.node, "loop", false).await?.device;
    database::system("mkfs.ext4", &["-q", "-F", &show.device]).await?;
    show.mount()?;
    tools.give(&show.place()?)?;
    report.step("making a database");
    let data = show.data()?;
    show.database.init(&data).await?;
    show.database.start(&data).await?;
    show.database.fill(SCALE).await?;
    report.fact(
        "database",
        format!(
            "PostgreSQL as {}, on ext4 on {} at {}, pgbench scale {SCALE}",
            tools.user, show.device, show.node
        ),
        json!({"guest": show.node, "device": show.device, "scale": SCALE}),
    );
    Ok(show)
}

impl Show<'_> {
    fn mount(&mut self) -> Result<(), UserError> {
        self.mounts += 1;
        let path = self.stage.directory().join(format!("mnt{}", self.mounts));
        self.mounted = Some(Mounted::new(&self.device, &path)?);
        Ok(())
    }

    fn place(&self) -> Result<PathBuf, UserError> {
        let mounted = self.mounted.as_ref().ok_or_else(|| failed("the volume", "it is not mounted"))?;
        Ok(mounted.path().to_owned())
    }

    fn data(&self) -> Result<PathBuf, UserError> {
        Ok(self.place()?.join("data"))
    }

    fn unmount(&mut self) -> Result<(), UserError> {
        self.mounted.take().map_or(Ok(()), Mounted::unmount)
    }

    async fn act_one(&mut self, report: &mut Report<'_>) -> Result<String, UserError> {
        report.act("Act 1: the leader's zone dies under the database");
        report.step("pgbench runs");
        let client = self.ledger.keep(&self.database)?;
        let bench = self.database.bench(BENCH_SECONDS);
        let (zone, leader) = acts::leader_outside(self.stage, &self.stage.zone_of(&self.node)?).await?;
        tokio::time::sleep(BEFORE).await;
        self.ledger.begin_gap();
        let daemons = self.stage.kill(&zone).await?;
        report.fact(
            "killed",
            format!("zone {zone} with the leader {leader}, {daemons} daemons, by SIGKILL, under pgbench"),
            json!({"killed_zone": zone, "leader": leader}),
        );
        let bench = bench.await.map_err(|error| failed("pgbench", error))?;
        client.abort();
        let gap = self.ledger.gap();
        report.fact(
            "stall",
            format!("no commit was acknowledged for {}", span(gap)),
            json!({"stall_ms": millis(gap)}),
        );
        report.check("no transaction failed", without_failures(bench));
        let outcome = self.ledger.check(&self.database).await;
        report.check("every acknowledged transaction is there", outcome);
        report.step(format!("zone {zone} comes back"));
        let index = stage::committed(&self.stage.volume().await?);
        self.stage.start(&zone).await?;
        let healed = self.stage.healed(index).await?;
        acts::road(report, &zone, &healed);
        Ok(zone)
    }

    async fn act_two(&mut self, report: &mut Report<'_>, died: &str) -> Result<Lost, UserError> {
        report.act("Act 2: the zone of the database dies");
        let zone = self.move_beside_a_replica(report, died).await?;
        let client = self.ledger.keep(&self.database)?;
        let bench = self.database.bench(600);
        tokio::time::sleep(BEFORE).await;
        let acknowledged = self.ledger.len();
        let killed = Instant::now();
        let daemons = self.stage.kill(&zone).await?;
        self.database.kill().await?;
        bench.abort();
        client.abort();
        // The machine is gone, and its mount with it.
        self.mounted = None;
        report.fact(
            "killed",
            format!("zone {zone}, {daemons} daemons, and PostgreSQL on it, after {acknowledged} commits of the client"),
            json!({"killed_zone": zone, "commits_before": acknowledged}),
        );
        let volume = self.stage.volume().await?;
        let elsewhere = volume.replicas.iter().find(|replica| replica.zone != zone);
        let elsewhere = elsewhere.ok_or_else(|| failed("the volume", "all replicas are in one zone"))?;
        report.step("attaching elsewhere by force");
        let attached = self.stage.attach(&elsewhere.node, "loop", true).await?;
        (self.node, self.device) = (attached.node, attached.device);
        self.mount()?;
        let data = self.data()?;
        let recovered = self.database.start(&data).await?;
        report.fact(
            "moved",
            format!(
                "to {} with --force, epoch {}; PostgreSQL recovered in {} and answered {} after the kill",
                self.node,
                attached.epoch,
                span(recovered),
                span(killed.elapsed())
            ),
            json!({
                "moved_to": self.node,
                "epoch": attached.epoch,
                "recovery_ms": millis(recovered),
                "back_ms": millis(killed.elapsed()),
            }),
        );
        let outcome = self.ledger.check(&self.database).await;
        report.check("every acknowledged transaction is there", outcome);
        report.check("tables and indexes are sound", self.database.check().await);
        Ok(Lost { zone, index: stage::committed(&self.stage.volume().await?) })
    }

    /// Moves the database, as planned, onto the node of a replica in a zone that has not died yet.
    async fn move_beside_a_replica(
        &mut self,
        report: &mut Report<'_>,
        died: &str,
    ) -> Result<String, UserError> {
        let (home, volume) = (self.stage.zone_of(&self.node)?, self.stage.volume().await?);
        let fits = |zone: &str| zone != home && zone != died;
        let other = volume.replicas.iter().find(|replica| fits(&replica.zone));
        let other = other.ok_or_else(|| failed("the volume", "no zone is left for the database"))?;
        report.step(format!("moving the database to {}", other.node));
        self.database.stop().await?;
        self.unmount()?;
        self.stage.detach().await?;
        let attached = self.stage.attach(&other.node, "loop", false).await?;
        (self.node, self.device) = (attached.node, attached.device);
        self.mount()?;
        let data = self.data()?;
        self.database.start(&data).await?;
        report.fact(
            "guest",
            format!("moved to {}, beside a replica, on {}", self.node, self.device),
            json!({"guest": self.node, "device": self.device}),
        );
        Ok(other.zone.clone())
    }

    async fn return_of(&mut self, report: &mut Report<'_>, lost: &Lost) -> Result<(), UserError> {
        report.act("The lost zone comes back after the log has been purged past it");
        report.step("pgbench runs on until the log is purged");
        let (mut transactions, mut purged) = (0, false);
        for _ in 0..ROUNDS_MAX {
            let bench =
                self.database.bench(ROUND_SECONDS).await.map_err(|error| failed("pgbench", error))??;
            transactions += bench.transactions;
            purged = stage::is_purged_past(&self.stage.volume().await?, lost.index);
            if purged {
                break;
            }
        }
        report.check(
            "the log was purged past the lost zone",
            if purged {
                Ok(format!("{transactions} transactions without it"))
            } else {
                Err(format!("not within {transactions} transactions"))
            },
        );
        report.step(format!("zone {} comes back", lost.zone));
        let back = Instant::now();
        let index = stage::committed(&self.stage.volume().await?);
        self.stage.start(&lost.zone).await?;
        let healed = self.stage.healed(index).await?;
        acts::road(report, &lost.zone, &healed);
        report.fact("took", span(back.elapsed()), json!({"heal_ms": millis(back.elapsed())}));
        let road = healed.replicas.iter().find(|replica| replica.zone == lost.zone);
        report.check(
            "it was healed by chunks",
            match road.map(|replica| replica.healed_by.as_str()) {
                Some("chunks") => Ok(String::new()),
                other => Err(format!("the log was gone, and it says {other:?}")),
            },
        );
        Ok(())
    }

    async fn epilogue(&mut self, report: &mut Report<'_>) -> Result<(), UserError> {
        report.act("Everything, checked at rest");
        let outcome = self.ledger.check(&self.database).await;
        report.check("every acknowledged transaction is there", outcome);
        self.database.stop().await?;
        let data = self.data()?;
        report.check("every page has its checksum", self.database.check_pages(&data).await);
        self.unmount()?;
        let checked = database::system("fsck.ext4", &["-f", "-n", &self.device]).await;
        report.check(
            "the file system is clean",
            checked.map(|_| String::new()).map_err(|error| error.to_string()),
        );
        self.stage.detach().await?;
        report.step("verifying all replicas");
        let verified = self.stage.verify().await?;
        report.check("the replicas are equal", acts::equal(&verified));
        Ok(())
    }
}

/// Whether pgbench ran to its end and lost nothing.
fn without_failures(bench: Result<Bench, UserError>) -> Result<String, String> {
    match bench {
        Err(error) => Err(error.to_string()),
        Ok(bench) if bench.failed > 0 || bench.transactions == 0 => {
            Err(format!("{} failed, {} were processed", bench.failed, bench.transactions))
        }
        Ok(bench) => {
            Ok(format!("pgbench: {} processed, 0 failed, {:.0} a second", bench.transactions, bench.rate))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_transaction_or_none_at_all_is_no_success() {
        let bench = |transactions, failed| Ok(Bench { transactions, failed, rate: 1.0 });
        assert!(without_failures(bench(10, 0)).is_ok());
        assert!(without_failures(bench(10, 1)).is_err());
        assert!(without_failures(bench(0, 0)).is_err());
        assert!(without_failures(Err(failed("pgbench", "it ended"))).is_err());
    }
}
