//! Calls to the stores and to the replicas of volumes, from wherever the shard stands.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::catalog::{CatalogState, NodeRecord, StoreRecord, VolumeRecord};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::placement::Candidate;
use holdfast_protocol::volume::{Refusal, VolumeReply};
use holdfast_replica::administration::{ADMINISTRATION, ShardRequest, StoreReport, decode_reply};
use holdfast_replica::messages::{DATA, DataReply, DataRequest, ReplicaReport};
use holdfast_types::{ErrorCode, GroupId, ReplicaId, StoreId, UserError};
use holdfast_wire::rpc::{CallError, Rpc};

/// How long a store may take to tell how it is; one that takes longer counts as not answering.
const REPORT_DEADLINE: Duration = Duration::from_secs(2);
/// How long the others may take for each answer more, once a volume's leader has answered.
const REPORT_GRACE: Duration = Duration::from_millis(500);
/// How long a change at one replica may take.
const CHANGE_DEADLINE: Duration = Duration::from_secs(12);
/// How long one replica may take to answer a question that any may answer.
const ASK_DEADLINE: Duration = Duration::from_secs(3);
/// Between tries while no replica leads.
const RETRY_PAUSE: Duration = Duration::from_millis(30);
/// Kept free on every store for trim, deletion and the index, in bytes.
const RESERVE_BYTES: u64 = 256 << 20;

/// Asks a shard to do something.
pub async fn shard(rpc: &Rpc, to: StoreId, request: &ShardRequest) -> Result<Option<StoreReport>, UserError> {
    let deadline = if *request == ShardRequest::Report { REPORT_DEADLINE } else { CHANGE_DEADLINE };
    let frame = Frame::small(request.encode());
    let answer = rpc.call(to, Lane::Control, ADMINISTRATION, frame, deadline).await;
    let answer = answer.map_err(|error| {
        UserError::new(ErrorCode::Unavailable, format!("store {to} does not answer: {error}"))
            .hint("is its node up? `holdfast node list` shows it")
    })?;
    decode_reply(&answer.head).map_err(|error| UserError::new(ErrorCode::Internal, error.to_string()))?
}

/// What a store says of itself, or why it cannot; none if it does not answer at all.
pub async fn store_answer(rpc: &Rpc, store: StoreId) -> Option<Result<StoreReport, String>> {
    let frame = Frame::small(ShardRequest::Report.encode());
    match rpc.call(store, Lane::Control, ADMINISTRATION, frame, REPORT_DEADLINE).await {
        Ok(answer) => Some(match decode_reply(&answer.head) {
            Ok(Ok(Some(report))) => Ok(report),
            Ok(Ok(None)) => Err("it tells nothing of itself".into()),
            Ok(Err(error)) => Err(error.message),
            Err(error) => Err(error.to_string()),
        }),
        Err(CallError::Send(_) | CallError::Disconnected | CallError::TimedOut) => None,
        Err(answered) => Some(Err(answered.to_string())),
    }
}

/// What stores say of themselves.
pub type StoreReports = BTreeMap<StoreId, StoreReport>;

/// How every store of every node is; those that do not answer are left out.
pub async fn store_reports(rpc: &Rpc, state: &CatalogState) -> StoreReports {
    let stores = state.nodes.values().flat_map(|node| node.stores());
    let asked = stores.map(|StoreRecord { store, .. }| async move {
        let report = shard(rpc, store, &ShardRequest::Report).await.ok().flatten()?;
        Some((store, report))
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// The stores as placement sees them.
pub fn candidates(state: &CatalogState, reports: &StoreReports) -> Vec<Candidate> {
    let candidate = |node: &NodeRecord, store: StoreId| {
        let report = reports.get(&store);
        Candidate {
            store,
            location: node.location.clone(),
            usable: report.is_some_and(|report| report.failed.is_empty()) && !node.cordoned,
            witness: node.witness,
            available_bytes: report.map_or(0, |r| r.available_bytes.saturating_sub(RESERVE_BYTES)),
            replicas: report.map_or(0, |report| report.replicas.len()),
        }
    };
    let of_node = |node| NodeRecord::stores(node).map(move |store| candidate(node, store.store));
    state.nodes.values().flat_map(of_node).collect()
}

/// Asks one replica of a group something; block data of the answer is dropped.
pub async fn ask(
    rpc: &Rpc,
    to: StoreId,
    request: &DataRequest,
    deadline: Duration,
) -> Result<DataReply, String> {
    let frame = Frame::small(request.encode());
    let answer =
        rpc.call(to, Lane::Control, DATA, frame, deadline).await.map_err(|error| error.to_string())?;
    DataReply::decode(&answer.head).map_err(|error| error.to_string())
}

/// What each replica of a volume says of itself, by id, or why it says nothing.
pub type Reports = BTreeMap<ReplicaId, Result<ReplicaReport, String>>;

/// How each replica of a volume is, by id; those that do not answer say why. Once the leader has answered, nobody
/// waits long for those that are silent.
pub async fn replica_reports(rpc: &Rpc, record: &VolumeRecord) -> Reports {
    let request = DataRequest::Report { group: record.group };
    let silent = |id| (id, Err("it did not answer in time".to_owned()));
    let mut reports: Reports = record.replicas.iter().map(|replica| silent(replica.id)).collect();
    let mut asked: FuturesUnordered<_> = record
        .replicas
        .iter()
        .map(|replica| {
            let request = &request;
            async move {
                let reply = match ask(rpc, replica.store, request, REPORT_DEADLINE).await {
                    Ok(DataReply::Report(report)) if report.replica == replica.id => Ok(*report),
                    Ok(DataReply::Report(report)) => Err(format!("replica {} stands there", report.replica)),
                    Ok(other) => Err(format!("it answered {other:?}")),
                    Err(why) => Err(why),
                };
                (replica.id, reply)
            }
        })
        .collect();
    let mut left = REPORT_DEADLINE;
    while let Ok(Some((id, report))) = holdfast_env::timeout(left, asked.next()).await {
        reports.insert(id, report);
        if leader_of(&reports).is_some() {
            left = REPORT_GRACE;
        }
    }
    reports
}

/// The replica that leads with a quorum, if one does.
pub fn leader_of(reports: &Reports) -> Option<(ReplicaId, &ReplicaReport)> {
    let leading = reports.iter().filter_map(|(id, report)| Some((*id, report.as_ref().ok()?)));
    leading.filter(|(_, report)| report.is_leader && report.has_quorum).max_by_key(|(_, report)| report.term)
}

/// Has a volume's leader carry out a control command; only commands that bear repetition.
pub async fn control(
    rpc: &Rpc,
    group: GroupId,
    stores: &[StoreId],
    command: &VolumeCommand,
    patience: Duration,
) -> Result<VolumeReply, UserError> {
    carry_out(rpc, stores, &DataRequest::Control { group, command: command.encode() }, patience).await
}

/// Has a volume's leader make a snapshot, within the volume's snapshot quota if it has one.
pub async fn make_snapshot(
    rpc: &Rpc,
    volume: &VolumeRecord,
    command: &VolumeCommand,
    patience: Duration,
) -> Result<VolumeReply, UserError> {
    let (group, command) = (volume.group, command.encode());
    let request = match volume.spec.snapshot_quota {
        Some(quota) => DataRequest::MakeSnapshot { group, command, quota },
        None => DataRequest::Control { group, command },
    };
    carry_out(rpc, &volume.stores(), &request, patience).await
}

async fn carry_out(
    rpc: &Rpc,
    stores: &[StoreId],
    request: &DataRequest,
    patience: Duration,
) -> Result<VolumeReply, UserError> {
    let until = Instant::now() + patience;
    let mut leader = None;
    let mut turn = 0;
    let mut last = "no replica answered".to_owned();
    let mut refusal_of_now = None;
    while Instant::now() < until && !stores.is_empty() {
        let to = leader.take().unwrap_or_else(|| stores[turn % stores.len()]);
        turn += 1;
        refusal_of_now = None;
        match ask(rpc, to, request, until.since(Instant::now()).min(Duration::from_secs(3))).await {
            Ok(DataReply::Applied { reply: VolumeReply::Refused(refusal), .. }) if refusal.retryable() => {
                last = refusal.to_string();
                refusal_of_now = Some(refusal);
            }
            Ok(DataReply::Applied { reply: VolumeReply::Refused(refusal), .. }) => {
                return Err(refused(&refusal));
            }
            Ok(DataReply::Applied { reply, .. }) => return Ok(reply),
            Ok(DataReply::Elsewhere { leader: hint, why }) => {
                leader = hint.filter(|hint| *hint != to);
                last = why;
            }
            Ok(DataReply::Failed(why)) => return Err(UserError::new(ErrorCode::Internal, why)),
            Ok(other) => last = format!("it answered {other:?}"),
            Err(why) => last = why,
        }
        holdfast_env::sleep(RETRY_PAUSE).await;
    }
    // There is a quorum: it said so.
    if let Some(refusal) = refusal_of_now {
        return Err(UserError::new(ErrorCode::Unavailable, refusal.to_string()));
    }
    Err(UserError::new(ErrorCode::Unavailable, format!("no quorum of the volume's replicas: {last}"))
        .hint("`holdfast volume show` tells which replicas answer"))
}

/// A state machine's refusal for users.
pub fn refused(refusal: &Refusal) -> UserError {
    let code = match refusal {
        Refusal::SnapshotNameTaken => ErrorCode::AlreadyExists,
        Refusal::SnapshotsFull | Refusal::SnapshotQuota { .. } => ErrorCode::ResourceExhausted,
        Refusal::NoSuchSnapshot => ErrorCode::NotFound,
        _ => ErrorCode::Refused,
    };
    let error = UserError::new(code, refusal.to_string());
    match refusal {
        Refusal::SnapshotQuota { .. } => {
            error.hint("delete snapshots, or raise the quota: `holdfast volume set NAME --snapshot-quota`")
        }
        _ => error,
    }
}

/// Asks the replicas of a group in turn, the first of `stores` first, until one answers for itself; the answer and
/// the block data that came with it. Only for requests that bear repetition.
pub async fn ask_any(
    rpc: &Rpc,
    stores: &[StoreId],
    request: &DataRequest,
    patience: Duration,
) -> Result<(DataReply, Bytes), UserError> {
    let until = Instant::now() + patience;
    let head = request.encode();
    let mut hint = None;
    let mut turn = 0;
    let mut last = "no replica answered".to_owned();
    while Instant::now() < until && !stores.is_empty() {
        let to = hint.take().unwrap_or_else(|| stores[turn % stores.len()]);
        turn += 1;
        let deadline = until.since(Instant::now()).min(ASK_DEADLINE);
        match rpc.call(to, Lane::Bulk, DATA, Frame::small(head.clone()), deadline).await {
            Ok(frame) => {
                let reply = DataReply::decode(&frame.head)
                    .map_err(|error| UserError::new(ErrorCode::Internal, error.to_string()))?;
                match reply {
                    DataReply::Elsewhere { leader, why } => {
                        hint = leader.filter(|leader| *leader != to);
                        last = why;
                    }
                    reply => return Ok((reply, frame.into_body())),
                }
            }
            Err(error) => last = error.to_string(),
        }
        if turn % stores.len() == 0 {
            holdfast_env::sleep(RETRY_PAUSE).await;
        }
    }
    Err(UserError::new(ErrorCode::Unavailable, format!("no replica of the volume can answer now: {last}"))
        .hint("`holdfast volume show` tells which replicas answer"))
}

/// The specification as JSON, for disks that describe themselves.
pub fn spec_json(record: &VolumeRecord) -> Result<Bytes, UserError> {
    serde_json::to_vec(&record.spec)
        .map(Bytes::from)
        .map_err(|error| UserError::new(ErrorCode::Internal, format!("a specification is not JSON: {error}")))
}
