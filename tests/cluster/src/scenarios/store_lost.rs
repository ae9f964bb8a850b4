//! Nodes of two stores each lose one: the disk of one fails under load, first one beside which the guest runs, then one
//! that is its node's first; one hangs; one is not there, or is another one's, when its daemon starts. Each time the
//! volumes on the other store do not notice, the node's sessions and its admin API go on, `status` says which store and
//! why, and what was lost is healed on the node's other store.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::{Load, check_all};

const WORKERS: u64 = 2;
const REQUESTS: u64 = 100;
const LOST_AFTER: &str = "3";
const FIRST: &str = "store";
const OTHER: &str = "store-2";

/// The store of a volume's replica on a node, if it is one that stays.
fn store_on(shown: &Value, node: &str) -> Option<String> {
    let mut all = shown["replicas"].as_array()?.iter();
    let here = all.find(|replica| replica["node"] == node && replica["state"] != "removing")?;
    here["store"].as_str().map(str::to_owned)
}

/// The ids of a node's stores, the first one first.
async fn stores_of(dev: &Dev, node: &str) -> Outcome<[String; 2]> {
    let shown = dev.command(&["node", "show", node]).await?;
    let id = |n: usize| shown["stores"][n]["id"].as_str().map(str::to_owned);
    match (id(0), id(1)) {
        (Some(first), Some(other)) => Ok([first, other]),
        _ => Err(format!("{node} has two stores: {shown}")),
    }
}

/// What is said of a node's store, once something with these words is.
async fn until_told(dev: &Dev, node: &str, store: &str, words: &str) -> Outcome<String> {
    let until = Instant::now() + RECOVERY;
    loop {
        let status = dev.insist(&["status"], RECOVERY).await?;
        let problems = status["problems"].as_array().into_iter().flatten();
        let end = format!("/{store}");
        let of_store = |problem: &&Value| {
            let subject = problem["subject"].as_str().unwrap_or_default();
            subject.starts_with(&format!("node {node}, store ")) && subject.ends_with(&end)
        };
        let told = problems.filter(of_store).map(|problem| problem["what"].as_str().unwrap_or_default());
        if let Some(what) = told.into_iter().find(|what| what.contains(words)) {
            return Ok(what.to_owned());
        }
        if Instant::now() > until {
            return Err(format!("nothing says '{words}' of {store} on {node}: {status}"));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn until_quiet(dev: &Dev) -> Outcome<()> {
    let until = Instant::now() + 2 * RECOVERY;
    loop {
        let status = dev.insist(&["status"], RECOVERY).await?;
        if status["problems"].as_array().is_some_and(Vec::is_empty) {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(format!("the cluster is not whole: {status}"));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The volumes and what writes them.
struct Guests<'d> {
    dev: &'d Dev,
    loads: Vec<(&'static str, &'static str, Load)>,
}

impl Guests<'_> {
    async fn progress(&self, when: &str) -> Outcome<()> {
        for (volume, node, load) in &self.loads {
            let went_on = load.progress(REQUESTS, RECOVERY).await;
            went_on.map_err(|why| format!("{volume} on {node}, {when}: {why}"))?;
            let errors = load.figures.errors.load(Ordering::Relaxed);
            if errors > 0 {
                return Err(format!("{errors} requests of {volume} on {node} failed {when}"));
            }
        }
        Ok(())
    }

    fn longest(&self) -> Vec<u128> {
        self.loads.iter().map(|(_, _, load)| load.figures.take_longest().as_millis()).collect()
    }

    /// A node's daemon answers for itself, and says that a part of it is lost. One that has just started may be loading
    /// the other part.
    async fn still_there(&self, node: &str) -> Outcome<()> {
        let until = Instant::now() + RECOVERY;
        loop {
            let shown = self.dev.try_command_at(node, &["node", "show", node]).await;
            match shown {
                Ok(shown) if shown["state"] == "degraded" => return Ok(()),
                Err(refused) if refused.message.contains("no daemon answers") => {
                    return Err(format!("the daemon of {node} is gone: {}", refused.message));
                }
                other if Instant::now() > until => return Err(format!("{node} is not degraded: {other:?}")),
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// The disk of a store fails; what stood there is healed on the node's other store.
    async fn loses(&self, node: &'static str, store: &str, keeps: &str) -> Outcome<Duration> {
        self.dev.ctl(&["break-disk", node, "--store", store]).await?;
        let began = Instant::now();
        until_told(self.dev, node, store, "has stopped").await?;
        self.still_there(node).await?;
        self.progress("after the disk failed").await?;
        for (volume, _, _) in &self.loads {
            let healed = |shown: &Value| {
                shown["health"] == "healthy" && store_on(shown, node).as_deref() == Some(keeps)
            };
            let what = format!("{volume} on the store of {node} that is left");
            self.dev.until(volume, 2 * RECOVERY, &what, healed).await?;
        }
        self.still_there(node).await?;
        self.progress("after it was healed").await?;
        Ok(began.elapsed())
    }
}

async fn attach(dev: &Dev, volume: &'static str, node: &'static str, seed: u64) -> Outcome<Load> {
    dev.command(&["volume", "attach", volume, "--node", node]).await?;
    let led_there = |shown: &Value| shown["leader"] == node;
    dev.until(volume, RECOVERY, "the leader beside the guest", led_there).await?;
    Ok(Load::start(volume, dev.nbd(node), WORKERS, seed))
}

/// A daemon starts, and one of its stores is not what it should be.
async fn starts_without(
    dev: &Dev,
    node: &str,
    store: &str,
    words: &str,
    change: impl FnOnce(&Path) -> Outcome<()>,
) -> Outcome<String> {
    dev.ctl(&["kill", node]).await?;
    change(&dev.node(node))?;
    dev.ctl(&["start", node]).await.map_err(|why| format!("{node} does not start without {store}: {why}"))?;
    until_told(dev, node, store, words).await
}

fn moved(from: &Path, to: &Path) -> Outcome<()> {
    std::fs::rename(from, to).map_err(|error| format!("{}: {error}", from.display()))
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let options = ["--stores", "2", "--journal", "64MiB", "--lost-after", LOST_AFTER];
    let dev = place.cluster(&options).await?;
    let (a, b, c) = ("r1-z1-n1", "r1-z2-n1", "r1-z3-n1");
    for volume in ["v", "w"] {
        dev.command(&["volume", "create", volume, "--size", "32MiB"]).await?;
    }
    let [first, other] = stores_of(&dev, a).await?;
    let (v, w) = (dev.command(&["volume", "show", "v"]).await?, dev.command(&["volume", "show", "w"]).await?);
    let (on_v, on_w) = (store_on(&v, a), store_on(&w, a));
    if on_v == on_w || on_v.is_none() {
        return Err(format!("two volumes spread over the two stores of a node: {on_v:?}, {on_w:?}"));
    }
    // One on each store, attached on one node; the one on the other store is led on the disk that fails.
    let (far, near) = if on_v.as_ref() == Some(&other) { ("v", "w") } else { ("w", "v") };
    let far_load = attach(&dev, far, a, place.seed).await?;
    let near_load = attach(&dev, near, b, place.seed + 100).await?;
    let guests = Guests { dev: &dev, loads: vec![(far, a, far_load), (near, b, near_load)] };
    guests.progress("before anything").await?;
    guests.longest();
    let other_lost = guests.loses(a, OTHER, &first).await?;
    let stalls = guests.longest();
    dev.ctl(&["break-disk", c, "--store", OTHER, "--hang"]).await?;
    until_told(&dev, c, OTHER, "does not answer").await?;
    guests.progress("while a disk hangs").await?;
    dev.ctl(&["heal"]).await?;
    guests.progress("after it answers again").await?;

    // Started anew, each with one of its stores missing, or another one's.
    let aside = dev.node(c).join("aside");
    let missing =
        starts_without(&dev, c, OTHER, "holds no store", |node| moved(&node.join(OTHER), &aside)).await?;
    guests.still_there(c).await?;
    guests.progress("while a store is not mounted").await?;
    let swap = |node: &Path| {
        let _empty = std::fs::remove_dir(node.join(OTHER));
        moved(&node.join(FIRST), &node.join(OTHER))?;
        moved(&aside, &node.join(FIRST))
    };
    starts_without(&dev, c, OTHER, "belongs to", swap).await?;
    let swapped = until_told(&dev, c, FIRST, "belongs to").await?;
    guests.progress("while two stores are swapped").await?;
    dev.ctl(&["kill", c]).await?;
    let (one, two) = (dev.node(c).join(FIRST), dev.node(c).join(OTHER));
    moved(&one, &aside).and_then(|()| moved(&two, &one)).and_then(|()| moved(&aside, &two))?;
    dev.ctl(&["start", c]).await?;
    for volume in ["v", "w"] {
        let healthy = |shown: &Value| shown["health"] == "healthy";
        dev.until(volume, 2 * RECOVERY, &format!("{volume} whole with both stores of {c}"), healthy).await?;
    }
    guests.longest();

    // The first store of a node has the member of the catalog, and the sessions run beside it.
    let [_, other_of_b] = stores_of(&dev, b).await?;
    let first_lost = guests.loses(b, FIRST, &other_of_b).await?;
    let stalls_of_first = guests.longest();
    println!(
        "  an other store was lost: told, and healed on the first, after {} ms (longest requests {stalls:?} ms); a first \
         store: after {} ms ({stalls_of_first:?} ms)",
        other_lost.as_millis(),
        first_lost.as_millis()
    );

    let mut blocks = 0;
    for (volume, node, load) in guests.loads {
        let (history, figures) = load.stop().await?;
        if figures.errors.load(Ordering::Relaxed) > 0 {
            return Err(format!("requests of {volume} failed"));
        }
        let client = NbdClient::connect(&dev.nbd(node), volume).await.map_err(|error| error.to_string())?;
        blocks += check_all(&client, &history).await?;
    }
    for node in [a, b] {
        dev.ctl(&["kill", node]).await?;
        dev.ctl(&["start", node]).await?;
    }
    until_quiet(&dev).await?;
    let indexes = [dev.verified("v", RECOVERY).await?, dev.verified("w", RECOVERY).await?];
    println!(
        "  at a start: {missing}; {swapped}\n  no request failed, {blocks} blocks as they should be, the cluster whole \
         again, replicas equal at {indexes:?}"
    );
    dev.stop().await
}
