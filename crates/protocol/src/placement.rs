//! Where a volume's replicas go: a pure function of what is asked and what there is.
//!
//! INV-PLACE: the loss of one domain of the kind that a volume survives takes less than half of its voters, whatever
//! else was asked. Equal input gives equal output.

use std::collections::BTreeMap;

use holdfast_types::{
    ByteSize, Domain, ErrorCode, Location, StoreId, Survive, TopologyTerm, UserError, VolumeSpec,
};

use crate::catalog::Placed;

/// A store on which a replica could stand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// The store.
    pub store: StoreId,
    /// Where it stands.
    pub location: Location,
    /// Whether something new may go there: it answers and is not cordoned.
    pub usable: bool,
    /// Free bytes.
    pub available_bytes: u64,
    /// Replicas that stand there already.
    pub replicas: usize,
}

/// Whether a place is within a term.
pub fn matches(term: &TopologyTerm, location: &Location) -> bool {
    let fits = |asked: &str, has: &str| asked.is_empty() || asked == has;
    fits(&term.region, &location.region)
        && fits(&term.zone, &location.zone)
        && fits(&term.node, location.node.as_str())
}

fn allowed(spec: &VolumeSpec, location: &Location) -> bool {
    spec.allowed.is_empty() || spec.allowed.iter().any(|term| matches(term, location))
}

/// The number of voters that a volume asks for.
pub fn voters(spec: &VolumeSpec) -> Result<usize, UserError> {
    let wrong =
        |message: String, hint: &str| Err(UserError::new(ErrorCode::InvalidArgument, message).hint(hint));
    match (spec.survive, spec.replicas) {
        (Survive::None, None | Some(1)) => Ok(1),
        (_, Some(1)) => wrong(
            format!("one replica survives nothing, and survive is {}", spec.survive.as_str()),
            "use replicas: 3, or survive: none",
        ),
        (_, None | Some(3)) => Ok(3),
        (_, Some(5)) => Ok(5),
        (_, Some(2)) => Err(UserError::new(
            ErrorCode::Unimplemented,
            "two replicas need a witness in a third domain, and witnesses are not built yet",
        )
        .hint("use replicas: 3")),
        (_, Some(n)) => wrong(format!("{n} replicas cannot be had"), "use replicas: 1, 3 or 5"),
    }
}

/// What the stores that take part have in common with the volume's rule.
struct Rule {
    voters: usize,
    domain: Domain,
    /// Voters that one domain may hold.
    most: usize,
}

fn rule(spec: &VolumeSpec) -> Result<Rule, UserError> {
    let voters = voters(spec)?;
    let domain = spec.survive.domain().unwrap_or(Domain::Node);
    Ok(Rule { voters, domain, most: ((voters - 1) / 2).max(1) })
}

/// Places all replicas of a new volume; the first is where it is to be led.
pub fn place(spec: &VolumeSpec, candidates: &[Candidate]) -> Result<Vec<Placed>, UserError> {
    let rule = rule(spec)?;
    let mut chosen: Vec<&Candidate> = Vec::new();
    while chosen.len() < rule.voters {
        match next(spec, &rule, candidates, &chosen) {
            Some(candidate) => chosen.push(candidate),
            None => return Err(refusal(spec, &rule, candidates, chosen.len())),
        }
    }
    Ok(chosen.into_iter().map(|c| Placed { store: c.store, location: c.location.clone() }).collect())
}

/// Places one more replica beside those that stay.
pub fn place_one(
    spec: &VolumeSpec,
    candidates: &[Candidate],
    staying: &[Placed],
) -> Result<Placed, UserError> {
    let rule = rule(spec)?;
    let stay: Vec<Candidate> = staying
        .iter()
        .map(|placed| Candidate {
            store: placed.store,
            location: placed.location.clone(),
            usable: true,
            available_bytes: 0,
            replicas: 0,
        })
        .collect();
    let chosen: Vec<&Candidate> = stay.iter().collect();
    next(spec, &rule, candidates, &chosen)
        .map(|c| Placed { store: c.store, location: c.location.clone() })
        .ok_or_else(|| refusal(spec, &rule, candidates, staying.len()))
}

fn fits(spec: &VolumeSpec, candidate: &Candidate) -> bool {
    candidate.usable && allowed(spec, &candidate.location) && candidate.available_bytes >= spec.size.0
}

fn next<'c>(
    spec: &VolumeSpec,
    rule: &Rule,
    candidates: &'c [Candidate],
    chosen: &[&Candidate],
) -> Option<&'c Candidate> {
    let in_domain = |kind: Domain, candidate: &Candidate| {
        let domain = candidate.location.domain(kind);
        chosen.iter().filter(|other| other.location.domain(kind) == domain).count()
    };
    candidates
        .iter()
        .filter(|c| fits(spec, c) && in_domain(Domain::Node, c) == 0 && in_domain(rule.domain, c) < rule.most)
        .min_by_key(|c| {
            let preferred = spec.preferred.iter().position(|term| matches(term, &c.location));
            let preferred = preferred.unwrap_or(usize::MAX);
            let away = chosen.first().is_some_and(|first| first.location.region != c.location.region);
            // The first replica stands where it is preferred. The others spread over zones, in the first one's region
            // if they may, and prefer room.
            let spread = (in_domain(Domain::Zone, c), away && spec.survive != Survive::Region);
            let first = if chosen.is_empty() { preferred } else { 0 };
            (first, spread, preferred, c.replicas, std::cmp::Reverse(c.available_bytes), c.store)
        })
}

fn refusal(spec: &VolumeSpec, rule: &Rule, candidates: &[Candidate], found: usize) -> UserError {
    let in_bounds: Vec<&Candidate> = candidates.iter().filter(|c| allowed(spec, &c.location)).collect();
    if spec.survive == Survive::None || enough(rule, &in_bounds) {
        let usable = in_bounds.iter().filter(|c| c.usable).count();
        let size = spec.size;
        let message = format!(
            "{} of {} replicas of {size} can be placed: of {} allowed nodes {usable} take new replicas, and {} \
             of these have that much room",
            found,
            rule.voters,
            in_bounds.len(),
            in_bounds.iter().filter(|c| fits(spec, c)).count(),
        );
        let code = if usable == 0 { ErrorCode::Unavailable } else { ErrorCode::ResourceExhausted };
        return UserError::new(code, message)
            .hint("add nodes or space, ask for less, or uncordon; `holdfast node list` shows them");
    }
    let kind = spec.survive.as_str();
    let domains = rule.voters.div_ceil(rule.most);
    let count = count_domains(rule.domain, &in_bounds);
    let listed: Vec<String> = count.iter().map(|(name, nodes)| format!("{name}: {nodes} nodes")).collect();
    let message = format!(
        "survive: {kind} with {} voters needs {domains} {kind}s; {} has {} ({})",
        rule.voters,
        if spec.allowed.is_empty() { "this cluster" } else { "what is allowed" },
        count.len(),
        listed.join(", ")
    );
    let weaker = match spec.survive {
        Survive::Region => "survive: zone",
        Survive::Zone => "survive: node",
        _ => "survive: none",
    };
    UserError::new(ErrorCode::ResourceExhausted, message)
        .hint(format!("add a {kind}, allow more of them, or use {weaker}"))
}

fn count_domains(domain: Domain, candidates: &[&Candidate]) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    for candidate in candidates {
        *count.entry(candidate.location.domain(domain)).or_default() += 1;
    }
    count
}

/// Whether the places would do if all were usable and empty.
fn enough(rule: &Rule, candidates: &[&Candidate]) -> bool {
    let room = count_domains(rule.domain, candidates);
    room.values().map(|nodes| (*nodes).min(rule.most)).sum::<usize>() >= rule.voters
}

/// The largest volume of this kind that could be placed now and used from one of these places (empty: no matter), zero
/// if none.
pub fn largest(spec: &VolumeSpec, candidates: &[Candidate], from: &[TopologyTerm]) -> u64 {
    let mut sizes: Vec<u64> = candidates.iter().map(|c| c.available_bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let possible = |size: &u64| {
        let asked = VolumeSpec { size: ByteSize(*size), ..spec.clone() };
        place(&asked, candidates).is_ok_and(|placed| {
            let locations: Vec<Location> = placed.into_iter().map(|at| at.location).collect();
            let terms = accessible(spec, &locations);
            terms.is_empty() || from.is_empty() || terms.iter().any(|term| from.iter().any(|f| meet(term, f)))
        })
    };
    sizes.into_iter().rev().find(possible).unwrap_or(0)
}

/// Whether a place can be within both terms.
fn meet(a: &TopologyTerm, b: &TopologyTerm) -> bool {
    let fits = |a: &str, b: &str| a.is_empty() || b.is_empty() || a == b;
    fits(&a.region, &b.region) && fits(&a.zone, &b.zone) && fits(&a.node, &b.node)
}

/// From where a volume may be used: terms for the node affinity of its PersistentVolume; empty for anywhere.
pub fn accessible(spec: &VolumeSpec, replicas: &[Location]) -> Vec<TopologyTerm> {
    let term = |location: &Location| match spec.access_from {
        holdfast_types::AccessFrom::Anywhere => None,
        holdfast_types::AccessFrom::Region => {
            Some(TopologyTerm { region: location.region.clone(), zone: String::new(), node: String::new() })
        }
        holdfast_types::AccessFrom::Zone => Some(TopologyTerm {
            region: location.region.clone(),
            zone: location.zone.clone(),
            node: String::new(),
        }),
        holdfast_types::AccessFrom::Replica => Some(TopologyTerm {
            region: location.region.clone(),
            zone: location.zone.clone(),
            node: location.node.to_string(),
        }),
    };
    let mut terms: Vec<TopologyTerm> = replicas.iter().filter_map(term).collect();
    terms.sort();
    terms.dedup();
    terms
}
