//! The attached node dies. Its attachment ends by force, with a certificate that a majority has signed; that holds before the
//! cluster and before the authority alone, and what is altered, or signed by too few, does not.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;

const VOLUME: &str = "c";
const DEAD: &str = "r1-z1-n1";
const NEXT: &str = "r1-z2-n1";
const REFUSED: i32 = 4;

fn keep(place: &Path, name: &str, json: &Value) -> Outcome<String> {
    let path = place.join(name);
    std::fs::write(&path, json.to_string()).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path.display().to_string())
}

async fn refused(dev: &Dev, arguments: &[&str], says: &str) -> Outcome<()> {
    let refused = dev.refused(arguments).await?;
    if refused.exit != Some(REFUSED) || !refused.message.contains(says) {
        return Err(format!("{} was refused otherwise: {refused:?}", arguments.join(" ")));
    }
    Ok(())
}

/// Both ways to verify.
fn ways<'s>(file: &'s str, authority: &'s str) -> [Vec<&'s str>; 2] {
    let online = vec!["fence", "verify", file];
    let offline = [&online[..], &["--authority", authority]].concat();
    [online, offline]
}

async fn holds(dev: &Dev, file: &str, authority: &str, holder: Option<&str>) -> Outcome<()> {
    for way in ways(file, authority) {
        let said = dev.command(&way).await?;
        let signers = said["signers"].as_array().map_or(0, Vec::len);
        let by = said["holder"].as_str().filter(|holder| !holder.is_empty());
        if said["fenced"] != DEAD || by != holder || signers < 2 || said["epoch"].as_u64().is_none() {
            return Err(format!("{} says {said}", way.join(" ")));
        }
    }
    Ok(())
}

/// What differs in one thing from what was signed.
async fn forgeries(dev: &Dev, place: &Path, whole: &Value, authority: &str) -> Outcome<usize> {
    let mut all = Vec::new();
    for (field, value) in [("fenced", Value::from(NEXT)), ("epoch", 99.into()), ("incarnation", 2.into())] {
        let mut forged = whole.clone();
        forged["statement"][field] = value;
        if field == "fenced" {
            forged["statement"]["holder"] = Value::Null;
        }
        all.push((forged, "signature"));
    }
    let mut few = whole.clone();
    few["signatures"].as_array_mut().ok_or("no signatures")?.truncate(1);
    all.push((few, "no majority"));
    for (forged, says) in &all {
        let file = keep(place, "forged.json", forged)?;
        for way in ways(&file, authority) {
            refused(dev, &way, says).await?;
        }
    }
    Ok(all.len())
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    // Voters stand on any store of their node.
    let dev = place.cluster(&["--stores", "2"]).await?;
    let files = tempfile::tempdir().map_err(|error| error.to_string())?;
    let authority: PathBuf = dev.data_dir(NEXT).join("pki/ca.pem");
    let authority = authority.display().to_string();
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", DEAD]).await?;
    let certify = ["fence", "certify", VOLUME, "--node", DEAD];
    refused(&dev, &certify, "holds").await?;

    dev.ctl(&["kill", DEAD]).await?;
    let detach = ["volume", "detach", VOLUME, "--force", "--node", DEAD];
    let detached = dev.insist_at(NEXT, &detach, RECOVERY).await?;
    let json = detached["fence_certificate"].as_str().unwrap_or_default();
    let first: Value = serde_json::from_str(json).map_err(|error| format!("{detached}: {error}"))?;
    let file = keep(files.path(), "first.json", &first)?;
    holds(&dev, &file, &authority, None).await?;
    let count = forgeries(&dev, files.path(), &first, &authority).await?;

    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", NEXT]).await?;
    let second = files.path().join("second.json").display().to_string();
    dev.command(&[&certify[..], &["--out", &second]].concat()).await?;
    holds(&dev, &second, &authority, Some(NEXT)).await?;
    // The first is as true as before: it speaks of an older epoch.
    holds(&dev, &file, &authority, None).await?;
    dev.ctl(&["start", DEAD]).await?;
    refused(&dev, &["fence", "certify", VOLUME, "--node", NEXT], "holds").await?;
    dev.insist(&["volume", "attach", "--frontend", "nbd", "--force", VOLUME, "--node", DEAD], RECOVERY)
        .await?;
    refused(&dev, &["fence", "verify", &file], "anew").await?;
    println!("  fenced with {} signatures; {count} forgeries refused, each in two ways", signatures(&first));
    dev.stop().await
}

fn signatures(certificate: &Value) -> usize {
    certificate["signatures"].as_array().map_or(0, Vec::len)
}
