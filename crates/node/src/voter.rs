//! What a store says of fences: what a leader there has applied, and the signature of a voter there (INV-CERT).

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_catalog::CatalogClient;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::catalog::VolumeRecord;
use holdfast_protocol::fence::{FenceStatement, NotSigned};
use holdfast_replica::Host;
use holdfast_types::{
    ClusterId, Epoch, ErrorCode, GroupId, LogIndex, NodeName, ReplicaId, StoreId, UserError, VolumeId,
};
use holdfast_wire::rpc::{Handler, Responder, Rpc, Service};
use holdfast_wire::signing::Signer;
use serde::{Deserialize, Serialize};

use crate::config::{Layout, NodeConfig, load_credentials};
use crate::fence::VoterSignature;
use crate::operations::PATIENCE;

/// Questions to the store of a voter.
const FENCE: Service = Service(13);
/// How long one may take.
const DEADLINE: Duration = Duration::from_secs(3);

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
enum Ask {
    /// What a leader there has applied, to make a statement of.
    View { group: GroupId },
    /// A voter there is to sign it.
    Sign { statement: Box<FenceStatement> },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
enum Answer {
    View { view: LeaderView },
    Signed { signature: VoterSignature },
}

type Outcome = Result<Answer, UserError>;

/// What a leader has applied, from which a statement is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaderView {
    pub(crate) epoch: Epoch,
    pub(crate) holder: Option<NodeName>,
    pub(crate) index: LogIndex,
    pub(crate) configurations: Vec<BTreeSet<ReplicaId>>,
}

fn refused(message: impl Into<String>) -> UserError {
    UserError::new(ErrorCode::Refused, message)
}

fn unavailable(message: impl Into<String>) -> UserError {
    UserError::new(ErrorCode::Unavailable, message)
}

fn internal(error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("a question about a fence: {error}"))
}

/// The voters of one store.
struct Voters {
    host: Rc<Host>,
    signer: Signer,
    cluster: ClusterId,
    node: NodeName,
    catalog: CatalogClient,
}

/// Lets a store's voters sign, as this node.
pub(crate) fn serve(
    rpc: &Rpc,
    host: &Rc<Host>,
    config: &NodeConfig,
    layout: &Layout,
) -> Result<(), UserError> {
    let signer = Signer::new(&load_credentials(layout)?)
        .map_err(|error| UserError::new(ErrorCode::Internal, format!("the node's key: {error}")))?;
    let voters = Voters {
        host: host.clone(),
        signer,
        cluster: config.cluster,
        node: config.location.node.clone(),
        catalog: CatalogClient::new(rpc.clone(), config.catalog.values().copied().collect()),
    };
    rpc.serve(FENCE, Rc::new(Served(Rc::new(voters))));
    Ok(())
}

struct Served(Rc<Voters>);

impl Handler for Served {
    fn handle(&self, _from: StoreId, _lane: Lane, request: Frame, responder: Responder) {
        let voters = self.0.clone();
        let ask: Ask = match serde_json::from_slice(&request.head) {
            Ok(ask) => ask,
            Err(error) => return responder.refuse(error.to_string()),
        };
        holdfast_env::spawn("fence", async move {
            let outcome: Outcome = match ask {
                Ask::View { group } => voters.view(group).await.map(|view| Answer::View { view }),
                Ask::Sign { statement } => {
                    voters.sign(&statement).await.map(|signature| Answer::Signed { signature })
                }
            };
            match serde_json::to_vec(&outcome) {
                Ok(json) => responder.reply(Frame::small(Bytes::from(json))),
                Err(error) => responder.refuse(error.to_string()),
            }
        });
    }
}

async fn ask(rpc: &Rpc, store: StoreId, ask: &Ask) -> Outcome {
    let json = serde_json::to_vec(ask).map_err(internal)?;
    let frame = Frame::small(Bytes::from(json));
    let answer = rpc.call(store, Lane::Control, FENCE, frame, DEADLINE).await;
    let answer = answer.map_err(|error| unavailable(format!("store {store} does not answer: {error}")))?;
    serde_json::from_slice::<Outcome>(&answer.head).map_err(internal)?
}

/// What the leader on a store has applied.
pub(crate) async fn view_of(rpc: &Rpc, store: StoreId, group: GroupId) -> Result<LeaderView, UserError> {
    match ask(rpc, store, &Ask::View { group }).await? {
        Answer::View { view } => Ok(view),
        Answer::Signed { .. } => Err(internal("it was answered with a signature")),
    }
}

/// The signature of the voter on a store.
pub(crate) async fn signature_of(
    rpc: &Rpc,
    store: StoreId,
    statement: &FenceStatement,
) -> Result<VoterSignature, UserError> {
    match ask(rpc, store, &Ask::Sign { statement: Box::new(statement.clone()) }).await? {
        Answer::Signed { signature } => Ok(signature),
        Answer::View { .. } => Err(internal("it was not answered with a signature")),
    }
}

/// A volume as the catalog has it.
pub(crate) async fn record_of(catalog: &CatalogClient, id: VolumeId) -> Result<VolumeRecord, UserError> {
    let state = catalog.state(PATIENCE).await?;
    let gone = || UserError::new(ErrorCode::NotFound, format!("there is no volume {id} any more"));
    state.volumes.get(&id).cloned().ok_or_else(gone)
}

/// Refuses a statement of another incarnation than that of now: which it is only the catalog knows.
pub(crate) fn check_incarnation(record: &VolumeRecord, statement: &FenceStatement) -> Result<(), UserError> {
    let now = &record.incarnation;
    if (record.group, now.number, now.recovery)
        == (statement.group, statement.incarnation, statement.recovery)
    {
        return Ok(());
    }
    let message = format!(
        "the certificate is of incarnation {} of volume {} (recovery {}), which is {} ({}) by now",
        statement.incarnation, record.spec.name, statement.recovery, now.number, now.recovery
    );
    Err(refused(message).hint("a forced recovery has come between: certify the fence anew"))
}

impl Voters {
    async fn view(&self, group: GroupId) -> Result<LeaderView, UserError> {
        let view = self.host.leader_view(group).await.map_err(|error| unavailable(error.to_string()))?;
        Ok(LeaderView {
            epoch: view.state.epoch(),
            holder: view.state.holder().map(|holder| holder.node.clone()),
            index: view.index,
            configurations: view.configurations,
        })
    }

    /// INV-CERT: signs what the voter here has applied itself, as this node, for its own volume and its own vote.
    async fn sign(&self, statement: &FenceStatement) -> Result<VoterSignature, UserError> {
        if let Some(why) = statement.malformed() {
            return Err(UserError::new(ErrorCode::InvalidArgument, why));
        }
        let view = self.host.voter_view(statement.group, statement.index).await;
        let view = view.ok_or_else(|| unavailable("the replica does not run here"))?;
        if statement.cluster != self.cluster || statement.volume != view.volume {
            return Err(refused("the statement is of another volume"));
        }
        match statement.check(&view.applied()) {
            Ok(()) => {}
            Err(why @ (NotSigned::Held(_) | NotSigned::NoVote(_))) => return Err(refused(why.to_string())),
            // Whoever asks looks again.
            Err(why) => return Err(unavailable(why.to_string())),
        }
        check_incarnation(&record_of(&self.catalog, statement.volume).await?, statement)?;
        if statement.node_of(view.replica) != Some(&self.node) {
            return Err(refused(format!("replica {} does not stand where the statement says", view.replica)));
        }
        let signature = self.signer.sign(&statement.to_bytes());
        let signature = signature.map_err(|error| UserError::new(ErrorCode::Internal, error.to_string()))?;
        Ok(VoterSignature::new(view.replica, self.signer.certificate(), &signature))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use holdfast_types::RecoveryId;

    use super::*;

    #[test]
    fn a_statement_survives_the_way_to_another_store() {
        let statement = FenceStatement {
            cluster: ClusterId(1),
            volume: VolumeId(2),
            group: GroupId(3),
            incarnation: 1,
            recovery: RecoveryId::NIL,
            fenced: NodeName::new("a"),
            epoch: Epoch(4),
            holder: None,
            index: LogIndex(5),
            configurations: vec![BTreeMap::from([(ReplicaId(6), NodeName::new("b"))])],
        };
        let json = serde_json::to_vec(&Ask::Sign { statement: Box::new(statement.clone()) });
        match serde_json::from_slice(&json.expect("is written")).expect("is read") {
            Ask::Sign { statement: read } => assert_eq!(*read, statement),
            other => panic!("{other:?}"),
        }
        let configurations = vec![BTreeSet::from([ReplicaId(6)])];
        let view = LeaderView { configurations, ..LeaderView::default() };
        let json = serde_json::to_vec(&Outcome::Ok(Answer::View { view: view.clone() }));
        let read: Outcome = serde_json::from_slice(&json.expect("is written")).expect("is read");
        assert!(matches!(read, Ok(Answer::View { view: read }) if read == view));
    }
}
