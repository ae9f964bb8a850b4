//! `holdfast snapshot ...`.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;

use holdfast_node::admin::pb;
use holdfast_types::{ErrorCode, UserError, limits};
use serde::Serialize;

use super::{bytes, or_dash};
use crate::cli::{SnapshotCommand, confirmed};
use crate::client::{Client, reply, with_client};
use crate::output::{Output, table};

/// What changed, all pages of it.
#[derive(Serialize)]
struct Diff {
    extents: Vec<pb::Extent>,
    bytes: u64,
}

/// A snapshot as a raw image.
#[derive(Serialize)]
struct Exported {
    file: String,
    size_bytes: u64,
    written_bytes: u64,
}

fn title(snapshot: &pb::Snapshot) -> String {
    format!("{}@{}", snapshot.volume, snapshot.name)
}

fn many(snapshots: &[pb::Snapshot], wide: bool) -> String {
    if snapshots.is_empty() {
        return "There are no snapshots; `holdfast snapshot create VOLUME NAME` makes one.".into();
    }
    let mut columns = vec!["snapshot", "size", "created", "state"];
    if wide {
        columns.extend(["index", "id", "key"]);
    }
    let rows = snapshots.iter().map(|snapshot| {
        let mut row = vec![
            title(snapshot),
            bytes(snapshot.size_bytes),
            snapshot.created.clone(),
            snapshot.state.clone(),
        ];
        if wide {
            row.extend([snapshot.index.to_string(), snapshot.id.clone(), or_dash(&snapshot.key)]);
        }
        row
    });
    table(&columns, rows.collect())
}

/// Runs the command.
pub fn run(command: SnapshotCommand, admin: Option<String>, output: &Output) -> Result<ExitCode, UserError> {
    with_client(admin, |client| carry_out(client, command, output))
}

async fn list(client: &mut Client, volume: String) -> Result<Vec<pb::Snapshot>, UserError> {
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let request = pb::ListSnapshotsRequest { volume: volume.clone(), token, ..Default::default() };
        let page = reply(client.list_snapshots(request).await)?;
        all.extend(page.snapshots);
        if page.next_token.is_empty() {
            all.sort_by(|a, b| (&a.volume, a.index, &a.name).cmp(&(&b.volume, b.index, &b.name)));
            return Ok(all);
        }
        token = page.next_token;
    }
}

/// All extents, those that touch made one, and the size of the newer end.
async fn diff(client: &mut Client, from: &str, to: &str) -> Result<(Vec<pb::Extent>, u64), UserError> {
    let mut all: Vec<pb::Extent> = Vec::new();
    let mut offset = 0;
    loop {
        let request = pb::DiffSnapshotsRequest { from: from.to_owned(), to: to.to_owned(), offset };
        let page = reply(client.diff_snapshots(request).await)?;
        for extent in page.extents {
            match all.last_mut() {
                Some(last) if last.offset + last.length == extent.offset => last.length += extent.length,
                _ => all.push(extent),
            }
        }
        if page.next_offset == 0 {
            return Ok((all, page.size_bytes));
        }
        offset = page.next_offset;
    }
}

async fn export(client: &mut Client, snapshot: &str, file: &Path) -> Result<Exported, UserError> {
    let failed = |error: std::io::Error| {
        UserError::new(ErrorCode::Internal, format!("{}: {error}", file.display()))
            .hint("name a file that is not there yet, on a medium with room")
    };
    let (extents, size_bytes) = diff(client, "", snapshot).await?;
    let mut image = std::fs::File::create_new(file).map_err(failed)?;
    image.set_len(size_bytes).map_err(failed)?;
    let mut written_bytes = 0;
    for extent in extents {
        image.seek(SeekFrom::Start(extent.offset)).map_err(failed)?;
        let end = extent.offset + extent.length;
        for offset in (extent.offset..end).step_by(limits::REQUEST_BYTES_MAX) {
            let length = (end - offset).min(limits::REQUEST_BYTES_MAX as u64) as u32;
            let request = pb::ReadSnapshotRequest { snapshot: snapshot.to_owned(), offset, length };
            let part = reply(client.read_snapshot(request).await)?;
            image.write_all(&part.data).map_err(failed)?;
            written_bytes += part.data.len() as u64;
        }
    }
    image.sync_all().map_err(failed)?;
    Ok(Exported { file: file.display().to_string(), size_bytes, written_bytes })
}

async fn carry_out(
    mut client: Client,
    command: SnapshotCommand,
    output: &Output,
) -> Result<ExitCode, UserError> {
    match command {
        SnapshotCommand::Create { volume, name } => {
            let request = pb::CreateSnapshotRequest { volume, name, key: String::new() };
            let snapshot = reply(client.create_snapshot(request).await)?;
            output.show(&snapshot, || many(std::slice::from_ref(&snapshot), output.wide()));
        }
        SnapshotCommand::List { volume } => {
            let snapshots = list(&mut client, volume.unwrap_or_default()).await?;
            output.show(&snapshots, || many(&snapshots, output.wide()));
        }
        SnapshotCommand::Delete { snapshot, yes } => {
            confirmed(yes, "deleting a snapshot")?;
            let deleted = reply(client.delete_snapshot(pb::DeleteSnapshotRequest { snapshot }).await)?;
            output.show(
                &deleted,
                || if deleted.existed { "deleted".into() } else { "it did not exist".into() },
            );
        }
        SnapshotCommand::Restore { snapshot, yes } => {
            confirmed(yes, "throwing away what was changed after a snapshot")?;
            let volume = reply(client.restore_snapshot(pb::RestoreSnapshotRequest { snapshot }).await)?;
            output.show(&volume, || super::volume::one(&volume, output.wide()));
        }
        SnapshotCommand::Diff { ends } => {
            let (from, to) = match ends.as_slice() {
                [from, to] => (from.as_str(), to.as_str()),
                _ => ("", ends[0].as_str()),
            };
            let (extents, _) = diff(&mut client, from, to).await?;
            let changed = extents.iter().map(|extent| extent.length).sum();
            let diff = Diff { extents, bytes: changed };
            output.show(&diff, || {
                let rows = diff.extents.iter();
                let rows = rows.map(|extent| vec![extent.offset.to_string(), extent.length.to_string()]);
                format!("{}\n{} in all", table(&["offset", "length"], rows.collect()), bytes(diff.bytes))
            });
        }
        SnapshotCommand::Export { snapshot, file } => {
            let exported = export(&mut client, &snapshot, &file).await?;
            output.show(&exported, || {
                let (written, size) = (bytes(exported.written_bytes), bytes(exported.size_bytes));
                format!("{}: {written} of {size}", exported.file)
            });
        }
    }
    Ok(ExitCode::SUCCESS)
}
