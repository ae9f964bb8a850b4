//! Clocks beyond what is promised of them (row 20): leases rest on rates within one percent, writes on none at all.
//!
//! A wall clock may jump as it likes: the data path has none (a tidy test sees to it).

use crate::{Script, cluster, milliseconds, seconds};

/// Five percent, in millionths.
const FIVE_PERCENT: i64 = 50_000;
const WHY: &str = "a process has no clock of its own";

pub(super) fn scripts() -> Vec<Script> {
    vec![
        rates(
            "clock-drift-holder-slow",
            "the holder's clock is five percent slow, the others' fast",
            -FIVE_PERCENT,
        ),
        rates(
            "clock-drift-holder-fast",
            "the holder's clock is five percent fast, the others' slow",
            FIVE_PERCENT,
        ),
        jumps(),
    ]
}

/// Every clock is beyond the bound. Only what the old holder reads may be stale; no write is lost and none lands late.
fn rates(name: &'static str, what: &'static str, ppm: i64) -> Script {
    let mut script = cluster(name, &[20], what).only_simulated(WHY).stale_reads_allowed("a");
    for (node, ppm) in [("a", ppm), ("b", -ppm), ("c", -ppm), ("d", ppm)] {
        script = script.clock_rate(node, ppm).kill(node).start(node);
    }
    script
        .attach("a")
        .lead("a")
        .work(50, seconds(5))
        .partition("a|bcd")
        .leader("bc", seconds(3))
        .attach_by_force("b")
        .work(100, seconds(5))
        .heal()
        .fenced("a", seconds(5))
        .let_pass(seconds(2))
        .kill("b")
        .attach_by_force("c")
        .work(50, seconds(5))
        .start("b")
        .caught_up("b", seconds(10))
        .script()
}

/// A machine sleeps for an hour, says its clock, and goes on: leases have ended, nothing else has.
fn jumps() -> Script {
    let what = "monotonic clocks jump by an hour on the holder's node, on the leader's, on all";
    cluster("clock-jumps", &[20], what)
        .only_simulated(WHY)
        .attach("a")
        .lead("b")
        .work(50, seconds(5))
        .clock_jump("a", seconds(3600))
        .work(50, seconds(5))
        .clock_jump("b", seconds(3600))
        .work(50, seconds(5))
        .clock_jump("a", seconds(3600))
        .clock_jump("b", seconds(3600))
        .clock_jump("c", seconds(3600))
        .let_pass(milliseconds(500))
        .work(50, seconds(5))
        .attach_by_force("c")
        .work(50, seconds(5))
        .script()
}
