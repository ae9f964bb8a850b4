//! Fills volumes that begin with what another one held: reads a snapshot, writes what is in it, lets go. The catalog's
//! leader asks for it and keeps asking; what nobody asks for any more is given up, and begins again elsewhere where it
//! is known to have been written.
//!
//! INV-FILL: a volume is attached for it only in the epoch that the request names, so never after a guest.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use holdfast_catalog::filling::{self, FILL, FillAnswer, FillRequest};
use holdfast_catalog::volumes;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane};
use holdfast_replica::messages::{DataReply, DataRequest};
use holdfast_replica::snapshot_messages::{Extents, SnapshotRequest};
use holdfast_session::{AttachOptions, Session, VolumeTarget};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, ByteSize, CHUNK_BYTES, ErrorCode, StoreId, UserError, VolumeId,
    limits,
};
use holdfast_wire::rpc::{Handler, Responder};

use crate::attachments::user_error;
use crate::shard::Shard;
use crate::snapshots::{is_whole, unexpected};

/// Bytes a second that a node writes at most while it fills volumes, all of them together: what guests write and read
/// goes the same ways.
const BYTES_PER_SECOND: u64 = 64 << 20;
/// Requests under way at once for one volume, of up to 1 MiB each.
const AT_ONCE: usize = 2;
/// Volumes that a node fills at once.
const VOLUMES_MAX: usize = 8;
/// Without a question for so long it is given up: the catalog has no leader, or does not want it any more.
const ABANDONED: Duration = Duration::from_secs(30);
/// How long the attach waits for a quorum, and for the lease of a node that began and does not answer.
const ATTACH_PATIENCE: Duration = Duration::from_secs(30);
const DETACH_PATIENCE: Duration = Duration::from_secs(10);
/// How long one part may take to be read.
const READ_PATIENCE: Duration = Duration::from_secs(20);
/// Times that a part is read that was damaged on its way.
const READS_MAX: usize = 5;

/// A volume that is being filled, or was.
struct Job {
    filled: Cell<u64>,
    asked: Cell<Instant>,
    ended: RefCell<Option<Result<(), UserError>>>,
}

/// What this node fills.
#[derive(Default)]
pub(crate) struct Fillings {
    jobs: RefCell<BTreeMap<VolumeId, Rc<Job>>>,
    /// When the next part may be written.
    next: Cell<Option<Instant>>,
}

/// A session that is ended on every way out.
struct Held(Rc<Session>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Lets the shard answer the catalog's leader.
pub(crate) fn serve(shard: &Rc<Shard>) {
    shard.rpc.serve(FILL, Rc::new(Asked(Rc::downgrade(shard))));
}

struct Asked(Weak<Shard>);

impl Handler for Asked {
    fn handle(&self, _from: StoreId, _lane: Lane, request: Frame, responder: Responder) {
        let Some(shard) = self.0.upgrade() else { return responder.refuse("the daemon is stopping") };
        let answer = filling::decode(request).map(|request| shard.fill(request));
        match answer.and_then(|answer| filling::encode(&answer)) {
            Ok(frame) => responder.reply(frame),
            Err(error) => responder.refuse(error.to_string()),
        }
    }
}

impl Fillings {
    /// When `bytes` more may be written.
    fn turn(&self, bytes: u64) -> Instant {
        let now = Instant::now();
        let at = self.next.get().map_or(now, |next| next.max(now));
        self.next.set(Some(at + Duration::from_nanos(bytes * 1_000_000_000 / BYTES_PER_SECOND)));
        at
    }

    /// What is known of a volume. An end is told once; one that nobody asked about is forgotten in time.
    fn look(&self, volume: VolumeId) -> Option<FillAnswer> {
        let mut jobs = self.jobs.borrow_mut();
        let now = Instant::now();
        let is_over = |job: &Job| job.ended.borrow().is_some();
        jobs.retain(|id, job| *id == volume || !is_over(job) || now.since(job.asked.get()) < ABANDONED);
        let job = jobs.get(&volume)?.clone();
        job.asked.set(now);
        let ended = job.ended.borrow().clone();
        match ended {
            None => Some(FillAnswer::Filling { filled: ByteSize(job.filled.get()) }),
            Some(Ok(())) => {
                jobs.remove(&volume);
                Some(FillAnswer::Done)
            }
            Some(Err(error)) => {
                jobs.remove(&volume);
                Some(FillAnswer::Failed { error })
            }
        }
    }

    fn begin(&self, request: &FillRequest) -> Result<Rc<Job>, UserError> {
        let mut jobs = self.jobs.borrow_mut();
        if jobs.len() >= VOLUMES_MAX {
            let message = format!("the node fills {VOLUMES_MAX} volumes already");
            return Err(UserError::new(ErrorCode::Unavailable, message).hint("it comes later"));
        }
        let job = Rc::new(Job {
            filled: Cell::new(request.filled.0),
            asked: Cell::new(Instant::now()),
            ended: RefCell::default(),
        });
        jobs.insert(request.volume, job.clone());
        Ok(job)
    }
}

/// Ranges of at most a request's length, in order.
fn parts(extents: &Extents) -> Vec<BlockRange> {
    const BLOCKS: u32 = (limits::REQUEST_BYTES_MAX / BLOCK_BYTES) as u32;
    let split = |extent: &BlockRange| {
        let (start, count) = (extent.start.0, extent.count);
        (0..count)
            .step_by(BLOCKS as usize)
            .map(move |at| BlockRange::new(BlockIndex(start + u64::from(at)), BLOCKS.min(count - at)))
    };
    extents.extents.iter().flat_map(split).collect()
}

/// The runs of blocks of `range` that are not zero, with their data: a new volume reads as zeros.
fn runs(range: BlockRange, data: &Bytes) -> Vec<(BlockRange, Bytes)> {
    let mut out: Vec<(BlockRange, Bytes)> = Vec::new();
    let mut begun: Option<usize> = None;
    let is_zero = |at: usize| data[at * BLOCK_BYTES..][..BLOCK_BYTES].iter().all(|byte| *byte == 0);
    for at in 0..=range.count as usize {
        match (begun, at < range.count as usize && !is_zero(at)) {
            (None, true) => begun = Some(at),
            (Some(from), false) => {
                let run = BlockRange::new(BlockIndex(range.start.0 + from as u64), (at - from) as u32);
                out.push((run, data.slice(from * BLOCK_BYTES..at * BLOCK_BYTES)));
                begun = None;
            }
            _ => {}
        }
    }
    out
}

impl Shard {
    /// Begins to fill a volume, or tells how far it is.
    fn fill(self: &Rc<Self>, request: FillRequest) -> FillAnswer {
        if let Some(answer) = self.fillings.look(request.volume) {
            return answer;
        }
        match self.fillings.begin(&request) {
            Ok(job) => {
                let filled = request.filled;
                holdfast_env::spawn("fill", self.clone().run_filling(job, request));
                FillAnswer::Filling { filled }
            }
            Err(error) => FillAnswer::Failed { error },
        }
    }

    async fn run_filling(self: Rc<Self>, job: Rc<Job>, request: FillRequest) {
        let abandoned = async {
            loop {
                let left = ABANDONED.saturating_sub(Instant::now().since(job.asked.get()));
                if left.is_zero() {
                    return;
                }
                holdfast_env::sleep(left).await;
            }
        };
        let result = {
            let work = self.fill_whole(&job, &request);
            futures_util::pin_mut!(work, abandoned);
            match futures_util::future::select(work, abandoned).await {
                futures_util::future::Either::Left((result, _)) => result,
                futures_util::future::Either::Right(_) => Err(UserError::new(
                    ErrorCode::Unavailable,
                    format!("nobody asked about volume {} for {ABANDONED:?}", request.name),
                )),
            }
        };
        match &result {
            Ok(()) => tracing::info!(volume = request.name, "the volume is filled"),
            Err(error) => tracing::warn!(volume = request.name, %error, "the volume is not filled yet"),
        }
        *job.ended.borrow_mut() = Some(result);
    }

    async fn fill_whole(&self, job: &Job, request: &FillRequest) -> Result<(), UserError> {
        let options = AttachOptions {
            node: self.config.location.node.clone(),
            force: request.force,
            read_only: false,
            resume: false,
            only_at: Some(request.epoch),
            patience: ATTACH_PATIENCE,
        };
        let target = VolumeTarget { group: request.group, stores: request.stores.clone() };
        let failed = |error| user_error(&request.name, error);
        let session = Session::attach(self.rpc.clone(), &self.sessions, target, &options, &self.timers);
        let held = Held(session.await.map_err(failed)?);
        tracing::info!(volume = request.name, from = %request.filled, of = %request.size, "fills a volume");
        self.copy(&held.0, job, request).await?;
        held.0.detach(DETACH_PATIENCE).await.map_err(failed)
    }

    async fn copy(&self, session: &Session, job: &Job, request: &FillRequest) -> Result<(), UserError> {
        let mut chunk = request.filled.0 / CHUNK_BYTES;
        loop {
            let ask = SnapshotRequest::Diff { from: None, to: Some(request.snapshot), from_chunk: chunk };
            let (reply, _) = self.ask_source(request, ask).await?;
            let DataReply::Extents(found) = reply else { return Err(unexpected(reply)) };
            // In order: what is reported as filled has nothing missing below.
            let copies = parts(&found)
                .into_iter()
                .map(|range| async move { self.copy_part(session, request, range).await.map(|()| range) });
            let mut copies = stream::iter(copies).buffered(AT_ONCE);
            while let Some(copied) = copies.next().await {
                job.filled.set(copied?.end().byte_offset());
            }
            let Some(next) = found.next_chunk else { break };
            chunk = next;
            job.filled.set(chunk * CHUNK_BYTES);
        }
        job.filled.set(request.size.0);
        Ok(())
    }

    async fn copy_part(
        &self,
        session: &Session,
        request: &FillRequest,
        range: BlockRange,
    ) -> Result<(), UserError> {
        holdfast_env::sleep_until(self.fillings.turn(range.bytes())).await;
        let data = self.read_part(request, range).await?;
        for (run, data) in runs(range, &data) {
            session.write(run, data).await.map_err(|error| user_error(&request.name, error))?;
        }
        Ok(())
    }

    async fn read_part(&self, request: &FillRequest, range: BlockRange) -> Result<Bytes, UserError> {
        for _ in 0..READS_MAX {
            let ask = SnapshotRequest::Read { snapshot: request.snapshot, range };
            match self.ask_source(request, ask).await? {
                (DataReply::Blocks { checksums, .. }, data) if is_whole(range, &checksums, &data) => {
                    return Ok(data);
                }
                (DataReply::Blocks { .. }, _) => {
                    tracing::error!(volume = request.name, "a part was damaged on its way and is read again");
                }
                (other, _) => return Err(unexpected(other)),
            }
        }
        Err(UserError::new(ErrorCode::Unavailable, "what replicas sent was damaged on its way"))
    }

    async fn ask_source(
        &self,
        request: &FillRequest,
        ask: SnapshotRequest,
    ) -> Result<(DataReply, Bytes), UserError> {
        let mut stores = request.from_stores.clone();
        self.nearest_first(&mut stores);
        let ask = DataRequest::Snapshot { group: request.from_group, ask };
        volumes::ask_any(&self.rpc, &stores, &ask, READ_PATIENCE).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_requests_in_order_and_cover_all() {
        let extent = |start, count| BlockRange::new(BlockIndex(start), count);
        let extents = Extents { extents: vec![extent(3, 1), extent(10, 600)], ..Default::default() };
        let parts = parts(&extents);
        assert_eq!(parts, [extent(3, 1), extent(10, 256), extent(266, 256), extent(522, 88)]);
    }

    #[test]
    fn zero_blocks_are_left_out_and_nothing_else() {
        let range = BlockRange::new(BlockIndex(100), 6);
        let mut data = vec![0u8; 6 * BLOCK_BYTES];
        for (block, byte) in [(1, 1), (2, 2), (5, 5)] {
            data[(block + 1) * BLOCK_BYTES - 1] = byte;
        }
        let data = Bytes::from(data);
        let found: Vec<(u64, u32, u8)> = runs(range, &data)
            .into_iter()
            .map(|(run, data)| (run.start.0, run.count, data[data.len() - 1]))
            .collect();
        assert_eq!(found, [(101, 2, 2), (105, 1, 5)]);
        assert_eq!(runs(range, &Bytes::from(vec![0u8; 6 * BLOCK_BYTES])), []);
        let full = Bytes::from(vec![7u8; 6 * BLOCK_BYTES]);
        assert_eq!(runs(range, &full), [(range, full)]);
    }

    #[test]
    fn all_volumes_together_are_copied_no_faster_than_the_bound() {
        holdfast_env::real::run(async {
            let fillings = Fillings::default();
            let first = fillings.turn(BYTES_PER_SECOND / 2);
            fillings.turn(BYTES_PER_SECOND / 2);
            assert_eq!(fillings.turn(1).since(first), Duration::from_secs(1));
        });
    }
}
