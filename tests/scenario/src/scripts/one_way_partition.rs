//! A node is cut off in one direction, for good (row 22): no term inflation, a stable leader.

use crate::{Condition, Nodes, Script, cluster, seconds};

/// How long the cut lasts.
const LONG: std::time::Duration = seconds(15);

/// Cut off from all others in one direction.
struct Way {
    from: &'static str,
    to: &'static str,
}

/// It can send but not hear.
const DEAF: Way = Way { from: "bcd", to: "a" };
/// It can hear but not send.
const MUTE: Way = Way { from: "a", to: "bcd" };

pub(super) fn scripts() -> Vec<Script> {
    vec![
        leader(
            "leader-deaf-for-good",
            "the leader can send but not hear: another leads, once and for all",
            DEAF,
        ),
        leader(
            "leader-mute-for-good",
            "the leader can hear but not send: another leads, once and for all",
            MUTE,
        ),
        // It hears no heartbeat, so it would campaign for ever: the others must not listen.
        follower(
            "follower-deaf-for-good",
            "a follower can send but not hear: the leader stays, in its term",
            DEAF,
        ),
        // It hears everything, and its answers are lost.
        follower(
            "follower-mute-for-good",
            "a follower can hear but not send: the leader stays, in its term",
            MUTE,
        ),
    ]
}

/// A leader must notice by itself that it cannot hear.
fn leader(name: &'static str, what: &'static str, way: Way) -> Script {
    cluster(name, &[22], what)
        .attach("b")
        .lead("a")
        .work(50, seconds(5))
        .cut_one_way(way.from, way.to)
        .leader("bc", seconds(3))
        .work(50, seconds(3))
        .mark()
        .hold(Condition::Leads(Nodes::of("bc")), LONG)
        .expect(Condition::TermsAtMost(1))
        .work(50, seconds(2))
        .script()
}

fn follower(name: &'static str, what: &'static str, way: Way) -> Script {
    cluster(name, &[22], what)
        .attach("b")
        .lead("b")
        .work(50, seconds(5))
        .mark()
        .cut_one_way(way.from, way.to)
        .hold(Condition::Leads(Nodes::of("b")), LONG)
        .expect(Condition::TermsAtMost(0))
        .work(50, seconds(2))
        .heal()
        .caught_up("a", seconds(10))
        .script()
}
