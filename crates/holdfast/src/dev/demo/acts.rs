//! What the demonstrations have in common: where the leader is, how a zone was healed, whether replicas are equal.

use std::time::{Duration, Instant};

use holdfast_node::admin::pb;
use holdfast_types::{ByteSize, ErrorCode, UserError};
use serde_json::json;

use super::failed;
use super::report::Report;
use super::stage::{self, Stage};

/// Gives the leadership to a zone that is not the guest's, so that the leader's loss is not the guest's. The leader
/// follows an attachment, so it may have to be given away more than once. The zone and node that lead then.
pub(super) async fn leader_outside(stage: &Stage, home: &str) -> Result<(String, String), UserError> {
    let until = Instant::now() + stage::PATIENCE;
    loop {
        let volume = stage.volume().await?;
        match stage::leader(&volume) {
            Some(leader) if leader.zone != home => return Ok((leader.zone.clone(), leader.node.clone())),
            _ if Instant::now() > until => {
                let message = format!("the leader does not stay outside of zone {home}");
                return Err(UserError::new(ErrorCode::TimedOut, message));
            }
            Some(_) => {
                let other = volume.replicas.iter().find(|replica| replica.zone != home);
                let other = other.ok_or_else(|| failed("the volume", "all replicas are in one zone"))?;
                stage.lead(other.id).await?;
            }
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Tells how a zone's replica caught up.
pub(super) fn road(report: &mut Report<'_>, zone: &str, healed: &pb::Volume) {
    let Some(replica) = healed.replicas.iter().find(|replica| replica.zone == zone) else { return };
    let (road, sent) = (replica.healed_by.as_str(), replica.healed_bytes);
    let text = match road {
        "" => "it was not behind".into(),
        road => format!("by {road}, {} sent", ByteSize(sent)),
    };
    let facts = json!({"healed_by": road, "sent_bytes": sent});
    report.fact("healed", format!("{}: {text}", replica.node), facts);
}

/// Whether a verification found all replicas equal and sound.
pub(super) fn equal(verified: &pb::VerifyReport) -> Result<String, String> {
    let bad: u64 = verified.replicas.iter().map(|replica| replica.bad_blocks).sum();
    let text = format!("{} replicas at index {}, {bad} bad blocks", verified.replicas.len(), verified.index);
    if verified.equal && bad == 0 && verified.replicas.len() > 1 {
        return Ok(text);
    }
    let told = |replica: &pb::ReplicaDigest| format!("{}: {}{}", replica.node, replica.digest, replica.error);
    let all: Vec<String> = verified.replicas.iter().map(told).collect();
    Err(format!("{text}: {}", all.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_that_differ_or_have_bad_blocks_are_not_equal() {
        let digest = |bad_blocks| pb::ReplicaDigest { digest: "d".into(), bad_blocks, ..Default::default() };
        let report =
            |equal, bad| pb::VerifyReport { index: 5, equal, replicas: vec![digest(0), digest(bad)] };
        assert!(equal(&report(true, 0)).is_ok());
        assert!(equal(&report(false, 0)).is_err());
        assert!(equal(&report(true, 1)).is_err());
        assert!(equal(&pb::VerifyReport { index: 5, equal: true, replicas: vec![digest(0)] }).is_err());
    }
}
