//! Bytes over blocks.
//!
//! A write that covers a block only in part reads it, changes it and writes it whole. Between the two nothing else may
//! write that block, so every change holds its blocks for as long as it lasts.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, limits};
use tokio::sync::Notify;

use crate::device::{Device, DeviceError, Run, RunKind};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// A device by bytes. Any offset and length within the device; split, aligned and kept apart here.
pub struct Edge {
    device: Rc<dyn Device>,
    held: RefCell<Vec<BlockRange>>,
    released: Notify,
}

/// What a change without payload does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Clear {
    Trim,
    Zero,
}

impl Edge {
    /// Bytes over `device`. Everything that writes to the device must go through the same edge.
    pub fn new(device: Rc<dyn Device>) -> Rc<Self> {
        Rc::new(Self { device, held: RefCell::default(), released: Notify::new() })
    }

    /// The device below.
    pub fn device(&self) -> &Rc<dyn Device> {
        &self.device
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size_bytes() => Ok(()),
            _ => Err(DeviceError::OutOfRange),
        }
    }

    /// Reads `length` bytes at `offset`.
    pub async fn read(&self, offset: u64, length: u64) -> Result<Bytes, DeviceError> {
        self.check(offset, length)?;
        let mut whole = BytesMut::new();
        for (at, part) in pieces(offset, length, limits::REQUEST_BLOCKS_MAX) {
            let range = covering(at, part);
            let data = self.device.read(range).await?;
            let skip = (at - range.start.byte_offset()) as usize;
            let data = data.slice(skip..skip + part as usize);
            if part == length {
                return Ok(data);
            }
            if whole.is_empty() {
                whole.reserve(length as usize);
            }
            whole.extend_from_slice(&data);
        }
        Ok(whole.freeze())
    }

    /// Writes `data` at `offset`. A failed write of more than one block may have happened in part, as on any disk.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), DeviceError> {
        self.check(offset, data.len() as u64)?;
        self.check_writable()?;
        for (at, part) in pieces(offset, data.len() as u64, limits::REQUEST_BLOCKS_MAX) {
            let from = (at - offset) as usize;
            self.write_piece(at, data.slice(from..from + part as usize)).await?;
        }
        Ok(())
    }

    async fn write_piece(&self, offset: u64, data: Bytes) -> Result<(), DeviceError> {
        let range = covering(offset, data.len() as u64);
        let _held = self.hold(range).await;
        let head = (offset % BLOCK) as usize;
        let tail = (range.bytes() as usize) - head - data.len();
        if head == 0 && tail == 0 {
            return self.device.write(range, data).await;
        }
        let mut whole = BytesMut::with_capacity(range.bytes() as usize);
        if head > 0 {
            let first = self.device.read(BlockRange::new(range.start, 1)).await?;
            whole.extend_from_slice(&first[..head]);
        }
        whole.extend_from_slice(&data);
        if tail > 0 {
            let last = self.device.read(BlockRange::new(BlockIndex(range.end().0 - 1), 1)).await?;
            whole.extend_from_slice(&last[BLOCK_BYTES - tail..]);
        }
        self.device.write(range, whole.freeze()).await
    }

    /// Gives space back. Only whole blocks are given back; the rest of the range is made zero, so that all of it
    /// reads as zeros.
    pub async fn trim(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        self.clear(offset, length, Clear::Trim).await
    }

    /// Makes bytes zero.
    pub async fn zero(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        self.clear(offset, length, Clear::Zero).await
    }

    async fn clear(&self, offset: u64, length: u64, how: Clear) -> Result<(), DeviceError> {
        self.check(offset, length)?;
        self.check_writable()?;
        for (at, part) in pieces(offset, length, limits::TRIM_BLOCKS_MAX) {
            let first_whole = at.next_multiple_of(BLOCK);
            let end_whole = (at + part) / BLOCK * BLOCK;
            if first_whole >= end_whole {
                self.write_zeros(at, part).await?;
                continue;
            }
            self.write_zeros(at, first_whole - at).await?;
            let range =
                BlockRange::new(BlockIndex(first_whole / BLOCK), ((end_whole - first_whole) / BLOCK) as u32);
            {
                let _held = self.hold(range).await;
                match how {
                    Clear::Trim => self.device.trim(range).await?,
                    Clear::Zero => self.device.zero(range).await?,
                }
            }
            self.write_zeros(end_whole, at + part - end_whole).await?;
        }
        Ok(())
    }

    /// Less than two blocks, none of them whole.
    async fn write_zeros(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        if length == 0 {
            return Ok(());
        }
        self.write(offset, Bytes::from(vec![0; length as usize])).await
    }

    /// What stands from `offset` on: runs of (bytes, kind) that cover at least one byte and at most `length`.
    pub async fn status(&self, offset: u64, length: u64) -> Result<Vec<(u64, RunKind)>, DeviceError> {
        self.check(offset, length)?;
        let mut runs: Vec<(u64, RunKind)> = Vec::new();
        for (at, part) in pieces(offset, length, limits::REQUEST_BLOCKS_MAX).take(STATUS_PIECES_MAX) {
            let range = covering(at, part);
            let mut skip = at - range.start.byte_offset();
            let mut left = part;
            for Run { blocks, kind } in self.device.status(range).await? {
                let bytes = (u64::from(blocks) * BLOCK - skip).min(left);
                skip = 0;
                left -= bytes;
                match runs.last_mut() {
                    Some(last) if last.1 == kind => last.0 += bytes,
                    _ if bytes > 0 => runs.push((bytes, kind)),
                    _ => {}
                }
            }
            if left > 0 {
                return Err(DeviceError::Failed("the status of a range ended before the range".into()));
            }
        }
        Ok(runs)
    }

    fn check_writable(&self) -> Result<(), DeviceError> {
        if self.device.read_only() { Err(DeviceError::ReadOnly) } else { Ok(()) }
    }

    async fn hold(&self, range: BlockRange) -> Held<'_> {
        loop {
            let released = self.released.notified();
            if self.try_hold(range) {
                return Held { edge: self, range };
            }
            released.await;
        }
    }

    fn try_hold(&self, range: BlockRange) -> bool {
        let mut held = self.held.borrow_mut();
        let free = !held.iter().any(|other| other.start < range.end() && range.start < other.end());
        if free {
            held.push(range);
        }
        free
    }
}

/// A status answer covers at most 64 MiB; whoever asks for more asks again.
const STATUS_PIECES_MAX: usize = 64;

struct Held<'e> {
    edge: &'e Edge,
    range: BlockRange,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.edge.held.borrow_mut();
        if let Some(at) = held.iter().position(|other| *other == self.range) {
            held.swap_remove(at);
        }
        self.edge.released.notify_waiters();
    }
}

/// The blocks that a run of bytes touches.
fn covering(offset: u64, length: u64) -> BlockRange {
    let first = offset / BLOCK;
    let end = (offset + length).div_ceil(BLOCK);
    BlockRange::new(BlockIndex(first), (end - first) as u32)
}

/// Splits a run of bytes so that each piece touches at most `blocks` blocks and all but the ends are whole blocks.
fn pieces(offset: u64, length: u64, blocks: u32) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let stop = ((at / BLOCK + u64::from(blocks)) * BLOCK).min(end);
        let piece = (at, stop - at);
        at = stop;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_block_boundaries() {
        let got: Vec<_> = pieces(100, 3 * 4096, 2).collect();
        assert_eq!(got, [(100, 8092), (8192, 4196)]);
        assert_eq!(pieces(5, 0, 2).count(), 0);
        assert!(pieces(1, 1 << 24, 256).all(|(at, part)| covering(at, part).count <= 256));
    }
}
