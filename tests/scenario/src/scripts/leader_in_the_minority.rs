//! The leader is alone on its side of a partition, and the guest with it (rows 21, 30).

use crate::{Script, cluster, milliseconds, seconds};

/// The minority stops within its lease, the majority goes on under a new holder, nothing of the old one lands, and what
/// was acknowledged before is there when the partition ends.
pub(super) fn script() -> Script {
    let what = "the leader and the guest are cut off; the others go on, and nothing of the old holder lands";
    cluster("leader-in-the-minority", &[21, 30], what)
        .attach("a")
        .lead("a")
        .work(50, seconds(5))
        .partition("a|bcd")
        .leader("bc", seconds(2))
        // The longest lease is 2 s: after it not even a read is answered.
        .let_pass(milliseconds(2500))
        .unanswered("a", seconds(2))
        .attach_by_force("b")
        .work(50, seconds(5))
        .expect(crate::Condition::Unanswered(crate::NodeName('a')))
        .heal()
        .fenced("a", seconds(5))
        .work(50, seconds(2))
        .caught_up("a", seconds(5))
        .script()
}
