//! The catalog's state machine on a replica: `holdfast_protocol::catalog` with its checkpoint in a small file.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_protocol::catalog::{CatalogCommand, CatalogResult, CatalogState};
use holdfast_replica::{AppData, AppReply, ApplyError, CheckError, Payload, Staged, StateMachine};
use holdfast_store::state_file::StateFile;
use holdfast_store::volume::Checkpoint;
use holdfast_store::{EntryId, StoreError};
use holdfast_types::{ClusterId, ErrorCode, LogIndex, UserError, limits};
use tokio::sync::{Mutex, Notify};

pub(crate) struct Inner {
    state: RefCell<CatalogState>,
    file: StateFile,
    writing: Mutex<()>,
    changed: Notify,
}

/// The machine. Cheap to clone.
#[derive(Clone)]
pub(crate) struct CatalogMachine(Rc<Inner>);

fn damaged(error: impl std::fmt::Display) -> StoreError {
    StoreError::Failed(format!("the catalog's checkpoint is damaged: {error}"))
}

impl CatalogMachine {
    pub(crate) fn open(cluster: ClusterId, file: StateFile) -> Result<Self, StoreError> {
        let state = match file.newest() {
            Some(checkpoint) => serde_json::from_slice(&checkpoint.state).map_err(damaged)?,
            None => CatalogState::new(cluster),
        };
        let state = RefCell::new(state);
        Ok(Self(Rc::new(Inner { state, file, writing: Mutex::new(()), changed: Notify::new() })))
    }

    pub(crate) fn state(&self) -> CatalogState {
        self.0.state.borrow().clone()
    }

    pub(crate) fn with_state<T>(&self, look: impl FnOnce(&CatalogState) -> T) -> T {
        look(&self.0.state.borrow())
    }

    /// Ends at the next change.
    pub(crate) async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// Makes `checkpoint` the one to start from.
    pub(crate) async fn save(&self, checkpoint: Checkpoint) -> Result<(), StoreError> {
        let _one_at_a_time = self.0.writing.lock().await;
        let newer = self.0.file.newest().is_none_or(|saved| saved.id.index < checkpoint.id.index);
        if newer { self.0.file.write(checkpoint).await } else { Ok(()) }
    }
}

/// A command as an entry of the catalog's log.
pub(crate) fn encode_command(command: &CatalogCommand) -> Result<AppData, UserError> {
    let json = serde_json::to_vec(command)
        .map_err(|error| UserError::new(ErrorCode::Internal, format!("a command is not JSON: {error}")))?;
    Ok(AppData { head: Bytes::from(json), payload: Payload::NONE })
}

/// What a command answered.
pub(crate) fn decode_reply(reply: &AppReply) -> CatalogResult {
    let wrong = |what: String| Err(UserError::new(ErrorCode::Internal, what));
    match reply {
        AppReply::Opaque(json) => match serde_json::from_slice(json) {
            Ok(result) => result,
            Err(error) => wrong(format!("the catalog's answer is not understood: {error}")),
        },
        other => wrong(format!("the catalog answered {other}")),
    }
}

impl StateMachine for CatalogMachine {
    fn check(&self, data: &AppData) -> Result<(), CheckError> {
        if data.head.len() > limits::LOG_HEAD_BYTES_MAX || !data.payload.is_empty() {
            return Err(CheckError::Malformed(format!(
                "a command of {} bytes is larger than the catalog takes, {}: give fewer topology terms",
                data.head.len(),
                limits::LOG_HEAD_BYTES_MAX
            )));
        }
        let decoded = serde_json::from_slice::<CatalogCommand>(&data.head);
        decoded.map(drop).map_err(|error| CheckError::Malformed(error.to_string()))
    }

    fn apply(&self, id: EntryId, data: &AppData) -> Result<AppReply, ApplyError> {
        let unknown = |why: serde_json::Error| ApplyError {
            index: id.index,
            why: format!(
                "the catalog's command is not understood ({why}): is this daemon older than its peers?"
            ),
        };
        let command: CatalogCommand = serde_json::from_slice(&data.head).map_err(unknown)?;
        let result = self.0.state.borrow_mut().apply(&command);
        let json = serde_json::to_vec(&result).map_err(unknown)?;
        Ok(AppReply::Opaque(Bytes::from(json)))
    }

    fn encode_state(&self) -> Bytes {
        let json = serde_json::to_vec(&*self.0.state.borrow());
        Bytes::from(json.expect("every part of the state has a JSON form: the maps' keys are strings"))
    }

    fn checkpoint(&self) -> Option<Checkpoint> {
        self.0.file.newest()
    }

    fn install(
        &self,
        checkpoint: Checkpoint,
        _staged: Option<Rc<dyn Staged>>,
    ) -> LocalBoxFuture<'static, Result<(), StoreError>> {
        let machine = self.clone();
        Box::pin(async move {
            let state: CatalogState = serde_json::from_slice(&checkpoint.state).map_err(damaged)?;
            machine.save(checkpoint).await?;
            *machine.0.state.borrow_mut() = state;
            Ok(())
        })
    }

    fn after_apply(&self, _index: LogIndex) {
        self.0.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use holdfast_protocol::catalog::NodeRecord;
    use holdfast_store::ReplicaIdentity;
    use holdfast_store::state_file::StateIdentity;
    use holdfast_types::{
        AccessFrom, ByteSize, GroupId, OnQuorumLoss, ReadPolicy, ReplicaId, StoreId, Survive, TimersPolicy,
        TopologyTerm, VolumeId, VolumeSpec,
    };

    use super::*;

    fn creation(terms: usize) -> CatalogCommand {
        let term = TopologyTerm { region: "r".repeat(64), zone: "z".repeat(64), node: String::new() };
        let spec = VolumeSpec {
            name: "v".into(),
            size: ByteSize(4096),
            survive: Survive::None,
            replicas: None,
            allowed: vec![term; terms],
            preferred: Vec::new(),
            on_quorum_loss: OnQuorumLoss::Suspend,
            read_policy: ReadPolicy::Nearest,
            access_from: AccessFrom::Anywhere,
            timers: TimersPolicy::Auto,
            snapshot_quota: None,
        };
        let (id, group) = (VolumeId(1), GroupId(1));
        CatalogCommand::CreateVolume {
            id,
            group,
            spec,
            parameters: Default::default(),
            placed: Vec::new(),
            source: None,
        }
    }

    /// A checkpoint of a version that knew no snapshots is read.
    #[test]
    fn a_state_without_snapshots_is_one_that_has_none() {
        let mut state = CatalogState::new(ClusterId(1));
        state.apply(&CatalogCommand::DeleteVolume { id: VolumeId(1) }).expect("there is nothing to delete");
        let mut json = serde_json::to_value(&state).expect("has a JSON form");
        assert!(json.as_object_mut().expect("an object").remove("snapshots").is_some());
        assert_eq!(serde_json::from_value::<CatalogState>(json).expect("is read"), state);
    }

    /// And what concerns a node of one store is written as it ever was, for members of before.
    #[test]
    fn a_node_of_one_store_is_written_as_it_ever_was() {
        let old = r#"{"location":{"region":"r","zone":"z","node":"n"},"store":"00000000000000000000000000000007","peer_address":"a:1","admin":"unix:/x","cordoned":false}"#;
        let record: NodeRecord = serde_json::from_str(old).expect("an old record is read");
        assert_eq!(record.stores().map(|store| store.store).collect::<Vec<_>>(), [StoreId(7)]);
        assert_eq!(serde_json::to_string(&record).expect("has a JSON form"), old);
    }

    /// The journal takes no larger head: it would end the catalog's task on every member in turn.
    #[test]
    fn a_command_that_no_log_takes_is_refused_before_it_is_proposed() {
        let place = tempfile::tempdir().expect("a place");
        holdfast_env::real::run(async {
            let directory: Rc<dyn holdfast_env::disk::Directory> =
                holdfast_env::real::disk::RealDirectory::open(place.path()).expect("opens");
            let id = ReplicaIdentity { group: GroupId::CATALOG, replica: ReplicaId(1) };
            let identity = StateIdentity { cluster: ClusterId(1), store: StoreId(1), id };
            let file = StateFile::open(&directory, "catalog-state", identity).await.expect("opens");
            let machine = CatalogMachine::open(ClusterId(1), file).expect("opens");
            let check = |terms| machine.check(&encode_command(&creation(terms)).expect("is encoded"));
            assert_eq!(check(8), Ok(()));
            let why = check(200).expect_err("is refused");
            assert!(why.to_string().contains("topology terms"), "{why}");
        });
    }
}
