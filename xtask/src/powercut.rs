//! `cargo xtask powercut`: makes a virtual machine of Debian's kernel and this repository's programs, and cuts its power
//! (`tests/cluster/src/powercut`).

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How it is called.
pub const USAGE: &str =
    "cargo xtask powercut [--rounds N] [--seed S] [--fs ext4|xfs] [--profile release|dev]";

/// Programs and the Debian packages that have them.
const PROGRAMS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("dmsetup", "dmsetup"),
    ("depmod", "kmod"),
    ("cpio", "cpio"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
];
/// The package that names the newest kernel.
const KERNEL: &str = "linux-image-amd64";
/// Modules that the machine needs; what they need comes with them.
const MODULES: &[&str] =
    &["virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "xfs", "dm_mod", "dm_flakey"];
/// Programs that go into the machine beside ours.
const INSIDE: &[&str] = &["dmsetup", "mkfs.ext4", "mkfs.xfs"];

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /data
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in MODULES; do /bin/busybox modprobe $module || echo "no module $module"; done
/bin/busybox ifconfig lo 127.0.0.1 up
export PATH=/bin
arguments=$(/bin/busybox sed 's/.*hf=\([^ ]*\).*/\1/; s/,/ /g' /proc/cmdline)
/bin/busybox stty -F /dev/ttyS1 raw -echo 115200
/bin/holdfast-cluster --program /bin/holdfast guest $arguments > /dev/ttyS1
/bin/busybox poweroff -f
"#;

fn run(program: &str, arguments: &[&str], directory: &Path) -> Result<String, String> {
    let output =
        Command::new(program).args(arguments).current_dir(directory).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} {} failed", arguments.join(" ")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn io(what: &Path) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{}: {error}", what.display())
}

/// Debian's kernel, unpacked; it is fetched once.
fn kernel(place: &Path) -> Result<PathBuf, String> {
    let root = place.join("kernel-package");
    if !root.exists() {
        let depends = run("apt-cache", &["depends", KERNEL], place)?;
        let name = depends.split_whitespace().find(|word| word.starts_with("linux-image-"));
        let name = name.filter(|name| *name != KERNEL);
        let name = name.or_else(|| depends.split_whitespace().find(|w| w.starts_with("linux-image-6")));
        let name = name.ok_or("no kernel package is known: run apt-get update")?;
        println!("fetching {name}");
        run("apt-get", &["download", "-q", name], place)?;
        let packages =
            fs::read_dir(place).map_err(io(place))?.filter_map(Result::ok).map(|entry| entry.path());
        let package = packages.into_iter().find(|path| path.extension().is_some_and(|e| e == "deb"));
        let package = package.ok_or("the kernel's package did not come")?;
        let part = place.join("kernel-package.part");
        run("dpkg-deb", &["-x", &package.display().to_string(), &part.display().to_string()], place)?;
        fs::rename(&part, &root).map_err(io(&root))?;
        fs::remove_file(&package).map_err(io(&package))?;
    }
    Ok(root)
}

fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf, String> {
    let entries = fs::read_dir(directory).map_err(io(directory))?.filter_map(Result::ok);
    let mut found = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    found.next().map(|entry| entry.path()).ok_or(format!("no {prefix}* in {}", directory.display()))
}

/// The modules, in the order in which each comes after what it needs.
fn modules(tree: &Path, version: &str) -> Result<Vec<PathBuf>, String> {
    let root = tree.display().to_string();
    run("depmod", &["-b", &root, version], tree)?;
    let mut out = Vec::new();
    for module in MODULES {
        let arguments = ["-d", &root, "-S", version, "--show-depends", module];
        for line in run("modprobe", &arguments, tree)?.lines() {
            if let Some(path) = line.strip_prefix("insmod ") {
                out.push(PathBuf::from(path.trim()));
            }
        }
    }
    out.dedup();
    Ok(out)
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(io(parent))?;
    }
    fs::copy(from, to).map(drop).map_err(io(from))
}

/// A program and the libraries that it is linked with.
fn copy_program(from: &Path, tree: &Path) -> Result<(), String> {
    let name = from.file_name().ok_or("a program without a name")?;
    let to = tree.join("bin").join(name);
    copy(from, &to)?;
    // Symbols are of no use there, and an emulated machine unpacks slowly.
    run("strip", &[&to.display().to_string()], tree)?;
    let linked = run("ldd", &[&from.display().to_string()], tree)?;
    for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        let inside = tree.join(library.trim_start_matches('/'));
        if !inside.exists() {
            copy(Path::new(library), &inside)?;
        }
    }
    Ok(())
}

fn find(program: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|directory| directory.join(program));
    places.find(|place| place.exists()).ok_or(format!("{program} is not there"))
}

/// Makes kernel and initramfs in `place`.
fn make(place: &Path, programs: &Path) -> Result<(), String> {
    let package = kernel(place)?;
    let boot = only_entry(&package.join("boot"), "vmlinuz-")?;
    copy(&boot, &place.join("kernel"))?;
    let name = boot.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let version = name.trim_start_matches("vmlinuz-");
    let tree = place.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree).map_err(io(&tree))?;
    }
    fs::create_dir_all(tree.join("bin")).map_err(io(&tree))?;
    for module in modules(&package, version)? {
        let within = module.strip_prefix(&package).map_err(|error| error.to_string())?;
        copy(&module, &tree.join(within))?;
    }
    let lists = Path::new("lib/modules").join(version);
    for list in ["modules.order", "modules.builtin"] {
        copy(&package.join(&lists).join(list), &tree.join(&lists).join(list))?;
    }
    run("depmod", &["-b", &tree.display().to_string(), version], &tree)?;
    copy(&find("busybox")?, &tree.join("bin/busybox"))?;
    for program in INSIDE {
        copy_program(&find(program)?, &tree)?;
    }
    for program in ["holdfast", "holdfast-cluster"] {
        copy_program(&programs.join(program), &tree)?;
    }
    symlink("busybox", tree.join("bin/kill")).map_err(io(&tree))?;
    let init = tree.join("init");
    fs::write(&init, INIT.replace("MODULES", &MODULES.join(" "))).map_err(io(&init))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).map_err(io(&init))?;
    let archive = place.join("initramfs").display().to_string();
    run("sh", &["-c", "find . | cpio --quiet -o -H newc > \"$0\"", &archive], &tree).map(drop)
}

fn try_run(given: &[&str]) -> Result<bool, String> {
    let mut profile = "release";
    let mut passed_on = Vec::new();
    let (mut rounds, mut seed) = ("3", "1");
    let mut rest = given.iter();
    while let Some(flag) = rest.next() {
        let value = rest.next().ok_or(USAGE)?;
        match *flag {
            "--rounds" => rounds = value,
            "--seed" => seed = value,
            "--fs" => passed_on.extend(["--fs", value]),
            "--profile" => profile = value,
            _ => return Err(format!("usage: {USAGE}")),
        }
    }
    crate::interop::install(PROGRAMS)?;
    let build =
        ["build", "--locked", &format!("--profile={profile}"), "-p", "holdfast", "-p", "holdfast-cluster"];
    if !crate::cargo(&build, &[]) {
        return Ok(false);
    }
    let programs = crate::cluster::programs(profile)?;
    let place = programs.parent().ok_or("no target directory")?.join("vm");
    fs::create_dir_all(&place).map_err(io(&place))?;
    make(&place, &programs)?;
    let status = Command::new(programs.join("holdfast-cluster"))
        .arg("--program")
        .arg(programs.join("holdfast"))
        .args(["powercut", "--rounds", rounds, "--seed", seed, "--vm"])
        .arg(&place)
        .args(passed_on)
        .status();
    status.map(|status| status.success()).map_err(|error| error.to_string())
}

/// Runs it; false if something was lost.
pub fn main(given: &[&str]) -> bool {
    try_run(given).unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}
