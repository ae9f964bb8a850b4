//! The faults of a development cluster: who cannot hear whom, how slow who is, and whose disk is broken.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_node::admin::pb;

/// By node name.
#[derive(Default, Clone, Debug)]
pub struct Faults {
    /// (from, to): dropped without a word.
    cut: BTreeSet<(String, String)>,
    /// (from, to): later by so much.
    delay: BTreeMap<(String, String), Duration>,
    /// (node, store): what its disk does.
    disks: BTreeMap<(String, String), &'static str>,
}

impl Faults {
    /// Nothing passes between `inside` and everybody else.
    pub fn partition(&mut self, inside: &BTreeSet<String>, all: &BTreeSet<String>) {
        for a in inside {
            for b in all.difference(inside) {
                self.cut.insert((a.clone(), b.clone()));
                self.cut.insert((b.clone(), a.clone()));
            }
        }
    }
    /// `inside` hears nobody else, but is heard.
    pub fn deafen(&mut self, inside: &BTreeSet<String>, all: &BTreeSet<String>) {
        for a in inside {
            for b in all.difference(inside) {
                self.cut.insert((b.clone(), a.clone()));
            }
        }
    }
    /// What `from` sends does not reach `to`.
    pub fn cut_one_way(&mut self, from: &BTreeSet<String>, to: &BTreeSet<String>) {
        for a in from {
            for b in to.iter().filter(|b| *b != a) {
                self.cut.insert((a.clone(), b.clone()));
            }
        }
    }
    /// What passes between the two sets takes longer.
    pub fn delay(&mut self, a: &BTreeSet<String>, b: &BTreeSet<String>, by: Duration) {
        for x in a {
            for y in b {
                self.delay.insert((x.clone(), y.clone()), by);
                self.delay.insert((y.clone(), x.clone()), by);
            }
        }
    }
    /// The disk of a node's store fails, or hangs.
    pub fn break_disk(&mut self, node: &str, store: &str, hang: bool) {
        self.disks.insert((node.to_owned(), store.to_owned()), if hang { "hangs" } else { "fails" });
    }
    /// The disks of a node are whole.
    pub fn mend_disks(&mut self, node: &str) {
        self.disks.retain(|(of, _), _| of != node);
    }
    /// No faults any more.
    pub fn heal(&mut self) {
        *self = Self::default();
    }
    /// What a node must know of it. Dropped where it is received: the sender sees silence either way.
    pub fn of(&self, node: &str) -> pb::SetFaultsRequest {
        pb::SetFaultsRequest {
            clear: true,
            block_send: Vec::new(),
            block_receive: self
                .cut
                .iter()
                .filter(|(_, to)| to == node)
                .map(|(from, _)| from.clone())
                .collect(),
            delay_us: self
                .delay
                .iter()
                .filter(|((from, _), _)| from == node)
                .map(|((_, to), by)| (to.clone(), u64::try_from(by.as_micros()).unwrap_or(u64::MAX)))
                .collect(),
            disks: self
                .disks
                .iter()
                .filter(|((of, _), _)| of == node)
                .map(|((_, store), fault)| (store.clone(), (*fault).to_owned()))
                .collect(),
        }
    }
    /// How many ways to and from a node are cut.
    pub fn cuts_of(&self, node: &str) -> usize {
        self.cut.iter().filter(|(from, to)| from == node || to == node).count()
    }
}

/// Reads a duration such as `30ms` or `2s`.
pub fn duration(text: &str) -> Option<Duration> {
    if let Some(number) = text.strip_suffix("ms") {
        return number.parse().ok().map(Duration::from_millis);
    }
    if let Some(number) = text.strip_suffix("us") {
        return number.parse().ok().map(Duration::from_micros);
    }
    text.strip_suffix('s').and_then(|number| number.parse().ok()).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_of_one_way_leaves_the_other_open() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let mut faults = Faults::default();
        faults.cut_one_way(&names(&["a", "b"]), &names(&["b", "c"]));
        assert_eq!(faults.of("b").block_receive, ["a"]);
        assert_eq!(faults.of("c").block_receive, ["a", "b"]);
        assert_eq!(faults.of("a").block_receive, Vec::<String>::new());
    }

    #[test]
    fn the_node_that_is_cut_off_has_the_most_cuts() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        for both_ways in [true, false] {
            let mut faults = Faults::default();
            if both_ways {
                faults.partition(&names(&["b"]), &names(&["a", "b", "c"]));
            } else {
                faults.deafen(&names(&["b"]), &names(&["a", "b", "c"]));
            }
            assert!(faults.cuts_of("b") > faults.cuts_of("a"));
            assert_eq!(faults.cuts_of("a"), faults.cuts_of("c"));
        }
    }
}
