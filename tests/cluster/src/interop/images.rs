//! NBD's tools, QEMU's, fio, and a second file system.

use std::time::Instant;

use serde_json::Value;

use super::files::{Guest, tree_sums};
use super::tools::tool;
use super::{Ground, VOLUME_MIB};
use crate::Outcome;

const MIB: u64 = 1 << 20;

fn mib_per_second(bytes: u64, since: Instant) -> f64 {
    bytes as f64 / MIB as f64 / since.elapsed().as_secs_f64()
}

/// What libnbd sees.
pub async fn nbdinfo(ground: &Ground) -> Outcome<String> {
    let volume = ground.volume("info", "r1-z1-n1", "nbd").await?;
    let told = tool("nbdinfo", &["--json", &volume.device]).await?;
    let told: Value = serde_json::from_str(&told).map_err(|error| format!("{error}: {told}"))?;
    let export = &told["exports"][0];
    let expected = [
        ("export-size", Value::from(VOLUME_MIB * MIB)),
        ("is_read_only", false.into()),
        ("can_flush", true.into()),
        ("can_fua", true.into()),
        ("can_trim", true.into()),
        ("can_zero", true.into()),
        ("can_multi_conn", true.into()),
    ];
    for (key, value) in expected {
        if export[key] != value {
            return Err(format!("{key} is {}, not {value}: {told}", export[key]));
        }
    }
    if told["structured"] != true || export["contexts"][0] != "base:allocation" {
        return Err(format!("no structured replies or no allocation: {told}"));
    }
    ground.done_with(volume).await?;
    Ok(format!("{VOLUME_MIB} MiB, FUA, trim, zero, multi-conn, structured replies, base:allocation"))
}

/// A real ext4 image of a real directory tree, in and out again.
pub async fn nbdcopy(ground: &Ground) -> Outcome<String> {
    let volume = ground.volume("image", "r1-z1-n1", "nbd").await?;
    let (image, back) = (ground.place.join("image"), ground.place.join("back"));
    let (image, back) = (image.display().to_string(), back.display().to_string());
    // Past the volume's end the image would not fit: what does not fit into it is left out of the tree.
    let tree = subtree(ground).await?;
    tool("truncate", &["--size", &format!("{VOLUME_MIB}M"), &image]).await?;
    tool("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &tree, &image]).await?;
    let began = Instant::now();
    tool("nbdcopy", &["--flush", &image, &volume.device]).await?;
    let into = mib_per_second(VOLUME_MIB * MIB, began);
    let began = Instant::now();
    tool("nbdcopy", &[&volume.device, &back]).await?;
    let out = mib_per_second(VOLUME_MIB * MIB, began);
    let sums = (checksum(&image).await?, checksum(&back).await?);
    if sums.0 != sums.1 {
        return Err(format!("the image has {}, what came back {}", sums.0, sums.1));
    }
    tool("e2fsck", &["-f", "-n", &back]).await?;
    let used = tool("du", &["-sm", &tree]).await?;
    let used = used.split_whitespace().next().unwrap_or("?").to_owned();
    for path in [image, back] {
        std::fs::remove_file(path).map_err(|error| error.to_string())?;
    }
    let index = ground.done_with(volume).await?;
    Ok(format!(
        "an ext4 image with {used} MB of {}, in {into:.0} and out {out:.0} MiB/s of image, sha256 {} both ways, \
         replicas equal at {index}",
        ground.amount.tree,
        &sums.0[..12]
    ))
}

/// A copy of as much of the tree as leaves room in the image.
async fn subtree(ground: &Ground) -> Outcome<String> {
    let tree = ground.place.join("tree");
    let path = tree.display().to_string();
    if tree.exists() {
        return Ok(path);
    }
    std::fs::create_dir(&tree).map_err(|error| error.to_string())?;
    let room = VOLUME_MIB * MIB / 2;
    let mut taken = 0;
    let entries = std::fs::read_dir(ground.amount.tree).map_err(|error| error.to_string())?;
    let mut entries: Vec<_> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
    entries.sort();
    for entry in entries {
        let entry = entry.display().to_string();
        let used = tool("du", &["-s", "--block-size=1", &entry]).await?;
        let used: u64 = used.split_whitespace().next().and_then(|used| used.parse().ok()).unwrap_or(room);
        if taken + used <= room {
            taken += used;
            tool("cp", &["-a", &entry, &path]).await?;
        }
    }
    if taken < 4 * MIB {
        return Err(format!("{} holds only {taken} bytes to copy", ground.amount.tree));
    }
    Ok(path)
}

async fn checksum(path: &str) -> Outcome<String> {
    let told = tool("sha256sum", &[path]).await?;
    told.split_whitespace().next().map(str::to_owned).ok_or_else(|| format!("sha256sum said {told}"))
}

/// Patterns, zeros, discards and the map, aligned and not.
pub async fn qemu_io(ground: &Ground) -> Outcome<String> {
    let volume = ground.volume("qemu", "r1-z1-n1", "nbd").await?;
    let commands = [
        "write -P 0xab 1M 2M",
        "read -P 0xab 1M 2M",
        "write -P 0xcd 1536k 512",
        "read -P 0xcd 1536k 512",
        "read -P 0xab 1537k 1M",
        "write -z 2M 64k",
        "read -P 0 2M 64k",
        "write -z -u 8M 1M",
        "read -P 0 8M 1M",
        "write -f -P 0x11 16M 4k",
        "discard 1M 512k",
        "read -P 0 1M 512k",
        "read -P 0xab 2112k 960k",
        "flush",
    ];
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&volume.device);
    // qemu-io prints a failed verification and goes on.
    let printed = tool("qemu-io", &arguments).await?;
    if printed.contains("verification failed") || printed.contains("error") {
        return Err(printed);
    }
    let map = tool("qemu-img", &["map", "-f", "raw", "--output=json", &volume.device]).await?;
    let map: Value = serde_json::from_str(&map).map_err(|error| format!("{error}: {map}"))?;
    let runs = map.as_array().ok_or("the map is no list")?;
    let data: u64 = runs
        .iter()
        .filter(|run| run["data"] == true && run["zero"] == false)
        .filter_map(|run| run["length"].as_u64())
        .sum();
    // 1.5 to 3 MiB without the zeroed 64 KiB, and 4 KiB at 16 MiB.
    let expected = 1536 * 1024 - 64 * 1024 + 4096;
    if data != expected {
        return Err(format!("the map has {data} bytes of data, not {expected}: {map}"));
    }
    ground.done_with(volume).await?;
    Ok(format!("{} commands, the map shows {data} bytes of data in {} runs", commands.len(), runs.len()))
}

/// fio: random reads and writes of mixed sizes, every block checked by its CRC.
async fn fio(ground: &Ground, how: &[&str]) -> Outcome<String> {
    let size = format!("--size={}M", ground.amount.fio_mib);
    let mut arguments = vec![
        "--name=verify",
        "--rw=randrw",
        "--rwmixread=30",
        "--bsrange=4k-128k",
        "--bs_unaligned=0",
        "--blockalign=4k",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--randseed=1",
        "--output-format=json",
        &size,
    ];
    arguments.extend(how);
    let printed = tool("fio", &arguments).await?;
    let from = printed.find('{').ok_or_else(|| format!("fio printed {printed}"))?;
    let report: Value =
        serde_json::from_str(&printed[from..]).map_err(|error| format!("{error}: {printed}"))?;
    let job = &report["jobs"][0];
    let (read, written) = (&job["read"]["io_bytes"], &job["write"]["io_bytes"]);
    let errors = &job["error"];
    if *errors != 0 || written.as_u64().unwrap_or(0) == 0 || read.as_u64() < written.as_u64() {
        return Err(format!("error {errors}, {written} bytes written, {read} read and verified"));
    }
    Ok(format!(
        "{} MiB written at {:.0} IOPS, {} MiB read, each block's CRC as it was written",
        written.as_u64().unwrap_or(0) / MIB,
        job["write"]["iops"].as_f64().unwrap_or(0.0),
        read.as_u64().unwrap_or(0) / MIB
    ))
}

/// On the NBD export.
pub async fn fio_nbd(ground: &Ground) -> Outcome<String> {
    let volume = ground.volume("fionbd", "r1-z1-n1", "nbd").await?;
    let uri = format!("--uri={}", volume.device);
    let figures = fio(ground, &["--ioengine=nbd", &uri]).await?;
    ground.done_with(volume).await?;
    Ok(figures)
}

/// On the file, asynchronously and past the page cache.
pub async fn fio_fuse(ground: &Ground) -> Outcome<String> {
    let volume = ground.volume("fiofuse", &ground.far()?, "fuse").await?;
    let file = format!("--filename={}", volume.device);
    let figures = fio(ground, &["--ioengine=libaio", "--direct=1", &file]).await?;
    ground.done_with(volume).await?;
    Ok(figures)
}

/// xfs on a block device: a tree copied in, the volume grown and xfs with it, detached, attached elsewhere, compared.
pub async fn xfs_loop(ground: &Ground) -> Outcome<String> {
    let volume = ground.volume("xfs", &ground.far()?, "loop").await?;
    tool("mkfs.xfs", &["-q", &volume.device]).await?;
    let guest = Guest::mount(&volume.device, &ground.place.join("xfs")).await?;
    let tree = subtree(ground).await?;
    let at = guest.path().display().to_string();
    tool("cp", &["-a", &tree, &at]).await?;
    let grown = format!("{}MiB", VOLUME_MIB + 128);
    ground.dev.command(&["volume", "resize", &volume.name, "--size", &grown]).await?;
    let device = tool("blockdev", &["--getsize64", &volume.device]).await?;
    if device.trim() != ((VOLUME_MIB + 128) * MIB).to_string() {
        return Err(format!("after growing, {} has {} bytes", volume.device, device.trim()));
    }
    tool("xfs_growfs", &[&at]).await?;
    if ground.dev.try_command(&["volume", "detach", &volume.name]).await.is_ok() {
        return Err("a mounted device was detached without --force".into());
    }
    guest.unmount().await?;
    ground.dev.command(&["volume", "detach", &volume.name]).await?;
    let volume = ground.attach(&volume.name, "r1-z2-n1", "loop", false).await?;
    tool("xfs_repair", &["-n", &volume.device]).await?;
    let guest = Guest::mount(&volume.device, &ground.place.join("xfs")).await?;
    let copied = guest.path().join("tree").display().to_string();
    let (original, copy) = (tree_sums(&tree).await?, tree_sums(&copied).await?);
    if original != copy {
        return Err("the tree that was copied in differs".into());
    }
    guest.unmount().await?;
    ground.done_with(volume).await?;
    Ok(format!("{} files equal on another node, grown by 128 MiB while mounted", original.lines().count()))
}
