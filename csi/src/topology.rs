//! Topology segments and the cluster's terms.

use std::collections::HashMap;

use tonic::Status;

use crate::admin::pb;
use crate::errors::invalid;
use crate::proto::Topology;

/// The region's key.
pub(crate) const REGION: &str = "topology.kubernetes.io/region";
/// The zone's key.
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";
/// The node's key. Only in what a volume is accessible from (accessFrom: replica) and as input: it is no key that the
/// driver registers, since a class would then have as many segments as there are nodes.
pub(crate) const HOST: &str = "kubernetes.io/hostname";
const LEGACY_REGION: &str = "failure-domain.beta.kubernetes.io/region";
const LEGACY_ZONE: &str = "failure-domain.beta.kubernetes.io/zone";

/// The segments of a node.
pub(crate) fn of_node(info: &pb::NodeInfo) -> Topology {
    Topology {
        segments: HashMap::from([(REGION.into(), info.region.clone()), (ZONE.into(), info.zone.clone())]),
    }
}

/// The segments of a term.
pub(crate) fn of_term(term: &pb::TopologyTerm) -> Topology {
    let parts = [(REGION, &term.region), (ZONE, &term.zone), (HOST, &term.node)];
    let given = parts.into_iter().filter(|(_, value)| !value.is_empty());
    Topology { segments: given.map(|(key, value)| (key.to_owned(), value.clone())).collect() }
}

/// The term of segments: a filter, which may name what no node has, and may leave keys out.
pub(crate) fn term(topology: &Topology) -> Result<pb::TopologyTerm, Status> {
    let mut term = pb::TopologyTerm::default();
    for (key, value) in &topology.segments {
        let part = match key.as_str() {
            REGION | LEGACY_REGION => &mut term.region,
            ZONE | LEGACY_ZONE => &mut term.zone,
            HOST => &mut term.node,
            other => {
                return Err(invalid(format!("the topology key {other} is unknown: use {REGION} and {ZONE}")));
            }
        };
        if !part.is_empty() && part != value {
            return Err(invalid(format!("the topology names both {part} and {value} for {key}")));
        }
        part.clone_from(value);
    }
    Ok(term)
}

/// The terms of several topologies.
pub(crate) fn terms(topologies: &[Topology]) -> Result<Vec<pb::TopologyTerm>, Status> {
    topologies.iter().map(term).collect()
}

/// Whether a place can be within both terms.
fn meet(a: &pb::TopologyTerm, b: &pb::TopologyTerm) -> bool {
    let fits = |a: &str, b: &str| a.is_empty() || b.is_empty() || a == b;
    fits(&a.region, &b.region) && fits(&a.zone, &b.zone) && fits(&a.node, &b.node)
}

/// Whether what is accessible from `accessible` (empty: anywhere) can be used in one of `requisite` (empty: no matter).
pub(crate) fn reachable(accessible: &[pb::TopologyTerm], requisite: &[pb::TopologyTerm]) -> bool {
    let meets = |place: &pb::TopologyTerm| requisite.iter().any(|asked| meet(place, asked));
    accessible.is_empty() || requisite.is_empty() || accessible.iter().any(meets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(segments: &[(&str, &str)]) -> Topology {
        Topology { segments: segments.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect() }
    }
    fn place(region: &str, zone: &str) -> pb::TopologyTerm {
        pb::TopologyTerm { region: region.into(), zone: zone.into(), node: String::new() }
    }

    #[test]
    fn terms_may_leave_keys_out_and_use_the_old_ones() {
        assert_eq!(term(&topology(&[(ZONE, "z1")])).expect("is understood"), place("", "z1"));
        let old = topology(&[(LEGACY_REGION, "r"), (LEGACY_ZONE, "z")]);
        assert_eq!(term(&old).expect("is understood"), place("r", "z"));
        assert!(term(&topology(&[("example.com/rack", "7")])).is_err());
        assert!(term(&topology(&[(LEGACY_ZONE, "a"), (ZONE, "b")])).is_err());
        assert_eq!(of_term(&place("r", "z")), topology(&[(REGION, "r"), (ZONE, "z")]));
    }

    #[test]
    fn accessible_from_anywhere_is_reachable_and_another_zone_is_not() {
        assert!(reachable(&[], &[place("r", "z1")]));
        assert!(reachable(&[place("r", "z1")], &[]));
        assert!(reachable(&[place("r", "z1"), place("r", "z2")], &[place("", "z2")]));
        assert!(reachable(&[place("r", "")], &[place("r", "z9")]));
        assert!(!reachable(&[place("r", "z1")], &[place("r", "z2"), place("q", "z1")]));
    }
}
