//! Requests that cannot be carried out: each is refused by a typed error that names what to do, and nothing has changed.

use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::Load;

const VOLUME: &str = "b";

/// A request, the code of its refusal, its exit code, and words that the refusal must say.
type Case = (&'static [&'static str], &'static str, i32, &'static [&'static str]);

const CASES: &[Case] = &[
    (&["volume", "create", "x", "--size", "0"], "invalid-argument", 2, &["size"]),
    (&["volume", "create", "x", "--size", "17TiB"], "out-of-range", 2, &["16"]),
    (&["volume", "create", "x", "--size", "18446744073709551615"], "out-of-range", 2, &["16"]),
    (&["volume", "create", "x/y", "--size", "1MiB"], "invalid-argument", 2, &["x/y"]),
    (
        &["volume", "create", "x", "--size", "1MiB", "--parameter", "colour=red"],
        "invalid-argument",
        2,
        &["colour", "survive"],
    ),
    (
        &["volume", "create", "x", "--size", "1MiB", "--parameter", "encryption=aes-xts"],
        "unimplemented",
        1,
        &["encryption"],
    ),
    (
        &["volume", "create", "x", "--size", "1MiB", "--survive", "region"],
        "resource-exhausted",
        1,
        &["region", "zone"],
    ),
    (&["volume", "create", "x", "--size", "1MiB", "--zones", "r1-z9"], "resource-exhausted", 1, &["zone"]),
    (&["volume", "create", VOLUME, "--size", "2MiB"], "already-exists", 4, &[VOLUME, "another name"]),
    (
        &["volume", "attach", "--frontend", "nbd", VOLUME, "--node", "r9-z9-n9"],
        "not-found",
        3,
        &["r9-z9-n9", "node list"],
    ),
    (
        &["volume", "attach", "--frontend", "nbd", "nowhere", "--node", "r1-z1-n1"],
        "not-found",
        3,
        &["nowhere", "volume list"],
    ),
    (
        &["volume", "attach", "--frontend", "nbd", VOLUME, "--node", "r1-z2-n1"],
        "refused",
        4,
        &["r1-z1-n1", "--force"],
    ),
    (
        &["volume", "attach", "--frontend", "nbd", VOLUME, "--node", "r1-z1-n1", "--read-only"],
        "already-exists",
        4,
        &["detach"],
    ),
    (
        &["volume", "attach", VOLUME, "--node", "r1-z1-n1", "--frontend", "tape"],
        "invalid-argument",
        2,
        &["tape"],
    ),
    (&["volume", "resize", VOLUME, "--size", "4096"], "invalid-argument", 2, &["shrink"]),
    (&["volume", "resize", VOLUME, "--size", "17TiB"], "out-of-range", 2, &["16"]),
    (&["volume", "delete", VOLUME, "--yes"], "refused", 4, &["r1-z1-n1", "detach"]),
    (&["volume", "delete", VOLUME], "invalid-argument", 2, &["--yes"]),
    (&["volume", "show", "nowhere"], "not-found", 3, &["nowhere"]),
    (&["volume", "verify", "nowhere"], "not-found", 3, &["nowhere"]),
    (&["replica", "add", VOLUME, "--node", "r1-z1-n1"], "refused", 4, &["r1-z1-n1", "--node"]),
    (&["replica", "add", VOLUME, "--node", "r9-z9-n9"], "not-found", 3, &["r9-z9-n9", "node list"]),
    (&["replica", "move", VOLUME, "999"], "not-found", 3, &["999"]),
    (&["replica", "remove", VOLUME, "1", "--yes"], "refused", 4, &["move"]),
    (&["node", "cordon", "r9-z9-n9"], "not-found", 3, &["r9-z9-n9"]),
];

/// What must not change: everything about the volumes but their log's growth.
async fn state(dev: &Dev) -> Outcome<Value> {
    let listed = dev.insist(&["volume", "list"], RECOVERY).await?;
    let kept = |volume: &Value| {
        let replicas: Vec<Value> =
            volume["replicas"].as_array().into_iter().flatten().map(|r| r["id"].clone()).collect();
        serde_json::json!([
            volume["name"],
            volume["size_bytes"],
            volume["epoch"],
            volume["attached_to"],
            volume["survive"],
            replicas
        ])
    };
    Ok(listed.as_array().into_iter().flatten().map(kept).collect())
}

async fn check(dev: &Dev, case: &Case) -> Outcome<()> {
    let (request, code, exit, words) = case;
    let refused = dev.refused(request).await?;
    let (said, message, hint) = refused.error()?;
    let whole = format!("{message} / {hint}");
    if said != *code || refused.exit != Some(*exit) {
        return Err(format!("{said} (exit {:?}) instead of {code} (exit {exit}): {whole}", refused.exit));
    }
    if hint.is_empty() {
        return Err(format!("it does not say what to do: {whole}"));
    }
    match words.iter().find(|word| !whole.contains(**word)) {
        Some(word) => Err(format!("it does not say '{word}': {whole}")),
        None => Ok(()),
    }
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let made = dev.command(&["volume", "create", VOLUME, "--size", "1000001"]).await?;
    if made["size_bytes"] != 1_003_520 {
        return Err(format!("1000001 bytes are 245 blocks, not {}", made["size_bytes"]));
    }
    let again = dev.command(&["volume", "create", VOLUME, "--size", "1000001"]).await?;
    if again["id"] != made["id"] {
        return Err("creating a volume again made another one".into());
    }
    dev.command(&["volume", "resize", VOLUME, "--size", "67108864"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", "r1-z1-n1"]).await?;
    let load = Load::start(VOLUME, dev.nbd("r1-z1-n1"), 2, place.seed);
    let before = state(&dev).await?;
    let mut wrong = Vec::new();
    for case in CASES {
        if let Err(why) = check(&dev, case).await {
            wrong.push(format!("{}: {why}", case.0.join(" ")));
        }
        let after = state(&dev).await?;
        if after != before {
            wrong.push(format!("{} left something behind: {after} instead of {before}", case.0.join(" ")));
            break;
        }
    }
    load.progress(50, RECOVERY).await?;
    let (_, figures) = load.stop().await?;
    if figures.errors.load(std::sync::atomic::Ordering::Relaxed) > 0 {
        wrong.push("the guest was disturbed".into());
    }
    if !wrong.is_empty() {
        return Err(wrong.join("\n    "));
    }
    println!("  {} requests refused by a typed error, nothing changed, the guest undisturbed", CASES.len());
    dev.stop().await
}
