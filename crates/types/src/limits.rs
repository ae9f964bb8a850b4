//! Every bound of the system in one place, with assertions that relate them.

use crate::error::{ErrorCode, UserError};
use crate::sizes::{BLOCK_BYTES, CHUNK_BYTES};

/// Largest volume: 16 TiB.
pub const VOLUME_BYTES_MAX: u64 = 16 << 40;
/// Largest request that a session sends, in bytes; larger ones are split.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Largest request, in blocks.
pub const REQUEST_BLOCKS_MAX: u32 = (REQUEST_BYTES_MAX / BLOCK_BYTES) as u32;
/// Largest run that one trim or zero command covers, in blocks (1 GiB). They carry no payload.
pub const TRIM_BLOCKS_MAX: u32 = (1 << 30) / BLOCK_BYTES as u32;
/// Payload that one AppendEntries carries at most, in bytes (one entry may exceed it alone).
pub const APPEND_BYTES_MAX: usize = 2 << 20;
/// Largest frame on the peer network, in bytes.
pub const FRAME_BYTES_MAX: usize = 8 << 20;
/// Largest head of a frame (everything but bulk payload), in bytes.
pub const FRAME_HEAD_BYTES_MAX: usize = 1 << 20;
/// Bytes queued for one peer and lane before a sender is refused or made to wait.
pub const PEER_QUEUE_BYTES_MAX: usize = 32 << 20;
/// Log entries of one group kept in memory for followers and apply, in payload bytes.
pub const LOG_TAIL_BYTES_MAX: usize = 32 << 20;
/// Largest entry of a log without its payload, in bytes.
pub const LOG_HEAD_BYTES_MAX: usize = 16 << 10;
/// Request numbers that the exactly-once window remembers beyond its floor.
pub const WINDOW_SEQS_MAX: u64 = 4096;
/// Requests of a session in flight.
pub const SESSION_IN_FLIGHT_MAX: usize = 1024;
/// Longest name of a node, volume, zone or region, in bytes.
pub const NAME_LENGTH_MAX: usize = 128;
/// Longest free text in a message, in bytes.
pub const TEXT_LENGTH_MAX: usize = 4096;
/// Largest serialized state of a catalog command or read, in bytes.
pub const CATALOG_BYTES_MAX: usize = 4 << 20;
/// Voters of one volume.
pub const VOTERS_MAX: usize = 5;
/// Payload that the log of one witness holds for a data replica that is away, in bytes, unless its node is told otherwise.
pub const WITNESS_LOG_BYTES: u64 = 1 << 30;
/// Replicas that the catalog knows of one volume: those that vote, join, and leave; the latter may stand on nodes that
/// never come back.
pub const REPLICAS_MAX: usize = 32;
/// Living snapshots of one volume.
pub const SNAPSHOTS_PER_VOLUME_MAX: usize = 256;
/// Ids of dropped snapshots that a volume remembers, so that a late repetition of a creation makes none of them anew.
pub const SNAPSHOTS_DROPPED_MAX: usize = 256;
/// Largest encoded fencing state of a volume, its snapshots included, in bytes.
pub const VOLUME_STATE_BYTES_MAX: usize = 128 << 10;
/// Largest encoded form of one snapshot: its name, and room for its numbers, in bytes.
pub const SNAPSHOT_BYTES_MAX: usize = NAME_LENGTH_MAX + 64;

const _: () = assert!(REQUEST_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(APPEND_BYTES_MAX >= REQUEST_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX >= 2 * APPEND_BYTES_MAX + FRAME_HEAD_BYTES_MAX);
const _: () = assert!(PEER_QUEUE_BYTES_MAX >= 4 * FRAME_BYTES_MAX);
const _: () = assert!(WINDOW_SEQS_MAX >= 4 * SESSION_IN_FLIGHT_MAX as u64);
const _: () = assert!(VOLUME_BYTES_MAX.is_multiple_of(CHUNK_BYTES));
const _: () = assert!(CATALOG_BYTES_MAX < FRAME_BYTES_MAX);
const _: () = assert!(
    SNAPSHOTS_PER_VOLUME_MAX * SNAPSHOT_BYTES_MAX
        + SNAPSHOTS_DROPPED_MAX * 16
        + WINDOW_SEQS_MAX as usize * 2
        + TEXT_LENGTH_MAX
        <= VOLUME_STATE_BYTES_MAX
);
const _: () = assert!(2 * VOLUME_STATE_BYTES_MAX <= FRAME_HEAD_BYTES_MAX);

/// Refuses a name that is empty, too long, or has characters beyond letters, digits, `.`, `_` and `-`.
pub fn check_name(what: &str, name: &str) -> Result<(), UserError> {
    let bad = |why: String| {
        Err(UserError::new(ErrorCode::InvalidArgument, format!("{what} name '{name}' {why}")).hint(
            "use letters, digits, '.', '_' and '-', starting with a letter or digit, at most 128 characters",
        ))
    };
    if name.is_empty() {
        return bad("is empty".into());
    }
    if name.len() > NAME_LENGTH_MAX {
        return bad(format!("has {} bytes, more than {NAME_LENGTH_MAX}", name.len()));
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return bad("has a character that is not allowed".into());
    }
    if !name.as_bytes()[0].is_ascii_alphanumeric() {
        return bad("does not start with a letter or digit".into());
    }
    Ok(())
}
