//! A replica is replaced while leaders die, and during a partition (row 26): at no time two quorums that share nobody,
//! one configuration at the end, and nothing lost.

use crate::{Builder, Script, cluster, milliseconds, seconds};

pub(super) fn scripts() -> Vec<Script> {
    vec![under_crashes(), under_a_partition()]
}

fn begin(name: &'static str, what: &'static str) -> Builder {
    cluster(name, &[26], what).attach("a").lead("b").work(50, seconds(5)).fill(4, 4)
}

/// Whoever leads, the change goes on; each death comes at another moment of it.
fn under_crashes() -> Script {
    let what = "a replica is replaced while one node after the other is killed, the leader first";
    let mut script = begin("membership-change-crashes", what).replace("c", "d");
    for (number, victim) in ["b", "a", "b", "d", "a", "b"].into_iter().enumerate() {
        script = script.let_pass(milliseconds(150 + 130 * number as u64)).kill(victim);
        script = script.let_pass(milliseconds(300)).start(victim).let_pass(milliseconds(1500));
    }
    script
        .members("abd", seconds(40))
        .caught_up("d", seconds(10))
        .gone("c", seconds(30))
        // The new one counts: with it and another, the volume goes on.
        .attach_by_force("b")
        .kill("a")
        .work(50, seconds(5))
        .script()
}

/// The leader that has begun the change is cut off with the replica that is to go; the others decide.
fn under_a_partition() -> Script {
    let what =
        "the leader and the replica that goes are cut off while it is replaced; no two quorums, one outcome";
    begin("membership-change-partition", what)
        .replace("c", "d")
        .let_pass(milliseconds(250))
        .partition("bc|ad")
        .let_pass(seconds(5))
        .partition("b|c")
        .let_pass(seconds(5))
        .heal()
        .members("abd", seconds(40))
        .work(50, seconds(5))
        .gone("c", seconds(30))
        .script()
}
