//! Snapshots: idempotent by name over all volumes, ids that say whose they are, lists in pages.

use std::collections::HashMap;

use holdfast_types::{ErrorCode, SnapshotId};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tonic::Status;

use super::{bytes, existing, is_taken};
use crate::admin::{Admin, pb};
use crate::arguments;
use crate::errors::{invalid, status};
use crate::names::{is_volume_id, volume_name};
use crate::proto;

/// What sidecars add about the snapshot (`--extra-create-metadata`): no property of it.
const METADATA: [&str; 3] = [
    "csi.storage.k8s.io/volumesnapshot/name",
    "csi.storage.k8s.io/volumesnapshot/namespace",
    "csi.storage.k8s.io/volumesnapshotcontent/name",
];

/// Between the volume's id and the snapshot's.
const SEPARATOR: char = '@';

/// A snapshot's id as COs see it.
fn handle(volume: &str, snapshot: &str) -> String {
    format!("{volume}{SEPARATOR}{snapshot}")
}

/// The volume's and the snapshot's id; none if the text cannot be a snapshot's id.
pub(super) fn parse(text: &str) -> Option<(&str, &str)> {
    let (volume, snapshot) = text.split_once(SEPARATOR)?;
    (is_volume_id(volume) && snapshot.parse::<SnapshotId>().is_ok()).then_some((volume, snapshot))
}

/// The handle of the snapshot that a volume was copied from.
pub(super) fn handle_of_source(volume: &pb::Volume) -> String {
    handle(&volume.source_volume, &volume.source_snapshot)
}

/// A snapshot by the id that COs know, or none.
pub(super) async fn find(admin: &Admin, text: &str) -> Result<Option<pb::Snapshot>, Status> {
    let Some((volume, snapshot)) = parse(text) else { return Ok(None) };
    match admin.get_snapshot(pb::GetSnapshotRequest { snapshot: snapshot.to_owned() }).await {
        Ok(found) => Ok(Some(found).filter(|found| found.volume_id == volume && is_listed(found))),
        Err(error) if error.code == ErrorCode::NotFound => Ok(None),
        Err(error) => Err(status(error)),
    }
}

/// Those that are being deleted are gone for COs; those that a copy is made from go by themselves.
fn is_listed(snapshot: &pb::Snapshot) -> bool {
    snapshot.state != "deleting" && snapshot.copy.is_empty()
}

/// A snapshot as CSI shows it.
fn shown(snapshot: &pb::Snapshot) -> Result<proto::Snapshot, Status> {
    let created = OffsetDateTime::parse(&snapshot.created, &Rfc3339)
        .map_err(|error| Status::internal(format!("'{}' is no time: {error}", snapshot.created)))?;
    Ok(proto::Snapshot {
        size_bytes: bytes(snapshot.size_bytes),
        snapshot_id: handle(&snapshot.volume_id, &snapshot.id),
        source_volume_id: snapshot.volume_id.clone(),
        creation_time: Some(prost_types::Timestamp {
            seconds: created.unix_timestamp(),
            nanos: created.nanosecond() as i32,
        }),
        ready_to_use: snapshot.ready,
        group_snapshot_id: String::new(),
    })
}

/// A checked request for a new snapshot.
pub(super) struct Order {
    /// Unique in the cluster, as the CO sees it.
    key: String,
    /// In the catalog.
    name: String,
    volume: String,
}

impl Order {
    pub(super) fn check(request: proto::CreateSnapshotRequest) -> Result<Self, Status> {
        let key = arguments::name(&request.name)?.to_owned();
        let volume = arguments::text("source_volume_id", &request.source_volume_id)?.to_owned();
        check_parameters(&request.parameters)?;
        Ok(Self { name: volume_name(&key), key, volume })
    }

    pub(super) fn subject(&self) -> String {
        format!("snapshot {}", self.key)
    }
}

fn check_parameters(parameters: &HashMap<String, String>) -> Result<(), Status> {
    arguments::map("parameters", parameters)?;
    let mut unknown: Vec<_> = parameters.keys().filter(|key| !METADATA.contains(&key.as_str())).collect();
    unknown.sort_unstable();
    match unknown.first() {
        Some(key) => Err(invalid(format!("there is no parameter '{key}' of snapshots: leave it out"))),
        None => Ok(()),
    }
}

pub(super) async fn create(admin: Admin, order: Order) -> Result<proto::CreateSnapshotResponse, Status> {
    if let Some(snapshot) = keyed(&admin, &order.key).await? {
        if snapshot.volume_id != order.volume {
            return Err(Status::already_exists(format!(
                "there is a snapshot {} of volume {}, not of {}: choose another name",
                order.key, snapshot.volume_id, order.volume
            )));
        }
        if snapshot.ready {
            return Ok(proto::CreateSnapshotResponse { snapshot: Some(shown(&snapshot)?) });
        }
    }
    // A CO must not reach a volume that merely has such a name.
    existing(&admin, &order.volume).await?;
    let request = pb::CreateSnapshotRequest { volume: order.volume, name: order.name, key: order.key };
    let snapshot = match admin.create_snapshot(request).await {
        Ok(snapshot) => snapshot,
        Err(error) if is_taken(&error) => return Err(Status::already_exists(status(error).message())),
        Err(error) => return Err(status(error)),
    };
    Ok(proto::CreateSnapshotResponse { snapshot: Some(shown(&snapshot)?) })
}

async fn keyed(admin: &Admin, key: &str) -> Result<Option<pb::Snapshot>, Status> {
    let request = pb::ListSnapshotsRequest { key: key.to_owned(), ..Default::default() };
    let page = admin.list_snapshots(request).await.map_err(status)?;
    Ok(page.snapshots.into_iter().find(is_listed))
}

pub(super) async fn delete(admin: Admin, id: String) -> Result<proto::DeleteSnapshotResponse, Status> {
    // What cannot be one of ours does not exist.
    if let Some(snapshot) = find(&admin, &id).await? {
        let request = pb::DeleteSnapshotRequest { snapshot: snapshot.id };
        admin.delete_snapshot(request).await.map_err(status)?;
    }
    Ok(proto::DeleteSnapshotResponse {})
}

pub(super) async fn list(
    admin: &Admin,
    request: proto::ListSnapshotsRequest,
) -> Result<proto::ListSnapshotsResponse, Status> {
    let max = u32::try_from(request.max_entries)
        .map_err(|_| invalid(format!("max_entries {} is negative", request.max_entries)))?;
    let token = request.starting_token;
    if !token.is_empty() && token.parse::<SnapshotId>().is_err() {
        return Err(Status::aborted(format!("'{token}' is no token of a list: begin anew, without a token")));
    }
    let (snapshots, next_token) = if !request.snapshot_id.is_empty() {
        let found = find(admin, &request.snapshot_id).await?;
        let of = &request.source_volume_id;
        let wanted = |found: &pb::Snapshot| of.is_empty() || found.volume_id == *of;
        (found.filter(wanted).into_iter().collect(), String::new())
    } else if request.source_volume_id.is_empty() || is_volume_id(&request.source_volume_id) {
        pages(admin, request.source_volume_id, max as usize, token).await?
    } else {
        (Vec::new(), String::new())
    };
    let entry = |snapshot: &pb::Snapshot| {
        Ok(proto::list_snapshots_response::Entry { snapshot: Some(shown(snapshot)?) })
    };
    let entries = snapshots.iter().map(entry).collect::<Result<_, Status>>()?;
    Ok(proto::ListSnapshotsResponse { entries, next_token })
}

/// `max` snapshots that COs see, all of them if that is 0, and where to go on; what the cluster's pages have besides
/// is left out.
async fn pages(
    admin: &Admin,
    volume: String,
    max: usize,
    mut token: String,
) -> Result<(Vec<pb::Snapshot>, String), Status> {
    let mut listed: Vec<pb::Snapshot> = Vec::new();
    loop {
        let left = if max == 0 { 0 } else { (max - listed.len()) as u32 };
        let request =
            pb::ListSnapshotsRequest { volume: volume.clone(), max: left, token, ..Default::default() };
        let page = match admin.list_snapshots(request).await {
            Ok(page) => page,
            Err(error) if error.code == ErrorCode::NotFound => return Ok((listed, String::new())),
            Err(error) => return Err(status(error)),
        };
        listed.extend(page.snapshots.into_iter().filter(is_listed));
        if page.next_token.is_empty() || (max > 0 && listed.len() >= max) {
            return Ok((listed, page.next_token));
        }
        token = page.next_token;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn ids_say_whose_they_are_and_others_are_none() {
        let (volume, snapshot) = ("0".repeat(31) + "a", "0".repeat(31) + "b");
        let id = handle(&volume, &snapshot);
        assert!(id.len() <= 128);
        assert_eq!(parse(&id), Some((volume.as_str(), snapshot.as_str())));
        for other in ["", "a@b", &volume, &format!("{volume}@"), &format!("a@{snapshot}"), "non-existing"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_request_is_understood_or_refused_by_name() {
        let request = |name: &str, volume: &str, parameters: &[&str]| proto::CreateSnapshotRequest {
            name: name.into(),
            source_volume_id: volume.into(),
            parameters: parameters.iter().map(|key| ((*key).to_owned(), "x".to_owned())).collect(),
            ..Default::default()
        };
        let order = Order::check(request("größe", "v", &METADATA)).expect("is understood");
        assert_eq!(order.key, "größe");
        assert!(holdfast_types::limits::check_name("snapshot", &order.name).is_ok());
        assert!(Order::check(request(&"n".repeat(128), "v", &[])).is_ok());
        for (wrong, word) in [
            (request("", "v", &[]), "name"),
            (request("s", "", &[]), "source_volume_id"),
            (request(&"n".repeat(129), "v", &[]), "name"),
            (request("a\u{1}", "v", &[]), "control"),
            (request("s", "v", &["colour"]), "colour"),
        ] {
            let refused = Order::check(wrong).err().expect("is refused");
            assert_eq!(refused.code(), Code::InvalidArgument);
            assert!(refused.message().contains(word), "{refused:?}");
        }
    }

    #[test]
    fn a_snapshot_tells_when_it_was_made() {
        let snapshot = pb::Snapshot { created: "2025-11-25T13:42:03.456Z".into(), ..Default::default() };
        let time = shown(&snapshot).expect("is shown").creation_time.expect("has a time");
        assert_eq!((time.seconds, time.nanos), (1_764_078_123, 456_000_000));
        assert!(shown(&pb::Snapshot::default()).is_err());
    }
}
