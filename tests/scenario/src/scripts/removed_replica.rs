//! A replica is replaced while its node is away, and the node comes back with its old data (row 27).

use crate::{Condition, Script, cluster, seconds};

/// It is no voter any more: it must not disturb the term, nobody may count on it, and its data is deleted.
pub(super) fn script() -> Script {
    let what =
        "a node returns with a replica that was replaced meanwhile: it disturbs nothing, and its data goes";
    cluster("removed-replica-returns", &[27], what)
        .attach("a")
        .lead("a")
        .work(50, seconds(5))
        .kill("c")
        .replace("c", "d")
        .members("abd", seconds(30))
        .work(100, seconds(5))
        .start("c")
        .mark()
        // It is deleted only some time later, or at once: until then it hears of no leader and may try to be elected.
        .hold(Condition::TermsAtMost(0), seconds(10))
        .work(50, seconds(3))
        // The others need each other, not it.
        .kill("a")
        .leader("bd", seconds(3))
        .start("a")
        .gone("c", seconds(30))
        .caught_up("a", seconds(15))
        .script()
}
