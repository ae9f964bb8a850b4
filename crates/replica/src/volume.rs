//! One replica of one volume: its fencing state and its blocks, and the calls of sessions to it.
//!
//! INV-FENCE and INV-ONCE are decided by `holdfast_protocol` at apply; here the leader's courtesies are added (the
//! watch over the holder's lease, INV-LEASE; the wait until a change of holder has settled, INV-SETTLE), and reads
//! are admitted (at or above the reader's floor, at or above the replica's serve floor: INV-STAGE).

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::lease::{
    AttachDecision, HolderWatch, LeaseTerms, NotServed, admit_read, admit_renewal, decide_attach,
};
use holdfast_protocol::planted::is_planted;
use holdfast_protocol::timers::{Timers, VolumeTimers};
use holdfast_protocol::volume::{Refusal, Snapshot, VolumeReply, VolumeState};
use holdfast_store::journal::GroupLog;
use holdfast_store::volume::{BlockKind, CheckedBlocks, Checkpoint, Clear, ReadError, SpaceUsed, VolumeData};
use holdfast_store::{EntryId, StoreError};
use holdfast_types::{BLOCK_BYTES, BlockRange, Epoch, LogIndex, SessionId, SnapshotId, Term, block_checksum};
use holdfast_wire::rpc::{Responder, Rpc};
use tokio::sync::Notify;

use crate::config::{AppData, AppReply};
use crate::group::{Group, GroupError};
use crate::machine::{ApplyError, CheckError, Staged, StateMachine};
use crate::messages::{self, DataReply, DataRequest, SessionRequest};
use crate::payload::Payload;
use crate::rebuild::PurgeHold;
use crate::scrub::ScrubProgress;
use crate::space;

/// How long a read waits for its floor before it is sent elsewhere: a follower learns of a commit with the next
/// append, and a caller that waited longer had better ask the leader.
const FLOOR_PATIENCE: Duration = Duration::from_millis(20);
/// How long a command of a newer epoch waits for the older one to settle before its sender is asked to repeat it.
const SETTLE_PATIENCE: Duration = Duration::from_secs(2);
/// Between proposals of `Settled` that came to nothing.
const SETTLE_PAUSE: Duration = Duration::from_millis(50);
/// How long a command waits in line for the journal before its sender is asked to repeat it. Less than a session's
/// patience with a call: what it has given up and sent again must not gather here while a disk hangs.
const ADMIT_PATIENCE: Duration = Duration::from_secs(2);

/// The replicated state machine of a volume.
pub(crate) struct VolumeMachine {
    state: RefCell<VolumeState>,
    data: VolumeData,
    /// Woken after every run of applied entries.
    changed: Notify,
    /// Woken when the cleaner may have work.
    pub(crate) dirtied: Notify,
    /// Somebody waits for a checkpoint of the layers that there are now.
    checkpoint_wanted: Cell<bool>,
}

impl VolumeMachine {
    pub(crate) fn new(state: VolumeState, data: VolumeData) -> Rc<Self> {
        data.set_size(state.size());
        Rc::new(Self {
            state: RefCell::new(state),
            data,
            changed: Notify::new(),
            dirtied: Notify::new(),
            checkpoint_wanted: Cell::new(false),
        })
    }

    /// A checkpoint is to be made soon.
    pub(crate) fn want_checkpoint(&self) {
        self.checkpoint_wanted.set(true);
        self.dirtied.notify_one();
    }

    pub(crate) fn is_checkpoint_wanted(&self) -> bool {
        self.checkpoint_wanted.get()
    }

    pub(crate) fn take_checkpoint_wanted(&self) -> bool {
        self.checkpoint_wanted.take()
    }

    fn effect(&self, index: LogIndex, command: &VolumeCommand) {
        match command {
            VolumeCommand::Write { range, checksums, .. } => self.data.apply_write(index, *range, checksums),
            VolumeCommand::Trim { range, .. } => self.data.apply_clear(index, *range, Clear::Trim),
            VolumeCommand::Zero { range, .. } => self.data.apply_clear(index, *range, Clear::Zero),
            VolumeCommand::Resize { size } => self.data.set_size(*size),
            _ => {}
        }
    }

    /// INV-LAYER: what a command of snapshots does to the layers, in step with the replicated state. `snapshot` is
    /// where the one that it names stood before.
    fn effect_on_layers(&self, index: LogIndex, command: &VolumeCommand, snapshot: Option<LogIndex>) {
        match (command, snapshot) {
            (VolumeCommand::Snapshot { .. }, _) => self.data.apply_snapshot(index),
            (VolumeCommand::DropSnapshot { .. }, Some(snapshot)) => {
                self.data.apply_drop_snapshot(index, snapshot);
            }
            (VolumeCommand::RestoreSnapshot { .. }, Some(snapshot)) => {
                self.data.apply_restore(index, snapshot);
            }
            _ => {}
        }
        let known = crate::rebuild::layers_of(&self.state.borrow());
        assert_eq!(self.data.layers(), known, "INV-LAYER: the store's layers are those of the state");
    }
}

/// Where the snapshot stands that a command drops or restores.
fn snapshot_of(state: &VolumeState, command: &VolumeCommand) -> Option<LogIndex> {
    let (VolumeCommand::DropSnapshot { id } | VolumeCommand::RestoreSnapshot { id, .. }) = command else {
        return None;
    };
    state.snapshot(*id).map(|snapshot| snapshot.index)
}

impl StateMachine for VolumeMachine {
    fn check(&self, data: &AppData) -> Result<(), CheckError> {
        check_command(data)
    }

    fn apply(&self, id: EntryId, data: &AppData) -> Result<AppReply, ApplyError> {
        let command = VolumeCommand::decode(&data.head)
            .map_err(|error| ApplyError { index: id.index, why: error.to_string() })?;
        let snapshot = snapshot_of(&self.state.borrow(), &command);
        let reply = self.state.borrow_mut().apply(id.index, &command);
        match reply {
            VolumeReply::Done { fresh: true } if command.is_of_snapshots() => {
                self.effect_on_layers(id.index, &command, snapshot);
            }
            VolumeReply::Done { fresh: true } => self.effect(id.index, &command),
            VolumeReply::Snapshotted { index, .. } if index == id.index => {
                self.effect_on_layers(id.index, &command, None);
            }
            _ => {}
        }
        Ok(AppReply::Volume(reply))
    }

    fn encode_state(&self) -> Bytes {
        self.state.borrow().encode()
    }

    fn checkpoint(&self) -> Option<Checkpoint> {
        Some(self.data.checkpoint())
    }

    fn install(
        &self,
        checkpoint: Checkpoint,
        staged: Option<Rc<dyn Staged>>,
    ) -> LocalBoxFuture<'_, Result<(), StoreError>> {
        let state = VolumeState::decode(&checkpoint.state);
        Box::pin(async move {
            let state = state.map_err(|error| {
                StoreError::Failed(format!("the leader's checkpoint is damaged: {error}"))
            })?;
            let staged = staged.ok_or_else(|| {
                StoreError::Failed("a volume's snapshot came without its block content".into())
            })?;
            staged.commit(checkpoint).await?;
            // Only now, and with no wait before the position follows: a cleaner that captured this state beside the
            // old position would make a checkpoint in which requests are marked as applied that are not.
            self.data.set_size(state.size());
            *self.state.borrow_mut() = state;
            Ok(())
        })
    }

    fn after_apply(&self, _index: LogIndex) {
        self.changed.notify_waiters();
        self.dirtied.notify_one();
    }
}

/// Refuses a command that is malformed, or whose block data does not match its checksums.
pub(crate) fn check_command(data: &AppData) -> Result<(), CheckError> {
    let malformed = |why: String| CheckError::Malformed(why);
    let command = VolumeCommand::decode(&data.head).map_err(|error| malformed(error.to_string()))?;
    command.validate(data.payload.len()).map_err(|refusal| malformed(refusal.to_string()))?;
    if let VolumeCommand::Write { range, checksums, .. } = &command {
        check_payload(*range, checksums, data.payload.whole()).map_err(CheckError::Damaged)?;
    }
    Ok(())
}

/// INV-CHECKED: whoever takes blocks over compares them with the checksums that their session computed.
fn check_payload(range: BlockRange, checksums: &[u32], payload: &[u8]) -> Result<(), String> {
    if is_planted("damaged-in-flight") {
        return Ok(());
    }
    for ((block, expected), data) in range.blocks().zip(checksums).zip(payload.chunks_exact(BLOCK_BYTES)) {
        if block_checksum(block, data) != *expected {
            return Err(format!("block {} does not match its checksum", block.0));
        }
    }
    Ok(())
}

/// A running replica of a volume.
pub struct Volume {
    group: Rc<Group>,
    machine: Rc<VolumeMachine>,
    rpc: Rpc,
    watch: RefCell<HolderWatch>,
    /// What the watch counts for: the term in which this replica leads, and since when it has led without a break.
    watch_term: Cell<Option<(Term, Instant)>>,
    /// Who pulls from it.
    hold: Rc<PurgeHold>,
    /// How the replica last caught up, and what that took.
    pub(crate) healed: RefCell<(String, u64)>,
    /// How far the store's scrub is with it.
    scrubbed: Cell<ScrubProgress>,
    /// Why its blocks are not brought home any more.
    cleaner_fault: RefCell<Option<String>>,
    /// How often the medium had been full when all of its blocks were last brought home in the reserve's room.
    pub(crate) home_when_full: Cell<u64>,
    /// Its space on the medium when it was last looked at.
    pub(crate) last_space: Cell<SpaceUsed>,
    stopped: Notify,
    is_stopped: Cell<bool>,
    /// The timers of a volume whose state tells none.
    defaults: Timers,
}

impl Volume {
    pub(crate) fn new(group: Rc<Group>, machine: Rc<VolumeMachine>, rpc: Rpc, defaults: Timers) -> Rc<Self> {
        let terms = lease_terms(machine.state.borrow().timers().with_defaults(defaults).waited_lease());
        let volume = Rc::new(Self {
            group,
            machine,
            rpc,
            watch: RefCell::new(HolderWatch::new(terms)),
            watch_term: Cell::new(None),
            hold: Rc::default(),
            healed: RefCell::default(),
            scrubbed: Cell::default(),
            cleaner_fault: RefCell::new(None),
            home_when_full: Cell::new(0),
            last_space: Cell::default(),
            stopped: Notify::new(),
            is_stopped: Cell::new(false),
            defaults,
        });
        holdfast_env::spawn("volume-settle", Self::settle_loop(Rc::downgrade(&volume)));
        volume
    }

    pub(crate) fn hold(&self) -> &Rc<PurgeHold> {
        &self.hold
    }

    /// Its group.
    pub fn group(&self) -> &Rc<Group> {
        &self.group
    }
    /// Its blocks.
    pub fn data(&self) -> &VolumeData {
        &self.machine.data
    }
    pub(crate) fn rpc(&self) -> &Rpc {
        &self.rpc
    }
    pub(crate) fn machine(&self) -> &Rc<VolumeMachine> {
        &self.machine
    }
    /// Its part of the journal.
    pub fn log(&self) -> &GroupLog {
        self.group.log()
    }
    /// The fencing state as applied here.
    pub fn state(&self) -> VolumeState {
        self.machine.state.borrow().clone()
    }

    /// Bytes that the last rebuild by chunks of this replica took, since its daemon started; 0 if there was none.
    pub fn healed_by_chunks(&self) -> u64 {
        let healed = self.healed.borrow();
        if healed.0 == "chunks" { healed.1 } else { 0 }
    }

    /// How far the store's scrub is with it.
    pub fn scrub_progress(&self) -> ScrubProgress {
        self.scrubbed.get()
    }

    pub(crate) fn scrubbed(&self, more: impl FnOnce(&mut ScrubProgress)) {
        let mut progress = self.scrubbed.get();
        more(&mut progress);
        self.scrubbed.set(progress);
    }

    /// Stops its tasks and its group.
    pub async fn stop(&self) {
        self.is_stopped.set(true);
        self.stopped.notify_waiters();
        self.machine.dirtied.notify_one();
        self.data().wake_healer();
        self.group.stop().await;
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.is_stopped.get()
    }

    /// Why the replica does not do its work any more and must be replaced; a store that failed is another matter.
    pub fn fault(&self) -> Option<String> {
        self.cleaner_fault.borrow().clone().or_else(|| self.group.fault())
    }

    pub(crate) fn cleaner_failed(&self, why: String) {
        *self.cleaner_fault.borrow_mut() = Some(why);
    }

    fn now(&self) -> u64 {
        Instant::now().0
    }

    /// The leader's watch over the holder; begins anew with every term in which this replica leads.
    fn with_watch<T>(&self, use_watch: impl FnOnce(&mut HolderWatch) -> T) -> T {
        let mut watch = self.watch.borrow_mut();
        let terms = self.waited_terms();
        if let Some((term, since)) = self.group.leading_since()
            && self.watch_term.replace(Some((term, since))) != Some((term, since))
        {
            *watch = HolderWatch::new(terms);
            watch.began_leading(since.0);
        }
        watch.follow(terms);
        use_watch(&mut watch)
    }

    /// Handles a call of a session. Called in order of arrival; answers later.
    pub(crate) fn handle(self: &Rc<Self>, request: DataRequest, body: Bytes, responder: Responder) {
        let volume = self.clone();
        holdfast_env::spawn("volume-call", async move {
            let (reply, body) = volume.answer(request, body).await;
            responder.reply(Frame { head: reply.encode(), body });
        });
    }

    /// Answers a call: the reply and the block data that goes with it.
    pub async fn answer(&self, request: DataRequest, body: Bytes) -> (DataReply, Vec<Bytes>) {
        match request {
            DataRequest::Propose { command, .. } => (self.propose(command, body).await, Vec::new()),
            DataRequest::Read { range, epoch, session, floor, .. } => {
                self.read(range, epoch, session, floor).await
            }
            DataRequest::BlockStatus { range, epoch, session, floor, .. } => {
                (self.block_status(range, epoch, session, floor).await, Vec::new())
            }
            DataRequest::Renew { epoch, session, .. } => (self.renew(epoch, session).await, Vec::new()),
            DataRequest::Control { command, .. } => (self.control(command, None).await, Vec::new()),
            DataRequest::MakeSnapshot { command, quota, .. } => {
                (self.control(command, Some(quota)).await, Vec::new())
            }
            DataRequest::Report { .. } => (self.report().await, Vec::new()),
            DataRequest::Digest { index, .. } => (self.digest(index).await, Vec::new()),
            DataRequest::Snapshot { ask, .. } => self.about_snapshot(ask).await,
        }
    }

    /// A living snapshot as applied here.
    pub(crate) fn living(&self, id: SnapshotId) -> Option<Snapshot> {
        self.machine.state.borrow().snapshot(id).cloned()
    }

    pub(crate) fn elsewhere(&self, why: impl Into<String>) -> DataReply {
        DataReply::Elsewhere { leader: self.group.leader().map(|(_, store)| store), why: why.into() }
    }

    pub(crate) fn group_error(&self, error: GroupError) -> DataReply {
        match error {
            GroupError::NotLeader { leader } => {
                DataReply::Elsewhere { leader, why: "this replica does not lead the volume's group".into() }
            }
            // Whoever leads now, who was asked cannot show that it does.
            GroupError::TimedOut => {
                DataReply::Elsewhere { leader: None, why: "no quorum answered in time".into() }
            }
            GroupError::Stopped(why) => self.elsewhere(format!("the replica has stopped: {why}")),
            // Its sender has it whole, as a rule, and sends it again.
            GroupError::Damaged(why) => {
                tracing::error!(group = %self.group.id().group, %why, "a write was damaged on the way");
                let leader = self.group.leader().map(|(_, store)| store);
                DataReply::Elsewhere { leader, why }
            }
            GroupError::Refused(why) => DataReply::Failed(why),
        }
    }

    /// Waits until no older holder is unsettled before an epoch's command; true if it is settled.
    async fn settled(&self, epoch: Epoch) -> bool {
        let wait = async {
            loop {
                let changed = self.machine.changed.notified();
                let blocked = {
                    let state = self.machine.state.borrow();
                    let unsettled = state.unsettled().is_some() && !is_planted("unsettled-ignored");
                    unsettled && epoch >= state.epoch()
                };
                if !blocked {
                    return;
                }
                changed.await;
            }
        };
        holdfast_env::timeout(SETTLE_PATIENCE, wait).await.is_ok()
    }

    async fn propose(&self, command: Bytes, payload: Bytes) -> DataReply {
        let decoded = match VolumeCommand::decode(&command) {
            Ok(decoded) => decoded,
            Err(error) => return DataReply::Failed(error.to_string()),
        };
        let Some(tag) = decoded.tag() else {
            return DataReply::Failed("only data commands are proposed this way".into());
        };
        if !self.group.is_leader() {
            return self.elsewhere("this replica does not lead the volume's group");
        }
        if !self.settled(tag.epoch).await {
            return self.elsewhere("the volume waits for its former holder's lease to end");
        }
        self.pace(payload.len()).await;
        let _admitted = loop {
            if space::brings_data(&decoded) && !self.has_room().await {
                return self.elsewhere("the medium is full: data waits for room");
            }
            let admitted = holdfast_env::timeout(ADMIT_PATIENCE, self.log().admit(payload.len())).await;
            let Ok(admitted) = admitted else {
                return self.elsewhere("the journal of this store has no room yet");
            };
            // What stood in line while the medium became full waits like the rest.
            if !space::brings_data(&decoded) || self.group.takes_data() {
                break admitted;
            }
        };
        self.propose_command(AppData { head: command, payload: Payload::Here(payload) }).await
    }

    async fn propose_command(&self, data: AppData) -> DataReply {
        match self.group.propose(data).await {
            Ok((id, AppReply::Volume(reply))) => DataReply::Applied { index: id.index, reply },
            Ok((id, other)) => DataReply::Failed(format!("entry {} answered {other}", id.index)),
            Err(error) => self.group_error(error),
        }
    }

    /// Whether a reader of this epoch and floor may be served now; otherwise what to answer.
    async fn admit_read(&self, epoch: Epoch, session: SessionId, floor: LogIndex) -> Result<(), DataReply> {
        // A leader has nobody to send the reader to.
        if self.log().is_hung() && !self.group.is_leader() {
            return Err(self.elsewhere("the disk of this store hangs"));
        }
        let floor = if is_planted("read-below-floor") { LogIndex::ZERO } else { floor };
        let reached = holdfast_env::timeout(FLOOR_PATIENCE, self.group.position().reached(floor)).await;
        if reached.is_err() {
            return Err(self.elsewhere("this replica has not applied far enough yet"));
        }
        let state = self.machine.state.borrow();
        let current = state.epoch();
        match admit_read(&state, epoch, session) {
            Ok(()) => Ok(()),
            Err(NotServed::OldEpoch) => Err(DataReply::Fenced {
                current,
                why: format!("epoch {epoch} is over: the volume is at epoch {current}"),
            }),
            Err(NotServed::NotHolder) => {
                Err(DataReply::Fenced { current, why: "another session holds the volume".into() })
            }
            Err(NotServed::Unsettled) => {
                Err(self.elsewhere("the volume waits for its former holder's lease to end"))
            }
            Err(NotServed::UnknownEpoch) => Err(self.elsewhere("this replica does not know that epoch yet")),
        }
    }

    async fn read(
        &self,
        range: BlockRange,
        epoch: Epoch,
        session: SessionId,
        floor: LogIndex,
    ) -> (DataReply, Vec<Bytes>) {
        if let Err(reply) = self.admit_read(epoch, session, floor).await {
            return (reply, Vec::new());
        }
        match self.data().read_checked(range).await {
            // The checksums that were computed where the blocks were written: what happens to a block since it was
            // checked here, its reader notices.
            Ok(CheckedBlocks { data, checksums }) => {
                // INV-STAGE: a rebuild that is being switched in meanwhile shows what is not applied yet.
                let floor = if is_planted("read-below-floor") { LogIndex::ZERO } else { floor };
                if !self.group.position().has_reached(floor) {
                    return (self.elsewhere("this replica is being rebuilt"), Vec::new());
                }
                // Taken after the read: whatever the blocks show was applied by now, so the reader's floor covers it.
                let applied = self.group.position().applied_index();
                (DataReply::Blocks { applied, checksums }, vec![data])
            }
            Err(error) => (self.read_failed(&error), Vec::new()),
        }
    }

    pub(crate) fn read_failed(&self, error: &ReadError) -> DataReply {
        match error {
            ReadError::OutOfRange { .. } => DataReply::Failed(error.to_string()),
            _ => {
                tracing::error!(group = %self.group.id().group, %error, "a read is sent to another replica");
                self.elsewhere(error.to_string())
            }
        }
    }

    async fn block_status(
        &self,
        range: BlockRange,
        epoch: Epoch,
        session: SessionId,
        floor: LogIndex,
    ) -> DataReply {
        if let Err(reply) = self.admit_read(epoch, session, floor).await {
            return reply;
        }
        match self.data().block_status(range).await {
            // INV-STAGE, as for a read.
            Ok(_) if !self.group.position().has_reached(floor) => {
                self.elsewhere("this replica is being rebuilt")
            }
            Ok(runs) => {
                let runs = runs.into_iter().map(|(count, kind)| (count, kind_number(kind))).collect();
                DataReply::Status { applied: self.group.position().applied_index(), runs }
            }
            Err(error) => self.read_failed(&error),
        }
    }

    async fn renew(&self, epoch: Epoch, session: SessionId) -> DataReply {
        let unasked = is_planted("renewal-in-transfer") && self.group.is_transferring();
        if self.group.is_transferring() && !unasked {
            return self.elsewhere("the leadership is being transferred");
        }
        // INV-LEASE: confirmed after the request arrived, so after the session sent it; whatever a later leader
        // commits comes after, and waits a full lease from its own election.
        let index = match self.group.confirm_leadership().await {
            Ok(index) => index,
            Err(_) if unasked => LogIndex::ZERO,
            Err(error) => return self.group_error(error),
        };
        if holdfast_env::timeout(FLOOR_PATIENCE, self.group.position().reached(index)).await.is_err() {
            return self.elsewhere("the leader has not applied far enough yet");
        }
        let state = self.machine.state.borrow();
        if !admit_renewal(&state, epoch, session) {
            let why = format!("epoch {epoch} is over: the volume is at epoch {}", state.epoch());
            return DataReply::Fenced { current: state.epoch(), why };
        }
        if self.group.is_transferring() && !unasked {
            return self.elsewhere("the leadership is being transferred");
        }
        let now = self.now();
        self.with_watch(|watch| watch.granted(now));
        let lease = self.timers().granted_lease();
        DataReply::Renewed {
            epoch: state.epoch(),
            members: self.group.data_members(),
            leader: self.group.id().replica,
            size: state.size().0,
            error_after_seconds: match state.on_quorum_loss() {
                holdfast_types::OnQuorumLoss::Suspend => 0,
                holdfast_types::OnQuorumLoss::Error { after_seconds } => after_seconds.max(1),
            },
            lease_ms: u32::try_from(lease.as_millis()).unwrap_or(u32::MAX),
        }
    }

    /// Attach, detach, resize, policy.
    async fn control(&self, command: Bytes, quota: Option<holdfast_types::ByteSize>) -> DataReply {
        let mut decoded = match VolumeCommand::decode(&command) {
            Ok(decoded) if decoded.tag().is_none() => decoded,
            Ok(_) => return DataReply::Failed("a data command is not a control command".into()),
            Err(error) => return DataReply::Failed(error.to_string()),
        };
        let index = match self.group.confirm_leadership().await {
            Ok(index) => index,
            Err(error) => return self.group_error(error),
        };
        if holdfast_env::timeout(SETTLE_PATIENCE, self.group.position().reached(index)).await.is_err() {
            return self.elsewhere("the leader has not applied far enough yet");
        }
        if let VolumeCommand::TimersSettled { since } = &decoded
            && let Some(refusal) = self.too_early(*since)
        {
            return DataReply::Applied { index, reply: VolumeReply::Refused(refusal) };
        }
        if let Some(refused) = self.refused_for_quota(&decoded, quota, index).await {
            return refused;
        }
        if let VolumeCommand::Attach { .. } = &decoded {
            let now = self.now();
            let decision = {
                let state = self.machine.state.borrow();
                self.with_watch(|watch| decide_attach(&state, watch, &decoded, now))
            };
            match decision {
                AttachDecision::Refuse(refusal) => {
                    return DataReply::Applied { index, reply: VolumeReply::Refused(refusal) };
                }
                // Whether the holder's end is confirmed only the leader knows; what the caller wrote counts for
                // nothing. And a holder whose lease has ended needs no force any more.
                AttachDecision::Propose { confirmed } => decoded = decoded.admitted(confirmed),
            }
        }
        let reply = self.propose_command(AppData { head: decoded.encode(), payload: Payload::NONE }).await;
        if let DataReply::Applied { reply: VolumeReply::Attached { .. }, .. } = &reply {
            let now = self.now();
            self.with_watch(|watch| watch.granted(now));
        }
        reply
    }

    /// Why this leader does not end a change of timers yet. INV-TIMERS: leases of before the change may still live.
    fn too_early(&self, since: LogIndex) -> Option<Refusal> {
        let change = self.timers().change().filter(|change| change.since == since)?;
        let now = self.now();
        (!self.with_watch(|watch| watch.may_end(change, now))).then_some(Refusal::TimersChanging)
    }

    /// The timers of the group as applied here.
    pub fn timers(&self) -> VolumeTimers {
        self.machine.state.borrow().timers().with_defaults(self.defaults)
    }

    /// Lets Raft run with the timers that the volume's state asks for.
    pub async fn take_up_timers(&self) -> Result<(), GroupError> {
        self.group.reload(self.timers().run()).await
    }

    /// What waits for the end of a holder by the timers as applied here: whoever granted a lease had applied no more.
    fn waited_terms(&self) -> LeaseTerms {
        lease_terms(self.timers().waited_lease())
    }

    async fn report(&self) -> DataReply {
        let mut report = self.group.report();
        {
            let state = self.machine.state.borrow();
            report.timers = self.timers();
            report.epoch = state.epoch();
            report.holder = state.holder().map(|holder| holder.node.to_string()).unwrap_or_default();
            report.size = state.size().0;
            report.snapshots = state.snapshots().len() as u32;
        }
        if let Some(bytes) = self.group.take_caught_up() {
            *self.healed.borrow_mut() = ("log".into(), bytes);
        }
        if let Some(fault) = self.fault() {
            report.fault = fault;
        }
        report.is_full = self.log().is_full();
        report.waits_for_room = self.waits_for_room();
        let healed = self.healed.borrow().clone();
        (report.healed_by, report.healed_bytes) = healed;
        let health = self.data().health();
        (report.bad_blocks, report.healed_blocks) = (health.bad_blocks, health.healed_blocks);
        let scrub = self.scrubbed.get();
        report.scrubbed_chunks = scrub.chunk;
        report.scrub_passes = scrub.passes;
        report.unsettled_chunks = scrub.unsettled;
        report.since_scrub_seconds =
            scrub.ended.map_or(u64::MAX, |ended| Instant::now().since(ended).as_secs());
        match self.space_told().await {
            Ok(space) => {
                report.used_bytes = space.blocks + space.snapshots;
                report.snapshot_bytes = space.snapshots;
                report.allocated_bytes = space.allocated;
            }
            Err(error) => report.fault = error.to_string(),
        }
        DataReply::Report(Box::new(report))
    }

    /// The digest of the whole content, read from disk, at the first moment when `index` is applied.
    async fn digest(&self, index: LogIndex) -> DataReply {
        let index = if index == LogIndex::ZERO {
            match self.group.confirm_leadership().await {
                Ok(index) => index,
                Err(error) => return self.group_error(error),
            }
        } else {
            index
        };
        let deadline = Duration::from_secs(10);
        if holdfast_env::timeout(deadline, self.group.position().reached(index)).await.is_err() {
            return self.elsewhere(format!("entry {index} is not applied here within {deadline:?}"));
        }
        match self.data().digest().await {
            Ok(digest) => DataReply::Digest {
                index: self.group.position().applied_index(),
                digest: digest.to_string(),
                bad_blocks: digest.bad_blocks,
            },
            Err(error) => self.elsewhere(error.to_string()),
        }
    }

    /// While it leads: once every older holder has confirmed its end, or one full lease has passed, `Settled` is
    /// proposed, and commands of the newer epoch are admitted (INV-SETTLE).
    async fn settle_loop(volume: Weak<Self>) {
        loop {
            let Some(this) = volume.upgrade().filter(|this| !this.is_stopped()) else { return };
            let changed = this.machine.changed.notified();
            let leadership = this.group.leadership_changed();
            let unsettled = this.machine.state.borrow().unsettled().cloned();
            let leading = this.group.leading_since();
            if let (Some(unsettled), Some((term, since))) = (unsettled, leading) {
                drop(changed);
                drop(leadership);
                let epoch = unsettled.epoch;
                this.settle(epoch, unsettled.holders, term.0, since).await;
                // Proposed in vain: its leader has no quorum, or gives its leadership away.
                if this.machine.state.borrow().unsettled().is_some_and(|still| still.epoch == epoch) {
                    holdfast_env::sleep(SETTLE_PAUSE).await;
                }
                continue;
            }
            let stopped = this.stopped.notified();
            futures_util::pin_mut!(changed, leadership, stopped);
            let woken = futures_util::future::select(changed, leadership);
            if let futures_util::future::Either::Right(_) = futures_util::future::select(woken, stopped).await
            {
                return;
            }
        }
    }

    async fn settle(
        &self,
        epoch: Epoch,
        holders: Vec<holdfast_protocol::volume::Holder>,
        term: u64,
        leading_since: Instant,
    ) {
        let lease = HolderWatch::lease_with_drift(&self.waited_terms());
        // One full lease after the commit, as this leader sees it: it saw the commit now or before, and a leader
        // elected later counts from its own election.
        let until = Instant::now().max(leading_since) + lease;
        let confirm = async {
            for holder in &holders {
                let request =
                    SessionRequest::Fence { group: self.group.id().group, session: holder.session, epoch };
                let frame = Frame::small(request.encode());
                let call = self.rpc.call(holder.store, Lane::Control, messages::SESSION, frame, lease);
                if let Err(error) = call.await {
                    tracing::info!(node = %holder.node, %error, "the former holder has not confirmed its end");
                    return holdfast_env::sleep_until(until).await;
                }
            }
        };
        // Whatever the former holders say, the wait ends with the lease.
        if !is_planted("settled-at-once") {
            let _ended_by_confirmation = holdfast_env::timeout(until.since(Instant::now()), confirm).await;
        }
        let still = self.group.leading_since().is_some_and(|(now, _)| now.0 == term);
        let needed = self.machine.state.borrow().unsettled().is_some_and(|u| u.epoch == epoch);
        if !still || !needed {
            return;
        }
        let command = VolumeCommand::Settled { epoch }.encode();
        if let DataReply::Applied { reply: VolumeReply::Refused(Refusal::OldEpoch { .. }), .. } =
            self.propose_command(AppData { head: command, payload: Payload::NONE }).await
        {
            tracing::debug!(%epoch, "a newer change of holder came first");
        }
    }
}

/// How much faster or slower than true time a clock may run, in thousandths.
pub(crate) const DRIFT_PERMILLE: u32 = 10;

/// A lease of that length.
pub fn lease_terms(lease: Duration) -> LeaseTerms {
    LeaseTerms { lease, drift_permille: DRIFT_PERMILLE }
}

/// A kind of block in messages.
pub(crate) fn kind_number(kind: BlockKind) -> u8 {
    match kind {
        BlockKind::Data => 0,
        BlockKind::Zero => 1,
        BlockKind::Absent => 2,
    }
}
