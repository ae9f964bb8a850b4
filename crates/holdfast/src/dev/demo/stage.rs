//! The cluster as the demonstration's director sees it: volumes by the admin API, faults by the supervisor.
//!
//! What is asked while a quorum is being found anew is asked again, for a bounded time; nothing is assumed that the
//! cluster did not say.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;
use holdfast_node::admin::pb;
use holdfast_types::{ErrorCode, UserError};

use super::{VOLUME_BYTES, failed};
use crate::client::{Client, connect, reply};
use crate::dev::Shared;
use crate::dev::cluster::NodeDescription;

/// The volume's name.
pub(super) const VOLUME: &str = "demo";
/// How long anything may take that waits for a quorum, a lease or a restart.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Between looks at the volume.
const LOOK: Duration = Duration::from_millis(50);

/// The running cluster.
pub(super) struct Stage {
    cluster: Shared,
    directory: PathBuf,
    nodes: Vec<NodeDescription>,
}

/// Whether asking again may help.
fn passing(error: &UserError) -> bool {
    matches!(error.code, ErrorCode::Unavailable | ErrorCode::TimedOut)
}

impl Stage {
    pub(super) async fn new(cluster: Shared, directory: &Path) -> Self {
        let nodes = cluster.lock().await.description().nodes;
        Self { cluster, directory: directory.to_owned(), nodes }
    }

    /// Everything is below it.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }
    /// The nodes, whether they run or not.
    pub(super) fn nodes(&self) -> &[NodeDescription] {
        &self.nodes
    }
    /// A node's zone.
    pub(super) fn zone_of(&self, node: &str) -> Result<String, UserError> {
        let found = self.nodes.iter().find(|other| other.name == node);
        found.map(|node| node.zone.clone()).ok_or_else(|| failed("the cluster has no node", node))
    }

    /// Asks until it is done; what cannot succeed is not asked again.
    async fn insist<T>(&self, call: impl AsyncFn(Client) -> Result<T, UserError>) -> Result<T, UserError> {
        let until = Instant::now() + PATIENCE;
        loop {
            let done = async { call(connect(&self.directory.join("admin.sock")).await?).await };
            match done.await {
                Err(error) if passing(&error) && Instant::now() < until => tokio::time::sleep(LOOK).await,
                done => return done,
            }
        }
    }

    /// Makes the volume; it survives a zone.
    pub(super) async fn create(&self) -> Result<pb::Volume, UserError> {
        let request = pb::CreateVolumeRequest {
            name: VOLUME.into(),
            size_bytes: VOLUME_BYTES,
            survive: "zone".into(),
            ..Default::default()
        };
        self.insist(async |mut client| reply(client.create_volume(request.clone()).await)).await
    }

    /// The volume with its replicas.
    pub(super) async fn volume(&self) -> Result<pb::Volume, UserError> {
        let request = pb::GetVolumeRequest { name: VOLUME.into() };
        self.insist(async |mut client| reply(client.get_volume(request.clone()).await)).await
    }

    /// Attaches the volume to a node.
    pub(super) async fn attach(
        &self,
        node: &str,
        frontend: &str,
        force: bool,
    ) -> Result<pb::Attachment, UserError> {
        let request = pb::AttachVolumeRequest {
            name: VOLUME.into(),
            node: node.into(),
            frontend: frontend.into(),
            force,
            read_only: false,
        };
        self.insist(async |mut client| reply(client.attach_volume(request.clone()).await)).await
    }

    /// Detaches the volume from where it is.
    pub(super) async fn detach(&self) -> Result<(), UserError> {
        let request = pb::DetachVolumeRequest { name: VOLUME.into(), force: false, node: String::new() };
        self.insist(async |mut client| reply(client.detach_volume(request.clone()).await)).await.map(drop)
    }

    /// Gives the leadership to a replica.
    pub(super) async fn lead(&self, replica: u64) -> Result<pb::Volume, UserError> {
        let request = pb::LeadReplicaRequest { volume: VOLUME.into(), replica };
        let until = Instant::now() + PATIENCE;
        loop {
            let asked = self.insist(async |mut client| reply(client.lead_replica(request.clone()).await));
            match asked.await {
                // It is behind, or did not take it: both pass.
                Err(error) if error.code == ErrorCode::Refused && Instant::now() < until => {
                    tokio::time::sleep(LOOK).await;
                }
                done => return done,
            }
        }
    }

    /// Compares all replicas.
    pub(super) async fn verify(&self) -> Result<pb::VerifyReport, UserError> {
        let request = pb::VerifyVolumeRequest { name: VOLUME.into() };
        self.insist(async |mut client| reply(client.verify_volume(request.clone()).await)).await
    }

    /// Looks at the volume until `seen` sees what it waits for.
    pub(super) async fn until<T>(
        &self,
        what: &str,
        mut seen: impl FnMut(&pb::Volume) -> Option<T>,
    ) -> Result<T, UserError> {
        let until = Instant::now() + PATIENCE;
        loop {
            let volume = self.volume().await?;
            if let Some(found) = seen(&volume) {
                return Ok(found);
            }
            if Instant::now() > until {
                let message =
                    format!("{what} does not happen in {PATIENCE:?}; the volume is {}", volume.health);
                return Err(UserError::new(ErrorCode::TimedOut, message).hint(format!(
                    "the daemons' logs are {}/*/log; --dir keeps them",
                    self.directory.display()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Ends when every replica is healthy and has applied at least `index`.
    pub(super) async fn healed(&self, index: u64) -> Result<pb::Volume, UserError> {
        self.until("the replicas' healing", |volume| is_healed(volume, index).then(|| volume.clone())).await
    }

    /// SIGKILL of every daemon of a zone.
    pub(super) async fn kill(&self, zone: &str) -> Result<usize, UserError> {
        let mut cluster = self.cluster.lock().await;
        let nodes = cluster.select(zone)?.len();
        cluster.kill(zone).await.map(|()| nodes)
    }

    /// Starts a zone again.
    pub(super) async fn start(&self, zone: &str) -> Result<(), UserError> {
        self.cluster.lock().await.start(zone).await
    }

    /// A guest's connection to the volume at a node.
    pub(super) async fn connect(&self, node: &str) -> std::io::Result<NbdClient> {
        NbdClient::connect(&self.directory.join(node).join("nbd.sock"), VOLUME).await
    }
}

/// Whether nothing is behind.
fn is_healed(volume: &pb::Volume, index: u64) -> bool {
    volume.health == "healthy"
        && volume.replicas.iter().all(|replica| replica.state == "healthy" && replica.applied_index >= index)
}

/// The replica that leads.
pub(super) fn leader(volume: &pb::Volume) -> Option<&pb::Replica> {
    volume.replicas.iter().find(|replica| replica.role == "leader")
}

/// How far the volume's log is known to be committed.
pub(super) fn committed(volume: &pb::Volume) -> u64 {
    leader(volume).map_or(0, |leader| leader.committed_index)
}

/// Whether every replica that answers has dropped its log up to `index`, that index included: nobody who has not seen
/// it can be brought up to date from a log any more.
pub(super) fn is_purged_past(volume: &pb::Volume, index: u64) -> bool {
    let mut living = volume.replicas.iter().filter(|replica| replica.state != "unreachable").peekable();
    living.peek().is_some() && living.all(|replica| replica.purged_index >= index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(replicas: &[(&str, &str, u64, u64)]) -> pb::Volume {
        let replicas = replicas.iter().map(|(role, state, applied, purged)| pb::Replica {
            role: (*role).into(),
            state: (*state).into(),
            applied_index: *applied,
            committed_index: *applied,
            purged_index: *purged,
            ..Default::default()
        });
        pb::Volume { health: "healthy".into(), replicas: replicas.collect(), ..Default::default() }
    }

    #[test]
    fn a_log_is_purged_past_an_index_when_no_living_replica_has_it_any_more() {
        let away = ("voter", "unreachable", 0, 0);
        assert!(is_purged_past(
            &volume(&[("leader", "healthy", 90, 40), ("voter", "healthy", 90, 41), away]),
            40
        ));
        assert!(!is_purged_past(
            &volume(&[("leader", "healthy", 90, 40), ("voter", "healthy", 90, 39), away]),
            40
        ));
        assert!(!is_purged_past(&volume(&[away]), 0), "nobody answers: nothing is known");
    }

    #[test]
    fn healed_is_every_replica() {
        assert!(is_healed(&volume(&[("leader", "healthy", 90, 0), ("voter", "healthy", 90, 0)]), 90));
        assert!(!is_healed(&volume(&[("leader", "healthy", 90, 0), ("voter", "healthy", 89, 0)]), 90));
        assert!(!is_healed(&volume(&[("leader", "healthy", 90, 0), ("voter", "rebuilding", 90, 0)]), 90));
        assert_eq!(committed(&volume(&[("voter", "healthy", 7, 0), ("leader", "healthy", 9, 0)])), 9);
    }
}
