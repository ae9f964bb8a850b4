//! What is wrong with stores and their disks, and what is being done about it.

use std::time::{Duration, SystemTime};

use holdfast_catalog::volumes::StoreReports;
use holdfast_protocol::catalog::CatalogState;
use holdfast_replica::administration::StoreReport;
use holdfast_replica::{SLOW_FACTOR, SLOW_FLOOR};
use holdfast_types::{ByteSize, StoreId};
use time::format_description::well_known::Rfc3339;

use crate::admin::pb;

/// The moment so long ago, as RFC 3339; empty if it cannot be said.
pub(crate) fn ago(long: Duration) -> String {
    let Some(at) = SystemTime::now().checked_sub(long) else { return String::new() };
    // Without fractions: the figure it comes from is no finer.
    let at = time::OffsetDateTime::from(at).replace_nanosecond(0).ok();
    at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default()
}

/// What problems call a store: its node if that has no other, else where it stands there as well.
pub(crate) fn subject(state: &CatalogState, store: StoreId) -> String {
    let Some(node) = state.node_of(store) else { return format!("store {store}") };
    let name = &node.location.node;
    match node.stores().find(|known| known.store == store) {
        Some(known) if !known.directory.is_empty() => format!("node {name}, store {}", known.directory),
        Some(_) if !node.others.is_empty() => format!("node {name}, store {store}"),
        _ => format!("node {name}"),
    }
}

/// Nodes that do not answer, and stores that have stopped.
pub(crate) fn of_stores(state: &CatalogState, nodes: &[pb::Node]) -> Vec<pb::Problem> {
    let mut problems = Vec::new();
    let mut problem = |subject: String, what: String, doing: &str| {
        problems.push(pb::Problem { subject, what, since: String::new(), doing: doing.into() });
    };
    for (record, node) in state.nodes.values().zip(nodes) {
        if node.state == "unreachable" {
            let doing = "its replicas are placed elsewhere when it stays away";
            problem(format!("node {}", node.name), "does not answer".into(), doing);
            continue;
        }
        let is_alone = record.others.is_empty();
        for (known, store) in record.stores().zip(&node.stores) {
            let subject = subject(state, known.store);
            match store.state.as_str() {
                "unreachable" => problem(
                    subject,
                    "does not answer, and its node does".into(),
                    "its replicas are placed elsewhere when it stays away; the node's log says what became of it",
                ),
                "failed" if is_alone => problem(
                    subject,
                    format!("its store has stopped: {}", store.failed),
                    "its replicas are placed elsewhere; start the daemon anew to have the disk verified, or replace it",
                ),
                "failed" => problem(
                    subject,
                    format!("has stopped: {}", store.failed),
                    "the node's other stores serve on, and its replicas are placed elsewhere; replace the disk, or start \
                     the daemon anew to have it verified",
                ),
                _ => {}
            }
        }
    }
    problems
}

/// What a flush takes elsewhere: the median of the others.
fn elsewhere(reports: &StoreReports, but: StoreId) -> Option<u64> {
    let others = reports.iter().filter(|(store, report)| **store != but && report.flush_us > 0);
    let mut others: Vec<u64> = others.map(|(_, report)| report.flush_us).collect();
    others.sort_unstable();
    others.get(others.len() / 2).copied()
}

/// What a store's disk is called: `ok`, `hung` or `slow`. Slow is it only beside the others.
pub(crate) fn condition(store: StoreId, report: &StoreReport, reports: &StoreReports) -> &'static str {
    let floor = SLOW_FLOOR.as_micros() as u64;
    let is_slow =
        |others: u64| report.flush_us >= floor && report.flush_us >= others * u64::from(SLOW_FACTOR);
    match elsewhere(reports, store) {
        _ if report.hung_ms > 0 => "hung",
        Some(others) if is_slow(others) => "slow",
        _ => "ok",
    }
}

/// What is wrong with a medium that is full, or with a store that has used up what it may take.
fn of_full(subject: String, report: &StoreReport) -> pb::Problem {
    let (is, more) = match report.is_beyond_budget {
        true => {
            let (taken, capacity) = (ByteSize(report.allocated_bytes), ByteSize(report.capacity_bytes));
            let is = format!("the store takes {taken} and what is kept back, of {capacity} that it may");
            (is, "let the store take more (--capacity)")
        }
        false => ("the medium is full".to_owned(), "add space"),
    };
    let (what, doing) = match report.waiting {
        0 => (
            format!("{is}: what stands on it falls behind"),
            format!("nobody waits for it; it catches up when there is room: {more}, or move replicas away"),
        ),
        waiting => (
            format!("{is}: writes to {waiting} volumes wait"),
            format!(
                "reads, trims and deletions go on; writes go on by themselves when there is room: trim, delete \
                 volumes or snapshots (what only a snapshot holds comes back once its layer is merged, in the \
                 background), {more}, or move replicas away"
            ),
        ),
    };
    let since = ago(Duration::from_millis(report.full_ms));
    pb::Problem { subject, what, since, doing }
}

/// The problems of the disks that answer for themselves.
pub(crate) fn of_disks(reports: &StoreReports, subject: impl Fn(StoreId) -> String) -> Vec<pb::Problem> {
    let mut problems = Vec::new();
    for (store, report) in
        reports.iter().map(|(store, report)| (*store, report)).filter(|(_, report)| report.failed.is_empty())
    {
        if report.full_ms > 0 {
            problems.push(of_full(subject(store), report));
        }
        let (what, since, doing) = match condition(store, report, reports) {
            "hung" => {
                let doing = if report.leading == 0 {
                    "other replicas lead and serve readers; it catches up when the disk answers".to_owned()
                } else {
                    format!(
                        "it still leads {} groups, until a majority of other replicas can write",
                        report.leading
                    )
                };
                let since = ago(Duration::from_millis(report.hung_ms));
                ("its disk does not answer".to_owned(), since, doing)
            }
            "slow" => {
                let ms = |us: u64| format!("{} ms", us.div_ceil(1000));
                let others = elsewhere(reports, store).unwrap_or_default();
                let what = format!(
                    "its disk is slow: a flush takes {}, {} elsewhere",
                    ms(report.flush_us),
                    ms(others)
                );
                let doing = "what it leads is handed over to quicker disks; no write waits for it while a majority \
                     is quicker";
                (what, String::new(), doing.to_owned())
            }
            _ => continue,
        };
        problems.push(pb::Problem { subject: subject(store), what, since, doing });
    }
    problems
}

#[cfg(test)]
mod tests {
    use holdfast_protocol::catalog::{CatalogCommand, NodeRecord, StoreRecord};
    use holdfast_types::{ClusterId, Location, NodeName};

    use super::*;

    fn reports(figures: [(u64, u64, u32); 3]) -> StoreReports {
        let report =
            |(hung_ms, flush_us, leading)| StoreReport { hung_ms, flush_us, leading, ..Default::default() };
        (1..).map(StoreId).zip(figures.map(report)).collect()
    }

    fn called(store: StoreId) -> String {
        format!("node {}", ["a", "b", "c"][store.0 as usize - 1])
    }

    fn texts(figures: [(u64, u64, u32); 3]) -> Vec<(String, String)> {
        of_disks(&reports(figures), called)
            .into_iter()
            .map(|problem| (problem.subject, problem.what))
            .collect()
    }

    #[test]
    fn a_store_that_stops_is_named_beside_those_of_its_node_that_serve() {
        let mut state = CatalogState::new(ClusterId(1));
        let other =
            StoreRecord { store: StoreId(2), peer_address: "a:2".into(), directory: "/disk/two".into() };
        let location = Location { region: "r".into(), zone: "z".into(), node: NodeName::new("a") };
        let node = NodeRecord {
            location,
            store: StoreId(1),
            peer_address: "a:1".into(),
            admin: String::new(),
            cordoned: false,
            witness: false,
            directory: "/disk/one".into(),
            others: vec![other],
        };
        let put = CatalogCommand::PutNode { cluster: ClusterId(1), node };
        state.apply(&put).expect("a node");
        let told = |reports: &StoreReports| {
            let node = crate::views::node(state.nodes.values().next().expect("a node"), reports);
            let problems = of_stores(&state, std::slice::from_ref(&node)).into_iter();
            (node.state, problems.map(|problem| (problem.subject, problem.what)).collect::<Vec<_>>())
        };
        let failed = || StoreReport { failed: "EIO".into(), ..Default::default() };
        let (one, two) = (StoreId(1), StoreId(2));
        let fine = StoreReports::from([(one, StoreReport::default()), (two, StoreReport::default())]);
        assert_eq!(told(&fine), ("ready".into(), vec![]));
        let stopped = ("node a, store /disk/two".to_owned(), "has stopped: EIO".to_owned());
        let with_one = StoreReports::from([(one, StoreReport::default()), (two, failed())]);
        assert_eq!(told(&with_one), ("degraded".into(), vec![stopped.clone()]));
        let silent = told(&StoreReports::from([(two, StoreReport::default())]));
        assert_eq!((silent.0.as_str(), silent.1[0].0.as_str()), ("degraded", "node a, store /disk/one"));
        assert_eq!(told(&StoreReports::from([(one, failed()), (two, failed())])).0, "failed");
        let away = vec![("node a".to_owned(), "does not answer".to_owned())];
        assert_eq!(told(&StoreReports::new()), ("unreachable".into(), away));
    }

    #[test]
    fn a_full_medium_says_who_waits_for_it() {
        let full = |waiting| StoreReport { full_ms: 4_000, waiting, ..Default::default() };
        let reports = StoreReports::from([(StoreId(1), full(2)), (StoreId(2), full(0))]);
        let found = of_disks(&reports, called);
        assert_eq!(found[0].what, "the medium is full: writes to 2 volumes wait");
        assert_eq!(found[1].what, "the medium is full: what stands on it falls behind");
        assert!(found.iter().all(|problem| problem.since.ends_with('Z')), "{found:?}");
        assert!(found[0].doing.contains("add space") && found[0].doing.contains("merged"), "{found:?}");
    }

    #[test]
    fn a_store_that_has_used_up_its_budget_says_so() {
        let report = StoreReport {
            full_ms: 4_000,
            waiting: 1,
            is_beyond_budget: true,
            allocated_bytes: 9 << 30,
            capacity_bytes: 10 << 30,
            ..Default::default()
        };
        let found = of_disks(&StoreReports::from([(StoreId(1), report)]), called);
        let what =
            "the store takes 9 GiB and what is kept back, of 10 GiB that it may: writes to 1 volumes wait";
        assert_eq!(found[0].what, what);
        assert!(found[0].doing.contains("--capacity"), "{found:?}");
    }

    #[test]
    fn a_disk_is_slow_beside_the_others_and_hung_by_itself() {
        assert_eq!(texts([(0, 900, 1), (0, 800, 0), (0, 0, 0)]), []);
        let slow = texts([(0, 120_000, 1), (0, 800, 0), (0, 1_000, 0)]);
        assert_eq!(
            slow,
            [("node a".into(), "its disk is slow: a flush takes 120 ms, 1 ms elsewhere".into())]
        );
        assert_eq!(texts([(0, 120_000, 1), (0, 90_000, 0), (0, 100_000, 0)]), [], "all are");
        assert_eq!(texts([(0, 120_000, 1), (0, 0, 0), (0, 0, 0)]), [], "nobody to compare with");
        assert_eq!(texts([(0, 9_000, 1), (0, 100, 0), (0, 100, 0)]), [], "too quick to matter");
        let hung = of_disks(&reports([(0, 900, 0), (4_000, 0, 2), (3_000, 0, 0)]), called);
        assert_eq!(hung.len(), 2);
        assert!(hung[0].doing.contains("still leads 2 groups"), "{}", hung[0].doing);
        assert!(hung[1].doing.contains("other replicas lead"), "{}", hung[1].doing);
        assert!(hung[0].since.ends_with('Z'), "{}", hung[0].since);
    }
}
