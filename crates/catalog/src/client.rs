//! The catalog from any shard: finds its leader and repeats what is safe to repeat.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_env::net::Lane;
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogReply, CatalogState, SnapshotRecord, SourceOrder, VolumeRecord,
};
use holdfast_replica::messages::CATALOG;
use holdfast_types::{ErrorCode, ReplicaId, SnapshotId, StoreId, UserError, VolumeId, VolumeSpec};
use holdfast_wire::rpc::{CallError, Rpc};

use crate::messages::{CatalogAnswer, CatalogRequest, from_frame, to_frame};

/// Between tries while no member leads.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long one member may take: a creation places, makes and starts replicas.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// How long a plain read or change may take at one member before another is asked: at first, and at most, as it grows
/// for a catalog that is slow rather than silent.
const SHORT_DEADLINE: Duration = Duration::from_millis(500);
const SHORT_DEADLINE_MAX: Duration = Duration::from_secs(3);

/// A client.
pub struct CatalogClient {
    rpc: Rpc,
    members: Vec<StoreId>,
    leader: Cell<Option<StoreId>>,
    next: Cell<usize>,
}

impl CatalogClient {
    /// A client of the catalog with these members.
    pub fn new(rpc: Rpc, members: Vec<StoreId>) -> Self {
        Self { rpc, members, leader: Cell::new(None), next: Cell::new(0) }
    }

    fn target(&self) -> Option<StoreId> {
        if let Some(leader) = self.leader.get() {
            return Some(leader);
        }
        let at = self.next.get();
        self.next.set(at + 1);
        self.members.get(at % self.members.len().max(1)).copied()
    }

    /// Asks until a leader answers. Every request bears repetition: creations by name, changes by revision or by
    /// being idempotent.
    async fn ask(&self, request: &CatalogRequest, patience: Duration) -> Result<CatalogAnswer, UserError> {
        let until = Instant::now() + patience;
        let mut last = "no member answered".to_owned();
        let mut short = SHORT_DEADLINE;
        let long = matches!(
            request,
            CatalogRequest::Create { .. }
                | CatalogRequest::Settle { .. }
                | CatalogRequest::CreateSnapshot { .. }
                | CatalogRequest::SettleSnapshot { .. }
        );
        loop {
            let left = until.since(Instant::now());
            let Some(to) = self.target().filter(|_| left > Duration::ZERO) else {
                return Err(UserError::new(
                    ErrorCode::Unavailable,
                    format!("the catalog does not answer: {last}"),
                )
                .hint(
                    "attached volumes go on working; provisioning waits until a majority of the catalog's \
                           nodes is back (`holdfast node list`)",
                ));
            };
            let deadline = left.min(if long { CALL_DEADLINE } else { short });
            match self.rpc.call(to, Lane::Control, CATALOG, to_frame(request)?, deadline).await {
                Ok(frame) => match from_frame::<CatalogAnswer>(frame)? {
                    CatalogAnswer::Elsewhere { leader } => {
                        self.leader.set(leader.filter(|leader| *leader != to));
                        last = "no member leads".into();
                    }
                    CatalogAnswer::Refused { error } => {
                        self.leader.set(Some(to));
                        return Err(error);
                    }
                    answer => {
                        self.leader.set(Some(to));
                        return Ok(answer);
                    }
                },
                Err(error @ CallError::TimedOut) if long => {
                    return Err(UserError::new(
                        ErrorCode::TimedOut,
                        format!("the catalog's leader: {error}"),
                    )
                    .hint("the reconciler goes on; ask again"));
                }
                Err(error) => {
                    short = (short * 3 / 2).min(SHORT_DEADLINE_MAX);
                    self.leader.set(None);
                    last = error.to_string();
                }
            }
            holdfast_env::sleep(RETRY_PAUSE).await;
        }
    }

    /// Everything that the catalog knows, as of now.
    pub async fn state(&self, patience: Duration) -> Result<CatalogState, UserError> {
        match self.ask(&CatalogRequest::State, patience).await? {
            CatalogAnswer::State { state } => Ok(*state),
            other => Err(unexpected(&other)),
        }
    }

    /// Applies a command.
    pub async fn apply(
        &self,
        command: CatalogCommand,
        patience: Duration,
    ) -> Result<CatalogReply, UserError> {
        match self.ask(&CatalogRequest::Apply { command }, patience).await? {
            CatalogAnswer::Reply { reply } => Ok(reply),
            other => Err(unexpected(&other)),
        }
    }

    /// Creates a volume and waits until it can be attached; one that begins with something, until it is being filled.
    /// Idempotent by name.
    pub async fn create(
        &self,
        spec: VolumeSpec,
        parameters: BTreeMap<String, String>,
        source: Option<SourceOrder>,
        patience: Duration,
    ) -> Result<VolumeRecord, UserError> {
        let request = CatalogRequest::Create { spec: Box::new(spec), parameters, source };
        match self.ask(&request, patience).await? {
            CatalogAnswer::Volume { record: Some(record) } => Ok(*record),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets the reconciler work on a volume now; the volume afterwards, if it still exists.
    pub async fn settle(&self, id: VolumeId, patience: Duration) -> Result<Option<VolumeRecord>, UserError> {
        match self.ask(&CatalogRequest::Settle { id }, patience).await? {
            CatalogAnswer::Volume { record } => Ok(record.map(|record| *record)),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a snapshot and waits until it is ready. Idempotent by volume, name and key.
    pub async fn create_snapshot(
        &self,
        volume: &str,
        name: &str,
        key: &str,
        created_ms: u64,
        patience: Duration,
    ) -> Result<SnapshotRecord, UserError> {
        let (volume, name, key) = (volume.to_owned(), name.to_owned(), key.to_owned());
        let request = CatalogRequest::CreateSnapshot { volume, name, key, created_ms };
        match self.ask(&request, patience).await? {
            CatalogAnswer::Snapshot { record: Some(record) } => Ok(*record),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets the reconciler work on a snapshot now; the snapshot afterwards, if it still exists.
    pub async fn settle_snapshot(
        &self,
        id: SnapshotId,
        patience: Duration,
    ) -> Result<Option<SnapshotRecord>, UserError> {
        match self.ask(&CatalogRequest::SettleSnapshot { id }, patience).await? {
            CatalogAnswer::Snapshot { record } => Ok(record.map(|record| *record)),
            other => Err(unexpected(&other)),
        }
    }

    /// Places one more replica of a volume, on a given node or anywhere (empty), for one that leaves or beside all.
    pub async fn add_replica(
        &self,
        id: VolumeId,
        node: &str,
        replacing: Option<ReplicaId>,
        patience: Duration,
    ) -> Result<VolumeRecord, UserError> {
        let request = CatalogRequest::Add { id, node: node.to_owned(), replacing };
        match self.ask(&request, patience).await? {
            CatalogAnswer::Volume { record: Some(record) } => Ok(*record),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(answer: &CatalogAnswer) -> UserError {
    UserError::new(ErrorCode::Internal, format!("the catalog gave another kind of answer: {answer:?}"))
}
