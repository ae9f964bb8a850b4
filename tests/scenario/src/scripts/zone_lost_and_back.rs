//! A zone is away for long, and comes back (row 25): writes go on all the time, and no more is sent than what changed.

use crate::{Condition, NodeName, Script, cluster, seconds};

pub(super) fn script() -> Script {
    let what =
        "a zone is away until the log is purged past it: it is healed by what changed, without a storm";
    cluster("zone-lost-and-back", &[25], what)
        .attach("a")
        .lead("a")
        .workers(2)
        .fill(12, 12)
        .caught_up("c", seconds(10))
        .cut_power("c")
        .work(50, seconds(3))
        // Many times over a part of the volume: far more than the journals hold.
        .fill(240, 4)
        .start("c")
        .work(50, seconds(3))
        .caught_up("c", seconds(30))
        // 4 MiB and the guest's own 2, whole chunks of what goes on meanwhile on top; not the 12 of a full copy.
        .until(Condition::HealedByChunks { node: NodeName('c'), at_most: 8 }, seconds(5))
        .script()
}
