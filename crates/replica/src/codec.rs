//! Raft's messages and log entries as bytes (layouts in docs/wire.md and docs/FORMAT.md), and the conversion between
//! openraft's identities and the store's.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use holdfast_protocol::command::{LEVEL_WITNESS, check_level};
use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::GroupLog;
use holdfast_store::{EntryHead, EntryId, LogEntry};
use holdfast_types::limits;
use holdfast_types::{DecodeError, LogIndex, Reader, ReplicaId, StoreId, Term, Writer};
use openraft::entry::RaftEntry;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult,
    TransferLeaderRequest, VoteRequest, VoteResponse,
};
use openraft::{EntryPayload, Membership as RaftMembership};

use crate::config::{AppData, Entry, LeaderId, LogId, Membership, Peer, StoredMembership, Types, Vote};
use crate::payload::Payload;
use crate::repair::Members;

const KIND_BLANK: u8 = 0;
const KIND_COMMAND: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;
const ENTRIES_MAX: usize = 4096;
/// Configurations in a joint membership; openraft uses one or two.
const CONFIGS_MAX: usize = 4;
const MEMBERS_MAX: usize = 64;

pub(crate) fn entry_id(id: &LogId) -> EntryId {
    EntryId {
        term: Term(id.leader_id.term),
        leader: ReplicaId(id.leader_id.node_id),
        index: LogIndex(id.index),
    }
}

pub(crate) fn log_id(id: EntryId) -> LogId {
    LogId::new(LeaderId { term: id.term.0, node_id: id.leader.0 }, id.index.0)
}

fn put_log_id(out: &mut Writer, id: &Option<LogId>) {
    out.bool(id.is_some());
    if let Some(id) = id {
        out.u64(id.leader_id.term);
        out.u64(id.leader_id.node_id);
        out.u64(id.index);
    }
}

fn get_log_id(input: &mut Reader<'_>) -> Result<Option<LogId>, DecodeError> {
    if !input.bool()? {
        return Ok(None);
    }
    let leader = LeaderId { term: input.u64()?, node_id: input.u64()? };
    Ok(Some(LogId::new(leader, input.u64()?)))
}

pub(crate) fn put_vote(out: &mut Writer, vote: &Vote) {
    out.u64(vote.leader_id.term);
    out.u64(vote.leader_id.node_id);
    out.bool(vote.committed);
}

pub(crate) fn get_vote(input: &mut Reader<'_>) -> Result<Vote, DecodeError> {
    let (term, node_id) = (input.u64()?, input.u64()?);
    Ok(if input.bool()? { Vote::new_committed(term, node_id) } else { Vote::new(term, node_id) })
}

pub(crate) fn vote_bytes(vote: &Vote) -> Bytes {
    let mut out = Writer::with_capacity(17);
    put_vote(&mut out, vote);
    out.finish()
}

pub(crate) fn vote_from(bytes: &[u8]) -> Result<Vote, DecodeError> {
    let mut input = Reader::new(bytes);
    let vote = get_vote(&mut input)?;
    input.end()?;
    Ok(vote)
}

fn put_membership(out: &mut Writer, membership: &Membership) {
    let configs = membership.get_joint_config();
    out.u32(configs.len() as u32);
    for config in configs {
        out.u32(config.len() as u32);
        for id in config {
            out.u64(*id);
        }
    }
    let nodes: Vec<_> = membership.nodes().collect();
    out.u32(nodes.len() as u32);
    for (id, peer) in nodes {
        out.u64(*id);
        peer.store.encode(out);
    }
    // A membership without a witness is written as it was before there were any, and read by whoever knows none.
    let witnesses: Vec<u64> =
        membership.nodes().filter(|(_, peer)| peer.witness).map(|(id, _)| *id).collect();
    if !witnesses.is_empty() {
        out.u16(LEVEL_WITNESS);
        out.u32(witnesses.len() as u32);
        witnesses.iter().for_each(|id| out.u64(*id));
    }
}

fn get_membership(input: &mut Reader<'_>) -> Result<Membership, DecodeError> {
    let mut configs = Vec::new();
    for _ in 0..input.count("configurations", CONFIGS_MAX)? {
        let mut config = BTreeSet::new();
        for _ in 0..input.count("voters", MEMBERS_MAX)? {
            config.insert(input.u64()?);
        }
        configs.push(config);
    }
    let mut nodes = BTreeMap::new();
    for _ in 0..input.count("members", MEMBERS_MAX)? {
        let id = input.u64()?;
        nodes.insert(id, Peer::data(StoreId::decode(input)?));
    }
    if input.remaining() > 0 {
        get_witnesses(input, &mut nodes)?;
    }
    if is_planted("joint-not-understood") && configs.len() > 1 {
        configs.remove(0);
    }
    RaftMembership::new(configs, nodes)
        .map_err(|_| DecodeError::Unknown { what: "membership without its members", value: 0 })
}

/// What follows the members of a membership: who of them are witnesses. Refused by name where this version does not
/// know it: a replica that took a witness for data would believe in copies that are not there.
fn get_witnesses(input: &mut Reader<'_>, nodes: &mut BTreeMap<u64, Peer>) -> Result<(), DecodeError> {
    check_level(input.u16()?)?;
    let count = input.count("witnesses", MEMBERS_MAX)?;
    for _ in 0..count {
        let id = input.u64()?;
        match nodes.get_mut(&id) {
            Some(peer) if !peer.witness => peer.witness = true,
            _ => return Err(DecodeError::Unknown { what: "witness", value: id }),
        }
    }
    if count == 0 {
        return Err(DecodeError::Unknown { what: "number of witnesses", value: 0 });
    }
    Ok(())
}

/// The term of a vote; `None` if it is none.
pub(crate) fn vote_term(bytes: &[u8]) -> Option<Term> {
    vote_from(bytes).ok().map(|vote| Term(vote.leader_id.term))
}

/// The leader or candidate of a vote, with its term; `None` if it is none.
pub(crate) fn vote_leader(bytes: &[u8]) -> Option<(Term, ReplicaId)> {
    vote_from(bytes).ok().map(|vote| (Term(vote.leader_id.term), ReplicaId(vote.leader_id.node_id)))
}

/// Who belongs to a group by a checkpoint and by the memberships in the log behind it, committed or not.
pub(crate) fn members_of(checkpoint: &[u8], log: &GroupLog, fork: LogIndex) -> Result<Members, DecodeError> {
    let stored = membership_from(checkpoint)?;
    let is_of_this_group = |index: LogIndex| fork == LogIndex::ZERO || index > fork;
    let mut all = Vec::new();
    if is_of_this_group(LogIndex(stored.log_id().as_ref().map_or(0, |id| id.index))) {
        all.push((LogIndex::ZERO, stored.membership().clone()));
    }
    for (id, head) in log.heads_of(KIND_MEMBERSHIP).into_iter().filter(|(id, _)| is_of_this_group(id.index)) {
        let mut input = Reader::new(&head);
        all.push((id.index, get_membership(&mut input)?));
        input.end()?;
    }
    Ok(gather(&all, log.committed().map_or(LogIndex::ZERO, |id| id.index)))
}

/// Everybody of these memberships, and the configurations that may still decide: the newest that is committed, and each
/// after it. Whoever has an entry behind it in the log has it, too, so nobody counts by an older one any more.
fn gather(memberships: &[(LogIndex, Membership)], committed: LogIndex) -> Members {
    let mut members = Members::default();
    for (index, membership) in memberships {
        members.peers.extend(membership.nodes().map(|(id, peer)| (ReplicaId(*id), peer.store)));
        if *index <= committed {
            members.voters.clear();
        }
        for config in membership.get_joint_config() {
            let voters: BTreeSet<ReplicaId> = config.iter().map(|id| ReplicaId(*id)).collect();
            if !voters.is_empty() && !members.voters.contains(&voters) {
                members.voters.push(voters);
            }
        }
    }
    members
}

/// The last membership with the entry that set it, for checkpoints.
pub(crate) fn membership_bytes(stored: &StoredMembership) -> Bytes {
    let mut out = Writer::new();
    put_log_id(&mut out, stored.log_id());
    put_membership(&mut out, stored.membership());
    out.finish()
}

pub(crate) fn membership_from(bytes: &[u8]) -> Result<StoredMembership, DecodeError> {
    if bytes.is_empty() {
        return Ok(StoredMembership::default());
    }
    let mut input = Reader::new(bytes);
    let id = get_log_id(&mut input)?;
    let membership = get_membership(&mut input)?;
    input.end()?;
    Ok(StoredMembership::new(id, membership))
}

fn kind_and_head(entry: &Entry) -> (u8, Bytes, Bytes) {
    match &entry.payload {
        EntryPayload::Blank => (KIND_BLANK, Bytes::new(), Bytes::new()),
        EntryPayload::Normal(data) => (KIND_COMMAND, data.head.clone(), data.payload.whole().clone()),
        EntryPayload::Membership(membership) => {
            let mut out = Writer::new();
            put_membership(&mut out, membership);
            (KIND_MEMBERSHIP, out.finish(), Bytes::new())
        }
    }
}

fn payload_of(
    kind: u8,
    head: Bytes,
    payload: Payload,
) -> Result<EntryPayload<AppData, u64, Peer>, DecodeError> {
    match kind {
        KIND_BLANK => Ok(EntryPayload::Blank),
        KIND_COMMAND => Ok(EntryPayload::Normal(AppData { head, payload })),
        KIND_MEMBERSHIP => {
            let mut input = Reader::new(&head);
            let membership = get_membership(&mut input)?;
            input.end()?;
            Ok(EntryPayload::Membership(membership))
        }
        other => Err(DecodeError::Unknown { what: "entry kind", value: other.into() }),
    }
}

/// INV-RECOVER: the entry with which a recovered group begins: this replica alone votes.
pub(crate) fn sole_voter(id: EntryId, peer: Peer) -> Result<LogEntry, DecodeError> {
    let alone = RaftMembership::new(vec![[id.leader.0].into()], BTreeMap::from([(id.leader.0, peer)]));
    let membership =
        alone.map_err(|_| DecodeError::Unknown { what: "membership without its members", value: 0 })?;
    let mut out = Writer::new();
    put_membership(&mut out, &membership);
    Ok(LogEntry { id, kind: KIND_MEMBERSHIP, head: out.finish(), payload: Bytes::new() })
}

/// Whether the entry at `index` is the one of [`sole_voter`] for this replica.
pub(crate) fn begins_alone(log: &GroupLog, index: LogIndex, replica: ReplicaId, peer: Peer) -> bool {
    let entries = log.heads_of(KIND_MEMBERSHIP);
    let entry = entries.into_iter().find(|(id, _)| id.index == index && id.leader == replica);
    entry.is_some_and(|(id, head)| sole_voter(id, peer).is_ok_and(|alone| alone.head == head))
}

/// A replica's vote for itself.
pub(crate) fn vote_for(term: Term, replica: ReplicaId) -> Bytes {
    vote_bytes(&Vote::new(term.0, replica.0))
}

/// An entry as the journal keeps it.
pub(crate) fn to_log_entry(entry: &Entry) -> LogEntry {
    let (kind, head, payload) = kind_and_head(entry);
    LogEntry { id: entry_id(&entry.log_id()), kind, head, payload }
}

/// An entry as openraft knows it.
pub(crate) fn from_log_entry(entry: LogEntry) -> Result<Entry, DecodeError> {
    let mut out = Entry::new_blank(log_id(entry.id));
    out.payload = payload_of(entry.kind, entry.head, Payload::Here(entry.payload))?;
    Ok(out)
}

/// An entry that is to be applied, as openraft knows it: its block data may have been left in the journal.
pub(crate) fn from_entry_head(entry: EntryHead) -> Result<Entry, DecodeError> {
    let payload = entry.payload.map_or(Payload::InJournal(entry.payload_bytes), Payload::Here);
    let mut out = Entry::new_blank(log_id(entry.id));
    out.payload = payload_of(entry.kind, entry.head, payload)?;
    Ok(out)
}

/// AppendEntries: the head has everything but block data, which follows in parts, uncopied.
pub(crate) fn append_request(request: &AppendEntriesRequest<Types>, out: &mut Writer) -> Vec<Bytes> {
    put_vote(out, &request.vote);
    put_log_id(out, &request.prev_log_id);
    put_log_id(out, &request.leader_commit);
    out.u32(request.entries.len() as u32);
    let mut parts = Vec::new();
    for entry in &request.entries {
        let (kind, head, payload) = kind_and_head(entry);
        put_log_id(out, &Some(entry.log_id()));
        out.u8(kind);
        out.bytes(&head);
        out.u32(payload.len() as u32);
        if !payload.is_empty() {
            parts.push(payload);
        }
    }
    parts
}

pub(crate) fn append_request_from(
    input: &mut Reader<'_>,
    mut body: Bytes,
) -> Result<AppendEntriesRequest<Types>, DecodeError> {
    let vote = get_vote(input)?;
    let prev_log_id = get_log_id(input)?;
    let leader_commit = get_log_id(input)?;
    let count = input.count("entries", ENTRIES_MAX)?;
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let id =
            get_log_id(input)?.ok_or(DecodeError::Unknown { what: "entry without identity", value: 0 })?;
        let kind = input.u8()?;
        let head = Bytes::copy_from_slice(input.bytes(limits::FRAME_HEAD_BYTES_MAX)?);
        let length = input.count("payload", limits::REQUEST_BYTES_MAX)?;
        if body.len() < length {
            return Err(DecodeError::Short { missing: length - body.len() });
        }
        let mut entry = Entry::new_blank(id);
        entry.payload = payload_of(kind, head, Payload::Here(body.split_to(length)))?;
        entries.push(entry);
    }
    if !body.is_empty() {
        return Err(DecodeError::Trailing { extra: body.len() });
    }
    Ok(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
}

const RESULT_OK: u8 = 0;
const RESULT_CONFLICT: u8 = 1;
const RESULT_HIGHER_VOTE: u8 = 2;
const RESULT_PARTIAL: u8 = 3;

/// An answer to an append of a stream, and whether the medium below is full.
pub(crate) fn stream_result(result: &StreamAppendResult<Types>, is_full: bool) -> Bytes {
    let mut out = Writer::with_capacity(32);
    match result {
        Ok(id) => {
            out.u8(RESULT_OK);
            put_log_id(&mut out, id);
        }
        Err(StreamAppendError::Conflict(id)) => {
            out.u8(RESULT_CONFLICT);
            put_log_id(&mut out, &Some(*id));
        }
        Err(StreamAppendError::HigherVote(vote)) => {
            out.u8(RESULT_HIGHER_VOTE);
            put_vote(&mut out, vote);
        }
    }
    out.bool(is_full);
    out.finish()
}

pub(crate) fn stream_result_from(bytes: &[u8]) -> Result<(StreamAppendResult<Types>, bool), DecodeError> {
    let mut input = Reader::new(bytes);
    let result = match input.u8()? {
        RESULT_OK => Ok(get_log_id(&mut input)?),
        RESULT_CONFLICT => Err(StreamAppendError::Conflict(
            get_log_id(&mut input)?
                .ok_or(DecodeError::Unknown { what: "conflict without identity", value: 0 })?,
        )),
        RESULT_HIGHER_VOTE => Err(StreamAppendError::HigherVote(get_vote(&mut input)?)),
        other => return Err(DecodeError::Unknown { what: "append result", value: other.into() }),
    };
    let is_full = input.bool()?;
    input.end()?;
    Ok((result, is_full))
}

/// An answer to a single append, and whether the medium below is full.
pub(crate) fn append_response(response: &AppendEntriesResponse<Types>, is_full: bool) -> Bytes {
    let mut out = Writer::with_capacity(32);
    match response {
        AppendEntriesResponse::Success => out.u8(RESULT_OK),
        AppendEntriesResponse::PartialSuccess(id) => {
            out.u8(RESULT_PARTIAL);
            put_log_id(&mut out, id);
        }
        AppendEntriesResponse::Conflict => out.u8(RESULT_CONFLICT),
        AppendEntriesResponse::HigherVote(vote) => {
            out.u8(RESULT_HIGHER_VOTE);
            put_vote(&mut out, vote);
        }
    }
    out.bool(is_full);
    out.finish()
}

pub(crate) fn append_response_from(
    bytes: &[u8],
) -> Result<(AppendEntriesResponse<Types>, bool), DecodeError> {
    let mut input = Reader::new(bytes);
    let response = match input.u8()? {
        RESULT_OK => AppendEntriesResponse::Success,
        RESULT_PARTIAL => AppendEntriesResponse::PartialSuccess(get_log_id(&mut input)?),
        RESULT_CONFLICT => AppendEntriesResponse::Conflict,
        RESULT_HIGHER_VOTE => AppendEntriesResponse::HigherVote(get_vote(&mut input)?),
        other => return Err(DecodeError::Unknown { what: "append response", value: other.into() }),
    };
    let is_full = input.bool()?;
    input.end()?;
    Ok((response, is_full))
}

pub(crate) fn vote_request(request: &VoteRequest<Types>, out: &mut Writer) {
    put_vote(out, &request.vote);
    put_log_id(out, &request.last_log_id);
    out.bool(request.leadership_transfer);
}

pub(crate) fn vote_request_from(input: &mut Reader<'_>) -> Result<VoteRequest<Types>, DecodeError> {
    let mut request = VoteRequest::new(get_vote(input)?, get_log_id(input)?);
    request.leadership_transfer = input.bool()?;
    Ok(request)
}

pub(crate) fn vote_response(response: &VoteResponse<Types>) -> Bytes {
    let mut out = Writer::with_capacity(48);
    put_vote(&mut out, &response.vote);
    put_log_id(&mut out, &response.last_log_id);
    out.bool(response.vote_granted);
    out.finish()
}

pub(crate) fn vote_response_from(bytes: &[u8]) -> Result<VoteResponse<Types>, DecodeError> {
    let mut input = Reader::new(bytes);
    let vote = get_vote(&mut input)?;
    let last = get_log_id(&mut input)?;
    let response = VoteResponse::new(vote, last, input.bool()?);
    input.end()?;
    Ok(response)
}

pub(crate) fn transfer_request(request: &TransferLeaderRequest<Types>, out: &mut Writer) {
    put_vote(out, request.from_leader());
    out.u64(*request.to_node_id());
    put_log_id(out, &request.last_log_id().copied());
}

pub(crate) fn transfer_request_from(
    input: &mut Reader<'_>,
) -> Result<TransferLeaderRequest<Types>, DecodeError> {
    Ok(TransferLeaderRequest::new(get_vote(input)?, input.u64()?, get_log_id(input)?))
}

/// The identity and membership of a snapshot.
pub(crate) fn snapshot_meta(meta: &crate::config::SnapshotMeta, out: &mut Writer) {
    put_log_id(out, &meta.last_log_id);
    let membership = membership_bytes(&meta.last_membership);
    out.bytes(&membership);
}

pub(crate) fn snapshot_meta_from(input: &mut Reader<'_>) -> Result<crate::config::SnapshotMeta, DecodeError> {
    Ok(crate::config::SnapshotMeta {
        last_log_id: get_log_id(input)?,
        last_membership: membership_from(input.bytes(limits::FRAME_HEAD_BYTES_MAX)?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(witnesses: &[u64]) -> Bytes {
        let peer = |id: u64| Peer { store: StoreId(id.into()), witness: witnesses.contains(&id) };
        let nodes: BTreeMap<u64, Peer> = (1..=3).map(|id| (id, peer(id))).collect();
        let membership = RaftMembership::new(vec![BTreeSet::from([1, 2, 3])], nodes).expect("is well formed");
        membership_bytes(&StoredMembership::new(None, membership))
    }

    #[test]
    fn a_membership_without_a_witness_is_as_it_was_before_there_were_any() {
        // No log id; one configuration of three voters; three members with their stores.
        let mut before = Writer::new();
        before.bool(false);
        before.u32(1);
        before.u32(3);
        (1..=3).for_each(|id| before.u64(id));
        before.u32(3);
        for id in 1..=3 {
            before.u64(id);
            StoreId(id.into()).encode(&mut before);
        }
        let before = before.finish();
        assert_eq!(written(&[]), before);
        let read = membership_from(&before).expect("is read");
        assert!(read.membership().nodes().all(|(_, peer)| !peer.witness));
        let with = written(&[3]);
        assert_eq!(&with[..before.len()], &before[..]);
        let read = membership_from(&with).expect("is read");
        let witnesses: Vec<u64> =
            read.membership().nodes().filter(|(_, peer)| peer.witness).map(|(id, _)| *id).collect();
        assert_eq!(witnesses, [3]);
        assert_eq!(membership_bytes(&read), with);
    }

    #[test]
    fn a_membership_of_a_later_version_is_refused_by_name() {
        let mut later = written(&[3]).to_vec();
        let level = later.len() - 8 - 4 - 2;
        later[level..level + 2].copy_from_slice(&u16::MAX.to_le_bytes());
        let why = membership_from(&later).expect_err("is refused").to_string();
        assert!(why.contains("upgrade this node"), "{why}");
        let mut stranger = written(&[3]).to_vec();
        let id = stranger.len() - 8;
        stranger[id] = 9;
        assert!(membership_from(&stranger).is_err(), "a witness that is no member");
    }

    #[test]
    fn configurations_that_are_over_do_not_decide_any_more() {
        let membership = |configs: &[&[u64]]| {
            let configs: Vec<BTreeSet<u64>> =
                configs.iter().map(|ids| ids.iter().copied().collect()).collect();
            let nodes = configs.iter().flatten().map(|id| (*id, Peer::default())).collect::<BTreeMap<_, _>>();
            RaftMembership::new(configs, nodes).expect("is well formed")
        };
        let all = [
            (LogIndex(0), membership(&[&[1, 2, 3]])),
            (LogIndex(5), membership(&[&[1, 2, 3], &[1, 2, 4]])),
            (LogIndex(6), membership(&[&[1, 2, 4]])),
        ];
        let voters = |committed| {
            let members = gather(&all, LogIndex(committed));
            assert_eq!(members.peers.len(), 4, "everybody is asked");
            let ids = |config: &BTreeSet<ReplicaId>| config.iter().map(|id| id.0).collect::<Vec<_>>();
            members.voters.iter().map(ids).collect::<Vec<_>>()
        };
        assert_eq!(voters(6), [vec![1, 2, 4]], "3 is gone, and need not say anything");
        assert_eq!(voters(5), [vec![1, 2, 3], vec![1, 2, 4]]);
        assert_eq!(
            voters(4),
            [vec![1, 2, 3], vec![1, 2, 4]],
            "what is not committed may have been decided by either"
        );
    }
}
