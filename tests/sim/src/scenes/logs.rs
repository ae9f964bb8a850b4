//! Scenes of logs, and of blocks that come home from them.

use std::time::Duration;

use super::{STAGE_WITHIN, Stage};
use crate::executor::MILLISECOND;
use crate::hooks::CrashPoint;
use crate::network::Cut;
use crate::plan::NODES;

/// Where blocks are written at last.
const AT_LAST: u64 = 1024;

impl Stage {
    pub(super) async fn cut_log(mut self) -> Option<()> {
        let world = self.world.clone();
        let old = world.leader()?;
        let guest = self.guests.start(old, true, Duration::from_nanos(STAGE_WITHIN))?;
        self.until(|| guest.done() >= 3 || guest.has_ended()).await?;
        let before = world.node(old).volume()?.group().leading_since()?.0;
        for other in (1..=NODES).filter(|other| *other != old) {
            world.network.cut(other, old, Cut::Swallow);
            world.network.cut(old, other, Cut::Swallow);
        }
        self.until(|| world.leader().is_some_and(|leader| leader != old)).await?;
        // Its guest has ended meanwhile: nothing is written that would come in the place of what is cut.
        let session = guest.session()?;
        self.within(old, async move { session.abort() }).await?;
        world.network.heal_all();
        let follows = || {
            let last = world.node(old).volume().and_then(|volume| volume.group().log().last());
            last.is_some_and(|last| last.term > before)
        };
        self.until(follows).await?;
        world.sleep(self.random.below(30) * MILLISECOND).await;
        self.end(old);
        world.sleep(self.random.range(1, 150) * MILLISECOND).await;
        world.boot(old);
        self.until(|| world.node(old).daemon().is_some()).await
    }

    pub(super) async fn slow_journal(mut self) -> Option<()> {
        let (guest, leader) = self.holder_apart().await?;
        let world = self.world.clone();
        let voters = world.seats.voters();
        let followers =
            voters.iter().map(|(_, node)| *node).filter(|node| *node != leader && *node != guest.node);
        let slow = self.random.pick(&followers.collect::<Vec<_>>());
        let disk = world.node(slow).disk.clone();
        self.rewrite(&guest, AT_LAST, 1).await?;
        self.clean(slow).await;
        let in_between = self.random.percent(50);
        disk.journal_slowness.set(self.random.range(200, 900) * MILLISECOND);
        let mib = self.random.range(3, 7);
        self.rewrite(&guest, 0, mib).await?;
        if in_between {
            // Blocks that only what is not durable there has written since the last checkpoint.
            self.rewrite(&guest, AT_LAST, 1).await?;
            world.hooks.arm(slow, CrashPoint::AfterHomeFlush);
        }
        self.clean(slow).await;
        // What it starts with is all that it has, for a while.
        (1..=NODES)
            .filter(|other| *other != slow)
            .for_each(|other| world.network.cut(other, slow, Cut::Swallow));
        let mode = self.random.pick(&world.plan.cut_modes);
        world.cut_power(slow, mode);
        disk.journal_slowness.set(0);
        world.boot(slow);
        self.until(|| world.node(slow).daemon().is_some()).await?;
        world.sleep(self.random.below(300) * MILLISECOND).await;
        Some(())
    }
}
