//! Two nodes do not hear each other, and both hear the third (row 23): progress through it, or bounded flapping.

use crate::{Condition, Script, cluster, seconds};

pub(super) fn scripts() -> Vec<Script> {
    let what = "leader and follower are cut from each other, both hear the third: progress, and few terms";
    let beside_the_leader = cluster("partial-partition", &[23], what)
        .attach("a")
        .lead("a")
        .work(50, seconds(5))
        .mark()
        .partition("a|b")
        .let_pass(seconds(20))
        .expect(Condition::TermsAtMost(4))
        .work(50, seconds(3))
        .heal()
        .caught_up("b", seconds(10))
        .script();
    let what = "the guest's node and the leader are cut from each other: the guest waits, and the volume can be taken";
    let cut_from_the_leader = cluster("partial-partition-guest", &[23], what)
        .attach("b")
        .lead("a")
        .work(50, seconds(5))
        .mark()
        .partition("a|b")
        .let_pass(seconds(10))
        .expect(Condition::TermsAtMost(4))
        // Nobody relays for a session that does not reach the leader: it waits, without an error. Whoever reaches a
        // quorum gets the volume.
        .attach_by_force("c")
        .work(50, seconds(3))
        .expect(Condition::TermsAtMost(4))
        .heal()
        .fenced("b", seconds(5))
        .caught_up("b", seconds(10))
        .script();
    vec![beside_the_leader, cut_from_the_leader]
}
