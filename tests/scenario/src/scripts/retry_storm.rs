//! Everything is cut off from everything under load, and comes back (row 34): what waited and is tried again must not
//! keep itself alive.

use crate::{Condition, Script, cluster, seconds};

pub(super) fn script() -> Script {
    let what =
        "all links are cut under load and come back at once: goodput returns, and little is sent in vain";
    cluster("reconnect-storm", &[34], what)
        .workers(48)
        .attach("a")
        .lead("b")
        .work(2000, seconds(10))
        .mark()
        .partition("a|b|c|d")
        .let_pass(seconds(20))
        // Every request that waits is sent again now and then; none may multiply.
        .expect(Condition::SentAtMost(16))
        .heal()
        // What it did before in less than two seconds.
        .work(2000, seconds(10))
        .caught_up("c", seconds(10))
        .script()
}
