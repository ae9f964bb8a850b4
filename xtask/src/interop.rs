//! `cargo xtask interop`: installs the programs that it needs, where it may, and runs the interop steps of
//! `tests/cluster`.

use std::path::Path;
use std::process::Command;

/// How it is called.
pub const USAGE: &str = "cargo xtask interop [--brief] [--only STEP] [--profile release|dev]";

/// Programs and the Debian packages that have them.
const PROGRAMS: &[(&str, &str)] = &[
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("qemu-io", "qemu-utils"),
    ("qemu-img", "qemu-utils"),
    ("fio", "fio"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_repair", "xfsprogs"),
    ("blkdiscard", "util-linux"),
];

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).exists())
}

/// Packages whose programs are missing, each once.
fn missing(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    let mut packages: Vec<_> =
        programs.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package).collect();
    packages.dedup();
    packages
}

fn is_root() -> bool {
    let told = Command::new("id").arg("-u").output();
    told.is_ok_and(|told| told.stdout.trim_ascii() == b"0")
}

fn apt(arguments: &[&str]) -> bool {
    let status = Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").status();
    status.is_ok_and(|status| status.success())
}

/// Installs what is missing of these programs and the packages that have them, or says what that is.
pub fn install(programs: &[(&str, &'static str)]) -> Result<(), String> {
    let packages = missing(programs);
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if is_root() && Path::new("/etc/debian_version").exists() {
        println!("installing {list}");
        let install = [&["install", "-y", "-q", "--no-install-recommends"][..], &packages].concat();
        // A list that is too old names packages that are no longer there.
        let installed = apt(&install) || (apt(&["update", "-q"]) && apt(&install));
        if installed && missing(programs).is_empty() {
            return Ok(());
        }
    }
    Err(format!("these programs' packages are missing: {list} (as root: apt-get install {list})"))
}

fn try_run(given: &[&str]) -> Result<bool, String> {
    let mut profile = "release";
    let mut passed_on = Vec::new();
    let mut rest = given.iter();
    while let Some(flag) = rest.next() {
        match *flag {
            "--brief" => passed_on.push("--brief"),
            "--only" => passed_on.extend(["--only", rest.next().ok_or(USAGE)?]),
            "--profile" => profile = rest.next().ok_or(USAGE)?,
            _ => return Err(format!("usage: {USAGE}")),
        }
    }
    if !is_root() {
        return Err("interop mounts file systems and makes loop devices: run it as root".into());
    }
    install(PROGRAMS)?;
    let build =
        ["build", "--locked", &format!("--profile={profile}"), "-p", "holdfast", "-p", "holdfast-cluster"];
    if !crate::cargo(&build, &[]) {
        return Ok(false);
    }
    let programs = crate::cluster::programs(profile)?;
    let status = Command::new(programs.join("holdfast-cluster"))
        .arg("--program")
        .arg(programs.join("holdfast"))
        .arg("interop")
        .args(passed_on)
        .status();
    status.map(|status| status.success()).map_err(|error| error.to_string())
}

/// Runs it; false if a step failed.
pub fn run(given: &[&str]) -> bool {
    try_run(given).unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}
