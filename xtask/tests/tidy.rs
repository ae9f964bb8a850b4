//! The house keeps its own rules: the direction of dependencies, what each file looks like, and that every invariant
//! stands in code and is attacked by a test that exists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Longest source file, in lines; and those that may be longer, each with why.
const LINES_MAX: usize = 800;
const MAY_BE_LONGER: [(&str, &str); 0] = [];

/// Invariants that no test attacks yet; each is a debt.
const NOT_ATTACKED_YET: [&str; 0] = [];

/// Floors of the house, bottom first: a crate depends on lower floors only, never on its own.
const FLOORS: [&[&str]; 8] = [
    &["holdfast-types"],
    &["holdfast-env", "holdfast-protocol"],
    &["holdfast-store", "holdfast-wire"],
    &["holdfast-replica"],
    &["holdfast-catalog", "holdfast-session"],
    &["holdfast-frontend"],
    &["holdfast-node"],
    &["holdfast"],
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace holds xtask").to_owned()
}

fn files_below(directory: &Path, out: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(directory).expect("the directory can be read");
    for entry in entries {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                files_below(&path, out);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            out.push(path);
        }
    }
}

/// Every source file with its text, by its path from the root.
fn sources() -> BTreeMap<String, String> {
    let root = root();
    let mut paths = Vec::new();
    files_below(&root, &mut paths);
    let named = paths.into_iter().map(|path| {
        let text = std::fs::read_to_string(&path).expect("a source file is text");
        let name = path.strip_prefix(&root).expect("below the root").to_string_lossy().into_owned();
        (name, text)
    });
    named.collect()
}

fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

/// What each crate of the house depends on, without what only tests need.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = MetadataCommand::new().current_dir(root()).no_deps().exec().expect("cargo metadata works");
    let of = |package: &cargo_metadata::Package| {
        let normal =
            package.dependencies.iter().filter(|dependency| dependency.kind == DependencyKind::Normal);
        normal.map(|dependency| dependency.name.clone()).collect()
    };
    metadata.packages.iter().map(|package| (package.name.to_string(), of(package))).collect()
}

#[test]
fn dependencies_go_one_way() {
    let all = dependencies();
    let floor = |name: &str| FLOORS.iter().position(|crates| crates.contains(&name));
    let mut wrong = Vec::new();
    for (number, crates) in FLOORS.iter().enumerate() {
        for name in *crates {
            let theirs = all.get(*name).unwrap_or_else(|| panic!("there is no crate {name}"));
            for other in theirs.iter().filter(|other| all.contains_key(*other)) {
                let is_csi = *name == "holdfast" && other == "holdfast-csi";
                if !is_csi && floor(other).is_none_or(|other| other >= number) {
                    wrong.push(format!("{name} depends on {other}, which is not below it"));
                }
            }
        }
    }
    none("the wrong way", &wrong);
}

#[test]
fn the_csi_driver_knows_a_node_only_by_its_admin_api() {
    let all = dependencies();
    let house =
        all.get("holdfast-csi").expect("the crate is there").iter().filter(|name| all.contains_key(*name));
    let allowed = ["holdfast-types"];
    let strangers: Vec<String> = house.filter(|name| !allowed.contains(&name.as_str())).cloned().collect();
    none("holdfast-csi depends on", &strangers);
}

#[test]
fn the_pure_crates_stay_pure() {
    let all = dependencies();
    let allowed = ["bytes", "crc32fast", "serde", "thiserror", "holdfast-types"];
    for name in ["holdfast-types", "holdfast-protocol"] {
        let strangers: Vec<String> =
            all[name].iter().filter(|other| !allowed.contains(&other.as_str())).cloned().collect();
        none(&format!("{name} is pure and depends on"), &strangers);
    }
    let store = &all["holdfast-store"];
    assert!(!store.iter().any(|name| name.starts_with("openraft")), "the store knows nothing of Raft");
}

/// Code that the simulator runs: it sees the world through `holdfast_env` only.
#[test]
fn the_data_path_sees_the_world_through_its_environment() {
    let inside = ["types", "protocol", "store", "replica", "session", "catalog"];
    let outside = [
        "std::time::Instant",
        "SystemTime",
        "std::fs",
        "std::net",
        "std::thread::",
        "tokio::time",
        "tokio::spawn",
        "tokio::net",
        "tokio::fs",
        "tokio::select",
        "rand::",
        "HashMap",
        "HashSet",
    ];
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        if !inside.iter().any(|name_of| name.starts_with(&format!("crates/{name_of}/src/"))) {
            continue;
        }
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let hits = outside.iter().filter(|word| code.contains(**word));
            wrong.extend(hits.map(|word| format!("{name}:{}: {word}", number + 1)));
        }
    }
    none("not through the environment", &wrong);
}

#[test]
fn files_fit_in_a_head_and_say_what_they_are() {
    let sources = sources();
    let mut wrong = Vec::new();
    for (name, text) in &sources {
        let lines = text.lines().count();
        if lines > LINES_MAX && !MAY_BE_LONGER.iter().any(|(longer, _)| longer == name) {
            wrong.push(format!("{name} has {lines} lines, more than {LINES_MAX}"));
        }
        if !text.starts_with("//!") {
            wrong.push(format!("{name} does not open with what it is (//!)"));
        }
    }
    for (name, _) in MAY_BE_LONGER {
        if sources.get(name).is_none_or(|text| text.lines().count() <= LINES_MAX) {
            wrong.push(format!("{name} needs no exception any more"));
        }
    }
    none("files", &wrong);
}

#[test]
fn nothing_is_left_undone_and_nothing_unsafe_is_unexplained() {
    // Written apart, so that this file does not find itself.
    let undone = [
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("#[ig", "nore"),
        concat!("dbg", "!("),
    ];
    let unsafe_words = [concat!("unsa", "fe {"), concat!("unsa", "fe impl")];
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let hits = undone.iter().filter(|word| code.contains(**word));
            wrong.extend(hits.map(|word| format!("{name}:{}: {word}", number + 1)));
            let explained =
                lines[number.saturating_sub(4)..=number].iter().any(|line| line.contains("SAFETY:"));
            if unsafe_words.iter().any(|word| code.contains(word)) && !explained {
                wrong.push(format!("{name}:{}: nobody says why this is sound (SAFETY:)", number + 1));
            }
        }
    }
    none("left undone or unexplained", &wrong);
}

struct Invariant {
    id: String,
    attacked_by: String,
}

fn invariants() -> Vec<Invariant> {
    let text = std::fs::read_to_string(root().join("docs/INVARIANTS.md")).expect("the page is there");
    let rows = text.lines().filter(|line| line.starts_with("| INV-"));
    let parse = |row: &str| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(
            cells.len(),
            4,
            "a row has an id, a sentence, where it is kept and what attacks it: {row}"
        );
        Invariant { id: cells[0].to_owned(), attacked_by: cells[3].to_owned() }
    };
    rows.map(parse).collect()
}

/// Ids of invariants in a text.
fn ids(text: &str) -> BTreeSet<String> {
    let ends = |c: char| !(c.is_ascii_uppercase() || c == '-');
    let parts = text.split("INV-").skip(1);
    let names = parts.map(|rest| rest.split(ends).next().unwrap_or_default().trim_end_matches('-'));
    names.filter(|name| !name.is_empty()).map(|name| format!("INV-{name}")).collect()
}

#[test]
fn every_invariant_of_the_code_is_on_the_page_and_the_other_way_round() {
    let listed: BTreeSet<String> = invariants().into_iter().map(|invariant| invariant.id).collect();
    assert!(listed.len() >= 10, "the page was not understood: {listed:?}");
    let own = file!().replace('\\', "/");
    let code = sources().into_iter().filter(|(name, _)| *name != own);
    let used: BTreeSet<String> = code.flat_map(|(_, text)| ids(&text)).collect();
    none(
        "in the code, and not in docs/INVARIANTS.md",
        &used.difference(&listed).cloned().collect::<Vec<_>>(),
    );
    none(
        "in docs/INVARIANTS.md, and not in the code",
        &listed.difference(&used).cloned().collect::<Vec<_>>(),
    );
}

/// Whether something that is said to attack an invariant is there: a file with tests, a test's name, a command, or the
/// name of an attack on real processes.
fn exists(sources: &BTreeMap<String, String>, name: &str) -> bool {
    if name.starts_with("cargo xtask ") {
        return true;
    }
    if name.ends_with(".rs") {
        let is_it = |path: &str| path == name || path == format!("crates/{name}");
        return sources.iter().any(|(path, text)| is_it(path) && text.contains("#[test]"));
    }
    let is_scenario = |path: &str, text: &str| {
        let of_scenarios = ["tests/cluster/src/scenarios/", "tests/scenario/src/scripts/"];
        of_scenarios.iter().any(|place| path.starts_with(place)) && text.contains(&format!("\"{name}\""))
    };
    sources.iter().any(|(path, text)| text.contains(&format!("fn {name}(")) || is_scenario(path, text))
}

#[test]
fn every_invariant_is_attacked_by_a_test_that_exists() {
    let sources = sources();
    let mut wrong = Vec::new();
    for Invariant { id, attacked_by } in invariants() {
        let names: Vec<&str> = attacked_by.split('`').skip(1).step_by(2).collect();
        let is_debt = NOT_ATTACKED_YET.contains(&id.as_str());
        if names.is_empty() != is_debt {
            wrong.push(format!(
                "{id}: attacked by '{attacked_by}', and is its absence listed here? {is_debt}"
            ));
        }
        let missing = names.into_iter().filter(|name| !exists(&sources, name));
        wrong.extend(missing.map(|name| format!("{id}: there is no test {name}")));
    }
    none("invariants", &wrong);
}

/// Names of the faults in a list of pairs: what stands between the first quotation marks of a line that opens one.
fn names_of_faults(text: &str) -> BTreeSet<String> {
    let opened = text.lines().filter_map(|line| line.trim().strip_prefix("(\""));
    opened.filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect()
}

/// A fault of the store that is in the code and in no table would never be looked for.
#[test]
fn every_fault_of_the_store_is_planted_somewhere_and_looked_for() {
    let sources = sources();
    let known = names_of_faults(&sources["crates/store/src/testing/planted.rs"]);
    assert!(known.len() >= 40, "only {} faults were found in the list", known.len());
    let table = &sources["xtask/src/store.rs"];
    let in_table = |name: &String| table.contains(&format!("\"{name}\","));
    let is_planted = |name: &String| {
        let call = format!("planted(\"{name}\")");
        let mut code = sources.iter().filter(|(path, _)| path.starts_with("crates/store/src/"));
        code.any(|(_, text)| text.contains(&call))
    };
    let wrong = known.iter().filter(|name| !in_table(name) || !is_planted(name)).cloned().collect::<Vec<_>>();
    none("faults that are not planted, or that nothing looks for", &wrong);
}

/// Rows of the list of faults that no test is named for yet.
const ROWS_WITHOUT_A_TEST: &[u32] = &[31, 32, 33, 35];

/// The rows that a line of the page names: `(row 5)`, `(rows 10, 11)`.
fn rows_of(line: &str) -> BTreeSet<u32> {
    let named = line.split("(row").skip(1).filter_map(|rest| rest.trim_start_matches('s').split(')').next());
    named.flat_map(|numbers| numbers.split(',')).filter_map(|number| number.trim().parse().ok()).collect()
}

/// A fault of the list is attacked by something that exists, or is listed here as one that nothing attacks.
#[test]
fn every_row_of_the_faults_has_a_test_that_exists() {
    let text = std::fs::read_to_string(root().join("docs/FAULTS.md")).expect("the page is there");
    let sources = sources();
    let (mut named, mut wrong) = (BTreeSet::new(), Vec::new());
    for line in text.lines().filter(|line| line.starts_with('|')) {
        let attacked_by = line.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let names: Vec<&str> = attacked_by.split('`').skip(1).step_by(2).collect();
        let is_test = |name: &&str| name.contains(['_', '-']) && !name.contains(['/', '.', ' ', ':']);
        let missing = names.iter().filter(|name| is_test(name) && !exists(&sources, name));
        wrong.extend(missing.map(|name| format!("there is no test {name}")));
        if !names.is_empty() || attacked_by.contains("kill loop") {
            named.extend(rows_of(line));
        }
    }
    let (rows, debt) = (1..=37, ROWS_WITHOUT_A_TEST.iter().copied().collect::<BTreeSet<u32>>());
    let without = rows.filter(|row| !named.contains(row)).collect::<BTreeSet<u32>>();
    wrong.extend(without.difference(&debt).map(|row| format!("no test is named for row {row}")));
    wrong.extend(
        debt.difference(&without).map(|row| format!("row {row} has a test, and is no debt any more")),
    );
    none("docs/FAULTS.md", &wrong);
}
