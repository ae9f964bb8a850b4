//! What a user asks of a new volume, checked: StorageClass parameters and the command line's flags.

use std::collections::BTreeMap;

use holdfast_types::{
    AccessFrom, ByteSize, ErrorCode, OnQuorumLoss, ReadPolicy, Survive, TimersPolicy, TopologyTerm,
    UserError, VolumeSpec, limits,
};

use crate::admin::pb;

/// What CSI sidecars add about the claim. Kept with the volume, of no other effect.
const METADATA: &[&str] =
    &["csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace", "csi.storage.k8s.io/pv/name"];

/// Parameters that a StorageClass may have, for the error that names them.
const KNOWN: &[&str] = &[
    "survive",
    "replicas",
    "asyncReplicas",
    "accessFrom",
    "readPolicy",
    "onQuorumLoss",
    "timers",
    "snapshotQuota",
    "encryption",
    "iops",
    "bandwidth",
    "csi.storage.k8s.io/fstype",
];

fn wrong(message: impl Into<String>, hint: impl Into<String>) -> UserError {
    UserError::new(ErrorCode::InvalidArgument, message).hint(hint)
}

fn not_built(name: &str) -> UserError {
    UserError::new(ErrorCode::Unimplemented, format!("the parameter {name} is not built yet"))
        .hint("leave it out of the StorageClass")
}

pub(crate) fn topology(terms: &[pb::TopologyTerm]) -> Vec<TopologyTerm> {
    let term = |term: &pb::TopologyTerm| TopologyTerm {
        region: term.region.clone(),
        zone: term.zone.clone(),
        node: term.node.clone(),
    };
    terms.iter().map(term).collect()
}

/// The size of a volume that must have at least `required` and at most `limit` bytes (0: no limit).
pub(crate) fn size(required: u64, limit: u64) -> Result<ByteSize, UserError> {
    let size = ByteSize::for_volume(required)?;
    if limit > 0 && size.0 > limit {
        let message =
            format!("{required} bytes are {} as whole blocks, more than the limit of {limit}", size.0);
        return Err(
            UserError::new(ErrorCode::OutOfRange, message).hint("raise the limit to a multiple of 4096")
        );
    }
    Ok(size)
}

/// The specification that a request asks for.
pub(crate) fn spec(request: &pb::CreateVolumeRequest) -> Result<VolumeSpec, UserError> {
    limits::check_name("volume", &request.name)?;
    let mut spec = VolumeSpec {
        name: request.name.clone(),
        size: size(request.size_bytes, request.limit_bytes)?,
        survive: Survive::Zone,
        replicas: None,
        allowed: topology(&request.allowed),
        preferred: topology(&request.preferred),
        on_quorum_loss: OnQuorumLoss::Suspend,
        read_policy: ReadPolicy::Nearest,
        access_from: AccessFrom::Anywhere,
        timers: TimersPolicy::Auto,
        snapshot_quota: None,
    };
    parameters(&mut spec, &request.parameters)?;
    if !request.survive.is_empty() {
        spec.survive = survive(&request.survive)?;
    }
    if request.replicas > 0 {
        spec.replicas = Some(request.replicas.try_into().unwrap_or(u8::MAX));
    }
    if spec.replicas == Some(1) && request.survive.is_empty() && !request.parameters.contains_key("survive") {
        spec.survive = Survive::None;
    }
    Ok(spec)
}

fn survive(text: &str) -> Result<Survive, UserError> {
    text.parse().map_err(|why| {
        wrong(why, "survive: zone needs three zones, or two and a witness; survive: none keeps one copy")
    })
}

/// Takes StorageClass parameters into a specification.
pub(crate) fn parameters(
    spec: &mut VolumeSpec,
    given: &std::collections::HashMap<String, String>,
) -> Result<(), UserError> {
    let sorted: BTreeMap<&String, &String> = given.iter().collect();
    for (key, value) in sorted {
        match key.as_str() {
            "survive" => spec.survive = survive(value)?,
            "replicas" => {
                let number = value.parse().map_err(|_| {
                    wrong(format!("replicas: '{value}' is no number"), "use replicas: 1, 2, 3 or 5")
                })?;
                spec.replicas = Some(number);
            }
            "accessFrom" => spec.access_from = access_from(value)?,
            "readPolicy" => spec.read_policy = read_policy(value)?,
            "onQuorumLoss" => spec.on_quorum_loss = on_quorum_loss(value)?,
            "csi.storage.k8s.io/fstype" if ["", "ext4", "xfs"].contains(&value.as_str()) => {}
            "csi.storage.k8s.io/fstype" => {
                return Err(wrong(format!("the file system '{value}' is not supported"), "use ext4 or xfs"));
            }
            metadata if METADATA.contains(&metadata) => {}
            "timers" => spec.timers = timers(value)?,
            "snapshotQuota" => spec.snapshot_quota = snapshot_quota(value)?,
            "encryption" if value == "none" => {}
            "asyncReplicas" | "encryption" | "iops" | "bandwidth" => return Err(not_built(key)),
            unknown => {
                return Err(wrong(
                    format!("there is no parameter '{unknown}'"),
                    format!("the parameters are: {}", KNOWN.join(", ")),
                ));
            }
        }
    }
    Ok(())
}

pub(crate) fn timers(text: &str) -> Result<TimersPolicy, UserError> {
    text.parse().map_err(|why| wrong(why, "use timers: auto, or timers: tight where the network is fast"))
}

/// How much snapshots may add to a volume's size, for example 10GiB, or none.
pub(crate) fn snapshot_quota(text: &str) -> Result<Option<ByteSize>, UserError> {
    if text == "none" {
        return Ok(None);
    }
    let hint = "use a number of bytes that is not zero, for example 10GiB, or none";
    match text.parse::<ByteSize>() {
        Ok(ByteSize(0)) => Err(wrong("a snapshot quota of zero permits no snapshots", hint)),
        Ok(quota) => Ok(Some(quota)),
        Err(why) => Err(wrong(format!("snapshotQuota: '{text}': {why}"), hint)),
    }
}

fn access_from(text: &str) -> Result<AccessFrom, UserError> {
    Ok(match text {
        "anywhere" => AccessFrom::Anywhere,
        "region" => AccessFrom::Region,
        "zone" => AccessFrom::Zone,
        "replica" => AccessFrom::Replica,
        other => {
            return Err(wrong(
                format!("accessFrom: '{other}' is unknown"),
                "use anywhere, region, zone or replica",
            ));
        }
    })
}

fn read_policy(text: &str) -> Result<ReadPolicy, UserError> {
    match text {
        "nearest" => Ok(ReadPolicy::Nearest),
        "leader" => Ok(ReadPolicy::Leader),
        other => Err(wrong(format!("readPolicy: '{other}' is unknown"), "use nearest or leader")),
    }
}

fn on_quorum_loss(text: &str) -> Result<OnQuorumLoss, UserError> {
    let hint = "use suspend, error, or error:30s";
    match text.split_once(':') {
        None if text == "suspend" => Ok(OnQuorumLoss::Suspend),
        None if text == "error" => Ok(OnQuorumLoss::Error { after_seconds: 1 }),
        Some(("error", duration)) => {
            let seconds =
                duration.strip_suffix('s').and_then(|number| number.parse().ok()).filter(|s| *s > 0);
            let after_seconds =
                seconds.ok_or_else(|| wrong(format!("onQuorumLoss: '{duration}' is no duration"), hint))?;
            Ok(OnQuorumLoss::Error { after_seconds })
        }
        _ => Err(wrong(format!("onQuorumLoss: '{text}' is unknown"), hint)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(parameters: &[(&str, &str)]) -> pb::CreateVolumeRequest {
        pb::CreateVolumeRequest {
            name: "a".into(),
            size_bytes: 4097,
            parameters: parameters.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_asked_is_understood_or_refused_by_name() {
        let spec = spec(&request(&[
            ("survive", "node"),
            ("onQuorumLoss", "error:30s"),
            ("timers", "tight"),
            ("snapshotQuota", "3GiB"),
            (METADATA[0], "claim"),
        ]))
        .expect("is understood");
        assert_eq!(spec.timers, TimersPolicy::Tight);
        assert_eq!(spec.snapshot_quota, Some(ByteSize(3 << 30)));
        assert_eq!((spec.size, spec.survive), (ByteSize(8192), Survive::Node));
        assert_eq!(spec.on_quorum_loss, OnQuorumLoss::Error { after_seconds: 30 });
        for (parameters, code, word) in [
            (("colour", "red"), ErrorCode::InvalidArgument, "colour"),
            (("survive", "comet"), ErrorCode::InvalidArgument, "comet"),
            (("replicas", "many"), ErrorCode::InvalidArgument, "many"),
            (("onQuorumLoss", "error:soon"), ErrorCode::InvalidArgument, "soon"),
            (("timers", "loose"), ErrorCode::InvalidArgument, "loose"),
            (("snapshotQuota", "0"), ErrorCode::InvalidArgument, "zero"),
            (("snapshotQuota", "much"), ErrorCode::InvalidArgument, "much"),
            (("encryption", "aes-xts"), ErrorCode::Unimplemented, "encryption"),
            (("csi.storage.k8s.io/fstype", "ntfs"), ErrorCode::InvalidArgument, "ntfs"),
        ] {
            let refused = super::spec(&request(&[parameters])).expect_err("is refused");
            assert_eq!(refused.code, code);
            assert!(refused.message.contains(word), "{refused}");
        }
    }

    #[test]
    fn sizes_round_up_within_their_limit() {
        assert_eq!(size(1, 0).map_err(|e| e.code), Ok(ByteSize(4096)));
        assert_eq!(size(4097, 8000).map_err(|e| e.code), Err(ErrorCode::OutOfRange));
        assert_eq!(size(0, 0).map_err(|e| e.code), Err(ErrorCode::InvalidArgument));
        assert_eq!(size(u64::MAX, 0).map_err(|e| e.code), Err(ErrorCode::OutOfRange));
    }
}
