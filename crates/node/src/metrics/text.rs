//! A snapshot as Prometheus text.

use std::fmt;
use std::time::Duration;

use holdfast_env::disk::Space;
use holdfast_replica::StoreSpace;
use holdfast_store::volume::SpaceUsed;
use holdfast_types::{LATENCY_BOUNDS_US, LatencyHistogram, VolumeSpec};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::snapshot::{OpenStore, ReplicaSnapshot, SessionSnapshot, Snapshot, StoreSnapshot};

type Labels = Vec<(&'static str, String)>;

enum Value {
    Count(u64),
    Number(f64),
    Latency(LatencyHistogram),
}

/// A name with its samples.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    samples: Vec<(Labels, Value)>,
}

fn counter(name: &'static str, help: &'static str, samples: Vec<(Labels, u64)>) -> Family {
    let samples = samples.into_iter().map(|(labels, count)| (labels, Value::Count(count))).collect();
    Family { name, help, kind: MetricType::Counter, samples }
}

fn gauge(name: &'static str, help: &'static str, samples: Vec<(Labels, u64)>) -> Family {
    let samples = samples.into_iter().map(|(labels, count)| (labels, Value::Count(count))).collect();
    Family { name, help, kind: MetricType::Gauge, samples }
}

fn latency(name: &'static str, help: &'static str, samples: Vec<(Labels, LatencyHistogram)>) -> Family {
    let samples = samples.into_iter().map(|(labels, how)| (labels, Value::Latency(how))).collect();
    Family { name, help, kind: MetricType::Histogram, samples }
}

/// A counter of seconds.
fn seconds(name: &'static str, help: &'static str, samples: Vec<(Labels, Duration)>) -> Family {
    let samples =
        samples.into_iter().map(|(labels, long)| (labels, Value::Number(long.as_secs_f64()))).collect();
    Family { name, help, kind: MetricType::Counter, samples }
}

fn one(value: u64) -> Vec<(Labels, u64)> {
    vec![(Vec::new(), value)]
}

fn by(label: &'static str, values: &[(&str, u64)]) -> Vec<(Labels, u64)> {
    values.iter().map(|(of, value)| (vec![(label, (*of).to_owned())], *value)).collect()
}

/// The whole text.
pub(super) fn encode(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("holdfast");
    registry.register_collector(Box::new(Holdfast(snapshot)));
    let mut out = String::new();
    prometheus_text::encode(&mut out, &registry)?;
    let mut process = Registry::default();
    process.register_collector(Box::new(Process));
    prometheus_text::encode(&mut out, &process)?;
    Ok(out)
}

#[derive(Debug)]
struct Holdfast(Snapshot);

impl Collector for Holdfast {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let snapshot = &self.0;
        let open = snapshot.stores.iter().filter_map(|store| store.open.as_ref());
        let all: Vec<ReplicaSnapshot> = open.flat_map(|open| open.replicas.iter().cloned()).collect();
        let mut families = node(snapshot);
        families.extend(journal(snapshot));
        families.extend(medium(snapshot));
        families.extend(wire(snapshot));
        families.extend(sessions(&snapshot.sessions, &all));
        families.extend(replicas(&all));
        families.extend(homes(&all));
        write(encoder, &families)
    }
}

/// What Prometheus expects of every process, under its usual names.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let seconds = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
        let mut families = vec![Family {
            name: "process_cpu_seconds",
            help: "Processor time of the daemon, user and system, in seconds",
            kind: MetricType::Counter,
            samples: vec![(Vec::new(), Value::Number(seconds))],
        }];
        if let Some(bytes) = resident_bytes() {
            families.push(gauge(
                "process_resident_memory_bytes",
                "Resident memory of the daemon",
                one(bytes),
            ));
        }
        write(encoder, &families)
    }
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

fn write(mut encoder: DescriptorEncoder<'_>, families: &[Family]) -> Result<(), fmt::Error> {
    for family in families.iter().filter(|family| !family.samples.is_empty()) {
        let mut metric = encoder.encode_descriptor(family.name, family.help, None, family.kind)?;
        for (labels, value) in &family.samples {
            if labels.is_empty() {
                write_value(&mut metric, family.kind, value)?;
            } else {
                write_value(&mut metric.encode_family(labels)?, family.kind, value)?;
            }
        }
    }
    Ok(())
}

fn write_value(metric: &mut MetricEncoder<'_>, kind: MetricType, value: &Value) -> Result<(), fmt::Error> {
    match (kind, value) {
        (MetricType::Counter, Value::Count(count)) => {
            metric.encode_counter::<NoLabelSet, _, u64>(count, None)
        }
        (MetricType::Counter, Value::Number(number)) => {
            metric.encode_counter::<NoLabelSet, _, u64>(number, None)
        }
        (_, Value::Count(count)) => metric.encode_gauge(count),
        (_, Value::Number(number)) => metric.encode_gauge(number),
        (_, Value::Latency(how)) => {
            let bounds = LATENCY_BOUNDS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(how.buckets().iter().copied()).collect();
            metric.encode_histogram::<NoLabelSet>(how.sum().as_secs_f64(), how.count(), &buckets, None)
        }
    }
}

/// What tells a store from the others of its node, where there are any.
fn of_store(snapshot: &Snapshot, store: &StoreSnapshot) -> Labels {
    if snapshot.stores.len() == 1 {
        return Vec::new();
    }
    vec![("store", store.store.clone())]
}

/// A sample of every store.
fn each<V>(snapshot: &Snapshot, value: impl Fn(&StoreSnapshot) -> V) -> Vec<(Labels, V)> {
    snapshot.stores.iter().map(|store| (of_store(snapshot, store), value(store))).collect()
}

/// A sample of every store that is open.
fn each_open<V>(snapshot: &Snapshot, value: impl Fn(&OpenStore) -> V) -> Vec<(Labels, V)> {
    let open = |store: &StoreSnapshot| Some((of_store(snapshot, store), value(store.open.as_ref()?)));
    snapshot.stores.iter().filter_map(open).collect()
}

fn stores_info(snapshot: &Snapshot) -> Vec<(Labels, u64)> {
    let info = |store: &StoreSnapshot| {
        (vec![("store", store.store.clone()), ("directory", store.directory.clone())], 1)
    };
    snapshot.stores.iter().map(info).collect()
}

fn node(snapshot: &Snapshot) -> Vec<Family> {
    let info = vec![
        ("cluster", snapshot.cluster.clone()),
        ("node", snapshot.node.clone()),
        ("zone", snapshot.zone.clone()),
        ("region", snapshot.region.clone()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
    ];
    vec![
        gauge("node_info", "Who the node is; always 1", vec![(info, 1)]),
        gauge("store_info", "The stores of the node; always 1", stores_info(snapshot)),
        gauge(
            "store_failed",
            "1 once the store has stopped for good",
            each(snapshot, |store| store.failed.into()),
        ),
        gauge(
            "replicas_faulty",
            "Replicas that stand here and do not run",
            each_open(snapshot, |store| store.faulty_replicas),
        ),
        gauge("volumes_attached", "Volumes that are attached here", one(snapshot.attached)),
    ]
}

fn journal(snapshot: &Snapshot) -> Vec<Family> {
    let of = |value: fn(&OpenStore) -> u64| each_open(snapshot, value);
    vec![
        counter("journal_flushes", "Batches made durable, one flush each", of(|store| store.journal.flushes)),
        counter(
            "journal_written_bytes",
            "Bytes written to the journal: payload, lists, copies, padding",
            of(|store| store.journal.bytes_written),
        ),
        counter(
            "journal_payload_bytes",
            "Bytes of block data written to the journal",
            of(|store| store.journal.payload_bytes_written),
        ),
        counter(
            "journal_entries",
            "Log entries written to the journal",
            of(|store| store.journal.entries_written),
        ),
        counter(
            "journal_repaired_entries",
            "Damaged log entries that were repaired from peers",
            of(|store| store.repaired.entries),
        ),
        counter(
            "journal_repair_received_bytes",
            "Payload received for their repair",
            of(|store| store.repaired.bytes),
        ),
        gauge("journal_size_bytes", "Bytes of all segments", of(|store| store.journal.bytes_total)),
        gauge(
            "journal_used_bytes",
            "Bytes of segments that are in use",
            of(|store| store.journal.bytes_used),
        ),
        gauge(
            "journal_hung",
            "Whether the disk does not answer for the journal",
            of(|store| store.hung.into()),
        ),
        gauge(
            "journal_queue_records",
            "Records that wait for a batch",
            of(|store| store.journal.waiting_records),
        ),
        gauge(
            "journal_queue_bytes",
            "Payload that waits for a batch",
            of(|store| store.journal.waiting_bytes),
        ),
        gauge(
            "journal_line_size_bytes",
            "Bytes that entries may fill before they wait",
            of(|store| store.journal.line_bytes),
        ),
        gauge(
            "journal_line_used_bytes",
            "Bytes of them that are needed",
            of(|store| store.journal.line_bytes_taken),
        ),
        counter(
            "journal_slowed_writes",
            "Writes that waited because the journal was filling up",
            of(|store| store.journal.slowed_writes),
        ),
        seconds(
            "journal_slowed_seconds",
            "How long they waited, all together",
            each_open(snapshot, |store| store.journal.slowed_for),
        ),
        seconds(
            "store_cleaners_paused_seconds",
            "How long cleaners paused to give way to batches of the journal",
            each_open(snapshot, |store| store.journal.cleaners_paused),
        ),
        latency(
            "journal_flush_seconds",
            "From the hand-over of a batch to the disk until it is durable",
            each_open(snapshot, |store| store.flush_latency.clone()),
        ),
    ]
}

/// The media, and what stands on them.
fn medium(snapshot: &Snapshot) -> Vec<Family> {
    let told = |value: &dyn Fn(&OpenStore) -> Option<u64>| -> Vec<(Labels, u64)> {
        let all = each_open(snapshot, value).into_iter();
        all.filter_map(|(labels, value)| Some((labels, value?))).collect()
    };
    let of = |value: fn(&StoreSpace) -> u64| told(&|store| store.medium.map(|(_, stands)| value(&stands)));
    let space = |value: fn(&Space) -> u64| told(&|store| store.medium.map(|(space, _)| value(&space)));
    vec![
        gauge(
            "medium_full",
            "Whether the medium is full: data waits for room",
            each_open(snapshot, |store| store.full.into()),
        ),
        counter(
            "medium_filled",
            "Times that the medium was found full",
            each_open(snapshot, |store| store.times_full),
        ),
        gauge(
            "medium_waiting_volumes",
            "Volumes led here whose writes wait for room",
            each_open(snapshot, |store| store.waiting),
        ),
        gauge("medium_size_bytes", "Bytes of the medium that the store may use", space(|space| space.total)),
        gauge("medium_free_bytes", "Bytes of them that are free", space(|space| space.available)),
        gauge(
            "store_capacity_bytes",
            "Bytes of its medium that the store may take",
            told(&|store| store.capacity),
        ),
        gauge("store_allocated_bytes", "Bytes of all files of the store", of(|stands| stands.allocated)),
        gauge(
            "store_blocks_bytes",
            "Bytes of blocks of replicas, snapshots included",
            of(|stands| stands.used),
        ),
        gauge("store_snapshot_bytes", "Bytes that only snapshots hold", of(|stands| stands.snapshots)),
        gauge("store_journal_bytes", "Bytes of the journal's files", of(|stands| stands.journal)),
        gauge("store_reserve_bytes", "Bytes kept back for a full medium", of(|stands| stands.reserve)),
    ]
}

fn wire(snapshot: &Snapshot) -> Vec<Family> {
    let of = |value: fn(&StoreSnapshot) -> u64| each(snapshot, value);
    let malformed = [
        labelled(of(|store| store.wire.malformed), &[("part", "frame")]),
        labelled(of(|store| store.rpc_malformed), &[("part", "call")]),
        by("part", &[("nbd", snapshot.nbd_malformed)]),
    ];
    let queued = [
        labelled(of(|store| store.wire_queued.0), &[("lane", "control")]),
        labelled(of(|store| store.wire_queued.1), &[("lane", "bulk")]),
    ];
    vec![
        counter("peer_sent_frames", "Frames sent to other stores", of(|store| store.wire.frames_sent)),
        counter(
            "peer_sent_bytes",
            "Bytes of frames sent to other stores, before TLS",
            of(|store| store.wire.bytes_sent),
        ),
        counter(
            "peer_received_frames",
            "Frames received from other stores",
            of(|store| store.wire.frames_received),
        ),
        counter(
            "peer_received_bytes",
            "Bytes of frames received from other stores, after TLS",
            of(|store| store.wire.bytes_received),
        ),
        counter(
            "peer_refused",
            "Incoming connections refused: no or a foreign certificate, a wrong hello, too many",
            of(|store| store.wire.refused),
        ),
        counter("peer_malformed", "What peers and clients sent that makes no sense", malformed.concat()),
        gauge("peer_queue_bytes", "Bytes that wait to be sent to other stores", queued.concat()),
    ]
}

/// The name that a replica's specification gives its volume, else the volume's id.
fn name_of(replica: &ReplicaSnapshot) -> String {
    let spec: Result<VolumeSpec, _> = serde_json::from_slice(&replica.spec_json);
    spec.map_or_else(|_| replica.volume.to_string(), |spec| spec.name)
}

fn sessions(sessions: &[SessionSnapshot], replicas: &[ReplicaSnapshot]) -> Vec<Family> {
    let label = |session: &SessionSnapshot| -> Labels {
        let here = replicas.iter().find(|replica| replica.group == session.group).map(name_of);
        let name = session.name.clone().or(here).unwrap_or_else(|| session.group.to_string());
        vec![("volume", name)]
    };
    let with = |session: &SessionSnapshot, operation: &str| -> Labels {
        let mut labels = label(session);
        labels.push(("operation", operation.to_owned()));
        labels
    };
    let mut times = Vec::new();
    let mut bytes = Vec::new();
    for session in sessions {
        let usage = &session.usage;
        times.push((with(session, "read"), usage.reads.clone()));
        times.push((with(session, "write"), usage.writes.clone()));
        times.push((with(session, "clear"), usage.clears.clone()));
        bytes.push((with(session, "read"), usage.read_bytes));
        bytes.push((with(session, "write"), usage.written_bytes));
    }
    let each = |value: fn(&SessionSnapshot) -> u64| -> Vec<(Labels, u64)> {
        sessions.iter().map(|session| (label(session), value(session))).collect()
    };
    vec![
        latency(
            "session_request_seconds",
            "Requests of sessions of this node that succeeded; clear is trim or zero",
            times,
        ),
        counter("session_bytes", "Bytes that sessions of this node read and wrote", bytes),
        counter("session_errors", "Requests that failed", each(|session| session.usage.errors)),
        counter(
            "session_repeats",
            "Calls to replicas that were repeated",
            each(|session| session.usage.repeats),
        ),
    ]
}

fn of_replicas(replicas: &[ReplicaSnapshot], value: impl Fn(&ReplicaSnapshot) -> u64) -> Vec<(Labels, u64)> {
    let labels = |replica: &ReplicaSnapshot| -> Labels {
        vec![("volume", name_of(replica)), ("replica", replica.replica.to_string())]
    };
    replicas.iter().map(|replica| (labels(replica), value(replica))).collect()
}

fn labelled(mut samples: Vec<(Labels, u64)>, more: &[(&'static str, &str)]) -> Vec<(Labels, u64)> {
    for (labels, _) in &mut samples {
        labels.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
    }
    samples
}

fn replicas(all: &[ReplicaSnapshot]) -> Vec<Family> {
    let of = |value: fn(&ReplicaSnapshot) -> u64| of_replicas(all, value);
    let rebuild = |value: fn(&ReplicaSnapshot) -> u64, road: &str, direction: &str| {
        labelled(of(value), &[("road", road), ("direction", direction)])
    };
    let rebuilds = [
        rebuild(|r| r.group_usage.catch_up_bytes_sent, "log", "sent"),
        rebuild(|r| r.group_usage.chunk_bytes_sent, "chunks", "sent"),
        rebuild(|r| r.group_usage.chunk_bytes_received, "chunks", "received"),
    ];
    vec![
        gauge("raft_term", "The term that the replica knows", of(|r| r.term)),
        gauge("raft_leader", "1 while the replica leads its group", of(|r| r.is_leader.into())),
        gauge("raft_resting", "1 while its group rests", of(|r| r.is_resting.into())),
        gauge("raft_last_index", "The last entry of its log", of(|r| r.last_log)),
        gauge("raft_committed_index", "The last entry that it knows to be committed", of(|r| r.committed)),
        gauge("raft_applied_index", "The last entry that it has applied", of(|r| r.applied)),
        gauge("raft_purged_index", "The last entry that was purged from its log", of(|r| r.purged)),
        counter("raft_leaderships", "Times that it became leader", of(|r| r.group_usage.leaderships)),
        counter(
            "raft_leaderships_given",
            "Times that it gave the leadership away because of its disk",
            of(|r| r.group_usage.leaderships_given),
        ),
        counter("raft_wakes", "Times that it woke after its group had rested", of(|r| r.group_usage.wakes)),
        counter(
            "raft_paced_writes",
            "Writes that waited so that a rebuild could end",
            of(|r| r.group_usage.paced_writes),
        ),
        counter("raft_proposals", "Commands proposed to it as leader", of(|r| r.group_usage.proposals)),
        counter("raft_applied_entries", "Entries applied", of(|r| r.group_usage.entries_applied)),
        counter("raft_purges", "Times that its log was purged", of(|r| r.group_usage.purges)),
        counter("raft_sent_appends", "Appends sent to followers", of(|r| r.group_usage.appends_sent)),
        counter("raft_sent_entries", "Entries in them", of(|r| r.group_usage.entries_sent)),
        counter("raft_received_appends", "Appends received", of(|r| r.group_usage.appends_received)),
        counter("raft_received_entries", "Entries in them", of(|r| r.group_usage.entries_received)),
        counter(
            "rebuild_bytes",
            "Bytes that heal replicas: by the log (entries sent after their commit) or by chunks",
            rebuilds.concat(),
        ),
    ]
}

fn homes(all: &[ReplicaSnapshot]) -> Vec<Family> {
    let of = |value: fn(&ReplicaSnapshot) -> u64| of_replicas(all, value);
    let part = |value: fn(&ReplicaSnapshot) -> u64, part: &str| labelled(of(value), &[("part", part)]);
    let told: Vec<ReplicaSnapshot> = all.iter().filter(|replica| replica.space.is_some()).cloned().collect();
    let space = |value: fn(&SpaceUsed) -> u64, part: &str| {
        let of_one = |replica: &ReplicaSnapshot| replica.space.as_ref().map_or(0, value);
        labelled(of_replicas(&told, of_one), &[("part", part)])
    };
    let spaces = [
        space(|space| space.blocks + space.snapshots, "used"),
        space(|space| space.snapshots, "snapshot"),
        space(|space| space.allocated, "allocated"),
        part(|r| r.journal_bytes, "journal"),
    ];
    let parts = [
        part(|r| r.volume_usage.home_bytes_written, "home"),
        part(|r| r.volume_usage.table_bytes_written, "table"),
        part(|r| r.volume_usage.manifest_bytes_written, "manifest"),
        part(|r| r.volume_usage.staging_bytes_written, "staging"),
    ];
    vec![
        counter(
            "store_written_bytes",
            "Bytes written to a replica's files, beside the journal",
            parts.concat(),
        ),
        counter("store_read_bytes", "Bytes read from home files", of(|r| r.volume_usage.home_bytes_read)),
        counter(
            "store_read_errors",
            "Reads of home files that the disk answered with an error",
            of(|r| r.volume_usage.read_errors),
        ),
        gauge(
            "store_bad_blocks",
            "Blocks that home does not hold as it should, not healed yet",
            of(|r| r.volume_usage.health.bad_blocks),
        ),
        counter(
            "store_found_bad_blocks",
            "Blocks that were found bad",
            of(|r| r.volume_usage.health.found_blocks),
        ),
        counter(
            "store_healed_blocks",
            "Blocks healed from a peer",
            of(|r| r.volume_usage.health.healed_blocks),
        ),
        counter(
            "store_healed_pages",
            "Table pages healed: from the other copy, from memory or from a peer",
            of(|r| r.volume_usage.health.healed_pages),
        ),
        counter(
            "store_replaced_chunks",
            "Chunks replaced by what the other replicas agree on",
            of(|r| r.volume_usage.health.replaced_chunks),
        ),
        counter("store_scrub_passes", "Passes of the scrub over the replica", of(|r| r.scrub.passes)),
        gauge("store_scrubbed_chunks", "Chunks that its pass under way has looked at", of(|r| r.scrub.chunk)),
        gauge(
            "store_unsettled_chunks",
            "Chunks that differed from another replica's in the last pass, and nothing showed who was right",
            of(|r| r.scrub.unsettled),
        ),
        counter("store_flushes", "Flushes of a replica's files", of(|r| r.volume_usage.flushes)),
        counter("store_checkpoints", "Checkpoints made by the cleaner", of(|r| r.volume_usage.checkpoints)),
        counter(
            "store_punched_chunks",
            "Chunks given back to the file system",
            of(|r| r.volume_usage.chunks_punched),
        ),
        gauge("store_dirty_bytes", "Bytes of blocks that are in the journal only", of(|r| r.dirty_bytes)),
        gauge(
            "replica_bytes",
            "Bytes of a replica on the medium: blocks, those that only snapshots hold, all files; payload of its log",
            spaces.concat(),
        ),
    ]
}
