//! Questions about snapshots to any replica of their volume. None needs a lease: what a snapshot holds never changes.

use holdfast_types::{BlockIndex, BlockRange, DecodeError, LogIndex, Reader, SnapshotId, Writer};

/// Extents of one answer.
pub const EXTENTS_MAX: usize = 4096;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotRequest {
    /// Read blocks. Answer: `DataReply::Blocks` with the data as body.
    Read {
        /// Of this one.
        snapshot: SnapshotId,
        /// What to read; at most a request's length.
        range: BlockRange,
    },
    /// Which blocks hold data. Answer: `DataReply::Status`.
    Status {
        /// Of this one.
        snapshot: SnapshotId,
        /// What to tell about; at most a request's length.
        range: BlockRange,
    },
    /// Which blocks differ, or may differ, between two moments. Answer: `DataReply::Extents`.
    Diff {
        /// The older one; none for a volume without anything in it.
        from: Option<SnapshotId>,
        /// The newer one; none for what the volume holds now, which only its leader tells.
        to: Option<SnapshotId>,
        /// The chunk to begin with.
        from_chunk: u64,
    },
}

/// Part of the answer to [`SnapshotRequest::Diff`].
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Extents {
    /// Runs of blocks, in order, not touching one another.
    pub extents: Vec<BlockRange>,
    /// The chunk to go on with; none at the end.
    pub next_chunk: Option<u64>,
    /// The index applied when they were looked up.
    pub applied: LogIndex,
    /// Blocks that the newer one has.
    pub blocks: u64,
}

const READ: u8 = 1;
const STATUS: u8 = 2;
const DIFF: u8 = 3;

impl SnapshotRequest {
    pub(crate) fn encode(&self, out: &mut Writer) {
        match self {
            Self::Read { snapshot, range } => {
                out.u8(READ);
                snapshot.encode(out);
                range.encode(out);
            }
            Self::Status { snapshot, range } => {
                out.u8(STATUS);
                snapshot.encode(out);
                range.encode(out);
            }
            Self::Diff { from, to, from_chunk } => {
                out.u8(DIFF);
                from.unwrap_or(SnapshotId::NIL).encode(out);
                to.unwrap_or(SnapshotId::NIL).encode(out);
                out.u64(*from_chunk);
            }
        }
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let given = |id| (id != SnapshotId::NIL).then_some(id);
        Ok(match input.u8()? {
            READ => Self::Read { snapshot: SnapshotId::decode(input)?, range: BlockRange::decode(input)? },
            STATUS => {
                Self::Status { snapshot: SnapshotId::decode(input)?, range: BlockRange::decode(input)? }
            }
            DIFF => Self::Diff {
                from: given(SnapshotId::decode(input)?),
                to: given(SnapshotId::decode(input)?),
                from_chunk: input.u64()?,
            },
            other => {
                return Err(DecodeError::Unknown { what: "question about a snapshot", value: other.into() });
            }
        })
    }
}

impl Extents {
    pub(crate) fn encode(&self, out: &mut Writer) {
        out.u32(self.extents.len() as u32);
        for extent in &self.extents {
            out.u64(extent.start.0);
            out.u32(extent.count);
        }
        out.bool(self.next_chunk.is_some());
        out.u64(self.next_chunk.unwrap_or_default());
        self.applied.encode(out);
        out.u64(self.blocks);
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = input.count("extents", EXTENTS_MAX)?;
        let extents = (0..count)
            .map(|_| Ok(BlockRange::new(BlockIndex(input.u64()?), input.u32()?)))
            .collect::<Result<_, DecodeError>>()?;
        let more = input.bool()?;
        let next = input.u64()?;
        let applied = LogIndex::decode(input)?;
        Ok(Self { extents, next_chunk: more.then_some(next), applied, blocks: input.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use holdfast_types::GroupId;

    use super::*;
    use crate::messages::{DataReply, DataRequest};

    #[test]
    fn questions_and_answers_come_back() {
        let range = BlockRange::new(BlockIndex(7), 9);
        let asks = [
            SnapshotRequest::Read { snapshot: SnapshotId(1), range },
            SnapshotRequest::Status { snapshot: SnapshotId(1), range },
            SnapshotRequest::Diff { from: None, to: Some(SnapshotId(2)), from_chunk: 5 },
            SnapshotRequest::Diff { from: Some(SnapshotId(1)), to: None, from_chunk: 0 },
        ];
        for ask in asks {
            let request = DataRequest::Snapshot { group: GroupId(3), ask };
            let bytes = request.encode();
            assert_eq!(DataRequest::decode(&bytes), Ok(request));
            assert!((0..bytes.len()).all(|end| DataRequest::decode(&bytes[..end]).is_err()));
        }
        let most = vec![range; EXTENTS_MAX];
        for (extents, next_chunk) in [(vec![], None), (most, Some(4))] {
            let extents = Extents { extents, next_chunk, applied: LogIndex(8), blocks: 64 };
            let reply = DataReply::Extents(Box::new(extents));
            let bytes = reply.encode();
            assert!(bytes.len() < holdfast_types::limits::FRAME_HEAD_BYTES_MAX);
            assert_eq!(DataReply::decode(&bytes), Ok(reply));
        }
        assert_eq!(DataReply::decode(&DataReply::NoSnapshot.encode()), Ok(DataReply::NoSnapshot));
    }
}
