//! Making a volume: idempotent by name, and placed as the request's topology says.
//!
//! The specification's rule (x topologies from which the volume is accessible, n requisite ones): where the requisite
//! ones can hold all replicas, they do. A single one that names a whole place is what a provisioner sends for the node
//! of a pod (strict topology): it cannot bound a volume that survives a zone, so it says where the first replica
//! stands and from where the volume must be usable, and the others stand around it. (docs/decisions/0030)

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use holdfast_types::{ErrorCode, UserError};
use tonic::Status;

use super::{FSTYPE_PARAMETER, existing, is_taken, snapshots};
use crate::admin::{Admin, pb};
use crate::arguments::{self, Wanted};
use crate::errors::{invalid, status};
use crate::names::volume_name;
use crate::proto::volume_content_source::{SnapshotSource, Type, VolumeSource};
use crate::{proto, topology};

/// How long an earlier call that is still making the volume is waited for.
const SETTLE_PATIENCE: Duration = Duration::from_secs(20);
/// Between looks at a volume that is being made.
const LOOK: Duration = Duration::from_millis(100);
/// What sidecars add about the claim (`--extra-create-metadata`): no property of the volume.
const METADATA: [&str; 3] =
    ["csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace", "csi.storage.k8s.io/pv/name"];

/// A checked request.
pub(super) struct Order {
    name: String,
    wanted: Wanted,
    parameters: HashMap<String, String>,
    requisite: Vec<pb::TopologyTerm>,
    preferred: Vec<pb::TopologyTerm>,
    source: Option<Source>,
    /// Whether `wanted` is only what a volume has that nobody asks for.
    any_size: bool,
}

/// What a volume begins with, by the CO's id.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Source {
    Snapshot(String),
    Volume(String),
}

/// The content source of a request.
fn source(given: Option<&proto::VolumeContentSource>) -> Result<Option<Source>, Status> {
    let Some(given) = given else { return Ok(None) };
    match &given.r#type {
        Some(Type::Snapshot(source)) => {
            let id = arguments::text("volume_content_source.snapshot.snapshot_id", &source.snapshot_id)?;
            Ok(Some(Source::Snapshot(id.to_owned())))
        }
        Some(Type::Volume(source)) => {
            let id = arguments::text("volume_content_source.volume.volume_id", &source.volume_id)?;
            Ok(Some(Source::Volume(id.to_owned())))
        }
        None => Err(invalid("volume_content_source is neither a snapshot nor a volume")),
    }
}

/// What a volume began with, if anything.
fn source_of(volume: &pb::Volume) -> Option<Source> {
    match (volume.source_volume.is_empty(), volume.source_snapshot.is_empty()) {
        (true, _) => None,
        (false, true) => Some(Source::Volume(volume.source_volume.clone())),
        (false, false) => Some(Source::Snapshot(snapshots::handle_of_source(volume))),
    }
}

/// The same as CSI shows it.
pub(super) fn content_source(volume: &pb::Volume) -> Option<proto::VolumeContentSource> {
    let r#type = match source_of(volume)? {
        Source::Snapshot(snapshot_id) => Type::Snapshot(SnapshotSource { snapshot_id }),
        Source::Volume(volume_id) => Type::Volume(VolumeSource { volume_id }),
    };
    Some(proto::VolumeContentSource { r#type: Some(r#type) })
}

/// A volume that is being filled cannot be used yet; COs take ABORTED for "it is being worked on, ask again".
pub(super) fn check_filled(volume: &pb::Volume) -> Result<(), Status> {
    if volume.phase != "filling" {
        return Ok(());
    }
    let (name, percent) = (&volume.name, volume.filled_percent);
    Err(Status::aborted(format!("volume {name} is being filled: {percent} %: ask again")))
}

impl Order {
    pub(super) fn check(request: proto::CreateVolumeRequest) -> Result<Self, Status> {
        let name = volume_name(arguments::name(&request.name)?);
        let uses = arguments::capabilities(&request.volume_capabilities)?;
        arguments::map("parameters", &request.parameters)?;
        let source = source(request.volume_content_source.as_ref())?;
        if !request.mutable_parameters.is_empty() {
            return Err(invalid("mutable_parameters are not supported: they are not built yet"));
        }
        let wanted = arguments::capacity(request.capacity_range.as_ref())?;
        let fstype = request.parameters.get(FSTYPE_PARAMETER).map(String::as_str).unwrap_or_default();
        arguments::room_for_filesystem(&uses, arguments::filesystem(fstype)?, wanted)?;
        let asked = request.accessibility_requirements.unwrap_or_default();
        Ok(Self {
            name,
            wanted,
            parameters: request.parameters,
            requisite: topology::terms(&asked.requisite)?,
            preferred: topology::terms(&asked.preferred)?,
            source,
            any_size: request.capacity_range.is_none_or(|range| range.required_bytes == 0),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn request(
        &self,
        allowed: &[pb::TopologyTerm],
        preferred: &[pb::TopologyTerm],
    ) -> pb::CreateVolumeRequest {
        pb::CreateVolumeRequest {
            name: self.name.clone(),
            size_bytes: self.wanted.required,
            limit_bytes: self.wanted.limit,
            allowed: allowed.to_vec(),
            preferred: preferred.to_vec(),
            parameters: self.parameters.clone(),
            source_snapshot: match &self.source {
                Some(Source::Snapshot(id)) => {
                    snapshots::parse(id).map(|(_, snapshot)| snapshot.to_owned()).unwrap_or_default()
                }
                _ => String::new(),
            },
            source_volume: match &self.source {
                Some(Source::Volume(id)) => id.clone(),
                _ => String::new(),
            },
            ..Default::default()
        }
    }

    /// What is copied must be there and must fit; a size that nobody asks for is that of what is copied.
    async fn check_source(&mut self, admin: &Admin) -> Result<(), Status> {
        let size = match &self.source {
            None => return Ok(()),
            Some(Source::Snapshot(id)) => {
                let found = snapshots::find(admin, id).await?;
                found.ok_or_else(|| Status::not_found(format!("there is no snapshot {id}")))?.size_bytes
            }
            Some(Source::Volume(id)) => existing(admin, id).await?.size_bytes,
        };
        if self.any_size {
            self.wanted.required = size;
        }
        let Wanted { required, limit } = self.wanted;
        if required < size || (limit > 0 && limit < size) {
            let most = if limit == 0 { required } else { limit.min(required) };
            return Err(Status::out_of_range(format!(
                "what is copied has {size} bytes: {most} are no room for it: ask for that size or more"
            )));
        }
        Ok(())
    }

    /// The one place that the request names, whole.
    fn single_place(&self) -> Option<&pb::TopologyTerm> {
        match &self.requisite[..] {
            [one] if !one.region.is_empty() && !one.zone.is_empty() => Some(one),
            _ => None,
        }
    }
}

/// In which parameters a volume differs from what is asked for, in words.
pub(super) fn differing(volume: &pb::Volume, asked: &HashMap<String, String>) -> Option<String> {
    let relevant = |parameters: &HashMap<String, String>| -> BTreeMap<String, String> {
        let kept = parameters.iter().filter(|(key, _)| !METADATA.contains(&key.as_str()));
        kept.map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    let (has, asked) = (relevant(&volume.parameters), relevant(asked));
    let key = has.keys().chain(asked.keys()).find(|key| has.get(*key) != asked.get(*key))?;
    let value = |from: &BTreeMap<String, String>| from.get(key).cloned().unwrap_or_else(|| "(none)".into());
    Some(format!("volume {} has {key}: {}, not {}", volume.name, value(&has), value(&asked)))
}

/// Makes the volume, or finds the one that was made before.
pub(super) async fn create(admin: &Admin, mut order: Order) -> Result<pb::Volume, Status> {
    if let Some(volume) = named(admin, &order.name).await? {
        return adopt(admin, volume, &order).await;
    }
    order.check_source(admin).await?;
    match place(admin, &order).await {
        Ok(volume) => settled(admin, usable(admin, volume, &order).await?).await,
        // Another controller was faster, or an earlier call is still at it.
        Err(error) if is_taken(&error) => match named(admin, &order.name).await? {
            Some(volume) => adopt(admin, volume, &order).await,
            None => Err(Status::aborted(format!("volume {} is being deleted: try again", order.name))),
        },
        Err(error) => Err(status(error)),
    }
}

/// The volume of that very name.
async fn named(admin: &Admin, name: &str) -> Result<Option<pb::Volume>, Status> {
    let found = admin.find(name).await.map_err(status)?;
    Ok(found.filter(|volume| volume.name == name))
}

async fn place(admin: &Admin, order: &Order) -> Result<pb::Volume, UserError> {
    let bounded = admin.create_volume(order.request(&order.requisite, &order.preferred)).await;
    match (bounded, order.single_place()) {
        (Err(error), Some(place)) if error.code == ErrorCode::ResourceExhausted => {
            admin.create_volume(order.request(&[], std::slice::from_ref(place))).await
        }
        (result, _) => result,
    }
}

/// A volume just made, if it can be used where it must be.
async fn usable(admin: &Admin, volume: pb::Volume, order: &Order) -> Result<pb::Volume, Status> {
    if topology::reachable(&volume.accessible, &order.requisite) {
        return Ok(volume);
    }
    // Nobody has been told of it yet, so nobody misses it.
    let request = pb::DeleteVolumeRequest { name: volume.id.clone() };
    admin.delete_volume(request).await.map_err(status)?;
    Err(Status::resource_exhausted(format!(
        "volume {} can be placed, but not so that it is accessible from where it is required: there is no room there",
        order.name
    )))
}

/// The volume that stands there under that name, if it is what is asked for. Where it stands counts, not what an earlier
/// request said about it: a retry may come with the topology of another node.
async fn adopt(admin: &Admin, volume: pb::Volume, order: &Order) -> Result<pb::Volume, Status> {
    let taken = |why: String| {
        Err(Status::already_exists(format!("{why}: choose another name, or ask for exactly what is there")))
    };
    if source_of(&volume) != order.source {
        return taken(format!("there is a volume {} that began with other content", volume.name));
    }
    let mut wanted = order.wanted;
    if order.any_size && order.source.is_some() {
        wanted.required = 0;
    }
    if !wanted.allows(volume.size_bytes) {
        let limit = if wanted.limit == 0 { "any more".into() } else { format!("at most {}", wanted.limit) };
        return taken(format!(
            "there is a volume {} of {} bytes, not of at least {} and {limit}",
            volume.name, volume.size_bytes, wanted.required
        ));
    }
    if let Some(why) = differing(&volume, &order.parameters) {
        return taken(why);
    }
    if !topology::reachable(&volume.accessible, &order.requisite) {
        return taken(format!("volume {} is not accessible from where it is required", volume.name));
    }
    settled(admin, volume).await
}

/// Waits until a volume that is being made has a leader and what it begins with, for a while: a large copy takes
/// longer than any call may, and is asked for again.
async fn settled(admin: &Admin, mut volume: pb::Volume) -> Result<pb::Volume, Status> {
    let until = tokio::time::Instant::now() + SETTLE_PATIENCE;
    while volume.phase == "filling" || (volume.health == "recovering" && volume.leader.is_empty()) {
        if tokio::time::Instant::now() > until {
            check_filled(&volume)?;
            return Err(Status::unavailable(format!("volume {} is not ready yet: try again", volume.name)));
        }
        tokio::time::sleep(LOOK).await;
        volume = super::existing(admin, &volume.id).await?;
    }
    Ok(volume)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::volume_capability::access_mode::Mode;
    use crate::proto::volume_capability::{AccessMode, AccessType, BlockVolume};
    use tonic::Code;

    fn request(requisite: &[&[(&str, &str)]]) -> proto::CreateVolumeRequest {
        let topology = |segments: &&[(&str, &str)]| proto::Topology {
            segments: segments.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        };
        proto::CreateVolumeRequest {
            name: "pvc-1".into(),
            volume_capabilities: vec![proto::VolumeCapability {
                access_type: Some(AccessType::Block(BlockVolume {})),
                access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            }],
            accessibility_requirements: Some(proto::TopologyRequirement {
                requisite: requisite.iter().map(topology).collect(),
                preferred: vec![],
            }),
            ..Default::default()
        }
    }

    #[test]
    fn only_one_whole_place_is_taken_for_the_place_of_a_pod() {
        let (region, zone) = ((topology::REGION, "r"), (topology::ZONE, "z"));
        let single = |requisite: &[&[(&str, &str)]]| {
            Order::check(request(requisite)).expect("is understood").single_place().is_some()
        };
        assert!(single(&[&[region, zone]]));
        assert!(!single(&[&[zone]]));
        assert!(!single(&[&[region]]));
        assert!(!single(&[&[region, zone], &[region, (topology::ZONE, "y")]]));
        assert!(!single(&[]));
    }

    #[test]
    fn what_is_not_built_or_says_nothing_is_refused() {
        let mut clone = request(&[]);
        clone.volume_content_source = Some(proto::VolumeContentSource::default());
        let mut mutable = request(&[]);
        mutable.mutable_parameters.insert("iops".into(), "7".into());
        for wrong in [clone, mutable] {
            let refused = Order::check(wrong).err().map(|status| status.code());
            assert_eq!(refused, Some(Code::InvalidArgument));
        }
    }

    #[test]
    fn a_source_is_shown_as_it_was_asked_for() {
        let id = |digit: &str| digit.repeat(32);
        let volume = |volume: String, snapshot: String| pb::Volume {
            source_volume: volume,
            source_snapshot: snapshot,
            ..Default::default()
        };
        assert_eq!(content_source(&volume(String::new(), String::new())), None);
        for one in [volume(id("1"), String::new()), volume(id("1"), id("2"))] {
            let echoed = content_source(&one);
            assert_eq!(source(echoed.as_ref()).expect("is understood"), source_of(&one));
            assert!(echoed.is_some());
        }
        assert_eq!(
            source_of(&volume(id("1"), id("2"))),
            Some(Source::Snapshot(format!("{}@{}", id("1"), id("2"))))
        );
        let filling = pb::Volume { phase: "filling".into(), filled_percent: 43, ..Default::default() };
        let refused = check_filled(&filling).expect_err("is refused");
        assert_eq!(refused.code(), Code::Aborted);
        assert!(refused.message().contains("43 %"), "{refused:?}");
    }

    #[test]
    fn differing_parameters_are_named() {
        let parameters = HashMap::from([("survive".to_owned(), "zone".to_owned())]);
        let volume = pb::Volume { name: "a".into(), parameters: parameters.clone(), ..Default::default() };
        assert_eq!(differing(&volume, &parameters), None);
        let mut with_claim = parameters.clone();
        with_claim.insert(METADATA[0].into(), "claim".into());
        assert_eq!(differing(&volume, &with_claim), None);
        let why = differing(&volume, &HashMap::new()).expect("differs");
        assert!(why.contains("survive: zone"), "{why}");
    }
}
