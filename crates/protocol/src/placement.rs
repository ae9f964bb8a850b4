//! Where a volume's replicas go: a pure function of what is asked and what there is.
//!
//! INV-PLACE: the loss of one domain of the kind that a volume survives takes less than half of its voters, whatever
//! else was asked; data stands on no witness node, and a witness on nothing else; no two voters stand on one node, on
//! whichever of its stores. Equal input gives equal output.
//!
//! Two domains with data have a quorum with a witness in a third, wherever data may stand: `allowed` bounds data only.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_types::{
    ByteSize, Domain, ErrorCode, Location, NodeName, StoreId, Survive, TopologyTerm, UserError, VolumeSpec,
    limits,
};

use crate::catalog::Placed;
use crate::planted::is_planted;

/// Volumes that are placed at most to tell how much room there is.
const TOTAL_VOLUMES: usize = 64;
/// Stores that are looked at for that, over all of these volumes.
const TOTAL_WORK: usize = 20_000;

/// A store on which a replica could stand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// The store.
    pub store: StoreId,
    /// Where it stands.
    pub location: Location,
    /// Whether something new may go there: it answers and is not cordoned.
    pub usable: bool,
    /// It takes witnesses, and no data.
    pub witness: bool,
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

/// The number of voters that a volume asks for, a witness among them.
pub fn voters(spec: &VolumeSpec) -> Result<usize, UserError> {
    let wrong =
        |message: String, hint: &str| Err(UserError::new(ErrorCode::InvalidArgument, message).hint(hint));
    match (spec.survive, spec.replicas) {
        (Survive::None, None | Some(1)) => Ok(1),
        (_, Some(1)) => wrong(
            format!("one replica survives nothing, and survive is {}", spec.survive.as_str()),
            "use replicas: 2 or 3, or survive: none",
        ),
        (_, None | Some(2 | 3)) => Ok(3),
        (_, Some(5)) => Ok(5),
        (_, Some(n)) => wrong(format!("{n} replicas cannot be had"), "use replicas: 1, 2, 3 or 5"),
    }
}

/// What the stores that take part have in common with the volume's rule.
#[derive(Clone, Copy)]
struct Rule {
    voters: usize,
    /// Witnesses among the voters.
    witnesses: usize,
    domain: Domain,
    /// Voters that one domain may hold.
    most: usize,
}

fn rule(spec: &VolumeSpec, candidates: &[Candidate]) -> Result<Rule, UserError> {
    let voters = voters(spec)?;
    let domain = spec.survive.domain().unwrap_or(Domain::Node);
    let all_data = Rule { voters, witnesses: 0, domain, most: ((voters - 1) / 2).max(1) };
    let data: Vec<&Candidate> =
        candidates.iter().filter(|c| !c.witness && allowed(spec, &c.location)).collect();
    // What there is decides, not what answers: a volume that is made while a zone is down is no other one.
    let with_witness = match spec.replicas {
        Some(replicas) => replicas == 2,
        None => {
            spec.survive != Survive::None
                && !enough(&all_data, &data)
                && witness_fits(&all_data, candidates, &data)
        }
    };
    Ok(Rule { witnesses: usize::from(with_witness), ..all_data })
}

/// Whether there is a witness node in a third domain beside two with data.
fn witness_fits(rule: &Rule, candidates: &[Candidate], data: &[&Candidate]) -> bool {
    let domains = count_domains(rule.domain, data);
    let elsewhere = |c: &Candidate| {
        let others = domains.keys().filter(|domain| **domain != c.location.domain(rule.domain));
        others.count() >= 2
    };
    candidates.iter().any(|c| c.witness && elsewhere(c))
}

fn placed_at(candidate: &Candidate) -> Placed {
    Placed { store: candidate.store, location: candidate.location.clone(), witness: candidate.witness }
}

/// How many of a volume's voters are witnesses, with these nodes.
pub fn witnesses(spec: &VolumeSpec, candidates: &[Candidate]) -> Result<usize, UserError> {
    rule(spec, candidates).map(|rule| rule.witnesses)
}

/// Places all replicas of a new volume; the first is where it is to be led, and a witness is the last.
pub fn place(spec: &VolumeSpec, candidates: &[Candidate]) -> Result<Vec<Placed>, UserError> {
    let rule = rule(spec, candidates)?;
    if let Some(chosen) = choose(spec, &rule, candidates) {
        return Ok(chosen.into_iter().map(placed_at).collect());
    }
    let found = (0..rule.voters).rev().find(|found| {
        let fewer = Rule { voters: *found, witnesses: rule.witnesses.min(found.saturating_sub(2)), ..rule };
        choose(spec, &fewer, candidates).is_some()
    });
    Err(refusal(spec, &rule, candidates, found.unwrap_or(0)))
}

fn choose<'c>(spec: &VolumeSpec, rule: &Rule, candidates: &'c [Candidate]) -> Option<Vec<&'c Candidate>> {
    // Data that took the only domain where a witness can stand would leave it none: then that is kept free.
    let witnesses: Vec<&Candidate> = candidates.iter().filter(|c| c.witness && c.usable).collect();
    let kept_free = count_domains(rule.domain, &witnesses).into_keys().map(Some);
    let tries =
        std::iter::once(None).chain(kept_free.take(if rule.witnesses > 0 { witnesses.len() } else { 0 }));
    tries.into_iter().find_map(|kept_free| choose_beside(spec, rule, candidates, kept_free.as_deref()))
}

fn choose_beside<'c>(
    spec: &VolumeSpec,
    rule: &Rule,
    candidates: &'c [Candidate],
    kept_free: Option<&str>,
) -> Option<Vec<&'c Candidate>> {
    let mut chosen: Vec<&Candidate> = Vec::new();
    while chosen.len() < rule.voters - rule.witnesses {
        chosen.push(next(spec, rule, candidates, &chosen, kept_free)?);
    }
    while chosen.len() < rule.voters {
        chosen.push(next_witness(rule, candidates, &chosen)?);
    }
    Some(chosen)
}

/// Places one more replica, data or a witness, beside those that stay.
pub fn place_one(
    spec: &VolumeSpec,
    candidates: &[Candidate],
    staying: &[Placed],
    witness: bool,
) -> Result<Placed, UserError> {
    let voters = voters(spec)?;
    let domain = spec.survive.domain().unwrap_or(Domain::Node);
    let witnesses = staying.iter().filter(|placed| placed.witness).count() + usize::from(witness);
    let rule = Rule { voters, witnesses, domain, most: ((voters - 1) / 2).max(1) };
    let stay: Vec<Candidate> = staying
        .iter()
        .map(|placed| Candidate {
            store: placed.store,
            location: placed.location.clone(),
            usable: true,
            witness: placed.witness,
            available_bytes: 0,
            replicas: 0,
        })
        .collect();
    let chosen: Vec<&Candidate> = stay.iter().collect();
    let found = if witness {
        next_witness(&rule, candidates, &chosen)
    } else {
        next(spec, &rule, candidates, &chosen, None)
    };
    found.map(placed_at).ok_or_else(|| refusal(spec, &rule, candidates, staying.len()))
}

fn fits(spec: &VolumeSpec, candidate: &Candidate) -> bool {
    candidate.usable
        && !candidate.witness
        && allowed(spec, &candidate.location)
        && candidate.available_bytes >= spec.size.0
}

/// How many of those that were chosen stand in the candidate's domain.
fn in_domain(chosen: &[&Candidate], kind: Domain, candidate: &Candidate) -> usize {
    let domain = candidate.location.domain(kind);
    chosen.iter().filter(|other| other.location.domain(kind) == domain).count()
}

/// INV-PLACE: whether a node holds none of those that were chosen, on whichever of its stores.
fn is_apart(chosen: &[&Candidate], candidate: &Candidate) -> bool {
    if is_planted("two-on-a-node") {
        return chosen.iter().all(|other| other.store != candidate.store);
    }
    in_domain(chosen, Domain::Node, candidate) == 0
}

/// The witness node for the next witness: in the first replica's region if it may, and with few others.
fn next_witness<'c>(
    rule: &Rule,
    candidates: &'c [Candidate],
    chosen: &[&Candidate],
) -> Option<&'c Candidate> {
    let free = |c: &&Candidate| {
        c.witness && c.usable && is_apart(chosen, c) && in_domain(chosen, rule.domain, c) < rule.most
    };
    candidates.iter().filter(free).min_by_key(|c| {
        let away = chosen.first().is_some_and(|first| first.location.region != c.location.region);
        (in_domain(chosen, Domain::Zone, c), away, c.replicas, c.store)
    })
}

fn next<'c>(
    spec: &VolumeSpec,
    rule: &Rule,
    candidates: &'c [Candidate],
    chosen: &[&Candidate],
    kept_free: Option<&str>,
) -> Option<&'c Candidate> {
    let in_domain = |kind: Domain, candidate: &Candidate| in_domain(chosen, kind, candidate);
    candidates
        .iter()
        .filter(|c| fits(spec, c) && is_apart(chosen, c) && in_domain(rule.domain, c) < rule.most)
        .filter(|c| kept_free.is_none_or(|domain| c.location.domain(rule.domain) != domain))
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
    let in_bounds: Vec<&Candidate> =
        candidates.iter().filter(|c| !c.witness && allowed(spec, &c.location)).collect();
    let data = Rule { voters: rule.voters - rule.witnesses, ..*rule };
    let has_witness = rule.witnesses == 0 || witness_fits(rule, candidates, &in_bounds);
    if spec.survive == Survive::None || (enough(&data, &in_bounds) && has_witness) {
        return no_room(spec, rule, candidates, &in_bounds, found);
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
    let teaches = if rule.voters == 3 && count.len() == 2 {
        format!(
            "start a witness in a third {kind} (`holdfast node --witness`), add a {kind} with nodes, or use {weaker}"
        )
    } else {
        format!("add a {kind}, allow more of them, or use {weaker}")
    };
    UserError::new(ErrorCode::ResourceExhausted, message).hint(teaches)
}

/// There are domains enough, and something else is missing.
fn no_room(
    spec: &VolumeSpec,
    rule: &Rule,
    candidates: &[Candidate],
    in_bounds: &[&Candidate],
    found: usize,
) -> UserError {
    let usable = in_bounds.iter().filter(|c| c.usable).count();
    let witnesses = candidates.iter().filter(|c| c.witness);
    let answering = witnesses.clone().filter(|c| c.usable).count();
    let size = spec.size;
    let mut message = format!(
        "{} of {} replicas of {size} can be placed: of {} allowed stores {usable} take new replicas, and {} \
         of these have that much room",
        found,
        rule.voters,
        in_bounds.len(),
        in_bounds.iter().filter(|c| fits(spec, c)).count(),
    );
    if rule.witnesses > 0 {
        message += &format!("; of {} witness nodes {answering} take a new witness", witnesses.count());
    }
    let is_away = usable == 0 || (rule.witnesses > 0 && answering == 0);
    let code = if is_away { ErrorCode::Unavailable } else { ErrorCode::ResourceExhausted };
    UserError::new(code, message)
        .hint("add nodes or space, ask for less, or uncordon; `holdfast node list` shows them")
}

/// The nodes in each domain: several stores of one are one place.
fn count_domains(domain: Domain, candidates: &[&Candidate]) -> BTreeMap<String, usize> {
    let mut nodes: BTreeMap<String, BTreeSet<&NodeName>> = BTreeMap::new();
    for candidate in candidates {
        nodes.entry(candidate.location.domain(domain)).or_default().insert(&candidate.location.node);
    }
    nodes.into_iter().map(|(domain, nodes)| (domain, nodes.len())).collect()
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
    sizes.into_iter().rev().find(|size| place_from(spec, *size, candidates, from).is_some()).unwrap_or(0)
}

/// Places a volume of a size that can be used from one of these places.
fn place_from(
    spec: &VolumeSpec,
    size: u64,
    candidates: &[Candidate],
    from: &[TopologyTerm],
) -> Option<Vec<Placed>> {
    let asked = VolumeSpec { size: ByteSize(size), ..spec.clone() };
    let placed = place(&asked, candidates).ok()?;
    let data = placed.iter().filter(|at| !at.witness);
    let locations: Vec<Location> = data.map(|at| at.location.clone()).collect();
    let terms = accessible(spec, &locations);
    let meets = |term: &TopologyTerm| from.iter().any(|asked| meet(term, asked));
    (terms.is_empty() || from.is_empty() || terms.iter().any(meets)).then_some(placed)
}

/// How many bytes of volumes of this kind could be placed now, the largest first: a node's stores count together, and
/// each replica stands on one of them. In a large cluster it may be less than could be had.
pub fn total(spec: &VolumeSpec, candidates: &[Candidate], from: &[TopologyTerm]) -> u64 {
    let mut left = candidates.to_vec();
    let mut sum = 0u64;
    for _ in 0..(TOTAL_WORK / candidates.len().max(1)).clamp(1, TOTAL_VOLUMES) {
        let size = largest(spec, &left, from).min(limits::VOLUME_BYTES_MAX);
        let Some(placed) = place_from(spec, size, &left, from).filter(|_| size > 0) else { break };
        for at in placed.iter().filter(|at| !at.witness) {
            for candidate in left.iter_mut().filter(|candidate| candidate.store == at.store) {
                candidate.available_bytes -= size;
                candidate.replicas += 1;
            }
        }
        sum = sum.saturating_add(size);
    }
    sum
}

/// Whether a place can be within both terms.
fn meet(a: &TopologyTerm, b: &TopologyTerm) -> bool {
    let fits = |a: &str, b: &str| a.is_empty() || b.is_empty() || a == b;
    fits(&a.region, &b.region) && fits(&a.zone, &b.zone) && fits(&a.node, &b.node)
}

/// From where a volume may be used, whose data replicas stand there: terms for the node affinity of its
/// PersistentVolume; empty for anywhere.
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
