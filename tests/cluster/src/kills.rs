//! SIGKILL under load: no acknowledged write lost, no stale read, and no error at all while the guest's own node lives.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;

use crate::Outcome;
use crate::dev::Dev;
use crate::load::{Load, check_all};
use crate::random::Random;

/// What is to be done.
pub struct Plan {
    /// Kills.
    pub kills: u32,
    /// Where choices come from.
    pub seed: u64,
    /// What happens to unflushed writes.
    pub disk: String,
    /// Everybody, every time.
    pub all_at_once: bool,
}

const WORKERS: u64 = 8;
const VOLUME: &str = "k";
/// How long a cluster whose daemons all run may take to serve again.
pub const RECOVERY: Duration = Duration::from_secs(30);
/// Requests between kills at least.
const REQUESTS: u64 = 50;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Victim {
    Leader,
    Follower,
    Attached,
    /// The attached node, and the volume is attached elsewhere by force.
    AttachedMoved,
    All,
    Any,
}

const VICTIMS: [Victim; 6] =
    [Victim::Leader, Victim::Follower, Victim::Attached, Victim::AttachedMoved, Victim::All, Victim::Any];

struct Run {
    dev: Dev,
    load: Load,
    random: Random,
    nodes: Vec<String>,
    attached: String,
    stalls: BTreeMap<Victim, Vec<Duration>>,
}

/// Runs the plan.
pub async fn run(program: &Path, keep: Option<PathBuf>, plan: &Plan) -> Outcome<()> {
    println!("kills: {} with seed {}, disk {}", plan.kills, plan.seed, plan.disk);
    let began = Instant::now();
    let dev = Dev::start(program, keep, &["--disk", &plan.disk, "--journal", "64MiB"]).await?;
    let nodes = dev.nodes()?;
    let mut random = Random::new(plan.seed);
    let attached = random.pick(&nodes).clone();
    dev.command(&["volume", "create", VOLUME, "--size", "256MiB"]).await?;
    dev.command(&["volume", "attach", VOLUME, "--node", &attached, "--frontend", "nbd"]).await?;
    let load = Load::start(VOLUME, dev.nbd(&attached), WORKERS, plan.seed);
    let mut run = Run { dev, load, random, nodes, attached, stalls: BTreeMap::new() };
    for round in 0..plan.kills {
        let victim = if plan.all_at_once { Victim::All } else { VICTIMS[(round % 6) as usize] };
        let result = run.round(victim).await;
        result.map_err(|why| format!("round {round} ({victim:?}), seed {}: {why}", plan.seed))?;
    }
    run.finish(plan, began).await
}

impl Run {
    async fn leader(&self) -> Outcome<String> {
        let shown = self.dev.insist(&["volume", "show", VOLUME], RECOVERY).await?;
        Ok(shown["leader"].as_str().unwrap_or(&self.nodes[0]).to_owned())
    }

    async fn choose(&mut self, victim: Victim) -> Outcome<Vec<String>> {
        Ok(match victim {
            Victim::Leader => vec![self.leader().await?],
            Victim::Follower => {
                let leader = self.leader().await?;
                let others: Vec<String> =
                    self.nodes.iter().filter(|node| **node != leader).cloned().collect();
                vec![self.random.pick(&others).clone()]
            }
            Victim::Attached | Victim::AttachedMoved => vec![self.attached.clone()],
            Victim::All => self.nodes.clone(),
            Victim::Any => vec![self.random.pick(&self.nodes).clone()],
        })
    }

    async fn round(&mut self, victim: Victim) -> Outcome<()> {
        self.load.progress(REQUESTS, RECOVERY).await?;
        let names = self.choose(victim).await?;
        tokio::time::sleep(Duration::from_millis(self.random.below(200))).await;
        self.load.figures.take_longest();
        let errors = self.load.figures.errors.load(Ordering::Relaxed);
        let region = names.len() == self.nodes.len();
        if region {
            self.dev.ctl(&["kill", "r1"]).await?;
        } else {
            self.dev.ctl(&["kill", &names[0]]).await?;
        }
        let killed = Instant::now();
        let guest_died = names.contains(&self.attached);
        if guest_died && victim == Victim::AttachedMoved {
            self.move_guest().await?;
        } else if !guest_died {
            // Two of three live: I/O goes on without an error before the third is back.
            self.load.progress(REQUESTS, RECOVERY).await?;
        }
        if region {
            self.dev.ctl(&["start", "r1"]).await?;
        } else {
            self.dev.ctl(&["start", &names[0]]).await?;
        }
        self.load.progress(REQUESTS, RECOVERY).await?;
        let stall = if guest_died { killed.elapsed() } else { self.load.figures.take_longest() };
        self.stalls.entry(victim).or_default().push(stall);
        let new_errors = self.load.figures.errors.load(Ordering::Relaxed) - errors;
        if !guest_died && new_errors > 0 {
            return Err(format!("{new_errors} requests failed although the guest's node lived"));
        }
        Ok(())
    }

    /// The guest's node is dead: the volume goes to another.
    async fn move_guest(&mut self) -> Outcome<()> {
        let others: Vec<String> = self.nodes.iter().filter(|node| **node != self.attached).cloned().collect();
        let to = self.random.pick(&others).clone();
        let attach = ["volume", "attach", VOLUME, "--node", &to, "--frontend", "nbd", "--force"];
        self.dev.insist(&attach, RECOVERY).await?;
        self.attached = to;
        self.load.moved(self.dev.nbd(&self.attached));
        self.load.progress(REQUESTS, RECOVERY).await
    }

    async fn finish(self, plan: &Plan, began: Instant) -> Outcome<()> {
        let (history, figures) = self.load.stop().await?;
        let client = NbdClient::connect(&self.dev.nbd(&self.attached), VOLUME).await;
        let client = client.map_err(|error| format!("the volume is gone at the end: {error}"))?;
        let blocks = check_all(&client, &history).await?;
        let verified = self.dev.insist(&["volume", "verify", VOLUME], RECOVERY).await?;
        if verified["equal"] != true {
            return Err(format!("the replicas differ: {verified}"));
        }
        for (victim, mut stalls) in self.stalls {
            stalls.sort();
            println!(
                "  {victim:13?} {:4} kills, stall median {:5} ms, longest {:5} ms",
                stalls.len(),
                stalls[stalls.len() / 2].as_millis(),
                stalls.last().map_or(0, Duration::as_millis)
            );
        }
        println!(
            "  {} writes acknowledged, {} reads checked, {} requests of unknown outcome; at the end {blocks} blocks \
             as they should be, replicas equal at index {}",
            figures.writes.load(Ordering::Relaxed),
            figures.reads.load(Ordering::Relaxed),
            figures.errors.load(Ordering::Relaxed),
            verified["index"]
        );
        println!("  {} kills, seed {}, {:.0} s", plan.kills, plan.seed, began.elapsed().as_secs_f64());
        self.dev.stop().await
    }
}
