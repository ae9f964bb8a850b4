//! The replicas of one store, on its shard: loads what the disk holds, creates and destroys replicas, and hands
//! incoming calls to them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::Instant;
use holdfast_env::disk::Directory;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::volume::VolumeState;
use holdfast_store::journal::{GroupLog, Journal, RecoveredGroup, Recovery, StoreOptions};
use holdfast_store::past_file;
use holdfast_store::recovery_file::RecoveryFile;
use holdfast_store::state_file::StateIdentity;
use holdfast_store::volume::{Checkpoint, Manifest, ReplicaFileIdentity, VolumeData};
use holdfast_store::witness_file::{WitnessFile, WitnessManifest};
use holdfast_store::{Budget, EntryId, FailStop, ReplicaIdentity, StoreError, StoreIdentity};
use holdfast_types::{ByteSize, DecodeError, GroupId, LogIndex, Reader, ReplicaId, StoreId, VolumeId};
use holdfast_wire::rpc::{Handler, Responder};

use crate::codec;
use crate::destroy::Departures;
use crate::group::{Group, GroupEnvironment, GroupError};
use crate::machine::{Position, SnapshotData, StateMachine};
use crate::messages::{self, Method, RaftHead};
use crate::observe::observed;
use crate::past::{self, Pasts};
use crate::rebuild::{self, Offer, RebuildError, Receivers, Receiving};
use crate::repair::{self, Repair, RepairUsage};
use crate::scrub::{self, Scrub, ScrubOptions};
use crate::survey::Surveys;
use crate::volume::{Volume, VolumeMachine};
use crate::witness::Witnesses;
use crate::{cleaner, config, gray, heal, rest, space};

/// What a new replica of a volume is.
#[derive(Clone, Debug)]
pub struct NewReplica {
    /// The volume.
    pub volume: VolumeId,
    /// Who the replica is.
    pub id: ReplicaIdentity,
    /// The volume's size.
    pub size: ByteSize,
    /// The volume's specification, for disks that must describe themselves.
    pub spec_json: Bytes,
}

/// A replica as it stands on the disk.
#[derive(Clone, Debug)]
pub(crate) enum Standing {
    Data(Manifest),
    Witness(WitnessManifest),
}

impl Standing {
    pub(crate) fn identity(&self) -> &ReplicaFileIdentity {
        match self {
            Self::Data(manifest) => &manifest.identity,
            Self::Witness(manifest) => &manifest.identity,
        }
    }
    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        match self {
            Self::Data(manifest) => &manifest.checkpoint,
            Self::Witness(manifest) => &manifest.checkpoint,
        }
    }
}

/// A replica that stands on the disk but does not run, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faulty {
    /// Who it is.
    pub id: ReplicaIdentity,
    /// Its volume.
    pub volume: VolumeId,
    /// Why it does not run and what to do.
    pub why: String,
    /// Its peers are asked what they know of it, or its log is repaired from them; it is not to be replaced for now.
    pub repairing: bool,
}

struct HostedVolume {
    volume: Rc<Volume>,
    of: VolumeId,
}

/// The replicas of one store.
pub struct Host {
    /// What forced recoveries have made of the replicas here.
    pub(crate) recoveries: RecoveryFile,
    environment: GroupEnvironment,
    identity: StoreIdentity,
    directory: Rc<dyn Directory>,
    pub(crate) surveys: Surveys,
    journal: Journal,
    volumes: RefCell<BTreeMap<GroupId, HostedVolume>>,
    pub(crate) witnesses: Witnesses,
    groups: RefCell<BTreeMap<GroupId, Rc<Group>>>,
    faulty: RefCell<BTreeMap<GroupId, Faulty>>,
    /// Replicas that do not run before their peers have answered; they are in `faulty` too.
    pub(crate) repairs: RefCell<BTreeMap<GroupId, Rc<Repair>>>,
    pub(crate) repaired: Cell<RepairUsage>,
    pasts: Pasts,
    receivers: Rc<Receivers>,
    pub(crate) departures: Departures,
    scrub: Rc<Scrub>,
    /// Logs of which part is unreadable, and why, by their files' identity.
    unknown: RefCell<BTreeMap<ReplicaIdentity, String>>,
    /// Logs that no manifest claims: the catalog's, until it is started.
    unclaimed: RefCell<Vec<RecoveredGroup>>,
    loaded: Cell<bool>,
    /// When a rebuild is tried again that has found no room.
    rebuilds_again: Cell<Option<Instant>>,
}

/// Between rebuilds that find no room: each sends what differs.
const REBUILD_PAUSE: Duration = Duration::from_secs(10);

impl Host {
    /// Opens the store's journal and registers for the shard's calls. Replicas run after [`Self::load`].
    pub async fn open(
        environment: GroupEnvironment,
        directory: Rc<dyn Directory>,
        identity: StoreIdentity,
        options: &StoreOptions,
    ) -> Result<Rc<Self>, StoreError> {
        Self::open_within(environment, directory, identity, options, None).await
    }

    /// As [`Self::open`], for a store that may take so many bytes of its medium.
    pub async fn open_within(
        environment: GroupEnvironment,
        directory: Rc<dyn Directory>,
        identity: StoreIdentity,
        options: &StoreOptions,
        capacity: Option<u64>,
    ) -> Result<Rc<Self>, StoreError> {
        let (journal, recovered) = Journal::open(directory.clone(), &identity, options).await?;
        let budget = Budget::open(&directory, capacity, journal.usage().bytes_total).await?;
        let directory = budget.guard(directory);
        journal.open_reserve(directory.clone()).await?;
        let directory: Rc<dyn Directory> = Rc::new(FailStop::new(directory, journal.clone()));
        let departures = Departures::open(directory.clone(), &identity).await?;
        let recoveries = RecoveryFile::open(directory.clone(), identity.cluster, identity.store).await?;
        let host = Rc::new(Self {
            identity,
            directory,
            surveys: Surveys::new(budget),
            departures,
            recoveries,
            unknown: RefCell::default(),
            journal,
            volumes: RefCell::default(),
            witnesses: Witnesses::default(),
            groups: RefCell::default(),
            faulty: RefCell::default(),
            repairs: RefCell::default(),
            repaired: Cell::default(),
            pasts: Pasts::default(),
            receivers: Rc::default(),
            scrub: Rc::default(),
            unclaimed: RefCell::new(recovered),
            loaded: Cell::new(false),
            rebuilds_again: Cell::new(None),
            environment,
        });
        use messages::{DATA, HEAL, PAST, RAFT, REBUILD, REPAIR, REST};
        for service in [RAFT, DATA, REBUILD, HEAL, REPAIR, PAST, REST] {
            let handler = Rc::new(Service { host: Rc::downgrade(&host), service: service.0 });
            host.environment.rpc.serve(service, handler);
        }
        holdfast_env::spawn("leaderships", gray::watch(Rc::downgrade(&host)));
        holdfast_env::spawn("past", past::keep(Rc::downgrade(&host)));
        holdfast_env::spawn("room", space::watch(Rc::downgrade(&host)));
        holdfast_env::spawn("rest-watch", rest::watch(Rc::downgrade(&host)));
        holdfast_env::spawn("rest-offer", rest::offer(Rc::downgrade(&host)));
        Ok(host)
    }

    /// Starts every replica that the disk holds. One that has others to ask what they know of it, or whose log is
    /// damaged, runs when they have answered ([`Self::faulty`] shows it until then).
    pub async fn load(self: &Rc<Self>) -> Result<(), StoreError> {
        let data = VolumeData::list(self.directory.clone()).await?.into_iter().map(Standing::Data);
        let witnesses = WitnessFile::list(&self.directory).await?.into_iter().map(Standing::Witness);
        for standing in data.chain(witnesses) {
            let files = standing.identity().id;
            let id = self.recoveries.known_as(files);
            let recovered = self.claim(files);
            if let Some(Recovery::Unknown(why)) = recovered.as_ref().map(|recovered| &recovered.state) {
                self.unknown.borrow_mut().insert(files, why.clone());
            }
            let outcome = match (self.recoveries.may_run(files), recovered) {
                // INV-RECOVER: what was replaced is kept, and does not run.
                (Err(barred), _) => Err(barred.to_string()),
                (Ok(_), Some(recovered)) => self.load_one(&standing, id, recovered).await,
                (Ok(_), None) => {
                    Err("its log is not in the journal: the replica must be replaced".to_owned())
                }
            };
            if let Err(why) = outcome {
                tracing::error!(group = %id.group, replica = %id.replica, %why, "a replica does not run");
                let faulty = Faulty { id, volume: standing.identity().volume, why, repairing: false };
                self.set_faulty(id.group, Some(faulty));
            }
        }
        for nobodys in self.unclaimed.borrow().iter() {
            nobodys.log.set_parked(true);
        }
        self.loaded.set(true);
        Ok(())
    }

    /// The recovered log of a replica, taken out of what nobody has claimed yet.
    pub fn claim(&self, id: ReplicaIdentity) -> Option<RecoveredGroup> {
        let mut unclaimed = self.unclaimed.borrow_mut();
        let at = unclaimed.iter().position(|recovered| recovered.id == id)?;
        Some(unclaimed.remove(at))
    }

    /// The recovered log of a group of which this store holds one replica, whatever its id.
    pub fn claim_group(&self, group: GroupId) -> Option<RecoveredGroup> {
        let mut unclaimed = self.unclaimed.borrow_mut();
        let at = unclaimed.iter().position(|recovered| recovered.id.group == group)?;
        let claimed = unclaimed.remove(at);
        claimed.log.set_parked(false);
        Some(claimed)
    }

    async fn load_one(
        self: &Rc<Self>,
        standing: &Standing,
        id: ReplicaIdentity,
        recovered: RecoveredGroup,
    ) -> Result<(), String> {
        self.remember(id).await.map_err(|error| error.to_string())?;
        let is_damaged = matches!(recovered.state, Recovery::Faulty(_));
        if recovered.vote_lost || !is_damaged {
            usable(&recovered)?;
        }
        let members = self.members_of(id, standing, &recovered.log);
        let members = members.map_err(|error| format!("its memberships are not understood: {error}"))?;
        if !is_damaged && past::is_alone(id, &members) {
            return self.open_and_run(standing, id, recovered.log).await.map(drop);
        }
        repair::begin(self, standing.clone(), id, recovered.log);
        Ok(())
    }

    /// Who belongs to the group as which a replica runs, as far as its checkpoint and log know.
    pub(crate) fn members_of(
        &self,
        id: ReplicaIdentity,
        standing: &Standing,
        log: &GroupLog,
    ) -> Result<repair::Members, DecodeError> {
        codec::members_of(&standing.checkpoint().membership, log, self.recoveries.fork_of(id))
    }

    /// The volume, if it is one that holds data.
    pub(crate) async fn open_and_run(
        self: &Rc<Self>,
        standing: &Standing,
        id: ReplicaIdentity,
        log: GroupLog,
    ) -> Result<Option<Rc<Volume>>, String> {
        let manifest = match standing {
            Standing::Data(manifest) => manifest,
            Standing::Witness(manifest) => {
                self.open_and_run_witness(manifest, log).await?;
                return Ok(None);
            }
        };
        let data = self.open_data(manifest, &log).await.map_err(|error| error.to_string())?;
        reaches(&log, &data.checkpoint())?;
        let running = self.run(manifest.identity.volume, id, log, data, false).await;
        running.map(Some).map_err(|error| error.to_string())
    }

    pub(crate) async fn remember(&self, id: ReplicaIdentity) -> Result<(), StoreError> {
        self.remember_in(id, past_file::name_of(id)).await
    }
    /// Reads what a replica knew of the others of its group, from a file of this name.
    pub async fn remember_in(&self, id: ReplicaIdentity, name: String) -> Result<(), StoreError> {
        let identity = StateIdentity { cluster: self.identity.cluster, store: self.identity.store, id };
        self.pasts.open(&self.directory, name, identity).await
    }
    pub(crate) fn wake_starting(&self, group: GroupId) {
        if let Some(starting) = self.repairs.borrow().get(&group) {
            starting.asking.wake();
        }
    }
    pub(crate) fn pasts(&self) -> &Pasts {
        &self.pasts
    }

    /// Opens a replica's files, which may take room. INV-SPACE: a full medium is no reason to replace it.
    async fn open_data(&self, manifest: &Manifest, log: &GroupLog) -> Result<VolumeData, StoreError> {
        let open = || VolumeData::open(self.directory.clone(), &manifest.identity, Rc::new(log.clone()));
        match (open().await, self.journal.reserve()) {
            (Err(error), Some(reserve)) if error.is_full() => {
                reserve.give_up().await?;
                let _using = reserve.in_use();
                open().await
            }
            (opened, _) => opened,
        }
    }

    /// Runs a replica that may run now, and whose log was repaired with so many bytes.
    pub(crate) async fn start_repaired(
        self: &Rc<Self>,
        standing: &Standing,
        id: ReplicaIdentity,
        log: GroupLog,
        bytes: u64,
    ) -> Result<(), String> {
        let volume = self.open_and_run(standing, id, log).await?;
        if let Some(volume) = volume.filter(|_| bytes > 0) {
            *volume.healed.borrow_mut() = ("entries".into(), bytes);
        }
        Ok(())
    }

    async fn run(
        self: &Rc<Self>,
        of: VolumeId,
        id: ReplicaIdentity,
        log: GroupLog,
        data: VolumeData,
        fresh: bool,
    ) -> Result<Rc<Volume>, GroupError> {
        log.set_parked(false);
        let checkpoint = data.checkpoint();
        let state = VolumeState::decode(&checkpoint.state)
            .map_err(|error| GroupError::Stopped(format!("the checkpoint's state is damaged: {error}")))?;
        if data.layers() != rebuild::layers_of(&state) {
            let why = "its layers are not those of its checkpoint's state: replace the replica";
            return Err(GroupError::Stopped(why.into()));
        }
        let position = Rc::new(Position::recovered(Some(&checkpoint), log.committed())?);
        observed(|observer| observer.installed(id, checkpoint.id, &checkpoint.state));
        // What the checkpoint tells; what the log tells beyond it is taken up like any change.
        let defaults = self.environment.timers;
        let timers = state.timers().with_defaults(defaults).run();
        let machine = VolumeMachine::new(state, data);
        let inner: Rc<dyn StateMachine> = machine.clone();
        let environment = self.environment.with_timers(timers, fresh);
        let group = Group::start(&environment, id, log, inner, position, fresh).await?;
        let volume = Volume::new(group, machine, self.environment.rpc.clone(), defaults);
        let cleaning = cleaner::run(Rc::downgrade(&volume), self.journal.clone());
        holdfast_env::spawn("cleaner", cleaning);
        holdfast_env::spawn("healer", heal::run(Rc::downgrade(&volume), self.journal.clone()));
        self.volumes.borrow_mut().insert(id.group, HostedVolume { volume: volume.clone(), of });
        Ok(volume)
    }

    /// The shard's calls.
    pub fn environment(&self) -> &GroupEnvironment {
        &self.environment
    }
    /// Who the store is.
    pub fn identity(&self) -> &StoreIdentity {
        &self.identity
    }
    /// The store's journal.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }
    /// The store's directory; a write or flush of its files that fails stops the store.
    pub fn directory(&self) -> &Rc<dyn Directory> {
        &self.directory
    }
    /// A running replica.
    pub fn volume(&self, group: GroupId) -> Option<Rc<Volume>> {
        self.volumes.borrow().get(&group).map(|hosted| hosted.volume.clone())
    }
    /// Every running replica with its volume.
    pub fn volumes(&self) -> Vec<(VolumeId, Rc<Volume>)> {
        self.volumes.borrow().values().map(|hosted| (hosted.of, hosted.volume.clone())).collect()
    }
    /// The group of a replica that runs, the catalog's included.
    pub(crate) fn group(&self, group: GroupId) -> Option<Rc<Group>> {
        let hosted = self.volumes.borrow().get(&group).map(|hosted| hosted.volume.group().clone());
        hosted.or_else(|| self.groups.borrow().get(&group).cloned())
    }
    /// The groups of everything that runs, the catalog's included.
    pub(crate) fn all_groups(&self) -> Vec<Rc<Group>> {
        let volumes = self.volumes.borrow();
        let others = self.groups.borrow();
        let volumes = volumes.values().map(|hosted| hosted.volume.group());
        volumes.chain(others.values()).cloned().collect()
    }
    /// Replicas that do not run.
    pub fn faulty(&self) -> Vec<Faulty> {
        self.faulty.borrow().values().cloned().collect()
    }
    /// The replica of a group that does not run here.
    pub(crate) fn faulty_of(&self, group: GroupId) -> Option<Faulty> {
        self.faulty.borrow().get(&group).cloned()
    }
    /// The log of a replica that stands here, whether it runs or not.
    pub(crate) fn log_of(&self, id: ReplicaIdentity) -> Option<GroupLog> {
        self.journal.group(self.recoveries.files_of(id))
    }
    /// The volume of a replica that stands here, and whether it runs or is being repaired.
    pub(crate) fn standing_volume(&self, id: ReplicaIdentity) -> Option<VolumeId> {
        let volumes = self.volumes.borrow();
        let hosted = volumes.get(&id.group).filter(|hosted| hosted.volume.group().id() == id);
        let witness = self.witnesses.get(id.group).filter(|witness| witness.group().id() == id);
        let faulty = self.faulty_of(id.group).filter(|faulty| faulty.id == id).map(|faulty| faulty.volume);
        hosted.map(|hosted| hosted.of).or(witness.map(|witness| witness.of())).or(faulty)
    }
    /// Why the log of a replica is in doubt beyond single entries.
    pub(crate) fn unknown_log(&self, files: ReplicaIdentity) -> Option<String> {
        self.unknown.borrow().get(&files).cloned()
    }
    /// Notes that the replica of a group that is no volume does not run here, or that it does.
    pub fn set_faulty(&self, group: GroupId, fault: Option<Faulty>) {
        match fault {
            Some(fault) => {
                // Nobody purges its log. One that only asks runs in a moment, and is not copied about.
                if let Some(log) = self.log_of(fault.id).filter(|_| !fault.repairing) {
                    log.set_parked(true);
                }
                self.faulty.borrow_mut().insert(group, fault)
            }
            None => self.faulty.borrow_mut().remove(&group),
        };
    }
    /// Lets a group that is no volume (the catalog's) get its calls.
    pub fn register(&self, group: Rc<Group>) {
        self.groups.borrow_mut().insert(group.id().group, group);
    }

    /// Creates a replica, durably. Creating it again gives the one that is there. Refused until everything that the
    /// disk holds is loaded: making the files of a replica that is there would empty it. Refused for good if it was
    /// destroyed here.
    pub async fn create(self: &Rc<Self>, new: &NewReplica) -> Result<Rc<Volume>, GroupError> {
        self.check_loaded()?;
        self.witnesses.check_takes(false)?;
        let turn = self.turn(new.id.group);
        let _one_at_a_time = turn.lock().await;
        if let Some(volume) = self.volume(new.id.group) {
            if volume.group().id() == new.id {
                return Ok(volume);
            }
            let other = volume.group().id().replica;
            return Err(GroupError::Refused(format!(
                "this store holds replica {other} of the volume; remove it before another comes here"
            )));
        }
        let log = self.new_log(new.id).await?;
        let made = self.make_files(new, log.clone()).await;
        if made.is_err() {
            self.not_made(log);
        }
        made
    }

    /// The empty log of a replica that is to be made, durably.
    pub(crate) async fn new_log(&self, id: ReplicaIdentity) -> Result<GroupLog, GroupError> {
        self.may_make(id)?;
        if let Some(faulty) = self.faulty.borrow().get(&id.group) {
            return Err(GroupError::Refused(format!(
                "this store holds replica {} of the volume, which does not run: {}",
                faulty.id.replica, faulty.why
            )));
        }
        match self.claim(id) {
            // A crash came between the two steps of an earlier creation.
            Some(recovered) if recovered.log.is_unused() => Ok(recovered.log),
            Some(used) => {
                self.unclaimed.borrow_mut().push(used);
                Err(GroupError::Refused(
                    "the replica's log is here, but its files are not: remove it before it is made anew"
                        .into(),
                ))
            }
            None => Ok(self.journal.create_group(id).await?),
        }
    }

    /// No room for its files, perhaps: the next try finds the log as after a crash.
    pub(crate) fn not_made(&self, log: GroupLog) {
        if log.is_unused() {
            let (id, state, vote_lost) = (log.id(), Recovery::Clean, false);
            self.unclaimed.borrow_mut().push(RecoveredGroup { id, log, state, vote_lost });
        }
    }

    async fn make_files(self: &Rc<Self>, new: &NewReplica, log: GroupLog) -> Result<Rc<Volume>, GroupError> {
        let initial = Checkpoint {
            id: EntryId::default(),
            membership: Bytes::new(),
            state: VolumeState::new(new.size).encode(),
            serve_floor: LogIndex::ZERO,
        };
        let payloads = Rc::new(log.clone());
        let identity = self.file_identity(new);
        self.remember(new.id).await?;
        let data =
            VolumeData::create(self.directory.clone(), identity, new.spec_json.clone(), initial, payloads)
                .await?;
        self.run(new.volume, new.id, log, data, true).await
    }

    pub(crate) fn file_identity(&self, new: &NewReplica) -> ReplicaFileIdentity {
        ReplicaFileIdentity {
            cluster: self.identity.cluster,
            store: self.identity.store,
            node: self.identity.node.clone(),
            volume: new.volume,
            id: new.id,
            incarnation: 1,
        }
    }

    pub(crate) fn check_loaded(&self) -> Result<(), GroupError> {
        if self.is_loaded() {
            return Ok(());
        }
        Err(GroupError::Refused("the store is loading its replicas: ask again".into()))
    }

    /// Whether every replica that the disk holds was loaded.
    pub fn is_loaded(&self) -> bool {
        self.loaded.get()
    }

    /// Refuses while a replica that was repaired is being started.
    pub(crate) fn check_not_starting(&self, id: ReplicaIdentity) -> Result<(), GroupError> {
        let repairs = self.repairs.borrow();
        match repairs.get(&id.group).filter(|repair| repair.id == id && repair.is_starting.get()) {
            Some(_) => Err(GroupError::Refused("the replica is being started: ask again".into())),
            None => Ok(()),
        }
    }

    /// Stops a replica that is to be removed, whether it runs or not.
    pub(crate) async fn stop_one(&self, id: ReplicaIdentity) {
        let repair = self.repairs.borrow().get(&id.group).filter(|repair| repair.id == id).cloned();
        if let Some(repair) = repair {
            self.repair_ends(&repair);
        }
        let hosted = {
            let mut volumes = self.volumes.borrow_mut();
            let is_it = volumes.get(&id.group).is_some_and(|hosted| hosted.volume.group().id() == id);
            if is_it { volumes.remove(&id.group) } else { None }
        };
        if let Some(hosted) = hosted {
            hosted.volume.stop().await;
            self.receivers.forget(id.group).await;
        }
        if let Some(witness) = self.witnesses.take(id) {
            self.groups.borrow_mut().remove(&id.group);
            witness.stop().await;
            self.receivers.forget(id.group).await;
        }
        let was_faulty = self.faulty.borrow().get(&id.group).is_some_and(|faulty| faulty.id == id);
        if was_faulty {
            self.faulty.borrow_mut().remove(&id.group);
        }
    }

    /// Begins to scrub the store, for as long as the host is there.
    pub fn start_scrub(self: &Rc<Self>, options: ScrubOptions) {
        let (scrub, directory) = (self.scrub.clone(), self.directory.clone());
        holdfast_env::spawn("scrub", scrub::run(Rc::downgrade(self), scrub, directory, options));
    }

    /// Lets the scrub look at a volume's replica next.
    pub fn scrub_now(&self, group: GroupId) {
        self.scrub.ask(group);
    }

    /// Stops every replica.
    pub async fn stop(&self) {
        self.repairs.borrow_mut().clear();
        self.scrub.stop();
        let volumes: Vec<_> = self.volumes.borrow_mut().split_off(&GroupId::NIL).into_values().collect();
        for hosted in volumes {
            hosted.volume.stop().await;
        }
        self.witnesses.stop().await;
        let groups: Vec<_> = self.groups.borrow_mut().split_off(&GroupId::NIL).into_values().collect();
        for group in groups {
            group.stop().await;
        }
    }

    fn on_raft(self: &Rc<Self>, from: StoreId, request: Frame, responder: Responder) {
        let mut input = Reader::new(&request.head);
        let head = match messages::raft_head_from(&mut input) {
            Ok(head) => head,
            Err(error) => return responder.refuse(error.to_string()),
        };
        let rest = request.head.slice(request.head.len() - input.remaining()..);
        let hosted = self.volumes.borrow().get(&head.group).map(|hosted| hosted.volume.clone());
        let Some(group) = self.group(head.group) else {
            if let Some(starting) = self.repairs.borrow().get(&head.group) {
                starting.asking.called_by(head.from, from);
            }
            let why = if self.loaded.get() {
                "no replica of the group stands here"
            } else {
                "the store is loading"
            };
            return responder.refuse(why);
        };
        if group.id().replica != head.to {
            return responder.refuse(format!("replica {} stands here, not {}", group.id().replica, head.to));
        }
        let body = request.into_body();
        if head.method == Method::InstallSnapshot {
            self.on_snapshot(from, &head, hosted, group, &rest, body, responder);
        } else {
            group.handle(&head, Reader::new(&rest), body, responder);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one call, used once")]
    fn on_snapshot(
        self: &Rc<Self>,
        from: StoreId,
        head: &RaftHead,
        volume: Option<Rc<Volume>>,
        group: Rc<Group>,
        rest: &Bytes,
        state: Bytes,
        responder: Responder,
    ) {
        let mut input = Reader::new(rest);
        let parsed =
            codec::get_vote(&mut input).and_then(|vote| Ok((vote, codec::snapshot_meta_from(&mut input)?)));
        let (vote, meta) = match parsed {
            Ok(parsed) => parsed,
            Err(error) => return responder.refuse(error.to_string()),
        };
        if self.rebuilds_again.get().is_some_and(|at| Instant::now() < at) {
            return responder.refuse("the medium had no room for a rebuild: it is tried again later");
        }
        // INV-WITNESS: it has no blocks, and what it says would be taken for all there is.
        if group.is_witness(head.from) {
            tracing::error!(group = %head.group, from = %head.from, "a witness offers a snapshot");
            return responder.refuse("a witness has no blocks: its snapshots are not taken");
        }
        let index = LogIndex(meta.last_log_id.map_or(0, |id| id.index));
        let rpc = self.environment.rpc.clone();
        let offer = Offer { replica: head.to, vote, index };
        self.receivers.poll(head.group, offer, responder, |receiving| {
            let host = Rc::downgrade(self);
            Box::pin(async move {
                let received = receive(receiving, volume, group, rpc, from, vote, meta, state).await;
                if let (Err(RebuildError::Store(error)), Some(host)) = (&received, host.upgrade())
                    && error.is_full()
                {
                    tracing::warn!(%error, "the medium has no room for a rebuild");
                    host.rebuilds_again.set(Some(Instant::now() + REBUILD_PAUSE));
                }
                received
            })
        });
    }

    fn on_rebuild(&self, request: Frame, responder: Responder) {
        let mut input = Reader::new(&request.head);
        let group = match GroupId::decode(&mut input) {
            Ok(group) => group,
            Err(error) => return responder.refuse(error.to_string()),
        };
        let Some(volume) = self.volume(group) else {
            return responder.refuse("no replica of the group stands here");
        };
        let rest = request.head.slice(request.head.len() - input.remaining()..);
        holdfast_env::spawn("rebuild-serve", async move {
            match rebuild::serve(&volume, Reader::new(&rest)).await {
                Ok(frame) => responder.reply(frame),
                Err(error) => responder.refuse(error.to_string()),
            }
        });
    }
}

/// Whether a recovered log may be run. INV-TERM, FAULTS §8: what may have been acknowledged and cannot be read is
/// never cut; such a replica does not vote.
pub fn usable(recovered: &RecoveredGroup) -> Result<(), String> {
    if recovered.vote_lost {
        return Err("its vote is lost: it may have voted for somebody it does not remember. \
             Replace the replica; a new one comes under a new id"
            .into());
    }
    match &recovered.state {
        Recovery::Clean => Ok(()),
        Recovery::Faulty(entries) => Err(format!(
            "{} log entries are damaged, the first at index {}. Replace the replica; the others hold the data",
            entries.len(),
            entries.first().map_or(LogIndex::ZERO, |id| id.index)
        )),
        Recovery::Unknown(why) => Err(format!(
            "part of its log is unreadable ({why}). Replace the replica; the others hold the data"
        )),
    }
}

/// Whether a log begins where a checkpoint ends. If the newest generation of a checkpoint is lost, the one before it
/// is found, and the log may have been purged since.
pub fn reaches(log: &GroupLog, checkpoint: &Checkpoint) -> Result<(), String> {
    match log.purged() {
        Some(purged) if purged.index > checkpoint.id.index => Err(format!(
            "its checkpoint is of index {} and its log begins after {}: the newest checkpoint is damaged. \
             Replace the replica; the others hold the data",
            checkpoint.id.index, purged.index
        )),
        _ => Ok(()),
    }
}

#[allow(clippy::too_many_arguments, reason = "the parts of one call, used once")]
async fn receive(
    receiving: Rc<Receiving>,
    volume: Option<Rc<Volume>>,
    group: Rc<Group>,
    rpc: holdfast_wire::rpc::Rpc,
    from: StoreId,
    vote: config::Vote,
    meta: config::SnapshotMeta,
    state: Bytes,
) -> Result<Bytes, RebuildError> {
    let id = meta.last_log_id.map(|id| codec::entry_id(&id)).unwrap_or_default();
    let mut data = SnapshotData { state: state.clone(), staged: None, serve_floor: id.index };
    if let Some(volume) = &volume {
        let membership = codec::membership_bytes(&meta.last_membership);
        let target = Checkpoint { id, membership, state, serve_floor: id.index };
        let source = (ReplicaId(vote.leader_id.node_id), from);
        let pull = rebuild::pull(volume, &rpc, source, &target);
        let received = receiving.unless_given_up(pull).await?;
        data.staged = Some(received.staged);
        data.serve_floor = received.serve_floor;
        *volume.healed.borrow_mut() = ("chunks".into(), received.bytes);
        group.note_rebuilt();
    }
    Ok(group.install(vote, meta, data).await?)
}

struct Service {
    host: std::rc::Weak<Host>,
    service: u8,
}

impl Handler for Service {
    fn handle(&self, from: StoreId, _lane: Lane, request: Frame, responder: Responder) {
        let Some(host) = self.host.upgrade() else { return responder.refuse("the shard is stopping") };
        match self.service {
            service if service == messages::RAFT.0 => host.on_raft(from, request, responder),
            service if service == messages::DATA.0 => host.on_data(request, responder),
            service if service == messages::HEAL.0 => host.on_heal(request, responder),
            service if service == messages::REPAIR.0 => host.on_repair(&request, responder),
            service if service == messages::PAST.0 => past::serve(&host, &request, responder),
            service if service == messages::REST.0 => host.on_rest(&request, responder),
            _ => host.on_rebuild(request, responder),
        }
    }
}

/// A set of voters for [`Group::bootstrap`].
pub type Voters = BTreeMap<ReplicaId, StoreId>;
