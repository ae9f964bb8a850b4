//! Scenes of who holds the volume.

use std::time::Duration;

use holdfast_env::net::Lane;

use super::{STAGE_WITHIN, Stage};
use crate::executor::MILLISECOND;
use crate::network::Cut;
use crate::plan::NODES;

impl Stage {
    pub(super) async fn after_detach(mut self) -> Option<()> {
        let (guest, leader) = self.holder_apart().await?;
        let (world, session) = (self.world.clone(), guest.session()?);
        let way = (guest.node, leader);
        world.network.hold(way, Lane::Bulk, true);
        world.sleep(self.random.range(50, 400) * MILLISECOND).await;
        let patience = Duration::from_millis(self.random.range(100, 800));
        drop(world.run_on(guest.node, async move {
            if let Err(error) = session.detach(patience).await {
                tracing::info!(%error, "the detach did not end well");
            }
        }));
        let nobody = || {
            let volume = world.leader().and_then(|leader| world.node(leader).volume());
            volume.is_some_and(|volume| volume.state().holder().is_none())
        };
        self.until(nobody).await?;
        world.sleep(self.random.below(300) * MILLISECOND).await;
        world.network.hold(way, Lane::Bulk, false);
        world.sleep(self.random.range(200, 1000) * MILLISECOND).await;
        Some(())
    }

    pub(super) async fn late_grant(mut self) -> Option<()> {
        let (guest, leader) = self.holder_apart().await?;
        let (world, holder) = (self.world.clone(), guest.node);
        let lease = u64::try_from(world.plan.timers.session_lease.as_nanos()).unwrap_or(u64::MAX);
        for other in (1..=NODES).filter(|other| *other != holder && *other != leader) {
            world.network.cut(other, holder, Cut::Swallow);
        }
        let way = (leader, holder);
        world.network.hold(way, Lane::Control, true);
        // Of what waits there, the answer to a renewal is the only answer.
        self.until(|| world.network.answers_on_their_way(way, Lane::Control) > 0).await?;
        world.network.vanish(way);
        let taker = self.other_than(&[holder]);
        let taker = self.guests.start(taker, true, Duration::from_nanos(STAGE_WITHIN))?;
        // Nearly as late as the session waits for it.
        world.sleep(lease / 100 * self.random.range(25, 48)).await;
        world.network.hold(way, Lane::Control, false);
        self.until(|| taker.done() >= 1 || taker.has_ended()).await
    }
}
