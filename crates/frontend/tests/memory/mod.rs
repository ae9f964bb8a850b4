//! A block device in memory, for tests of the frontends.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use futures_util::future::LocalBoxFuture;
use holdfast_frontend::{Device, DeviceError, Run, RunKind};
use holdfast_types::{BLOCK_BYTES, BlockRange, limits};

/// Blocks that were written; `None` stands for zeros that were written without payload.
#[derive(Default)]
pub struct Memory {
    pub size: Cell<u64>,
    pub read_only: bool,
    pub blocks: RefCell<BTreeMap<u64, Option<Bytes>>>,
    pub ended: RefCell<Option<String>>,
    /// Times that a request lets others run before it takes effect.
    pub slowness: Cell<usize>,
    /// Requests wait until this is false or the device has ended.
    pub stuck: Cell<bool>,
    /// Requests that wait.
    pub waiting: Cell<usize>,
}

impl Memory {
    pub fn new(size: u64) -> Rc<Self> {
        Rc::new(Self { size: Cell::new(size), ..Self::default() })
    }

    async fn pass(&self, range: BlockRange, most: u32) -> Result<(), DeviceError> {
        for _ in 0..self.slowness.get() {
            holdfast_env::yield_now().await;
        }
        self.waiting.set(self.waiting.get() + 1);
        while self.stuck.get() && self.ended().is_none() {
            holdfast_env::sleep(std::time::Duration::from_millis(1)).await;
        }
        self.waiting.set(self.waiting.get() - 1);
        assert!(range.count > 0 && range.count <= most, "the edge splits: {range:?}");
        assert!(range.end().byte_offset() <= self.size.get(), "the edge checks: {range:?}");
        match self.ended() {
            Some(why) => Err(DeviceError::Ended(why)),
            None => Ok(()),
        }
    }
}

impl Device for Memory {
    fn size_bytes(&self) -> u64 {
        self.size.get()
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<Bytes, DeviceError>> {
        Box::pin(async move {
            self.pass(range, limits::REQUEST_BLOCKS_MAX).await?;
            let mut out = BytesMut::with_capacity(range.bytes() as usize);
            for block in range.blocks() {
                match self.blocks.borrow().get(&block.0) {
                    Some(Some(data)) => out.extend_from_slice(data),
                    _ => out.extend_from_slice(&[0; BLOCK_BYTES]),
                }
            }
            Ok(out.freeze())
        })
    }
    fn write(&self, range: BlockRange, data: Bytes) -> LocalBoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            self.pass(range, limits::REQUEST_BLOCKS_MAX).await?;
            assert_eq!(data.len() as u64, range.bytes());
            for (at, block) in range.blocks().enumerate() {
                let data = data.slice(at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES);
                self.blocks.borrow_mut().insert(block.0, Some(data));
            }
            Ok(())
        })
    }
    fn trim(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            self.pass(range, limits::TRIM_BLOCKS_MAX).await?;
            self.blocks.borrow_mut().retain(|block, _| *block < range.start.0 || *block >= range.end().0);
            Ok(())
        })
    }
    fn zero(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            self.pass(range, limits::TRIM_BLOCKS_MAX).await?;
            self.blocks.borrow_mut().extend(range.blocks().map(|block| (block.0, None)));
            Ok(())
        })
    }
    fn status(&self, range: BlockRange) -> LocalBoxFuture<'_, Result<Vec<Run>, DeviceError>> {
        Box::pin(async move {
            self.pass(range, limits::REQUEST_BLOCKS_MAX).await?;
            let kind = |block| match self.blocks.borrow().get(&block) {
                Some(Some(_)) => RunKind::Data,
                Some(None) => RunKind::Zero,
                None => RunKind::Absent,
            };
            Ok(range.blocks().map(|block| Run { blocks: 1, kind: kind(block.0) }).collect())
        })
    }
    fn ended(&self) -> Option<String> {
        self.ended.borrow().clone()
    }
}
