//! Fence certificates (INV-CERT): voters sign what they have applied, and whoever has the authority's certificate verifies it.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use holdfast_catalog::volumes;
use holdfast_env::Instant;
use holdfast_protocol::catalog::VolumeRecord;
use holdfast_protocol::fence::{Configuration, FenceStatement};
use holdfast_protocol::planted::is_planted;
use holdfast_types::{ErrorCode, NodeName, ReplicaId, UserError, VolumeId, limits};
use holdfast_wire::signing::Signed;
use serde::{Deserialize, Serialize};

use crate::admin::pb;
use crate::operations::PATIENCE;
use crate::shard::Shard;
use crate::voter;

/// Between rounds while a volume has no leader, or its members change.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Bytes of a certificate as JSON, at most.
const CERTIFICATE_BYTES_MAX: usize = 1 << 20;
/// Signatures of a certificate, at most: each voter of two configurations.
const SIGNATURES_MAX: usize = 2 * limits::VOTERS_MAX;

/// A voter's signature of a statement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VoterSignature {
    /// The voter.
    pub replica: ReplicaId,
    /// The certificate of its node, as PEM.
    pub certificate: String,
    /// The signature, in hexadecimal digits.
    pub signature: String,
}

impl VoterSignature {
    /// From the signature's bytes.
    pub(crate) fn new(replica: ReplicaId, certificate: &str, signature: &[u8]) -> Self {
        Self { replica, certificate: certificate.to_owned(), signature: to_hex(signature) }
    }
}

/// A statement with the signatures of a majority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceCertificate {
    /// What they say.
    pub statement: FenceStatement,
    /// Who says it.
    pub signatures: Vec<VoterSignature>,
}

fn refused(message: impl Into<String>) -> UserError {
    UserError::new(ErrorCode::Refused, message)
}

fn unavailable(message: impl Into<String>) -> UserError {
    UserError::new(ErrorCode::Unavailable, message)
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

impl FenceCertificate {
    /// Reads a certificate.
    pub fn from_json(json: &str) -> Result<Self, UserError> {
        if json.len() > CERTIFICATE_BYTES_MAX {
            return Err(UserError::new(ErrorCode::InvalidArgument, "a fence certificate is not that long"));
        }
        serde_json::from_str(json).map_err(|error| {
            UserError::new(ErrorCode::InvalidArgument, format!("this is no fence certificate: {error}"))
                .hint("`holdfast fence certify VOLUME --node NODE` makes one")
        })
    }

    /// As text.
    pub fn to_json(&self) -> Result<String, UserError> {
        serde_json::to_string_pretty(self)
            .map_err(|error| UserError::new(ErrorCode::Internal, format!("a certificate: {error}")))
    }

    /// INV-CERT: the nodes whose voters have signed it, if they are a majority, by the cluster authority's certificate
    /// (PEM), `now` since 1970.
    pub fn verify(&self, authority: &str, now: Duration) -> Result<Vec<NodeName>, UserError> {
        let statement = &self.statement;
        if let Some(why) = statement.malformed() {
            return Err(refused(format!("the certificate proves nothing: {why}")));
        }
        if self.signatures.len() > SIGNATURES_MAX {
            return Err(refused("the certificate has more signatures than a group has voters"));
        }
        let message = statement.to_bytes();
        let mut signed: BTreeMap<ReplicaId, NodeName> = BTreeMap::new();
        for one in &self.signatures {
            let node = statement.node_of(one.replica).ok_or_else(|| {
                refused(format!("replica {} has signed, and has no vote by the statement", one.replica))
            })?;
            let signature = from_hex(&one.signature).ok_or_else(|| {
                refused(format!("the signature of replica {} is not readable", one.replica))
            })?;
            let signed_by =
                Signed { message: &message, signature: &signature, certificate: &one.certificate };
            let signer = signed_by.signer(statement.cluster, authority, now);
            let signer = match signer {
                Err(_) if is_planted("signatures-unread") => node.clone(),
                other => other.map_err(|error| refused(format!("replica {}: {}", one.replica, error.0)))?,
            };
            if signer != *node {
                let message =
                    format!("replica {} stands on node {node}, and {signer} has signed", one.replica);
                return Err(refused(message));
            }
            signed.insert(one.replica, signer);
        }
        if !statement.is_majority(&signed.keys().copied().collect()) {
            let message = format!("{} voters have signed, which is no majority", signed.len());
            return Err(refused(message));
        }
        Ok(signed.into_values().collect())
    }
}

/// Seconds and more since 1970.
pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn named(record: &VolumeRecord, voters: &BTreeSet<ReplicaId>) -> Result<Configuration, UserError> {
    let node = |id: &ReplicaId| {
        let replica = record.replicas.iter().find(|replica| replica.id == *id);
        let unknown = || unavailable(format!("replica {id} is leaving or coming: ask again"));
        Ok((*id, replica.ok_or_else(unknown)?.location.node.clone()))
    };
    voters.iter().map(node).collect()
}

impl Shard {
    /// A certificate that a node does not hold a volume and can change it no more.
    pub(crate) async fn certify(
        self: &Rc<Self>,
        id: VolumeId,
        fenced: &NodeName,
    ) -> Result<FenceCertificate, UserError> {
        let until = Instant::now() + PATIENCE;
        loop {
            // Members and leader may be others by the next round.
            let record = voter::record_of(&self.catalog, id).await?;
            match self.certify_once(&record, fenced).await {
                Err(error) if error.code == ErrorCode::Unavailable && Instant::now() < until => {
                    tracing::debug!(volume = record.spec.name, %error, "a fence is not certified yet");
                    holdfast_env::sleep(RETRY_PAUSE).await;
                }
                ended => return ended,
            }
        }
    }

    async fn certify_once(
        self: &Rc<Self>,
        record: &VolumeRecord,
        fenced: &NodeName,
    ) -> Result<FenceCertificate, UserError> {
        let name = &record.spec.name;
        let reports = volumes::replica_reports(&self.rpc, record).await;
        let leads = volumes::leader_of(&reports).and_then(|(id, _)| {
            record.replicas.iter().find(|replica| replica.id == id).map(|replica| replica.store)
        });
        let leads = leads.ok_or_else(|| {
            unavailable(format!("volume {name} has no leader now: a majority of its replicas must answer"))
                .hint("`holdfast volume show` tells which replicas answer")
        })?;
        let view = voter::view_of(&self.rpc, leads, record.group).await?;
        if view.holder.as_ref() == Some(fenced) {
            return Err(refused(format!("node {fenced} holds volume {name}: it is not fenced"))
                .hint(format!("`holdfast volume detach {name} --force` ends that")));
        }
        let configurations = view.configurations.iter().map(|voters| named(record, voters));
        let statement = FenceStatement {
            cluster: self.config.cluster,
            volume: record.id,
            group: record.group,
            incarnation: record.incarnation.number,
            recovery: record.incarnation.recovery,
            fenced: fenced.clone(),
            epoch: view.epoch,
            holder: view.holder.clone(),
            index: view.index,
            configurations: configurations.collect::<Result<_, _>>()?,
        };
        let signatures = self.signatures(record, &statement).await?;
        Ok(FenceCertificate { statement, signatures })
    }

    /// Those of a majority, as soon as there is one.
    async fn signatures(
        self: &Rc<Self>,
        record: &VolumeRecord,
        statement: &FenceStatement,
    ) -> Result<Vec<VoterSignature>, UserError> {
        let voters = record.replicas.iter().filter(|replica| statement.node_of(replica.id).is_some());
        let mut asked: FuturesUnordered<_> =
            voters.map(|replica| voter::signature_of(&self.rpc, replica.store, statement)).collect();
        let (mut signatures, mut why) = (Vec::new(), None);
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(signature) => signatures.push(signature),
                Err(error) => why = Some(error),
            }
            let signed = signatures.iter().map(|one: &VoterSignature| one.replica).collect();
            if statement.is_majority(&signed) {
                return Ok(signatures);
            }
        }
        let why = why.map(|error| format!(": {}", error.message)).unwrap_or_default();
        let message = format!("{} voters have signed the fence, no majority{why}", signatures.len());
        Err(unavailable(message).hint("ask again when more replicas answer: `holdfast volume show`"))
    }

    /// `holdfast fence certify`.
    pub(crate) async fn certify_fence(
        self: Rc<Self>,
        request: pb::CertifyFenceRequest,
    ) -> Result<pb::FenceCertificate, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let id = state.get(&request.name)?.id;
        let fenced = NodeName::new(request.node);
        // A certificate about a name that nobody has would be true, and of no use.
        if !state.nodes.contains_key(&fenced) {
            return Err(UserError::new(ErrorCode::NotFound, format!("there is no node {fenced}"))
                .hint("`holdfast node list` shows them all"));
        }
        let certificate = self.certify(id, &fenced).await?;
        Ok(pb::FenceCertificate { json: certificate.to_json()? })
    }

    /// `holdfast fence verify`, beside what the cluster knows: also that it is of the volume's incarnation of now, and that the
    /// node has not attached the volume anew.
    pub(crate) async fn verify_fence(
        self: Rc<Self>,
        request: pb::FenceCertificate,
    ) -> Result<pb::VerifiedFence, UserError> {
        let certificate = FenceCertificate::from_json(&request.json)?;
        let signers = certificate.verify(&self.authority, since_1970())?;
        let statement = &certificate.statement;
        let record = voter::record_of(&self.catalog, statement.volume).await?;
        voter::check_incarnation(&record, statement)?;
        let name = record.spec.name.clone();
        let reports = volumes::replica_reports(&self.rpc, &record).await;
        let (_, leader) = volumes::leader_of(&reports).ok_or_else(|| {
            unavailable(format!("volume {name} has no leader now, so nobody knows who holds it"))
                .hint("`--authority CA.PEM` verifies what was signed, and asks nobody")
        })?;
        if leader.holder == statement.fenced.as_str() {
            let (epoch, fenced) = (leader.epoch, &statement.fenced);
            let message = format!("node {fenced} has attached volume {name} anew since, in epoch {epoch}");
            return Err(refused(message));
        }
        Ok(verified(&certificate, name, &signers))
    }
}

/// What a certificate that was verified says.
pub fn verified(certificate: &FenceCertificate, name: String, signers: &[NodeName]) -> pb::VerifiedFence {
    let statement = &certificate.statement;
    pb::VerifiedFence {
        volume_id: statement.volume.to_string(),
        volume: name,
        incarnation: statement.incarnation.to_string(),
        fenced: statement.fenced.to_string(),
        epoch: statement.epoch.0,
        holder: statement.holder.as_ref().map(NodeName::to_string).unwrap_or_default(),
        index: statement.index.0,
        signers: signers.iter().map(NodeName::to_string).collect(),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_protocol::planted;
    use holdfast_types::{ClusterId, Epoch, GroupId, LogIndex, RecoveryId};
    use holdfast_wire::pki::Authority;
    use holdfast_wire::signing::Signer;

    use super::*;

    const CLUSTER: ClusterId = ClusterId(7);
    const NOW: Duration = Duration::from_secs(1_796_000_000);

    fn node(number: u64) -> NodeName {
        NodeName::new(format!("n{number}"))
    }

    fn statement() -> FenceStatement {
        FenceStatement {
            cluster: CLUSTER,
            volume: VolumeId(2),
            group: GroupId(3),
            incarnation: 1,
            recovery: RecoveryId::NIL,
            fenced: node(1),
            epoch: Epoch(2),
            holder: Some(node(2)),
            index: LogIndex(9),
            configurations: vec![(1..=3).map(|id| (ReplicaId(id), node(id))).collect()],
        }
    }

    /// Signs as the node of that number, for a replica.
    fn signed(
        authority: &Authority,
        statement: &FenceStatement,
        number: u64,
        replica: u64,
    ) -> VoterSignature {
        let credentials = authority.issue(&node(number)).expect("a certificate");
        let signature = Signer::new(&credentials).expect("a key").sign(&statement.to_bytes()).expect("signs");
        let (replica, signature) = (ReplicaId(replica), to_hex(&signature));
        VoterSignature { replica, certificate: credentials.certificate, signature }
    }

    fn certificate(authority: &Authority, voters: &[u64]) -> FenceCertificate {
        let statement = statement();
        let signatures = voters.iter().map(|id| signed(authority, &statement, *id, *id)).collect();
        FenceCertificate { statement, signatures }
    }

    fn why(certificate: &FenceCertificate, authority: &Authority) -> String {
        let error = certificate.verify(authority.certificate(), NOW).expect_err("it proves nothing");
        assert_eq!(error.code, ErrorCode::Refused);
        error.message
    }

    #[test]
    fn what_a_majority_has_signed_is_proved_and_survives_text() {
        let authority = Authority::create(CLUSTER).expect("an authority");
        let whole = certificate(&authority, &[2, 3]);
        let read = FenceCertificate::from_json(&whole.to_json().expect("text")).expect("is read");
        assert_eq!(read, whole);
        assert_eq!(read.verify(authority.certificate(), NOW).expect("proves"), vec![node(2), node(3)]);
    }

    #[test]
    fn a_minority_proves_nothing_however_often_it_signs() {
        let authority = Authority::create(CLUSTER).expect("an authority");
        assert!(why(&certificate(&authority, &[2]), &authority).contains("no majority"));
        assert!(why(&certificate(&authority, &[2, 2, 2]), &authority).contains("no majority"));
        assert!(why(&certificate(&authority, &[]), &authority).contains("no majority"));
        // One node in the name of others.
        let mut forged = certificate(&authority, &[2]);
        forged.signatures.push(signed(&authority, &forged.statement, 2, 3));
        assert!(why(&forged, &authority).contains("and n2 has signed"));
        forged.signatures[1] = signed(&authority, &forged.statement, 4, 4);
        assert!(why(&forged, &authority).contains("has no vote"));
    }

    /// Everything that a certificate consists of, altered one by one.
    fn altered(whole: &FenceCertificate) -> Vec<FenceCertificate> {
        let with = |change: &dyn Fn(&mut FenceStatement)| {
            let mut other = whole.clone();
            change(&mut other.statement);
            other
        };
        let mut all = vec![
            with(&|it| it.cluster = ClusterId(8)),
            with(&|it| it.volume = VolumeId(8)),
            with(&|it| it.group = GroupId(8)),
            with(&|it| it.incarnation = 2),
            with(&|it| it.recovery = RecoveryId(8)),
            with(&|it| it.fenced = node(3)),
            with(&|it| it.epoch = Epoch(3)),
            with(&|it| it.holder = None),
            with(&|it| it.index = LogIndex(8)),
            with(&|it| drop(it.configurations[0].remove(&ReplicaId(1)))),
            with(&|it| it.configurations.push(it.configurations[0].clone())),
        ];
        let mut broken = whole.clone();
        broken.signatures[0].signature.replace_range(10..11, "z");
        all.push(broken);
        all
    }

    #[test]
    fn what_was_altered_proves_nothing() {
        let authority = Authority::create(CLUSTER).expect("an authority");
        let whole = certificate(&authority, &[2, 3]);
        for (number, other) in altered(&whole).iter().enumerate() {
            assert_ne!(*other, whole);
            assert!(other.verify(authority.certificate(), NOW).is_err(), "alteration {number}");
        }
        let foreign = Authority::create(CLUSTER).expect("an authority");
        assert!(why(&certificate(&foreign, &[2, 3]), &authority).contains("not of this cluster"));
        planted::plant(&["signatures-unread"]);
        let unread =
            altered(&whole).iter().filter(|it| it.verify(authority.certificate(), NOW).is_ok()).count();
        planted::plant(&[]);
        assert!(unread > 5, "without reading signatures the test above fails");
    }

    #[test]
    fn what_is_no_certificate_is_refused_by_name() {
        for text in ["", "{}", "[1]", "{\"statement\": 3}"] {
            let error = FenceCertificate::from_json(text).expect_err("no certificate");
            assert_eq!(error.code, ErrorCode::InvalidArgument);
        }
        assert!(FenceCertificate::from_json(&" ".repeat(CERTIFICATE_BYTES_MAX + 1)).is_err());
        assert_eq!(from_hex("0aff"), Some(vec![10, 255]));
        assert!(from_hex("0a1").is_none() && from_hex("zz").is_none());
    }
}
