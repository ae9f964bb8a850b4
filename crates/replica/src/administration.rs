//! Calls of the catalog's reconciler to a shard: create and destroy replicas, change memberships, tell how the store
//! is. Every call is idempotent: the reconciler repeats what it has no answer for.

use std::rc::{Rc, Weak};

use bytes::Bytes;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane};
use holdfast_store::recovery_file::Order;
use holdfast_store::{EntryId, ReplicaIdentity};
use holdfast_types::{
    ByteSize, DecodeError, ErrorCode, GroupId, LogIndex, Reader, RecoveryId, ReplicaId, StoreId, Term,
    UserError, VolumeId, Writer, limits,
};
use holdfast_wire::rpc::{Handler, Responder, Rpc, Service};

use crate::config::Peer;
use crate::group::{Group, GroupError};
use crate::host::{Host, NewReplica, Voters};
use crate::recover::SealedReplica;

/// Calls of the reconciler to a shard.
pub const ADMINISTRATION: Service = Service(6);

const MEMBERS_MAX: usize = 64;

/// What a shard is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardRequest {
    /// Make a replica.
    Create {
        /// The volume.
        volume: VolumeId,
        /// The replica.
        id: ReplicaIdentity,
        /// The volume's size.
        size: ByteSize,
        /// The volume's specification as JSON.
        spec_json: Bytes,
        /// It is a witness.
        witness: bool,
    },
    /// Begin the group with these voters.
    Bootstrap {
        /// The group.
        group: GroupId,
        /// Its voters.
        voters: Voters,
        /// Those among them that are witnesses.
        witnesses: Vec<ReplicaId>,
    },
    /// Remove a replica for good.
    Destroy {
        /// The replica.
        id: ReplicaIdentity,
        /// The revision of the volume that this was decided on; refused if the replica was taken back on a later one.
        revision: u64,
    },
    /// A replica that stands there is taken back into its group: whatever was decided before does not end it.
    Keep {
        /// The replica.
        id: ReplicaIdentity,
        /// The revision of the volume that this was decided on.
        revision: u64,
    },
    /// As leader: add a learner.
    AddLearner {
        /// The group.
        group: GroupId,
        /// The learner.
        replica: ReplicaId,
        /// Its store.
        store: StoreId,
        /// It is a witness.
        witness: bool,
    },
    /// As leader: change the voters.
    ChangeVoters {
        /// The group.
        group: GroupId,
        /// The voters that this was decided on, of every configuration; with others nothing is changed.
        expected: Vec<ReplicaId>,
        /// The voters afterwards.
        voters: Vec<ReplicaId>,
    },
    /// As leader: forget a learner.
    RemoveLearner {
        /// The group.
        group: GroupId,
        /// The learner.
        replica: ReplicaId,
    },
    /// As leader: give the leadership to a voter.
    Transfer {
        /// The group.
        group: GroupId,
        /// The voter.
        to: ReplicaId,
    },
    /// Let Raft run with the timers that the volume's state asks for.
    TakeUpTimers {
        /// The group.
        group: GroupId,
    },
    /// End a replica of a group that a recovery replaces (INV-RECOVER).
    Seal {
        /// The volume.
        volume: VolumeId,
        /// The replica.
        id: ReplicaIdentity,
        /// The recovery.
        order: Order,
        /// The revision of the volume that this was decided on; refused if the replica was kept on a later one.
        revision: u64,
    },
    /// Let a replica that was sealed for a recovery go on as the only one of a new group.
    TakeOver {
        /// The replica, as it was sealed.
        id: ReplicaIdentity,
        /// The new group.
        group: GroupId,
        /// The recovery.
        order: Order,
        /// The highest term that is known of the former group.
        above: Term,
    },
    /// Let the scrub look at a volume's replica next.
    Scrub {
        /// The group.
        group: GroupId,
    },
    /// How the store is.
    Report,
}

/// How a store is, and what stands on it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct StoreReport {
    /// Bytes of the medium.
    pub total_bytes: u64,
    /// Bytes free on it.
    pub available_bytes: u64,
    /// How many bytes the store may take; 0 if nothing but the medium limits it.
    pub capacity_bytes: u64,
    /// Bytes of all of the store's files on the medium.
    pub allocated_bytes: u64,
    /// Of these, blocks of replicas, those of snapshots included.
    pub used_bytes: u64,
    /// Of these, what only snapshots hold.
    pub snapshot_bytes: u64,
    /// Bytes of the journal on the medium.
    pub journal_bytes: u64,
    /// Bytes that are kept back for a full medium; 0 while they are given up.
    pub reserve_bytes: u64,
    /// It is full because it may take no more, not because the medium is full.
    pub is_beyond_budget: bool,
    /// Why the store has fail-stopped; empty while healthy.
    pub failed: String,
    /// For how long the disk has not answered, in milliseconds; 0 while it does.
    pub hung_ms: u64,
    /// How long a flush has been taking for a while, in microseconds; 0 if too few say so.
    pub flush_us: u64,
    /// For how long the medium has been full, in milliseconds; 0 while it is not.
    pub full_ms: u64,
    /// Volumes that are led here and whose data waits for room, here or on the media of others.
    pub waiting: u32,
    /// Groups that are led here.
    pub leading: u32,
    /// Replicas on it: volume, identity, and why one does not run (empty if it does).
    pub replicas: Vec<(VolumeId, ReplicaIdentity, String)>,
    /// Those among them that do not run because their log is being repaired from their peers.
    pub repairing: Vec<ReplicaIdentity>,
    /// Witnesses here whose volumes have one full copy, since their logs have gone beyond their budget.
    pub one_copy: Vec<ReplicaIdentity>,
    /// Replicas of groups that a recovery has replaced.
    pub sealed: Vec<SealedReplica>,
}

const CREATE: u8 = 1;
const BOOTSTRAP: u8 = 2;
const DESTROY: u8 = 3;
const ADD_LEARNER: u8 = 4;
const CHANGE_VOTERS: u8 = 5;
const TRANSFER: u8 = 6;
const REPORT: u8 = 7;
const SCRUB: u8 = 8;
const TAKE_UP_TIMERS: u8 = 9;
const REMOVE_LEARNER: u8 = 10;
const KEEP: u8 = 11;
const SEAL: u8 = 12;
const TAKE_OVER: u8 = 13;
const REPLICAS_MAX: usize = 100_000;

fn put_id(out: &mut Writer, id: &ReplicaIdentity) {
    id.group.encode(out);
    id.replica.encode(out);
}

fn get_id(input: &mut Reader<'_>) -> Result<ReplicaIdentity, DecodeError> {
    Ok(ReplicaIdentity { group: GroupId::decode(input)?, replica: ReplicaId::decode(input)? })
}

fn put_replicas(out: &mut Writer, replicas: &[ReplicaId]) {
    out.u32(replicas.len() as u32);
    replicas.iter().for_each(|replica| replica.encode(out));
}

fn get_replicas(input: &mut Reader<'_>) -> Result<Vec<ReplicaId>, DecodeError> {
    let count = input.count("replicas", MEMBERS_MAX)?;
    (0..count).map(|_| ReplicaId::decode(input)).collect()
}

fn put_order(out: &mut Writer, order: &Order) {
    out.u64(order.number);
    order.id.encode(out);
}

fn get_order(input: &mut Reader<'_>) -> Result<Order, DecodeError> {
    Ok(Order { number: input.u64()?, id: RecoveryId::decode(input)? })
}

impl SealedReplica {
    fn encode(&self, out: &mut Writer) {
        put_id(out, &self.id);
        put_order(out, &self.order);
        self.last.term.encode(out);
        self.last.leader.encode(out);
        self.last.index.encode(out);
    }

    fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (id, order) = (get_id(input)?, get_order(input)?);
        let (term, leader) = (Term::decode(input)?, ReplicaId::decode(input)?);
        Ok(Self { id, order, last: EntryId { term, leader, index: LogIndex::decode(input)? } })
    }
}

impl ShardRequest {
    /// The request as a frame's head.
    pub fn encode(&self) -> Bytes {
        let mut out = Writer::new();
        match self {
            Self::Create { volume, id, size, spec_json, witness } => {
                out.u8(CREATE);
                volume.encode(&mut out);
                put_id(&mut out, id);
                out.u64(size.0);
                out.bytes(spec_json);
                out.bool(*witness);
            }
            Self::Bootstrap { group, voters, witnesses } => {
                out.u8(BOOTSTRAP);
                group.encode(&mut out);
                out.u32(voters.len() as u32);
                for (replica, store) in voters {
                    replica.encode(&mut out);
                    store.encode(&mut out);
                }
                put_replicas(&mut out, witnesses);
            }
            Self::Destroy { id, revision } => {
                out.u8(DESTROY);
                put_id(&mut out, id);
                out.u64(*revision);
            }
            Self::Keep { id, revision } => {
                out.u8(KEEP);
                put_id(&mut out, id);
                out.u64(*revision);
            }
            Self::Seal { volume, id, order, revision } => {
                out.u8(SEAL);
                volume.encode(&mut out);
                put_id(&mut out, id);
                put_order(&mut out, order);
                out.u64(*revision);
            }
            Self::TakeOver { id, group, order, above } => {
                out.u8(TAKE_OVER);
                put_id(&mut out, id);
                group.encode(&mut out);
                put_order(&mut out, order);
                above.encode(&mut out);
            }
            Self::AddLearner { group, replica, store, witness } => {
                out.u8(ADD_LEARNER);
                group.encode(&mut out);
                replica.encode(&mut out);
                store.encode(&mut out);
                out.bool(*witness);
            }
            Self::ChangeVoters { group, expected, voters } => {
                out.u8(CHANGE_VOTERS);
                group.encode(&mut out);
                put_replicas(&mut out, expected);
                put_replicas(&mut out, voters);
            }
            Self::RemoveLearner { group, replica } => {
                out.u8(REMOVE_LEARNER);
                group.encode(&mut out);
                replica.encode(&mut out);
            }
            Self::Transfer { group, to } => {
                out.u8(TRANSFER);
                group.encode(&mut out);
                to.encode(&mut out);
            }
            Self::TakeUpTimers { group } => {
                out.u8(TAKE_UP_TIMERS);
                group.encode(&mut out);
            }
            Self::Scrub { group } => {
                out.u8(SCRUB);
                group.encode(&mut out);
            }
            Self::Report => out.u8(REPORT),
        }
        out.finish()
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(head);
        let input = &mut reader;
        let request = match input.u8()? {
            CREATE => Self::Create {
                volume: VolumeId::decode(input)?,
                id: get_id(input)?,
                size: ByteSize(input.u64()?),
                spec_json: Bytes::copy_from_slice(input.bytes(limits::LOG_HEAD_BYTES_MAX)?),
                witness: input.bool()?,
            },
            BOOTSTRAP => {
                let group = GroupId::decode(input)?;
                let count = input.count("voters", MEMBERS_MAX)?;
                let voters = (0..count)
                    .map(|_| Ok((ReplicaId::decode(input)?, StoreId::decode(input)?)))
                    .collect::<Result<_, DecodeError>>()?;
                Self::Bootstrap { group, voters, witnesses: get_replicas(input)? }
            }
            DESTROY => Self::Destroy { id: get_id(input)?, revision: input.u64()? },
            SEAL => Self::Seal {
                volume: VolumeId::decode(input)?,
                id: get_id(input)?,
                order: get_order(input)?,
                revision: input.u64()?,
            },
            TAKE_OVER => Self::TakeOver {
                id: get_id(input)?,
                group: GroupId::decode(input)?,
                order: get_order(input)?,
                above: Term::decode(input)?,
            },
            KEEP => Self::Keep { id: get_id(input)?, revision: input.u64()? },
            ADD_LEARNER => Self::AddLearner {
                group: GroupId::decode(input)?,
                replica: ReplicaId::decode(input)?,
                store: StoreId::decode(input)?,
                witness: input.bool()?,
            },
            CHANGE_VOTERS => {
                let group = GroupId::decode(input)?;
                let (expected, voters) = (get_replicas(input)?, get_replicas(input)?);
                Self::ChangeVoters { group, expected, voters }
            }
            REMOVE_LEARNER => {
                Self::RemoveLearner { group: GroupId::decode(input)?, replica: ReplicaId::decode(input)? }
            }
            TRANSFER => Self::Transfer { group: GroupId::decode(input)?, to: ReplicaId::decode(input)? },
            SCRUB => Self::Scrub { group: GroupId::decode(input)? },
            TAKE_UP_TIMERS => Self::TakeUpTimers { group: GroupId::decode(input)? },
            REPORT => Self::Report,
            other => return Err(DecodeError::Unknown { what: "shard request", value: other.into() }),
        };
        reader.end()?;
        Ok(request)
    }
}

impl StoreReport {
    fn encode(&self, out: &mut Writer) {
        for number in [
            self.total_bytes,
            self.available_bytes,
            self.capacity_bytes,
            self.allocated_bytes,
            self.used_bytes,
            self.snapshot_bytes,
            self.journal_bytes,
            self.reserve_bytes,
            self.hung_ms,
            self.flush_us,
            self.full_ms,
        ] {
            out.u64(number);
        }
        out.bool(self.is_beyond_budget);
        out.u32(self.waiting);
        out.u32(self.leading);
        out.text(&self.failed);
        out.u32(self.replicas.len() as u32);
        for (volume, id, fault) in &self.replicas {
            volume.encode(out);
            put_id(out, id);
            out.text(fault);
        }
        for ids in [&self.repairing, &self.one_copy] {
            out.u32(ids.len() as u32);
            ids.iter().for_each(|id| put_id(out, id));
        }
        out.u32(self.sealed.len() as u32);
        self.sealed.iter().for_each(|sealed| sealed.encode(out));
    }

    fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (total_bytes, available_bytes, capacity_bytes) = (input.u64()?, input.u64()?, input.u64()?);
        let (allocated_bytes, used_bytes, snapshot_bytes) = (input.u64()?, input.u64()?, input.u64()?);
        let (journal_bytes, reserve_bytes) = (input.u64()?, input.u64()?);
        let (hung_ms, flush_us, full_ms) = (input.u64()?, input.u64()?, input.u64()?);
        let is_beyond_budget = input.bool()?;
        let (waiting, leading) = (input.u32()?, input.u32()?);
        let failed = input.text(limits::FRAME_HEAD_BYTES_MAX)?;
        let count = input.count("replicas", REPLICAS_MAX)?;
        let replicas = (0..count)
            .map(|_| {
                Ok((VolumeId::decode(input)?, get_id(input)?, input.text(limits::FRAME_HEAD_BYTES_MAX)?))
            })
            .collect::<Result<_, DecodeError>>()?;
        let mut ids = || {
            let count = input.count("replicas", REPLICAS_MAX)?;
            (0..count).map(|_| get_id(input)).collect::<Result<Vec<_>, DecodeError>>()
        };
        let (repairing, one_copy) = (ids()?, ids()?);
        let count = input.count("sealed replicas", REPLICAS_MAX)?;
        let sealed = (0..count).map(|_| SealedReplica::decode(input)).collect::<Result<_, DecodeError>>()?;
        Ok(Self {
            total_bytes,
            available_bytes,
            capacity_bytes,
            allocated_bytes,
            used_bytes,
            snapshot_bytes,
            journal_bytes,
            reserve_bytes,
            is_beyond_budget,
            failed,
            hung_ms,
            flush_us,
            full_ms,
            waiting,
            leading,
            replicas,
            repairing,
            one_copy,
            sealed,
        })
    }
}

/// The answer: `Ok` with a report where one was asked for, or why not.
pub type ShardReply = Result<Option<StoreReport>, UserError>;

/// A reply as a frame's head.
pub fn encode_reply(reply: &ShardReply) -> Bytes {
    let mut out = Writer::new();
    match reply {
        Ok(report) => {
            out.u8(0);
            out.bool(report.is_some());
            if let Some(report) = report {
                report.encode(&mut out);
            }
        }
        Err(error) => {
            out.u8(1);
            out.u8(code_number(error.code));
            out.text(&error.message);
            out.text(&error.hint);
        }
    }
    out.finish()
}

/// Reads what [`encode_reply`] wrote.
pub fn decode_reply(head: &[u8]) -> Result<ShardReply, DecodeError> {
    let mut input = Reader::new(head);
    if input.u8()? == 0 {
        let report = if input.bool()? { Some(StoreReport::decode(&mut input)?) } else { None };
        return Ok(Ok(report));
    }
    let code = number_code(input.u8()?);
    let message = input.text(limits::FRAME_HEAD_BYTES_MAX)?;
    let hint = input.text(limits::FRAME_HEAD_BYTES_MAX)?;
    Ok(Err(UserError::new(code, message).hint(hint)))
}

const CODES: [ErrorCode; 10] = [
    ErrorCode::Internal,
    ErrorCode::InvalidArgument,
    ErrorCode::OutOfRange,
    ErrorCode::NotFound,
    ErrorCode::AlreadyExists,
    ErrorCode::Refused,
    ErrorCode::ResourceExhausted,
    ErrorCode::Unavailable,
    ErrorCode::TimedOut,
    ErrorCode::Unimplemented,
];

fn code_number(code: ErrorCode) -> u8 {
    CODES.iter().position(|known| *known == code).unwrap_or(0) as u8
}

fn number_code(number: u8) -> ErrorCode {
    CODES.get(usize::from(number)).copied().unwrap_or(ErrorCode::Internal)
}

/// A group's error for the reconciler and for users.
pub fn user_error(error: &GroupError) -> UserError {
    let code = match error {
        GroupError::NotLeader { .. } | GroupError::Damaged(_) => ErrorCode::Unavailable,
        GroupError::TimedOut => ErrorCode::TimedOut,
        GroupError::Stopped(_) => ErrorCode::Internal,
        GroupError::Refused(_) => ErrorCode::Refused,
    };
    UserError::new(code, error.to_string())
}

struct Administration(Weak<Host>);

/// Lets a shard answer the reconciler.
pub fn serve(host: &Rc<Host>) {
    host.environment().rpc.serve(ADMINISTRATION, Rc::new(Administration(Rc::downgrade(host))));
}

/// Lets a shard whose store cannot be opened say so to the reconciler: it is lost, and its node is not.
pub fn serve_refusal(rpc: &Rpc, why: String) {
    rpc.serve(ADMINISTRATION, Rc::new(Refusal(why)));
}

struct Refusal(String);

impl Handler for Refusal {
    fn handle(&self, _from: StoreId, _lane: Lane, request: Frame, responder: Responder) {
        let reply = match ShardRequest::decode(&request.head) {
            Ok(ShardRequest::Report) => {
                Ok(Some(StoreReport { failed: self.0.clone(), ..StoreReport::default() }))
            }
            Ok(_) => {
                let message = format!("the store does not serve: {}", self.0);
                Err(UserError::new(ErrorCode::Unavailable, message).hint("`holdfast status` says what to do"))
            }
            Err(error) => return responder.refuse(error.to_string()),
        };
        responder.reply(Frame::small(encode_reply(&reply)));
    }
}

impl Handler for Administration {
    fn handle(&self, _from: StoreId, _lane: Lane, request: Frame, responder: Responder) {
        let Some(host) = self.0.upgrade() else { return responder.refuse("the shard is stopping") };
        let decoded = match ShardRequest::decode(&request.head) {
            Ok(decoded) => decoded,
            Err(error) => return responder.refuse(error.to_string()),
        };
        holdfast_env::spawn("administration", async move {
            let reply = carry_out(&host, decoded).await;
            responder.reply(Frame::small(encode_reply(&reply)));
        });
    }
}

/// Does what a request says, on this shard.
pub async fn carry_out(host: &Rc<Host>, request: ShardRequest) -> ShardReply {
    let volume = |group| {
        host.volume(group)
            .ok_or_else(|| UserError::new(ErrorCode::NotFound, "no replica of that group runs here"))
    };
    match request {
        ShardRequest::Create { volume, id, size, spec_json, witness } => {
            let new = NewReplica { volume, id, size, spec_json };
            let made = match witness {
                true => host.create_witness(&new).await.map(drop),
                false => host.create(&new).await.map(drop),
            };
            made.map_err(|error| user_error(&error))?;
        }
        ShardRequest::Bootstrap { group, voters, witnesses } => {
            let peer =
                |(id, store): (ReplicaId, StoreId)| (id.0, Peer { store, witness: witnesses.contains(&id) });
            let members = voters.into_iter().map(peer).collect();
            let begun = volume(group)?.group().bootstrap_with(members).await;
            begun.map_err(|error| user_error(&error))?;
        }
        ShardRequest::Scrub { group } => {
            volume(group)?;
            host.scrub_now(group);
        }
        ShardRequest::TakeUpTimers { group } => {
            let taken = match host.witness(group) {
                Some(witness) => witness.take_up_timers().await,
                None => volume(group)?.take_up_timers().await,
            };
            taken.map_err(|error| user_error(&error))?;
        }
        ShardRequest::Destroy { id, revision } => {
            host.destroy(id, revision).await.map_err(|error| user_error(&error))?;
        }
        ShardRequest::Keep { id, revision } => {
            if !host.keep(id, revision).await.map_err(|error| user_error(&error))? {
                let why = format!("replica {} does not stand here any more", id.replica);
                let hint = "it cannot be taken back: place another one";
                return Err(UserError::new(ErrorCode::NotFound, why).hint(hint));
            }
        }
        ShardRequest::Seal { volume, id, order, revision } => {
            host.seal(id, volume, order, revision).await.map_err(|error| user_error(&error))?;
        }
        ShardRequest::TakeOver { id, group, order, above } => {
            host.take_over(id, group, order, above).await.map_err(|error| user_error(&error))?;
        }
        ShardRequest::AddLearner { group, replica, store, witness } => {
            let volume = volume(group)?;
            let peer = Peer { store, witness };
            volume.group().add_learner(replica, peer).await.map_err(|error| user_error(&error))?;
        }
        ShardRequest::ChangeVoters { group, expected, voters } => {
            let volume = volume(group)?;
            check_voters(volume.group(), expected)?;
            volume.group().change_voters(&voters).await.map_err(|error| user_error(&error))?;
        }
        ShardRequest::RemoveLearner { group, replica } => {
            volume(group)?.group().remove_learner(replica).await.map_err(|error| user_error(&error))?;
        }
        ShardRequest::Transfer { group, to } => {
            volume(group)?.group().transfer_to(to).await.map_err(|error| user_error(&error))?;
        }
        ShardRequest::Report => return Ok(Some(report(host).await?)),
    }
    Ok(None)
}

/// INV-MEMBER: a change is made only of the voters that it was decided on; whoever decided late changes nothing.
fn check_voters(group: &Group, expected: Vec<ReplicaId>) -> Result<(), UserError> {
    let (mut found, mut expected) = (group.voters(), expected);
    found.sort_unstable();
    expected.sort_unstable();
    if found == expected {
        return Ok(());
    }
    let message = format!("the volume's voters are {found:?} by now, not {expected:?}");
    Err(UserError::new(ErrorCode::Refused, message).hint("decide anew"))
}

async fn report(host: &Host) -> Result<StoreReport, UserError> {
    if !host.is_loaded() {
        // A replica that is missing in a report counts as lost.
        return Err(
            UserError::new(ErrorCode::Unavailable, "the store is loading its replicas").hint("ask again")
        );
    }
    let survey = host.survey().await.ok_or_else(|| {
        UserError::new(ErrorCode::Unavailable, "the store's disk has not told yet what stands on it")
            .hint("ask again; if it stays so, look at the disk")
    })?;
    let (space, stands) = (survey.space, host.space_of(&survey));
    let running = host.volumes().into_iter();
    let running = running.map(|(of, volume)| (of, volume.group().id(), volume.fault().unwrap_or_default()));
    let witnesses = host.witnesses().into_iter();
    let witnesses =
        witnesses.map(|witness| (witness.of(), witness.group().id(), witness.fault().unwrap_or_default()));
    let one_copy = host.witnesses().into_iter().filter(|witness| witness.barred(host).is_some());
    let repairing = host.faulty().into_iter().filter(|faulty| faulty.repairing).map(|faulty| faulty.id);
    let faulty = host.faulty().into_iter().map(|faulty| (faulty.volume, faulty.id, faulty.why));
    let journal = host.journal();
    let hung = journal.hung_since().map(|since| Instant::now().since(since));
    let number = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
    let full = journal.reserve().and_then(|reserve| Some((reserve.full_since()?, reserve.bytes())));
    let full_ms = full.map_or(0, |(since, _)| number(Instant::now().since(since).as_millis()).max(1));
    // What is free while the reserve is given up is the reserve's.
    let owed = full.map_or(0, |(_, reserve)| reserve);
    Ok(StoreReport {
        full_ms,
        waiting: host.volumes().iter().filter(|(_, volume)| volume.waits_for_room()).count() as u32,
        hung_ms: hung.map_or(0, |hung| number(hung.as_millis())),
        flush_us: journal.sustained_flush().map_or(0, |flush| number(flush.as_micros())),
        leading: host.all_groups().iter().filter(|group| group.is_leader()).count() as u32,
        total_bytes: space.total,
        available_bytes: space.available.saturating_sub(owed),
        capacity_bytes: host.budget().capacity().unwrap_or(0),
        allocated_bytes: stands.allocated,
        used_bytes: stands.used,
        snapshot_bytes: stands.snapshots,
        journal_bytes: stands.journal,
        reserve_bytes: stands.reserve,
        is_beyond_budget: full_ms > 0 && host.budget().has_refused(),
        failed: host.journal().failed().map(|error| error.to_string()).unwrap_or_default(),
        replicas: running.chain(witnesses).chain(faulty).collect(),
        repairing: repairing.collect(),
        one_copy: one_copy.map(|witness| witness.group().id()).collect(),
        sealed: host.sealed(),
    })
}
