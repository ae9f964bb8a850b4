//! Scenes of rebuilds by chunks.

use holdfast_types::ReplicaId;

use super::Stage;
use crate::churn;
use crate::executor::{MILLISECOND, SECOND};
use crate::hooks::CrashPoint;
use crate::network::Cut;
use crate::plan::NODES;

impl Stage {
    pub(super) async fn switch(mut self) -> Option<()> {
        let world = self.world.clone();
        self.holder_apart().await?;
        self.purge().await?;
        let voters: Vec<ReplicaId> = world.seats.voters().into_iter().map(|(id, _)| id).collect();
        let target = churn::replace(&world, self.random.pick(&voters))?;
        world.hooks.arm(target, CrashPoint::AfterSwitch);
        world.wait_until(60 * SECOND, || world.seats.are_settled()).await.then_some(())
    }

    pub(super) async fn source_goes(mut self) -> Option<()> {
        let (guest, source) = self.holder_apart().await?;
        let world = self.world.clone();
        let followers = world.seats.voters().into_iter().map(|(_, node)| node).filter(|node| *node != source);
        let others: Vec<u64> = followers.filter(|node| *node != guest.node).collect();
        let behind = self.random.pick(&others);
        self.end(behind);
        self.rewrite(&guest, 0, 1).await?;
        let lacks = world.node(source).volume()?.group().log().last()?.index;
        self.purge().await?;
        let purged = || {
            let purged = world.node(source).volume().and_then(|volume| volume.group().log().purged());
            purged.is_some_and(|purged| purged.index >= lacks)
        };
        self.until(purged).await?;
        // It hears its source alone: nobody else offers it anything.
        for other in (1..=NODES).filter(|other| *other != behind && *other != source) {
            world.network.cut(other, behind, Cut::Swallow);
        }
        let way = (behind, source);
        world.network.hold_pulls(way, true);
        world.boot(behind);
        self.until(|| world.network.pull_waits(way)).await?;
        churn::replace(&world, self.seat(source)?)?;
        self.until(|| world.seats.are_settled() && world.node(source).volume().is_none()).await?;
        let stays = world.seats.voters().into_iter().find(|(_, node)| *node != behind)?.0;
        churn::replace(&world, stays)?;
        self.until(|| world.node(source).volume().is_some()).await?;
        world.network.hold_pulls(way, false);
        world.sleep(self.random.range(300, 1000) * MILLISECOND).await;
        Some(())
    }
}
