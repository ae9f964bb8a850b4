//! A copy of everything that a node counts: of each shard taken on its thread in one go.

use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::Space;
use holdfast_env::net::Lane;
use holdfast_replica::repair::RepairUsage;
use holdfast_replica::scrub::ScrubProgress;
use holdfast_replica::{GroupUsage, Host, StoreSpace, Survey};
use holdfast_session::SessionUsage;
use holdfast_store::journal::JournalUsage;
use holdfast_store::volume::{SpaceUsed, VolumeUsage};
use holdfast_types::{GroupId, LatencyHistogram, VolumeId};
use holdfast_wire::tcp::Counters;

use crate::config::StorePlan;
use crate::shard::Shard;
use crate::store::LocalStore;

/// One replica.
#[derive(Clone, Debug)]
pub(super) struct ReplicaSnapshot {
    pub(super) volume: VolumeId,
    pub(super) group: GroupId,
    /// The volume's specification as the disk has it, which names it.
    pub(super) spec_json: Bytes,
    pub(super) replica: u64,
    pub(super) is_leader: bool,
    pub(super) is_resting: bool,
    pub(super) term: u64,
    pub(super) last_log: u64,
    pub(super) committed: u64,
    pub(super) applied: u64,
    pub(super) purged: u64,
    pub(super) dirty_bytes: u64,
    pub(super) scrub: ScrubProgress,
    pub(super) group_usage: GroupUsage,
    pub(super) volume_usage: VolumeUsage,
    /// As of the last survey of the medium.
    pub(super) space: Option<SpaceUsed>,
    pub(super) journal_bytes: u64,
}

/// The sessions of one volume.
#[derive(Clone, Debug)]
pub(super) struct SessionSnapshot {
    pub(super) group: GroupId,
    /// The volume's name, while it is attached here.
    pub(super) name: Option<String>,
    pub(super) usage: SessionUsage,
}

/// What runs on a store that is open.
#[derive(Clone, Debug)]
pub(super) struct OpenStore {
    pub(super) journal: JournalUsage,
    pub(super) flush_latency: LatencyHistogram,
    pub(super) hung: bool,
    pub(super) full: bool,
    pub(super) times_full: u64,
    pub(super) waiting: u64,
    /// The medium and what stands on it, as of its last survey: a scrape waits for no disk.
    pub(super) medium: Option<(Space, StoreSpace)>,
    /// What the store may take, if it may not take all of its medium.
    pub(super) capacity: Option<u64>,
    pub(super) replicas: Vec<ReplicaSnapshot>,
    pub(super) faulty_replicas: u64,
    pub(super) repaired: RepairUsage,
}

/// A store of the node.
#[derive(Clone, Debug)]
pub(super) struct StoreSnapshot {
    pub(super) store: String,
    pub(super) directory: String,
    /// It has stopped, or could not be opened.
    pub(super) failed: bool,
    /// None while it is not open.
    pub(super) open: Option<OpenStore>,
    pub(super) wire: Counters,
    /// Bytes that wait for peers on the control and on the bulk lane.
    pub(super) wire_queued: (u64, u64),
    pub(super) rpc_malformed: u64,
}

/// A whole node.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(super) node: String,
    pub(super) zone: String,
    pub(super) region: String,
    pub(super) cluster: String,
    /// The first one first.
    pub(super) stores: Vec<StoreSnapshot>,
    pub(super) sessions: Vec<SessionSnapshot>,
    pub(super) attached: u64,
    pub(super) nbd_malformed: u64,
}

impl StoreSnapshot {
    fn take(store: &LocalStore) -> Self {
        let mut wire_queued = (0, 0);
        for (_, lane, bytes) in store.network.queued() {
            match lane {
                Lane::Control => wire_queued.0 += bytes,
                Lane::Bulk => wire_queued.1 += bytes,
            }
        }
        Self {
            store: store.plan.store.to_string(),
            directory: store.plan.directory.display().to_string(),
            failed: !store.why_not().is_empty(),
            open: store.host().map(|host| open(&host)),
            wire: store.network.counters(),
            wire_queued,
            rpc_malformed: store.rpc.malformed(),
        }
    }

    /// Of one whose thread has ended, or waits for its disk: nobody tells what it has counted.
    fn ended(plan: &StorePlan) -> Self {
        Self {
            store: plan.store.to_string(),
            directory: plan.directory.display().to_string(),
            failed: true,
            open: None,
            wire: Counters::default(),
            wire_queued: (0, 0),
            rpc_malformed: 0,
        }
    }
}

fn open(host: &Rc<Host>) -> OpenStore {
    let (journal, survey) = (host.journal(), host.last_survey());
    OpenStore {
        journal: journal.usage(),
        flush_latency: journal.flush_latency(),
        hung: journal.is_hung(),
        full: journal.is_full(),
        times_full: journal.reserve().map_or(0, |reserve| reserve.times_full()),
        waiting: host.volumes().iter().filter(|(_, volume)| volume.waits_for_room()).count() as u64,
        medium: survey.as_ref().map(|survey| (survey.space, host.space_of(survey))),
        capacity: host.budget().capacity(),
        replicas: host
            .volumes()
            .into_iter()
            .map(|(of, volume)| replica(of, &volume, survey.as_ref()))
            .collect(),
        faulty_replicas: host.faulty().len() as u64,
        repaired: host.repaired(),
    }
}

impl Snapshot {
    /// As of now; of each store on its own thread.
    pub(crate) async fn take(shard: &Rc<Shard>) -> Self {
        let mut stores = vec![StoreSnapshot::take(&shard.store)];
        for other in &shard.others {
            let taken = other.ask(StoreSnapshot::take).await;
            stores.push(taken.unwrap_or_else(|_ended| StoreSnapshot::ended(&other.plan)));
        }
        Self {
            node: shard.config.location.node.to_string(),
            zone: shard.config.location.zone.clone(),
            region: shard.config.location.region.clone(),
            cluster: shard.config.cluster.to_string(),
            stores,
            sessions: sessions(shard),
            attached: shard.attachments.count() as u64,
            nbd_malformed: shard.nbd.malformed(),
        }
    }
}

fn replica(volume: VolumeId, of: &holdfast_replica::Volume, survey: Option<&Survey>) -> ReplicaSnapshot {
    let report = of.group().report();
    ReplicaSnapshot {
        volume,
        group: of.group().id().group,
        spec_json: of.data().spec_json(),
        replica: report.replica.0,
        is_leader: report.is_leader,
        is_resting: of.group().is_resting(),
        term: report.term.0,
        last_log: report.last_log.0,
        committed: report.committed.0,
        applied: report.applied.0,
        purged: report.purged.0,
        dirty_bytes: of.data().dirty().bytes,
        scrub: of.scrub_progress(),
        group_usage: of.group().usage(),
        volume_usage: of.data().usage(),
        space: survey.map(|survey| of.data().space_in(&survey.standing)),
        journal_bytes: report.journal_bytes,
    }
}

fn sessions(shard: &Shard) -> Vec<SessionSnapshot> {
    let usage = shard.sessions.usage().into_iter();
    usage
        .map(|(group, usage)| SessionSnapshot { group, name: shard.attachments.name_of(group), usage })
        .collect()
}
