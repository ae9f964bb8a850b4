//! `holdfast volume ...`.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use holdfast_node::admin::pb;
use holdfast_types::UserError;

use super::{bytes, or_dash};
use crate::cli::{VolumeCommand, confirmed, not_built, usage};
use crate::client::{Client, reply, with_client};
use crate::output::{Output, table};

/// Between looks at a volume that is being filled.
const FILL_LOOK: Duration = Duration::from_millis(500);
/// Between two looks at how far the scrub is.
const SCRUB_LOOK: std::time::Duration = std::time::Duration::from_millis(200);

/// The replicas of a volume as a table.
pub fn replicas(replicas: &[pb::Replica], wide: bool) -> String {
    let mut columns = vec!["id", "node", "zone", "role", "state", "term", "applied", "lag", "used"];
    if wide {
        columns.extend([
            "region",
            "last",
            "committed",
            "purged",
            "healed by",
            "healed bytes",
            "bad",
            "healed",
            "scrubs",
            "snapshots",
            "allocated",
            "journal",
            "store",
        ]);
    }
    let rows = replicas.iter().map(|replica| {
        // A replica that does not answer tells nothing; zero would be a figure.
        let told = |figure: String| if replica.state == "unreachable" { "-".to_owned() } else { figure };
        let mut row = vec![
            replica.id.to_string(),
            replica.node.clone(),
            replica.zone.clone(),
            replica.role.clone(),
            replica.state.clone(),
            told(replica.term.to_string()),
            told(replica.applied_index.to_string()),
            told(bytes(replica.lag_bytes)),
            told(bytes(replica.used_bytes)),
        ];
        if wide {
            row.extend([
                replica.region.clone(),
                told(replica.last_log_index.to_string()),
                told(replica.committed_index.to_string()),
                told(replica.purged_index.to_string()),
                or_dash(&replica.healed_by),
                told(replica.healed_bytes.to_string()),
                told(replica.bad_blocks.to_string()),
                told(replica.healed_blocks.to_string()),
                told(replica.scrub_passes.to_string()),
                told(bytes(replica.snapshot_bytes)),
                told(bytes(replica.allocated_bytes)),
                told(bytes(replica.journal_bytes)),
                replica.store.clone(),
            ]);
        }
        row
    });
    table(&columns, rows.collect())
}

/// What a volume is doing, in a word or two.
fn state(volume: &pb::Volume) -> String {
    match volume.phase.as_str() {
        "filling" => format!("being filled: {} %", volume.filled_percent),
        _ => volume.health.clone(),
    }
}

/// A volume with its replicas.
pub fn one(volume: &pb::Volume, wide: bool) -> String {
    format!(
        "{}  {}  {}  survive: {}  timers: {}{}  epoch {}  attached to {}  leader {}  snapshots {}{}\n{}",
        volume.name,
        bytes(volume.size_bytes),
        state(volume),
        volume.survive,
        volume.timers,
        if volume.timers_changing { " (changing)" } else { "" },
        volume.epoch,
        or_dash(&volume.attached_to),
        or_dash(&volume.leader),
        volume.snapshots,
        match volume.snapshot_quota_bytes {
            0 => String::new(),
            quota => format!(" (quota {})", bytes(quota)),
        },
        replicas(&volume.replicas, wide)
    )
}

fn many(volumes: &[pb::Volume]) -> String {
    if volumes.is_empty() {
        return "There are no volumes; `holdfast volume create NAME --size 1GiB` makes one.".into();
    }
    let rows = volumes.iter().map(|volume| {
        vec![
            volume.name.clone(),
            bytes(volume.size_bytes),
            state(volume),
            volume.survive.clone(),
            volume.epoch.to_string(),
            or_dash(&volume.attached_to),
            or_dash(&volume.leader),
            volume.replicas.len().to_string(),
        ]
    });
    table(
        &["name", "size", "health", "survive", "epoch", "attached to", "leader", "replicas"],
        rows.collect(),
    )
}

/// Runs the command.
pub fn run(command: VolumeCommand, admin: Option<String>, output: &Output) -> Result<ExitCode, UserError> {
    if let VolumeCommand::Later(words) = &command {
        return Err(not_built(words, "holdfast volume"));
    }
    with_client(admin, |client| carry_out(client, command, output))
}

fn zone_terms(zones: &[String]) -> Vec<pb::TopologyTerm> {
    zones.iter().map(|zone| pb::TopologyTerm { zone: zone.clone(), ..Default::default() }).collect()
}

fn key_values(texts: &[String]) -> Result<std::collections::HashMap<String, String>, UserError> {
    texts
        .iter()
        .map(|text| {
            let (key, value) = text
                .split_once('=')
                .ok_or_else(|| usage(format!("'{text}' is no parameter"), "write KEY=VALUE"))?;
            Ok((key.to_owned(), value.to_owned()))
        })
        .collect()
}

async fn list(client: &mut Client) -> Result<Vec<pb::Volume>, UserError> {
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let page = reply(client.list_volumes(pb::ListVolumesRequest { max: 0, token }).await)?;
        all.extend(page.volumes);
        if page.next_token.is_empty() {
            all.sort_by(|a, b| a.name.cmp(&b.name));
            return Ok(all);
        }
        token = page.next_token;
    }
}

/// Waits until what a volume begins with is there, however long that takes. It goes on without us, too.
async fn filled(
    client: &mut Client,
    mut volume: pb::Volume,
    output: &Output,
) -> Result<pb::Volume, UserError> {
    let shows = output.is_human() && std::io::stderr().is_terminal();
    let begun = volume.phase == "filling";
    while volume.phase == "filling" {
        if shows {
            eprint!("\r{}", progress(&volume.name, volume.filled_percent));
        }
        tokio::time::sleep(FILL_LOOK).await;
        volume = reply(client.get_volume(pb::GetVolumeRequest { name: volume.id.clone() }).await)?;
    }
    if shows && begun {
        eprintln!("\r{}", progress(&volume.name, volume.filled_percent));
    }
    Ok(volume)
}

/// A bar of 40 columns.
fn progress(name: &str, percent: u32) -> String {
    let done = (percent.min(100) * 2 / 5) as usize;
    format!("{name} is filled [{}{}] {percent:3} %", "#".repeat(done), "-".repeat(40 - done))
}

async fn carry_out(
    mut client: Client,
    command: VolumeCommand,
    output: &Output,
) -> Result<ExitCode, UserError> {
    match command {
        VolumeCommand::Create {
            name,
            size,
            survive,
            replicas,
            zones,
            timers,
            snapshot_quota,
            parameters,
            from_snapshot,
            from_volume,
        } => {
            let request = pb::CreateVolumeRequest {
                name,
                size_bytes: size.map_or(0, |size| size.0),
                survive: survive.unwrap_or_default(),
                replicas: replicas.unwrap_or_default(),
                allowed: zone_terms(&zones),
                preferred: zone_terms(&zones[..zones.len().min(1)]),
                parameters: {
                    let mut given = key_values(&parameters)?;
                    given.extend(timers.map(|timers| ("timers".to_owned(), timers)));
                    given.extend(snapshot_quota.map(|quota| ("snapshotQuota".to_owned(), quota)));
                    given
                },
                source_snapshot: from_snapshot.unwrap_or_default(),
                source_volume: from_volume.unwrap_or_default(),
                ..Default::default()
            };
            let volume = reply(client.create_volume(request).await)?;
            let volume = filled(&mut client, volume, output).await?;
            output.show(&volume, || one(&volume, output.wide()));
        }
        VolumeCommand::List => {
            let volumes = list(&mut client).await?;
            output.show(&volumes, || many(&volumes));
        }
        VolumeCommand::Show { name } => {
            let volume = reply(client.get_volume(pb::GetVolumeRequest { name }).await)?;
            output.show(&volume, || one(&volume, output.wide()));
        }
        VolumeCommand::Attach { name, node, frontend, force, read_only } => {
            let request = pb::AttachVolumeRequest { name, node, frontend, force, read_only };
            let attached = reply(client.attach_volume(request).await)?;
            output.show(&attached, || {
                format!("{}  (epoch {}, node {})", attached.device, attached.epoch, attached.node)
            });
        }
        VolumeCommand::Detach { name, force, node } => {
            let request = pb::DetachVolumeRequest { name, force, node: node.unwrap_or_default() };
            let detached = reply(client.detach_volume(request).await)?;
            output.show(&detached, || match (detached.was_attached, detached.fence_certificate.is_empty()) {
                (true, true) => "detached".into(),
                (true, false) => "detached; the node that did not answer is fenced".into(),
                (false, _) => "it was not attached".into(),
            });
        }
        VolumeCommand::Resize { name, size } => {
            let request = pb::ResizeVolumeRequest { name, size_bytes: size.0, limit_bytes: 0 };
            let volume = reply(client.resize_volume(request).await)?;
            output.show(&volume, || one(&volume, output.wide()));
        }
        VolumeCommand::Set { name, timers, snapshot_quota } => {
            let request = pb::SetVolumeRequest {
                name,
                timers: timers.unwrap_or_default(),
                snapshot_quota: snapshot_quota.unwrap_or_default(),
            };
            let volume = reply(client.set_volume(request).await)?;
            output.show(&volume, || one(&volume, output.wide()));
        }
        VolumeCommand::Delete { name, yes } => {
            confirmed(yes, "deleting a volume")?;
            let deleted = reply(client.delete_volume(pb::DeleteVolumeRequest { name }).await)?;
            output.show(
                &deleted,
                || if deleted.existed { "deleted".into() } else { "it did not exist".into() },
            );
        }
        VolumeCommand::Recover { name, survivors, accept_loss } => {
            let request = pb::RecoverVolumeRequest { name, survivors, accept_loss };
            let told = reply(client.recover_volume(request).await)?;
            output.show(&told, || recovery(&told));
        }
        VolumeCommand::Scrub { name, wait } => {
            let mut volume = reply(client.scrub_volume(pb::ScrubVolumeRequest { name }).await)?;
            if wait {
                volume = scrubbed(&mut client, volume).await?;
            }
            output.show(&volume, || one(&volume, output.wide()));
        }
        VolumeCommand::Verify { name } => return verify(client, name, output).await,
        VolumeCommand::Later(words) => return Err(not_built(&words, "holdfast volume")),
    }
    Ok(ExitCode::SUCCESS)
}

/// What a recovery would do, or has done.
fn recovery(told: &pb::RecoverVolumeReply) -> String {
    let mark = |is_so: bool| if is_so { "yes".to_owned() } else { "-".to_owned() };
    let rows = told.replicas.iter().map(|replica| {
        let known =
            |figure: u64| if replica.state == "unreachable" { "-".to_owned() } else { figure.to_string() };
        vec![
            replica.id.to_string(),
            replica.node.clone(),
            replica.zone.clone(),
            replica.state.clone(),
            mark(replica.survivor),
            mark(replica.source),
            known(replica.term),
            known(replica.last_log_term),
            known(replica.last_log_index),
            known(replica.committed_index),
            or_dash(&replica.why),
        ]
    });
    let columns = [
        "id",
        "node",
        "zone",
        "state",
        "survivor",
        "source",
        "term",
        "last term",
        "last",
        "committed",
        "why",
    ];
    let mut lines = vec![table(&columns, rows.collect())];
    lines.extend(told.loss.iter().cloned());
    lines.push(match (told.recovered, told.refused.is_empty()) {
        (true, _) => format!("The volume goes on as incarnation {} (recovery {}).", told.incarnation, told.recovery),
        (false, true) => {
            "Nothing was done. To accept this: --survivors with the replicas to go on from, and --accept-loss.".into()
        }
        (false, false) => format!("Nothing was done, and it would be refused now: {}", told.refused),
    });
    lines.join("\n")
}

/// The volume once every replica that answers has been looked at since `before`.
async fn scrubbed(client: &mut Client, before: pb::Volume) -> Result<pb::Volume, UserError> {
    let is_there = |replica: &&pb::Replica| replica.state != "unreachable" && replica.state != "faulty";
    let passes = |replica: &pb::Replica| {
        let same = before.replicas.iter().find(|old| old.id == replica.id);
        same.map_or(0, |old| old.scrub_passes)
    };
    loop {
        let now = reply(client.get_volume(pb::GetVolumeRequest { name: before.id.clone() }).await)?;
        // A daemon that restarted begins to count anew.
        let done = |replica: &pb::Replica| {
            replica.scrub_passes > passes(replica)
                || replica.scrub_passes > 0 && replica.scrub_passes < passes(replica)
        };
        if now.replicas.iter().filter(is_there).all(done) {
            return Ok(now);
        }
        tokio::time::sleep(SCRUB_LOOK).await;
    }
}

/// What a verification found, in words: replicas that could not be read say nothing of those that could.
fn verdict(report: &pb::VerifyReport) -> String {
    let unread = report.replicas.iter().filter(|replica| !replica.error.is_empty()).count();
    let digests = || report.replicas.iter().filter(|replica| replica.error.is_empty());
    let same = digests().all(|replica| Some(&replica.digest) == digests().next().map(|first| &first.digest));
    match (report.equal, unread, same && digests().all(|replica| replica.bad_blocks == 0)) {
        (true, _, _) => "equal".into(),
        (false, 0, _) | (false, _, false) => "NOT equal".into(),
        (false, unread, true) => {
            format!("not verified: {unread} of {} replicas could not be read", report.replicas.len())
        }
    }
}

async fn verify(mut client: Client, name: String, output: &Output) -> Result<ExitCode, UserError> {
    let report = reply(client.verify_volume(pb::VerifyVolumeRequest { name }).await)?;
    output.show(&report, || {
        let rows = report.replicas.iter().map(|digest| {
            vec![
                digest.node.clone(),
                or_dash(&digest.digest),
                digest.bad_blocks.to_string(),
                or_dash(&digest.error),
            ]
        });
        format!(
            "at index {}: {}\n{}",
            report.index,
            verdict(&report),
            table(&["node", "digest", "bad blocks", "error"], rows.collect())
        )
    });
    Ok(if report.equal { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_a_bar() {
        assert_eq!(progress("v", 0), format!("v is filled [{}]   0 %", "-".repeat(40)));
        let half = format!("v is filled [{}{}]  50 %", "#".repeat(20), "-".repeat(20));
        assert_eq!(progress("v", 50), half);
        assert_eq!(progress("v", 100), format!("v is filled [{}] 100 %", "#".repeat(40)));
    }

    #[test]
    fn a_replica_that_was_not_read_is_not_one_that_differs() {
        let digest = |digest: &str, error: &str, bad_blocks| pb::ReplicaDigest {
            digest: digest.into(),
            error: error.into(),
            bad_blocks,
            ..Default::default()
        };
        let verdict = |equal, replicas| verdict(&pb::VerifyReport { index: 1, equal, replicas });
        assert_eq!(verdict(true, vec![digest("a", "", 0), digest("a", "", 0)]), "equal");
        assert_eq!(verdict(false, vec![digest("a", "", 0), digest("b", "", 0)]), "NOT equal");
        assert_eq!(verdict(false, vec![digest("a", "", 1), digest("a", "", 0)]), "NOT equal");
        let away = digest("", "cannot be reached", 0);
        assert!(
            verdict(false, vec![digest("a", "", 0), digest("a", "", 0), away.clone()])
                .starts_with("not verified: 1 of 3")
        );
        assert_eq!(verdict(false, vec![digest("a", "", 0), digest("b", "", 0), away]), "NOT equal");
    }
}
