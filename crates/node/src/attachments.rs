//! What is attached on this node: the session, the frontend, and the note of it that outlives the daemon.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use holdfast_catalog::volumes;
use holdfast_frontend::Edge;
use holdfast_frontend::kernel::{Close, KernelError};
use holdfast_protocol::catalog::VolumeRecord;
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::volume::Refusal;
use holdfast_replica::administration::ShardRequest;
use holdfast_session::{AttachOptions, Closed, Session, SessionError, VolumeTarget};
use holdfast_types::{ByteSize, Epoch, ErrorCode, GroupId, StoreId, UserError, VolumeId};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::config::Layout;
use crate::device::SessionDevice;
use crate::shard::Shard;
use crate::shown::{FrontendChoice, FrontendKind, Shown, device_error};

/// How long an attach waits for a quorum and for a former holder's lease.
const ATTACH_PATIENCE: Duration = Duration::from_secs(30);
/// How long a detach waits for requests under way.
const DETACH_PATIENCE: Duration = Duration::from_secs(10);
/// How long a session may take to learn that its volume has grown.
const RESIZE_PATIENCE: Duration = Duration::from_secs(5);
/// Between tries to take over what was attached before a restart.
const RESUME_PAUSE: Duration = Duration::from_millis(500);

/// What a restarted daemon must know to take an attachment over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    name: String,
    group: GroupId,
    stores: Vec<StoreId>,
    frontend: FrontendKind,
    read_only: bool,
}

/// A running attachment.
#[derive(Clone)]
pub(crate) struct Attached {
    pub(crate) session: Rc<Session>,
    pub(crate) shown: Rc<Shown>,
    name: String,
}

/// All of them.
pub(crate) struct Attachments {
    running: RefCell<BTreeMap<VolumeId, Attached>>,
    notes: RefCell<BTreeMap<VolumeId, Note>>,
    path: PathBuf,
    /// One attach or detach of a volume at a time: each sees the other whole.
    changing: RefCell<BTreeMap<VolumeId, Arc<Mutex<()>>>>,
}

/// An attachment as it is told to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AttachmentView {
    pub(crate) epoch: Epoch,
    pub(crate) node: String,
    pub(crate) frontend: String,
    pub(crate) device: String,
}

impl Attachments {
    pub(crate) fn load(layout: &Layout) -> Result<Self, UserError> {
        let path = layout.attachments();
        let wrong = |error: &dyn std::fmt::Display| {
            UserError::new(ErrorCode::Internal, format!("{}: {error}", path.display()))
                .hint("remove the file and attach the node's volumes again")
        };
        let notes = match std::fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map_err(|error| wrong(&error))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(wrong(&error)),
        };
        let notes = RefCell::new(notes);
        Ok(Self { running: RefCell::default(), notes, path, changing: RefCell::default() })
    }

    pub(crate) fn get(&self, id: VolumeId) -> Option<Attached> {
        self.running.borrow().get(&id).cloned()
    }

    /// Waits for a volume's turn to be changed. A volume that waits for its quorum delays no other.
    async fn turn(&self, id: VolumeId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut changing = self.changing.borrow_mut();
            changing.retain(|_, lock| Arc::strong_count(lock) > 1);
            changing.entry(id).or_default().clone()
        };
        lock.lock_owned().await
    }

    pub(crate) fn count(&self) -> usize {
        self.running.borrow().len()
    }

    /// The name of an attached volume.
    pub(crate) fn name_of(&self, group: GroupId) -> Option<String> {
        let running = self.running.borrow();
        let found = running.values().find(|attached| attached.session.group() == group);
        found.map(|attached| attached.name.clone())
    }

    /// Writes the notes: whole or not at all.
    fn save(&self) -> Result<(), UserError> {
        let wrong = |error: &dyn std::fmt::Display| {
            UserError::new(ErrorCode::Internal, format!("{}: {error}", self.path.display()))
        };
        let json = serde_json::to_vec_pretty(&*self.notes.borrow()).map_err(|error| wrong(&error))?;
        holdfast_env::real::replace_file(&self.path, &json).map_err(|error| wrong(&error))
    }

    fn forget(&self, id: VolumeId) -> Result<(), UserError> {
        self.running.borrow_mut().remove(&id);
        match self.notes.borrow_mut().remove(&id) {
            Some(_) => {}
            None => return Ok(()),
        }
        self.save()
    }
}

/// A session's error for users.
pub(crate) fn user_error(name: &str, error: SessionError) -> UserError {
    let code = match &error {
        SessionError::Refused(_) | SessionError::Closed(_) | SessionError::ReadOnly => ErrorCode::Refused,
        SessionError::OutOfRange { .. } => ErrorCode::OutOfRange,
        SessionError::NoQuorum(_) => ErrorCode::Unavailable,
        SessionError::Failed(_) => ErrorCode::Internal,
    };
    let hint = match &error {
        SessionError::Refused(Refusal::HeldBy { .. }) => {
            "`holdfast volume attach --force` takes it from a node that is dead or unreachable"
        }
        SessionError::NoQuorum(_) => "`holdfast volume show` tells which replicas answer",
        _ => "",
    };
    UserError::new(code, format!("volume {name}: {error}")).hint(hint)
}

impl Shard {
    fn view(&self, attached: &Attached) -> AttachmentView {
        AttachmentView {
            epoch: attached.session.epoch(),
            node: self.config.location.node.to_string(),
            frontend: attached.shown.kind().as_str().into(),
            device: attached.shown.device(),
        }
    }

    /// How a volume is attached here, if it is and has not ended.
    pub(crate) fn look(&self, id: VolumeId) -> Option<AttachmentView> {
        let attached = self.attachments.get(id)?;
        attached.session.closed_now().is_none().then(|| self.view(&attached))
    }

    /// Attaches a volume here. Attaching it again the same way tells how it is attached.
    pub(crate) async fn attach(
        self: &Rc<Self>,
        name: &str,
        frontend: &str,
        force: bool,
        read_only: bool,
    ) -> Result<AttachmentView, UserError> {
        if self.config.witness {
            let message = format!("node {} is a witness: it serves no volumes", self.config.location.node);
            return Err(UserError::new(ErrorCode::Refused, message).hint("attach on a node that holds data"));
        }
        let choice: FrontendChoice = frontend.parse()?;
        let frontend = choice.resolve()?;
        let state = self.catalog.state(ATTACH_PATIENCE).await?;
        let record = state.get(name)?;
        record.check_ready()?;
        let _turn = self.attachments.turn(record.id).await;
        if let Some(attached) = self.attachments.get(record.id) {
            match attached.session.closed_now() {
                None if attached.session.read_only() == read_only && choice.allows(attached.shown.kind()) => {
                    return Ok(self.view(&attached));
                }
                None => {
                    let message = format!("volume {name} is attached here in another mode");
                    return Err(UserError::new(ErrorCode::AlreadyExists, message).hint("detach it first"));
                }
                Some(_) => self.take_down(record.id).await?,
            }
        }
        let note = Note {
            name: record.spec.name.clone(),
            group: record.group,
            stores: record.stores(),
            frontend,
            read_only,
        };
        let attached = self.start_session(record.id, &note, force, false).await?;
        self.attachments.notes.borrow_mut().insert(record.id, note);
        self.attachments.save()?;
        holdfast_env::spawn("lead-here", self.clone().lead_near(record.clone()));
        Ok(self.view(&attached))
    }

    async fn start_session(
        self: &Rc<Self>,
        id: VolumeId,
        note: &Note,
        force: bool,
        resume: bool,
    ) -> Result<Attached, UserError> {
        let options = AttachOptions {
            node: self.config.location.node.clone(),
            force,
            read_only: note.read_only,
            resume,
            only_at: None,
            patience: ATTACH_PATIENCE,
        };
        let target = VolumeTarget { group: note.group, stores: note.stores.clone() };
        let session = Session::attach(self.rpc.clone(), &self.sessions, target, &options, &self.timers)
            .await
            .map_err(|error| user_error(&note.name, error))?;
        let edge = Edge::new(Rc::new(SessionDevice(session.clone())));
        let shown = match Shown::open(self, &note.name, note.frontend, edge).await {
            Ok(shown) => Rc::new(shown),
            Err(error) => {
                // Nothing half-done: what cannot be shown is not held.
                if let Err(error) = session.detach(DETACH_PATIENCE).await {
                    tracing::warn!(volume = note.name, %error, "a volume that cannot be shown stays attached");
                }
                return Err(device_error(&note.name, &error));
            }
        };
        let attached = Attached { session: session.clone(), shown, name: note.name.clone() };
        self.attachments.running.borrow_mut().insert(id, attached.clone());
        holdfast_env::spawn("watch-size", Self::watch_size(attached.clone()));
        holdfast_env::spawn("watch-session", Self::watch(Rc::downgrade(self), id, session));
        Ok(attached)
    }

    /// A session that was fenced is not taken over by the next daemon. Its export stays and answers that it has
    /// ended, until it is detached.
    async fn watch(shard: std::rc::Weak<Self>, id: VolumeId, session: Rc<Session>) {
        let why = session.closed().await;
        let Some(this) = shard.upgrade() else { return };
        if matches!(why, Closed::Fenced { .. }) {
            let current = this.attachments.get(id).map(|attached| attached.session.epoch());
            if current == Some(session.epoch())
                && this.attachments.notes.borrow_mut().remove(&id).is_some()
                && let Err(error) = this.attachments.save()
            {
                tracing::error!(%error, "a fenced attachment is still noted");
            }
        }
    }

    /// A device of the kernel learns that its volume has grown.
    async fn watch_size(attached: Attached) {
        let Attached { session, shown, name } = attached;
        let mut known = session.size();
        while let Some(size) = session.grown_beyond(known).await {
            known = size;
            if let Err(error) = shown.resized().await {
                tracing::warn!(volume = name, %error, "the device does not show that its volume has grown");
            }
        }
    }

    /// Waits until the device shows at least `size`; false if the volume is not attached here.
    pub(crate) async fn show_size(&self, id: VolumeId, size: ByteSize) -> Result<bool, UserError> {
        let Some(attached) = self.attachments.get(id) else { return Ok(false) };
        let grown = async {
            let mut known = attached.session.size();
            while known < size {
                match attached.session.grown_beyond(known).await {
                    Some(size) => known = size,
                    None => return false,
                }
            }
            true
        };
        let late = |_| {
            let message = format!("the session of volume {} has not learnt the new size", attached.name);
            UserError::new(ErrorCode::TimedOut, message)
        };
        if !holdfast_env::timeout(RESIZE_PATIENCE, grown).await.map_err(late)? {
            return Ok(false);
        }
        attached.shown.resized().await.map_err(|error| device_error(&attached.name, &error))?;
        Ok(true)
    }

    /// Ends frontend and note of an attachment, whoever uses it.
    async fn take_down(&self, id: VolumeId) -> Result<(), UserError> {
        if let Some(attached) = self.attachments.get(id)
            && let Err(error) = attached.shown.close(self, &attached.name, Close::Forced).await
        {
            tracing::warn!(volume = attached.name, %error, "a device was not taken away");
        }
        self.attachments.forget(id)
    }

    /// Takes the devices of all attachments away and keeps the notes: the next daemon makes them anew.
    pub(crate) async fn hide_all(&self) {
        let running: Vec<Attached> = self.attachments.running.borrow().values().cloned().collect();
        for attached in running {
            if let Err(error) = attached.shown.close(self, &attached.name, Close::Forced).await {
                tracing::warn!(volume = attached.name, %error, "a device was not taken away");
            }
        }
    }

    /// Detaches a volume that is attached here; false if it was not. Without `force` it is refused while its device
    /// is mounted or open.
    pub(crate) async fn detach_here(&self, id: VolumeId, force: bool) -> Result<bool, UserError> {
        let _turn = self.attachments.turn(id).await;
        let Some(attached) = self.attachments.get(id) else {
            self.attachments.forget(id)?;
            return Ok(false);
        };
        let held = attached.session.closed_now().is_none();
        if held {
            if !force && let Err(error) = attached.shown.close(self, &attached.name, Close::Orderly).await {
                let refused = matches!(error, KernelError::InUse(_));
                let error = device_error(&attached.name, &error);
                if refused {
                    return Err(error);
                }
                tracing::warn!(volume = attached.name, %error, "a device is taken away by force");
            }
            let ended = attached.session.detach(DETACH_PATIENCE).await;
            self.take_down(id).await?;
            ended.map_err(|error| user_error(&attached.name, error))?;
        }
        self.take_down(id).await?;
        Ok(held)
    }

    /// Lets go of a volume that is attached here, whatever its quorum does: what waits fails. False if it was not
    /// attached here.
    pub(crate) async fn abort_here(
        &self,
        wanted: impl Fn(VolumeId, &str) -> bool,
    ) -> Result<bool, UserError> {
        let found = {
            let running = self.attachments.running.borrow();
            let mut all = running.iter().map(|(id, attached)| (*id, attached.clone()));
            all.find(|(id, attached)| wanted(*id, &attached.name))
        };
        let Some((id, attached)) = found else { return Ok(false) };
        let held = attached.session.closed_now().is_none();
        tracing::warn!(volume = attached.name, "the attachment is aborted");
        attached.session.abort();
        self.take_down(id).await?;
        Ok(held)
    }

    /// Takes over what this node held when its daemon ended.
    pub(crate) async fn resume_attachments(self: Rc<Self>) {
        let notes = self.attachments.notes.borrow().clone();
        for (id, note) in notes {
            let this = self.clone();
            holdfast_env::spawn("resume-one", async move { this.resume(id, note).await });
        }
    }

    async fn resume(self: Rc<Self>, id: VolumeId, note: Note) {
        loop {
            {
                let _turn = self.attachments.turn(id).await;
                if self.attachments.get(id).is_some() || !self.attachments.notes.borrow().contains_key(&id) {
                    return;
                }
                match self.start_session(id, &note, false, true).await {
                    Ok(_) => return,
                    Err(error) if error.code == ErrorCode::Refused => {
                        tracing::warn!(volume = note.name, %error, "an attachment was lost while the daemon was away");
                        if let Err(error) = self.attachments.forget(id) {
                            tracing::error!(%error, "a lost attachment is still noted");
                        }
                        return;
                    }
                    Err(error) => {
                        tracing::info!(volume = note.name, %error, "an attachment is not taken over yet")
                    }
                }
            }
            holdfast_env::sleep(RESUME_PAUSE).await;
        }
    }

    /// Ends the attachment that another node holds and does not answer for. Its session is fenced.
    pub(crate) async fn detach_by_force(&self, record: &VolumeRecord, epoch: Epoch) -> Result<(), UserError> {
        let command = VolumeCommand::Detach { epoch, force: true, confirmed: false };
        volumes::control(&self.rpc, record.group, &record.stores(), &command, ATTACH_PATIENCE).await?;
        Ok(())
    }

    /// The leader follows the attachment: to the replica on this node, else to one in its zone.
    async fn lead_near(self: Rc<Self>, record: VolumeRecord) {
        let here = &self.config.location;
        let near = record.data().find(|replica| replica.location.node == here.node).or_else(|| {
            record
                .data()
                .find(|replica| replica.location.region == here.region && replica.location.zone == here.zone)
        });
        let Some(near) = near else { return };
        let reports = volumes::replica_reports(&self.rpc, &record).await;
        let Some((leader, _)) = volumes::leader_of(&reports) else { return };
        if leader == near.id || !matches!(reports.get(&near.id), Some(Ok(_))) {
            return;
        }
        let Some(at) = record.replicas.iter().find(|replica| replica.id == leader) else { return };
        let request = ShardRequest::Transfer { group: record.group, to: near.id };
        if let Err(error) = volumes::shard(&self.rpc, at.store, &request).await {
            tracing::info!(volume = record.spec.name, %error, "the leader stays where it is");
        }
    }
}
