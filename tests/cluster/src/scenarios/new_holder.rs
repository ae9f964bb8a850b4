//! The attached node is cut off or stopped, and the volume is attached elsewhere: no write of the old epoch is accepted
//! any more, the old device fails and does not hang, and nothing stale is read once the new holder's first write is
//! acknowledged, though the old holder reads from the replica beside it all the time.

use std::time::{Duration, Instant};

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::holder::{NewHolder, OldGuest};

/// What happens to the old holder's node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing passes between it and the others.
    Partition,
    /// SIGSTOP.
    Pause,
}

/// How the volume is taken from it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Road {
    /// A forced attach.
    Force,
    /// A forced detach, then an attach.
    DetachThenAttach,
    /// A forced attach, and the leader is killed while the first request of the new holder waits for the old one's
    /// lease to end.
    LeaderKilled,
}

/// Requests of each connection before the fault.
const REQUESTS: usize = 50;
/// How long the new holder works alone, and after the old one is back.
const ALONE: Duration = Duration::from_millis(1500);
/// Times that the wait may be missed, on a machine that is busy with other things.
const MISSES_MAX: usize = 3;
const DOWN: Duration = Duration::from_millis(500);

struct Round<'d> {
    dev: &'d Dev,
    volume: String,
    old: String,
    fault: Fault,
    road: Road,
}

/// Runs it: with the leader beside the old holder, and with the leader elsewhere.
pub async fn run(place: &Place<'_>, fault: Fault, road: Road) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let nodes = dev.nodes()?;
    let (mut number, mut done, mut missed) = (0, 0, 0);
    while done < 2 * place.rounds as usize {
        let old = nodes[(place.seed as usize + number) % nodes.len()].clone();
        let volume = format!("v{number}");
        number += 1;
        let round = Round { dev: &dev, volume, old, fault, road };
        match round.run(done % 2 == 1).await {
            Ok(()) => done += 1,
            Err(why) if why == MISSED && missed < MISSES_MAX => missed += 1,
            Err(why) => return Err(format!("volume {}, old holder {}: {why}", round.volume, round.old)),
        }
        dev.ctl(&["heal"]).await?;
        dev.ctl(&["resume", "r1"]).await?;
    }
    dev.stop().await
}

/// The leader was killed too late.
const MISSED: &str = "the new holder did not wait any more when the leader was killed";

impl Round<'_> {
    async fn run(&self, led_elsewhere: bool) -> Outcome<()> {
        let Self { dev, volume, old, .. } = self;
        dev.command(&["volume", "create", volume, "--size", "64MiB"]).await?;
        let attached = dev.command(&["volume", "attach", "--frontend", "nbd", volume, "--node", old]).await?;
        let guest = OldGuest::start(dev.nbd(old), volume);
        guest.progress(REQUESTS, RECOVERY).await?;
        if led_elsewhere {
            lead_elsewhere(dev, volume, old).await?;
            guest.progress(REQUESTS, RECOVERY).await?;
        }
        self.break_it().await?;
        let broken = Instant::now();
        let leader = self.other_leader().await?;
        let led = broken.elapsed();
        let to = dev.nodes()?.into_iter().find(|node| node != old && *node != leader);
        let to = to.ok_or("there is no third node")?;
        let taken = self.take(&to).await?;
        let now = Instant::now();
        let mut new = self.begin(&to, &leader, now).await?;
        let waited = now - broken;
        let alone = new.work(ALONE).await?;
        let healed = Instant::now();
        new.work_during(self.heal()).await?;
        let failed = new.work_during(guest.failed(healed, RECOVERY)).await?;
        let failed_by = healed + failed;
        let beside = new.work(ALONE).await?;
        let (reads, writes) = guest.finish(&new, failed_by).await?;
        self.check_state(&to, attached["epoch"].as_u64(), taken).await?;
        let index = dev.verified(volume, RECOVERY).await?;
        let place = if led_elsewhere { "elsewhere" } else { "beside the old holder" };
        println!(
            "  led {place}: another leader seen {} ms and attached {} ms after the fault; {alone} + {beside} writes of the new holder; {reads} reads \
             and {writes} writes tried by the old one, none stale or late; its device failed {} ms after the fault \
             ended; replicas equal at {index}",
            led.as_millis(),
            waited.as_millis(),
            failed.as_millis()
        );
        Ok(())
    }

    async fn break_it(&self) -> Outcome<()> {
        match self.fault {
            Fault::Partition => self.dev.ctl(&["partition", &self.old]).await,
            Fault::Pause => self.dev.ctl(&["pause", &self.old]).await,
        }
    }

    async fn heal(&self) -> Outcome<()> {
        match self.fault {
            Fault::Partition => self.dev.ctl(&["heal"]).await,
            Fault::Pause => self.dev.ctl(&["resume", &self.old]).await,
        }
    }

    /// Another node than the old holder's leads, sooner or later.
    async fn other_leader(&self) -> Outcome<String> {
        let led = |shown: &serde_json::Value| {
            shown["leader"].as_str().is_some_and(|leader| !leader.is_empty() && leader != self.old)
        };
        let shown = self.dev.until(&self.volume, RECOVERY, "a new leader", led).await?;
        Ok(shown["leader"].as_str().unwrap_or_default().to_owned())
    }

    /// Attaches the volume to `to`; the epoch.
    async fn take(&self, to: &str) -> Outcome<Option<u64>> {
        let Self { dev, volume, .. } = self;
        let attach = ["volume", "attach", "--frontend", "nbd", volume, "--node", to];
        let forced = [&attach[..], &["--force"]].concat();
        let taken = match self.road {
            Road::Force => dev.insist(&forced, RECOVERY).await?,
            Road::DetachThenAttach => {
                dev.insist(&["volume", "detach", volume, "--force"], RECOVERY).await?;
                dev.insist(&attach, RECOVERY).await?
            }
            // The supervisor may pass a command to the leader's node, which is about to die.
            Road::LeaderKilled => dev.insist_at(to, &forced, RECOVERY).await?,
        };
        Ok(taken["epoch"].as_u64())
    }

    /// The new holder's first requests, which wait until the old holder's lease has ended, whoever leads.
    async fn begin(&self, to: &str, leader: &str, attached: Instant) -> Outcome<NewHolder> {
        let beginning = NewHolder::begin(self.dev.nbd(to), &self.volume, attached);
        if self.road != Road::LeaderKilled {
            return beginning.await;
        }
        let killing = async {
            self.dev.ctl(&["kill", leader]).await?;
            let killed = Instant::now();
            tokio::time::sleep(DOWN).await;
            self.dev.ctl(&["start", leader]).await?;
            Ok::<Instant, String>(killed)
        };
        let beginning = async { beginning.await.map(|new| (new, Instant::now())) };
        let ((new, began), killed) = tokio::try_join!(beginning, killing)?;
        if began < killed { Err(MISSED.into()) } else { Ok(new) }
    }

    async fn check_state(&self, to: &str, before: Option<u64>, taken: Option<u64>) -> Outcome<()> {
        let shown = self.dev.insist(&["volume", "show", &self.volume], RECOVERY).await?;
        if shown["attached_to"] != to || shown["epoch"].as_u64() != taken || taken <= before {
            return Err(format!(
                "attached at epoch {before:?}, then {taken:?} to {to}, but shown is {shown}"
            ));
        }
        Ok(())
    }
}

/// Moves the leader away from `node` by a short partition, which the guest there must survive.
pub async fn lead_elsewhere(dev: &Dev, volume: &str, node: &str) -> Outcome<()> {
    dev.ctl(&["partition", node]).await?;
    let led = |shown: &serde_json::Value| {
        shown["leader"].as_str().is_some_and(|leader| !leader.is_empty() && leader != node)
    };
    dev.until(volume, RECOVERY, "a leader elsewhere", led).await?;
    dev.ctl(&["heal"]).await
}
