//! `cargo xtask sanity`: the Container Storage Interface's own test suite, csi-sanity, against a development cluster;
//! `cargo xtask csi`: our tests of the driver. Both build what they need.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How it is called.
pub const USAGE: &str = "cargo xtask sanity --mode mount|block [--keep DIR] [--profile release|dev]
       cargo xtask csi [--profile release|dev] [SCENARIO ...]";

const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(60);
/// No run of the suite takes longer.
const SUITE: Duration = Duration::from_secs(900);
/// Between looks at a process.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes of a volume of the suite.
const VOLUME_BYTES: u64 = 1 << 30;
/// Programs of the node that the driver calls, and the package of each.
const PROGRAMS: &[(&str, &str)] = &[
    ("blkid", "util-linux"),
    ("fsck", "util-linux"),
    ("mkfs.ext4", "e2fsprogs"),
    ("resize2fs", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_growfs", "xfsprogs"),
];
/// Words in the names of cases that a driver without group snapshots and changes of parameters leaves out, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("GroupController", "group snapshots are not built yet"),
    ("GetSnapshot", "calls for one snapshot are alpha in the specification, and not built"),
    ("volume attribute class", "changes of parameters are not built yet"),
    ("ModifyVolume", "changes of parameters are not built yet"),
    ("max attach limit", "the suite leaves it out unless asked: nodes have no limit of their own"),
    ("pagination should detect", "switched off in the suite itself"),
];

type Outcome<T> = Result<T, String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn finds(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let directories = path.split(':').chain(["/usr/sbin", "/sbin", "/usr/local/go/bin"]);
    directories.into_iter().any(|directory| Path::new(directory).join(program).is_file())
}

/// What this machine lacks for mounting volumes, after installing what can be installed.
pub fn missing() -> Vec<String> {
    let mut lacks = Vec::new();
    if !is_root() {
        lacks.push("root (mounting needs it)".to_owned());
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(device).exists() {
            lacks.push(format!("{device} (of the kernel)"));
        }
    }
    let mut packages: Vec<&str> =
        PROGRAMS.iter().filter(|(program, _)| !finds(program)).map(|(_, package)| *package).collect();
    packages.dedup();
    if lacks.is_empty() && !packages.is_empty() && finds("apt-get") {
        println!("installs {}", packages.join(", "));
        let quiet = |arguments: &[&str]| {
            let mut command = Command::new("apt-get");
            command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        // Lists may be old or absent: a failed update shows in the install.
        quiet(&["update", "-q"]);
        quiet(&[&["install", "-q", "-y", "--no-install-recommends"], &packages[..]].concat());
    }
    let programs = PROGRAMS.iter().filter(|(program, _)| !finds(program));
    lacks.extend(programs.map(|(program, package)| format!("{program} (package {package})")));
    lacks
}

/// Builds the programs; where they are.
fn build(profile: &str, packages: &[&str]) -> Outcome<PathBuf> {
    let flag = format!("--profile={profile}");
    let mut arguments = vec!["build", "--locked", &flag];
    arguments.extend(packages.iter().flat_map(|package| ["-p", package]));
    if !crate::cargo(&arguments, &[]) {
        return Err("the programs do not build".into());
    }
    crate::cluster::programs(profile)
}

/// Builds csi-sanity, which `tests/sanity/go.mod` pins; where it is.
fn build_suite(programs: &Path) -> Outcome<PathBuf> {
    let go = if finds("go") { "go" } else { "/usr/local/go/bin/go" };
    let out = programs.parent().unwrap_or(programs).join("csi-sanity");
    let metadata = cargo_metadata::MetadataCommand::new().no_deps().exec().map_err(text)?;
    let status = Command::new(go)
        .args(["build", "-o"])
        .arg(&out)
        .arg("github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")
        .current_dir(metadata.workspace_root.join("tests/sanity"))
        .env("CGO_ENABLED", "0")
        .status()
        .map_err(|error| format!("{go}: {error}: csi-sanity is written in Go; install Go 1.25 or newer"))?;
    if status.success() { Ok(out) } else { Err("csi-sanity does not build".into()) }
}

/// A cluster that ends with its owner.
struct Dev(Child);

impl Dev {
    fn start(program: &Path, directory: &Path) -> Outcome<Self> {
        let child = Command::new(program)
            .args(["dev", "--journal", "64MiB", "--dir"])
            .arg(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(text)?;
        let mut dev = Self(child);
        let until = Instant::now() + START;
        while !directory.join("dev.json").exists() {
            if let Some(status) = dev.0.try_wait().map_err(text)? {
                return Err(format!("the cluster has ended: {status}"));
            }
            if Instant::now() > until {
                return Err("the cluster does not serve in time".into());
            }
            std::thread::sleep(LOOK);
        }
        Ok(dev)
    }

    fn stop(mut self) -> Outcome<()> {
        let status = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status().map_err(text)?;
        if !status.success() {
            return Err("the cluster cannot be stopped".into());
        }
        wait(&mut self.0, STOP, "the cluster")
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let killed = self.0.kill().and_then(|()| self.0.wait());
            if let Err(error) = killed {
                println!("the cluster goes on running: {error}");
            }
        }
    }
}

fn wait(child: &mut Child, patience: Duration, what: &str) -> Outcome<()> {
    let until = Instant::now() + patience;
    while child.try_wait().map_err(text)?.is_none() {
        if Instant::now() > until {
            return Err(format!("{what} has not ended after {patience:?}"));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// What became of the cases.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    /// Names and reasons.
    left_out: Vec<(String, String)>,
}

/// Reads the suite's report.
fn tally(report: &Value) -> Outcome<Tally> {
    let mut out = Tally::default();
    let suites = report.as_array().ok_or("the report has no suites")?;
    let cases = suites.iter().filter_map(|suite| suite["SpecReports"].as_array()).flatten();
    for case in cases.filter(|case| case["LeafNodeType"] == "It") {
        let containers = case["ContainerHierarchyTexts"].as_array().map(Vec::as_slice).unwrap_or_default();
        let words = containers.iter().chain([&case["LeafNodeText"]]).filter_map(Value::as_str);
        let name = words.collect::<Vec<_>>().join(": ");
        let message = case["Failure"]["Message"].as_str().unwrap_or_default();
        match case["State"].as_str().unwrap_or_default() {
            "passed" => out.passed += 1,
            "skipped" | "pending" => {
                let known = LEFT_OUT.iter().find(|(word, _)| name.contains(word));
                match known {
                    Some((_, why)) => out.left_out.push((name, (*why).to_owned())),
                    None => out.failed.push(format!("{name}: left out without a known reason: {message}")),
                }
            }
            state => out.failed.push(format!("{name}: {state}: {}", message.replace('\n', " "))),
        }
    }
    Ok(out)
}

fn print(tally: &Tally, mode: &str, seconds: f64) {
    let mut reasons: Vec<&str> = tally.left_out.iter().map(|(_, why)| why.as_str()).collect();
    reasons.sort_unstable();
    reasons.dedup();
    for reason in reasons {
        println!("left out: {reason}");
        for (name, _) in tally.left_out.iter().filter(|(_, why)| why == reason) {
            println!("    {name}");
        }
    }
    for failure in &tally.failed {
        println!("FAILED: {failure}");
    }
    println!(
        "csi-sanity, {mode}: {} passed, {} failed, {} left out, {seconds:.1} s",
        tally.passed,
        tally.failed.len(),
        tally.left_out.len()
    );
}

/// Mounts under a directory.
fn mounts_under(directory: &Path) -> Outcome<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(text)?;
    let targets = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(targets.filter(|target| Path::new(target).starts_with(directory)).map(str::to_owned).collect())
}

struct Sanity {
    mode: String,
    keep: Option<PathBuf>,
    profile: String,
}

fn parse_sanity(given: &[&str]) -> Option<Sanity> {
    let mut out = Sanity { mode: String::new(), keep: None, profile: "dev".into() };
    let mut rest = given.iter();
    while let Some(flag) = rest.next() {
        let value = rest.next()?.to_string();
        match *flag {
            "--mode" if ["mount", "block"].contains(&value.as_str()) => out.mode = value,
            "--keep" => out.keep = Some(PathBuf::from(value)),
            "--profile" => out.profile = value,
            _ => return None,
        }
    }
    (!out.mode.is_empty()).then_some(out)
}

fn run_suite(suite: &Path, place: &Path, mode: &str) -> Outcome<Value> {
    let description = std::fs::read(place.join("c/dev.json")).map_err(text)?;
    let description: Value = serde_json::from_slice(&description).map_err(text)?;
    let endpoint = description["nodes"][0]["csi"].as_str().ok_or("dev.json tells of no CSI socket")?;
    let report = place.join("report.json");
    let log = std::fs::File::create(place.join("suite.log")).map_err(text)?;
    let mut child = Command::new(suite)
        .arg(format!("-csi.endpoint={endpoint}"))
        .arg(format!("-csi.mountdir={}", place.join("target").display()))
        .arg(format!("-csi.stagingdir={}", place.join("staging").display()))
        .arg(format!("-csi.testvolumeaccesstype={mode}"))
        .arg(format!("-csi.testvolumesize={VOLUME_BYTES}"))
        .arg(format!("-csi.testvolumeexpandsize={}", 2 * VOLUME_BYTES))
        .arg(format!("-ginkgo.json-report={}", report.display()))
        .stdin(Stdio::null())
        .stdout(log)
        .spawn()
        .map_err(text)?;
    if let Err(why) = wait(&mut child, SUITE, "csi-sanity") {
        let killed = child.kill().and_then(|()| child.wait().map(drop));
        return Err(killed
            .err()
            .map_or(why.clone(), |error| format!("{why}, nor can it be killed: {error}")));
    }
    let json = std::fs::read(&report).map_err(|error| format!("csi-sanity made no report: {error}"))?;
    serde_json::from_slice(&json).map_err(text)
}

fn try_sanity(arguments: &Sanity) -> Outcome<bool> {
    let programs = build(&arguments.profile, &["holdfast"])?;
    let suite = build_suite(&programs)?;
    // Short: unix sockets stand below, and their paths have a limit.
    let made = tempfile::Builder::new().prefix("hfs").tempdir().map_err(text)?;
    let place = match &arguments.keep {
        Some(keep) => {
            std::fs::create_dir_all(keep).map_err(text)?;
            keep.canonicalize().map_err(text)?
        }
        None => made.path().to_owned(),
    };
    let began = Instant::now();
    let dev = Dev::start(&programs.join("holdfast"), &place.join("c"))?;
    let report = run_suite(&suite, &place, &arguments.mode);
    dev.stop()?;
    let left = mounts_under(&place)?;
    let tally = tally(&report?)?;
    print(&tally, &arguments.mode, began.elapsed().as_secs_f64());
    if !tally.failed.is_empty() {
        println!("{}", std::fs::read_to_string(place.join("suite.log")).unwrap_or_default());
    }
    for mount in &left {
        println!("left behind: {mount}");
    }
    Ok(tally.failed.is_empty() && tally.passed > 0 && left.is_empty())
}

/// `cargo xtask sanity`; false if a case failed.
pub fn sanity(given: &[&str]) -> bool {
    let Some(arguments) = parse_sanity(given) else {
        eprintln!("usage: {USAGE}");
        return false;
    };
    let lacks = missing();
    if !lacks.is_empty() {
        println!("csi-sanity cannot run here; missing: {}", lacks.join(", "));
        return false;
    }
    try_sanity(&arguments).unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}

/// `cargo xtask csi`; false if a scenario failed.
pub fn scenarios(given: &[&str]) -> bool {
    let (profile, names) = match given {
        ["--profile", profile, names @ ..] => (*profile, names),
        names => ("dev", names),
    };
    let lacks = missing();
    let run = || -> Outcome<bool> {
        let programs = build(profile, &["holdfast", "holdfast-csi-tests"])?;
        let mut command = Command::new(programs.join("holdfast-csi-tests"));
        command.arg("--program").arg(programs.join("holdfast"));
        if !lacks.is_empty() {
            println!("csi: scenarios that mount are left out; missing: {}", lacks.join(", "));
            command.arg("--unprivileged");
        }
        let status = command.args(names).status().map_err(text)?;
        Ok(status.success())
    };
    run().unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_that_fail_or_are_left_out_for_no_reason_count_as_failed() {
        let case = |state: &str, name: &str| {
            serde_json::json!({"LeafNodeType": "It", "State": state, "LeafNodeText": name,
                "ContainerHierarchyTexts": ["Controller Service"], "Failure": {"Message": "because"}})
        };
        let report = serde_json::json!([{"SpecReports": [
            case("passed", "should work"),
            case("skipped", "GroupController: should create a group"),
            case("skipped", "should be idempotent"),
            case("failed", "should return"),
            {"LeafNodeType": "BeforeSuite", "State": "passed"},
        ]}]);
        let tally = tally(&report).expect("is a report");
        assert_eq!((tally.passed, tally.failed.len(), tally.left_out.len()), (1, 2, 1));
        assert!(super::tally(&Value::Null).is_err());
    }
}
