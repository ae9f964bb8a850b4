//! What shards say to each other: Raft's calls, and the calls of sessions to replicas.

use bytes::Bytes;
use holdfast_protocol::timers::{Timers, VolumeTimers};
use holdfast_protocol::volume::VolumeReply;
use holdfast_types::{
    BlockRange, ByteSize, DecodeError, Epoch, GroupId, LogIndex, Reader, ReplicaId, SessionId, StoreId, Term,
    Writer, limits,
};
use holdfast_wire::rpc::Service;

pub use crate::session_messages::SessionRequest;
use crate::snapshot_messages::{Extents, SnapshotRequest};

/// Raft's calls between replicas of one group.
pub const RAFT: Service = Service(1);
/// Calls of sessions and of the catalog's reconciler to replicas.
pub const DATA: Service = Service(2);
/// Calls to sessions.
pub const SESSION: Service = Service(3);
/// The catalog's calls between nodes.
pub const CATALOG: Service = Service(4);
/// Rebuild: chunks from one replica to another.
pub const REBUILD: Service = Service(5);
/// Read repair: what another replica holds of a chunk.
pub const HEAL: Service = Service(8);
/// Repair: payloads of log entries that cannot be read, from whoever has them.
pub const REPAIR: Service = Service(10);
/// What replicas know of each other's past.
pub const PAST: Service = Service(11);
/// What stores ask each other about groups that rest.
pub const REST: Service = Service(12);

/// Which of Raft's calls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Method {
    Append = 1,
    StreamAppend = 2,
    Vote = 3,
    PreVote = 4,
    TransferLeader = 5,
    InstallSnapshot = 6,
    ProveWritable = 7,
}

impl Method {
    fn from(value: u8) -> Result<Self, DecodeError> {
        Ok(match value {
            1 => Self::Append,
            2 => Self::StreamAppend,
            3 => Self::Vote,
            4 => Self::PreVote,
            5 => Self::TransferLeader,
            6 => Self::InstallSnapshot,
            7 => Self::ProveWritable,
            other => return Err(DecodeError::Unknown { what: "raft method", value: other.into() }),
        })
    }
}

pub(crate) fn raft_head(group: GroupId, from: ReplicaId, to: ReplicaId, method: Method) -> Writer {
    let mut out = Writer::with_capacity(256);
    group.encode(&mut out);
    from.encode(&mut out);
    to.encode(&mut out);
    out.u8(method as u8);
    out
}

pub(crate) struct RaftHead {
    pub(crate) group: GroupId,
    pub(crate) from: ReplicaId,
    pub(crate) to: ReplicaId,
    pub(crate) method: Method,
}

pub(crate) fn raft_head_from(input: &mut Reader<'_>) -> Result<RaftHead, DecodeError> {
    Ok(RaftHead {
        group: GroupId::decode(input)?,
        from: ReplicaId::decode(input)?,
        to: ReplicaId::decode(input)?,
        method: Method::from(input.u8()?)?,
    })
}

/// Raft's calls, for whoever looks at frames on their way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RaftCall {
    /// Entries, or a heartbeat.
    Append,
    /// A request for a vote.
    Vote,
    /// A question whether a request for a vote would be granted.
    PreVote,
    /// A transfer of leadership.
    TransferLeader,
    /// A rebuild.
    InstallSnapshot,
    /// A question whether the disk takes writes.
    ProveWritable,
}

/// Which of Raft's calls a request to [`RAFT`] is; `None` if it is none.
pub fn raft_call(head: &[u8]) -> Option<RaftCall> {
    let head = raft_head_from(&mut Reader::new(head)).ok()?;
    Some(match head.method {
        Method::Append | Method::StreamAppend => RaftCall::Append,
        Method::Vote => RaftCall::Vote,
        Method::PreVote => RaftCall::PreVote,
        Method::TransferLeader => RaftCall::TransferLeader,
        Method::InstallSnapshot => RaftCall::InstallSnapshot,
        Method::ProveWritable => RaftCall::ProveWritable,
    })
}

/// A call to a replica. Block data travels in the frame's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataRequest {
    /// Put a data command into the log. Body: its payload.
    Propose {
        /// Its group.
        group: GroupId,
        /// The encoded command.
        command: Bytes,
    },
    /// Read blocks at or above a floor.
    Read {
        /// Its group.
        group: GroupId,
        /// What to read.
        range: BlockRange,
        /// The reader's epoch.
        epoch: Epoch,
        /// The reader.
        session: SessionId,
        /// The index that must be applied.
        floor: LogIndex,
    },
    /// As `Read`, for which blocks hold data.
    BlockStatus {
        /// Its group.
        group: GroupId,
        /// What to tell about.
        range: BlockRange,
        /// The reader's epoch.
        epoch: Epoch,
        /// The reader.
        session: SessionId,
        /// The index that must be applied.
        floor: LogIndex,
    },
    /// Renew a session's lease; the leader confirms its own quorum first.
    Renew {
        /// Its group.
        group: GroupId,
        /// The session's epoch.
        epoch: Epoch,
        /// The session.
        session: SessionId,
    },
    /// Attach, detach, resize, policy: control commands, on which the leader decides with its watch of the holder.
    Control {
        /// Its group.
        group: GroupId,
        /// The encoded command.
        command: Bytes,
    },
    /// Make a snapshot, if the volume then stays within its size and its snapshot quota. Answered as [`Self::Control`].
    MakeSnapshot {
        /// Its group.
        group: GroupId,
        /// The encoded command.
        command: Bytes,
        /// Bytes that snapshots may add to the volume's size.
        quota: ByteSize,
    },
    /// How the replica is.
    Report {
        /// Its group.
        group: GroupId,
    },
    /// Apply up to `index`, read every block from disk, and tell the digest.
    Digest {
        /// Its group.
        group: GroupId,
        /// The index to compare at; zero lets the leader choose (its committed index).
        index: LogIndex,
    },
    /// A question about the volume's snapshots.
    Snapshot {
        /// Its group.
        group: GroupId,
        /// The question.
        ask: SnapshotRequest,
    },
}

/// The answer to a [`DataRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataReply {
    /// The command was applied (or refused by the state machine) at `index`.
    Applied {
        /// The index after which it took effect.
        index: LogIndex,
        /// The state machine's answer.
        reply: VolumeReply,
    },
    /// Blocks are in the body.
    Blocks {
        /// The index applied when they were read.
        applied: LogIndex,
        /// Block checksums, zero blocks included.
        checksums: Vec<u32>,
    },
    /// Runs of blocks: (count, 0 data, 1 zero, 2 absent).
    Status {
        /// The index applied when they were read.
        applied: LogIndex,
        /// The runs.
        runs: Vec<(u32, u8)>,
    },
    /// The lease is renewed.
    Renewed {
        /// The last applied epoch of the volume.
        epoch: Epoch,
        /// The voters and learners now: where else to ask.
        members: Vec<(ReplicaId, StoreId)>,
        /// The leader.
        leader: ReplicaId,
        /// Size in bytes, which may have grown.
        size: u64,
        /// What the volume does without a quorum, in seconds; zero waits for ever.
        error_after_seconds: u32,
        /// For how long, in milliseconds, counted from when the request was sent.
        lease_ms: u32,
    },
    /// Not the leader, or not able to serve now: ask `leader`, or the others, or again.
    Elsewhere {
        /// The leader, if known.
        leader: Option<StoreId>,
        /// Why this replica does not serve.
        why: String,
    },
    /// The request's epoch is over.
    Fenced {
        /// The volume's epoch.
        current: Epoch,
        /// Why.
        why: String,
    },
    /// How the replica is.
    Report(Box<ReplicaReport>),
    /// The digest of a volume's content.
    Digest {
        /// The index it was taken at.
        index: LogIndex,
        /// The digest as hexadecimal text.
        digest: String,
        /// Blocks whose checksum does not match.
        bad_blocks: u64,
    },
    /// Blocks that differ between two moments.
    Extents(Box<Extents>),
    /// The volume has no such snapshot (any more).
    NoSnapshot,
    /// It cannot be done; asking again does not help.
    Failed(String),
}

/// How a replica is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ReplicaReport {
    /// The replica.
    pub replica: ReplicaId,
    /// Whether it leads, as far as it knows.
    pub is_leader: bool,
    /// Whether it leads and a quorum has confirmed that a moment ago.
    pub has_quorum: bool,
    /// The leader it follows.
    pub leader: Option<ReplicaId>,
    /// Voters of the last membership (joint: of all configurations).
    pub voters: Vec<ReplicaId>,
    /// Learners.
    pub learners: Vec<ReplicaId>,
    /// Whether the membership is uniform (no change under way).
    pub settled_membership: bool,
    /// Its term.
    pub term: Term,
    /// Last entry in its log.
    pub last_log: LogIndex,
    /// The term of that entry.
    pub last_term: Term,
    /// Its log has parts that it cannot read.
    pub is_damaged: bool,
    /// Two recoveries have asked for it: it runs for neither.
    pub is_halted: bool,
    /// Another replica that takes itself for the leader has called it a moment ago.
    pub hears_leader: bool,
    /// Last entry it knows to be committed.
    pub committed: LogIndex,
    /// Last entry applied.
    pub applied: LogIndex,
    /// Last entry purged.
    pub purged: LogIndex,
    /// Its last checkpoint.
    pub checkpoint: LogIndex,
    /// As leader: what each follower has matched.
    pub matched: Vec<(ReplicaId, LogIndex)>,
    /// Bytes of home files on the medium.
    pub used_bytes: u64,
    /// Of these, bytes that only snapshots hold.
    pub snapshot_bytes: u64,
    /// Bytes of all its files on the medium.
    pub allocated_bytes: u64,
    /// Payload of its log that the store's journal holds, in bytes.
    pub journal_bytes: u64,
    /// Living snapshots as applied here.
    pub snapshots: u32,
    /// The volume's epoch.
    pub epoch: Epoch,
    /// The node that holds it, empty if nobody.
    pub holder: String,
    /// Its size in bytes.
    pub size: u64,
    /// How it last caught up: empty, `log` or `chunks`.
    pub healed_by: String,
    /// Bytes received for that.
    pub healed_bytes: u64,
    /// Why it does not run; empty if it does.
    pub fault: String,
    /// Blocks that it does not hold as it should, and that are not healed yet.
    pub bad_blocks: u64,
    /// Blocks that were healed from another replica since its daemon started.
    pub healed_blocks: u64,
    /// It does not run yet: its log is being repaired from its peers.
    pub repairing: bool,
    /// Chunks that the scrub's pass under way has looked at; 0 while there is none.
    pub scrubbed_chunks: u64,
    /// Passes of the scrub that ended since its daemon started.
    pub scrub_passes: u64,
    /// Seconds since the last of them ended; the largest number before the first.
    pub since_scrub_seconds: u64,
    /// Chunks that differed from another replica's in the last pass, and nothing showed who was right.
    pub unsettled_chunks: u64,
    /// The medium below it is full.
    pub is_full: bool,
    /// As leader: data waits, because its medium or those of too many others are full.
    pub waits_for_room: bool,
    /// The group's timers as applied here.
    pub timers: VolumeTimers,
    /// Those that Raft runs with here.
    pub runs: Timers,
    /// It neither votes nor campaigns yet.
    pub owes_silence: bool,
    /// As leader: a round trip to the farthest voter that answers, for a while, in microseconds; 0 if nothing is known.
    pub round_trip_us: u64,
    /// It is a witness: it holds no data.
    pub is_witness: bool,
    /// As a witness: why some data voter can be brought up to date by data replicas only, and it does not campaign;
    /// empty otherwise.
    pub past_budget: String,
}

const PROPOSE: u8 = 1;
const READ: u8 = 2;
const BLOCK_STATUS: u8 = 3;
const RENEW: u8 = 4;
const CONTROL: u8 = 5;
const REPORT: u8 = 6;
const DIGEST: u8 = 7;
const SNAPSHOT: u8 = 10;
const MAKE_SNAPSHOT: u8 = 11;

impl DataRequest {
    /// The group that it is for.
    pub fn group(&self) -> GroupId {
        match self {
            Self::Propose { group, .. }
            | Self::Read { group, .. }
            | Self::BlockStatus { group, .. }
            | Self::Renew { group, .. }
            | Self::Control { group, .. }
            | Self::MakeSnapshot { group, .. }
            | Self::Report { group }
            | Self::Digest { group, .. }
            | Self::Snapshot { group, .. } => *group,
        }
    }

    /// The request as a frame's head.
    pub fn encode(&self) -> Bytes {
        let mut out = Writer::with_capacity(128);
        let put_read =
            |out: &mut Writer, range: &BlockRange, epoch: &Epoch, session: &SessionId, floor: &LogIndex| {
                range.encode(out);
                epoch.encode(out);
                session.encode(out);
                floor.encode(out);
            };
        match self {
            Self::Propose { group, command } => {
                out.u8(PROPOSE);
                group.encode(&mut out);
                out.bytes(command);
            }
            Self::Control { group, command } => {
                out.u8(CONTROL);
                group.encode(&mut out);
                out.bytes(command);
            }
            Self::MakeSnapshot { group, command, quota } => {
                out.u8(MAKE_SNAPSHOT);
                group.encode(&mut out);
                out.bytes(command);
                out.u64(quota.0);
            }
            Self::Read { group, range, epoch, session, floor } => {
                out.u8(READ);
                group.encode(&mut out);
                put_read(&mut out, range, epoch, session, floor);
            }
            Self::BlockStatus { group, range, epoch, session, floor } => {
                out.u8(BLOCK_STATUS);
                group.encode(&mut out);
                put_read(&mut out, range, epoch, session, floor);
            }
            Self::Renew { group, epoch, session } => {
                out.u8(RENEW);
                group.encode(&mut out);
                epoch.encode(&mut out);
                session.encode(&mut out);
            }
            Self::Report { group } => {
                out.u8(REPORT);
                group.encode(&mut out);
            }
            Self::Digest { group, index } => {
                out.u8(DIGEST);
                group.encode(&mut out);
                index.encode(&mut out);
            }
            Self::Snapshot { group, ask } => {
                out.u8(SNAPSHOT);
                group.encode(&mut out);
                ask.encode(&mut out);
            }
        }
        out.finish()
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(head);
        let input = &mut input;
        let kind = input.u8()?;
        let group = GroupId::decode(input)?;
        let request = match kind {
            PROPOSE => Self::Propose {
                group,
                command: Bytes::copy_from_slice(input.bytes(limits::FRAME_HEAD_BYTES_MAX)?),
            },
            CONTROL => Self::Control {
                group,
                command: Bytes::copy_from_slice(input.bytes(limits::FRAME_HEAD_BYTES_MAX)?),
            },
            MAKE_SNAPSHOT => Self::MakeSnapshot {
                group,
                command: Bytes::copy_from_slice(input.bytes(limits::FRAME_HEAD_BYTES_MAX)?),
                quota: ByteSize(input.u64()?),
            },
            READ | BLOCK_STATUS => {
                let range = BlockRange::decode(input)?;
                let epoch = Epoch::decode(input)?;
                let session = SessionId::decode(input)?;
                let floor = LogIndex::decode(input)?;
                if kind == READ {
                    Self::Read { group, range, epoch, session, floor }
                } else {
                    Self::BlockStatus { group, range, epoch, session, floor }
                }
            }
            RENEW => Self::Renew { group, epoch: Epoch::decode(input)?, session: SessionId::decode(input)? },
            REPORT => Self::Report { group },
            DIGEST => Self::Digest { group, index: LogIndex::decode(input)? },
            SNAPSHOT => Self::Snapshot { group, ask: SnapshotRequest::decode(input)? },
            other => return Err(DecodeError::Unknown { what: "data request", value: other.into() }),
        };
        if input.remaining() > 0 {
            return Err(DecodeError::Trailing { extra: input.remaining() });
        }
        Ok(request)
    }
}

const APPLIED: u8 = 1;
const BLOCKS: u8 = 2;
const STATUS: u8 = 3;
const RENEWED: u8 = 4;
const ELSEWHERE: u8 = 5;
const FENCED: u8 = 6;
const REPORTED: u8 = 7;
const DIGESTED: u8 = 8;
const FAILED: u8 = 9;
const EXTENTS: u8 = 20;
const NO_SNAPSHOT: u8 = 21;
const MEMBERS_MAX: usize = 64;

fn put_text(out: &mut Writer, text: &str) {
    let mut end = text.len().min(limits::TEXT_LENGTH_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.text(&text[..end]);
}

impl DataReply {
    /// The reply as a frame's head.
    pub fn encode(&self) -> Bytes {
        let mut out = Writer::with_capacity(128);
        match self {
            Self::Applied { index, reply } => {
                out.u8(APPLIED);
                index.encode(&mut out);
                out.bytes(&reply.encode());
            }
            Self::Blocks { applied, checksums } => {
                out.u8(BLOCKS);
                applied.encode(&mut out);
                out.u32(checksums.len() as u32);
                checksums.iter().for_each(|sum| out.u32(*sum));
            }
            Self::Status { applied, runs } => {
                out.u8(STATUS);
                applied.encode(&mut out);
                out.u32(runs.len() as u32);
                for (count, kind) in runs {
                    out.u32(*count);
                    out.u8(*kind);
                }
            }
            Self::Renewed { epoch, members, leader, size, error_after_seconds, lease_ms } => {
                out.u8(RENEWED);
                epoch.encode(&mut out);
                out.u32(members.len() as u32);
                for (replica, store) in members {
                    replica.encode(&mut out);
                    store.encode(&mut out);
                }
                leader.encode(&mut out);
                out.u64(*size);
                out.u32(*error_after_seconds);
                out.u32(*lease_ms);
            }
            Self::Elsewhere { leader, why } => {
                out.u8(ELSEWHERE);
                leader.unwrap_or(StoreId::NIL).encode(&mut out);
                put_text(&mut out, why);
            }
            Self::Fenced { current, why } => {
                out.u8(FENCED);
                current.encode(&mut out);
                put_text(&mut out, why);
            }
            Self::Report(report) => {
                out.u8(REPORTED);
                report.encode(&mut out);
            }
            Self::Digest { index, digest, bad_blocks } => {
                out.u8(DIGESTED);
                index.encode(&mut out);
                put_text(&mut out, digest);
                out.u64(*bad_blocks);
            }
            Self::Extents(extents) => {
                out.u8(EXTENTS);
                extents.encode(&mut out);
            }
            Self::NoSnapshot => out.u8(NO_SNAPSHOT),
            Self::Failed(why) => {
                out.u8(FAILED);
                put_text(&mut out, why);
            }
        }
        out.finish()
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(head);
        let input = &mut reader;
        let reply = match input.u8()? {
            APPLIED => {
                let index = LogIndex::decode(input)?;
                Self::Applied {
                    index,
                    reply: VolumeReply::decode(input.bytes(limits::FRAME_HEAD_BYTES_MAX)?)?,
                }
            }
            BLOCKS => {
                let applied = LogIndex::decode(input)?;
                let count = input.count("checksums", limits::REQUEST_BLOCKS_MAX as usize)?;
                Self::Blocks {
                    applied,
                    checksums: (0..count).map(|_| input.u32()).collect::<Result<_, _>>()?,
                }
            }
            STATUS => {
                let applied = LogIndex::decode(input)?;
                let count = input.count("runs", limits::REQUEST_BLOCKS_MAX as usize)?;
                let runs = (0..count)
                    .map(|_| Ok((input.u32()?, input.u8()?)))
                    .collect::<Result<_, DecodeError>>()?;
                Self::Status { applied, runs }
            }
            RENEWED => {
                let epoch = Epoch::decode(input)?;
                let count = input.count("members", MEMBERS_MAX)?;
                let members = (0..count)
                    .map(|_| Ok((ReplicaId::decode(input)?, StoreId::decode(input)?)))
                    .collect::<Result<_, DecodeError>>()?;
                let leader = ReplicaId::decode(input)?;
                Self::Renewed {
                    epoch,
                    members,
                    leader,
                    size: input.u64()?,
                    error_after_seconds: input.u32()?,
                    lease_ms: input.u32()?,
                }
            }
            ELSEWHERE => {
                let leader = StoreId::decode(input)?;
                let leader = (leader != StoreId::NIL).then_some(leader);
                Self::Elsewhere { leader, why: input.text(limits::TEXT_LENGTH_MAX)? }
            }
            FENCED => {
                Self::Fenced { current: Epoch::decode(input)?, why: input.text(limits::TEXT_LENGTH_MAX)? }
            }
            REPORTED => Self::Report(Box::new(ReplicaReport::decode(input)?)),
            DIGESTED => Self::Digest {
                index: LogIndex::decode(input)?,
                digest: input.text(limits::TEXT_LENGTH_MAX)?,
                bad_blocks: input.u64()?,
            },
            EXTENTS => Self::Extents(Box::new(Extents::decode(input)?)),
            NO_SNAPSHOT => Self::NoSnapshot,
            FAILED => Self::Failed(input.text(limits::TEXT_LENGTH_MAX)?),
            other => return Err(DecodeError::Unknown { what: "data reply", value: other.into() }),
        };
        reader.end()?;
        Ok(reply)
    }
}

impl ReplicaReport {
    fn encode(&self, out: &mut Writer) {
        self.replica.encode(out);
        out.bool(self.is_leader);
        out.bool(self.has_quorum);
        out.u64(self.leader.map_or(0, |id| id.0));
        for ids in [&self.voters, &self.learners] {
            out.u32(ids.len() as u32);
            ids.iter().for_each(|id| id.encode(out));
        }
        out.bool(self.settled_membership);
        self.term.encode(out);
        for index in [self.last_log, self.committed, self.applied, self.purged, self.checkpoint] {
            index.encode(out);
        }
        out.u32(self.matched.len() as u32);
        for (id, index) in &self.matched {
            id.encode(out);
            index.encode(out);
        }
        out.u64(self.used_bytes);
        out.u64(self.snapshot_bytes);
        out.u64(self.allocated_bytes);
        out.u64(self.journal_bytes);
        out.u32(self.snapshots);
        self.epoch.encode(out);
        put_text(out, &self.holder);
        out.u64(self.size);
        put_text(out, &self.healed_by);
        out.u64(self.healed_bytes);
        put_text(out, &self.fault);
        out.u64(self.bad_blocks);
        out.u64(self.healed_blocks);
        out.bool(self.repairing);
        out.u64(self.scrubbed_chunks);
        out.u64(self.scrub_passes);
        out.u64(self.since_scrub_seconds);
        out.u64(self.unsettled_chunks);
        out.bool(self.is_full);
        out.bool(self.waits_for_room);
        self.timers.encode(out);
        self.runs.encode(out);
        out.bool(self.owes_silence);
        out.u64(self.round_trip_us);
        out.bool(self.is_witness);
        put_text(out, &self.past_budget);
        self.last_term.encode(out);
        out.bool(self.is_damaged);
        out.bool(self.is_halted);
        out.bool(self.hears_leader);
    }

    fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let replica = ReplicaId::decode(input)?;
        let (is_leader, has_quorum) = (input.bool()?, input.bool()?);
        let leader = input.u64()?;
        let ids = |input: &mut Reader<'_>| {
            let count = input.count("members", MEMBERS_MAX)?;
            (0..count).map(|_| ReplicaId::decode(input)).collect::<Result<Vec<_>, _>>()
        };
        let (voters, learners) = (ids(input)?, ids(input)?);
        let settled_membership = input.bool()?;
        let term = Term::decode(input)?;
        let [last_log, committed, applied, purged, checkpoint] = {
            let mut out = [LogIndex::ZERO; 5];
            for index in &mut out {
                *index = LogIndex::decode(input)?;
            }
            out
        };
        let count = input.count("members", MEMBERS_MAX)?;
        let matched = (0..count)
            .map(|_| Ok((ReplicaId::decode(input)?, LogIndex::decode(input)?)))
            .collect::<Result<_, DecodeError>>()?;
        Ok(Self {
            replica,
            is_leader,
            has_quorum,
            leader: (leader != 0).then_some(ReplicaId(leader)),
            voters,
            learners,
            settled_membership,
            term,
            last_log,
            committed,
            applied,
            purged,
            checkpoint,
            matched,
            used_bytes: input.u64()?,
            snapshot_bytes: input.u64()?,
            allocated_bytes: input.u64()?,
            journal_bytes: input.u64()?,
            snapshots: input.u32()?,
            epoch: Epoch::decode(input)?,
            holder: input.text(limits::TEXT_LENGTH_MAX)?,
            size: input.u64()?,
            healed_by: input.text(limits::TEXT_LENGTH_MAX)?,
            healed_bytes: input.u64()?,
            fault: input.text(limits::TEXT_LENGTH_MAX)?,
            bad_blocks: input.u64()?,
            healed_blocks: input.u64()?,
            repairing: input.bool()?,
            scrubbed_chunks: input.u64()?,
            scrub_passes: input.u64()?,
            since_scrub_seconds: input.u64()?,
            unsettled_chunks: input.u64()?,
            is_full: input.bool()?,
            waits_for_room: input.bool()?,
            timers: VolumeTimers::decode(input)?,
            runs: Timers::decode(input)?,
            owes_silence: input.bool()?,
            round_trip_us: input.u64()?,
            is_witness: input.bool()?,
            past_budget: input.text(limits::TEXT_LENGTH_MAX)?,
            last_term: Term::decode(input)?,
            is_damaged: input.bool()?,
            is_halted: input.bool()?,
            hears_leader: input.bool()?,
        })
    }
}
