//! A rebuild is interrupted again and again (row 29): its target dies, its source dies, both, while the blocks that are
//! copied are written. It ends all the same, and nothing half copied is ever served.

use crate::{Builder, Condition, NodeName, Script, cluster, milliseconds, seconds};

/// Interruptions of each kind.
const TIMES: u64 = 4;

/// `c` was away until the log was purged past it.
fn behind(name: &'static str, what: &'static str) -> Builder {
    cluster(name, &[29], what)
        .attach("a")
        .lead("b")
        .workers(2)
        .fill(12, 12)
        .caught_up("c", seconds(10))
        .cut_power("c")
        .fill(240, 12)
}

pub(super) fn scripts() -> Vec<Script> {
    vec![target_dies(), source_dies(), both_die()]
}

fn target_dies() -> Script {
    let what = "who is rebuilt loses its power again and again, while what is copied is written";
    let mut script = behind("rebuild-target-dies", what);
    for time in 0..TIMES {
        script = script.start("c").let_pass(milliseconds(60 + 190 * time)).fill(2, 12).cut_power("c");
    }
    let ended = Condition::HealedByChunks { node: NodeName('c'), at_most: 40 };
    script = script.start("c").fill(4, 12).caught_up("c", seconds(40)).until(ended, seconds(5));
    script.work(50, seconds(5)).script()
}

fn source_dies() -> Script {
    let what = "the leader, who is the source of a rebuild, loses its power again and again";
    let mut script = behind("rebuild-source-dies", what).start("c");
    for time in 0..TIMES {
        script = script.let_pass(milliseconds(60 + 190 * time)).cut_power("b").let_pass(milliseconds(200));
        script = script.start("b").lead("b");
    }
    script.caught_up("c", seconds(40)).work(50, seconds(5)).script()
}

fn both_die() -> Script {
    let what = "source and target of a rebuild lose their power at once, again and again";
    let mut script = behind("rebuild-both-die", what);
    for time in 0..TIMES {
        script = script.start("c").let_pass(milliseconds(60 + 190 * time)).cut_power("b").cut_power("c");
        script = script.start("b").lead("b");
    }
    script.start("c").caught_up("c", seconds(40)).work(50, seconds(5)).script()
}
