//! The receiver's side of the calls of a rebuild.

use std::cell::Cell;

use bytes::Bytes;
use futures_util::FutureExt;
use holdfast_env::net::{Frame, Lane};
use holdfast_store::volume::{BlockSum, ChunkSummary, LayerMark};
use holdfast_types::{
    BlockRange, CHUNK_BLOCKS, ChunkIndex, GroupId, LogIndex, Reader, ReplicaId, StoreId, Writer,
};
use holdfast_wire::rpc::{CallError, Rpc};

use super::{
    ASK_AGAIN, BLOCKS, CALL_DEADLINE, CHECKSUM_CHUNKS_MAX, CHECKSUMS, POSITION, RebuildError, SUMMARIES,
    SUMMARIES_MAX, get_sum, get_summary,
};
use crate::messages;
use crate::usage::Counters;

/// Pulls from one source.
pub(super) struct Source {
    pub(super) rpc: Rpc,
    /// Who offered the checkpoint.
    pub(super) replica: ReplicaId,
    pub(super) store: StoreId,
    /// The other replicas, as of the checkpoint: this one may not know any yet.
    pub(super) others: Vec<StoreId>,
    pub(super) group: GroupId,
    /// The checkpoint.
    pub(super) hold_from: LogIndex,
    pub(super) received: Cell<u64>,
    pub(super) counters: Counters,
}

impl Source {
    async fn call(
        &self,
        kind: u8,
        layers: &[LayerMark],
        arguments: impl FnOnce(&mut Writer),
    ) -> Result<Frame, RebuildError> {
        let mut head = Writer::new();
        self.group.encode(&mut head);
        head.u8(kind);
        self.replica.encode(&mut head);
        self.hold_from.encode(&mut head);
        head.u32(layers.len() as u32);
        layers.iter().for_each(|layer| layer.encode(&mut head));
        arguments(&mut head);
        let frame = Frame::small(head.finish());
        let answer = self.ask(frame).await?;
        self.received.set(self.received.get() + answer.bytes() as u64);
        self.counters.count(|usage| usage.chunk_bytes_received += answer.bytes() as u64);
        Ok(answer)
    }

    /// Asks, and once more if there is no answer for a while: nothing is changed by it. An answer that is merely late counts.
    async fn ask(&self, frame: Frame) -> Result<Frame, CallError> {
        let ask = || {
            self.rpc
                .call(self.store, Lane::Bulk, messages::REBUILD, frame.clone(), CALL_DEADLINE)
                .boxed_local()
        };
        let mut first = ask();
        match holdfast_env::timeout(ASK_AGAIN, &mut first).await {
            Ok(answer) => answer,
            Err(_) => Ok(futures_util::future::select_ok([first, ask()]).await?.0),
        }
    }

    pub(super) async fn summaries(
        &self,
        layer: LayerMark,
        from: ChunkIndex,
        count: u32,
    ) -> Result<Vec<ChunkSummary>, RebuildError> {
        let answer = self
            .call(SUMMARIES, &[layer], |head| {
                head.u64(from.0);
                head.u32(count);
            })
            .await?;
        let mut input = Reader::new(&answer.head);
        let count = input.count("chunks", SUMMARIES_MAX as usize)?;
        Ok((0..count).map(|_| get_summary(&mut input)).collect::<Result<_, _>>()?)
    }

    pub(super) async fn checksums(
        &self,
        layer: LayerMark,
        chunks: &[ChunkIndex],
    ) -> Result<Vec<Vec<BlockSum>>, RebuildError> {
        let answer = self
            .call(CHECKSUMS, &[layer], |head| {
                head.u32(chunks.len() as u32);
                chunks.iter().for_each(|chunk| head.u64(chunk.0));
            })
            .await?;
        let mut input = Reader::new(&answer.head);
        let count = input.count("chunks", CHECKSUM_CHUNKS_MAX)?;
        let mut out = Vec::new();
        for _ in 0..count {
            out.push((0..CHUNK_BLOCKS).map(|_| get_sum(&mut input)).collect::<Result<Vec<_>, _>>()?);
        }
        Ok(out)
    }

    /// Blocks with their checksums as the source knows them, so that what is damaged on the way is noticed.
    pub(super) async fn blocks(
        &self,
        layer: LayerMark,
        range: BlockRange,
    ) -> Result<(Bytes, Vec<u32>), RebuildError> {
        let answer = self.call(BLOCKS, &[layer], |head| range.encode(head)).await?;
        let mut input = Reader::new(&answer.head);
        let sums: Vec<u32> = range.blocks().map(|_| input.u32()).collect::<Result<_, _>>()?;
        let body = answer.into_body();
        if body.len() as u64 != range.bytes() {
            return Err(RebuildError::Failed(format!(
                "{} bytes came for {} blocks",
                body.len(),
                range.count
            )));
        }
        Ok((body, sums))
    }

    /// How far the source has applied. It has all the layers.
    pub(super) async fn position(&self, layers: &[LayerMark]) -> Result<LogIndex, RebuildError> {
        let answer = self.call(POSITION, layers, |_| {}).await?;
        Ok(LogIndex::decode(&mut Reader::new(&answer.head))?)
    }
}
