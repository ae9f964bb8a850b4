//! Tables on a file whose writes wait for permits.

use std::io;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::FileSize;
use tokio::sync::Semaphore;

use super::*;

/// A file in memory whose writes wait for permits, one each, and fail when it is full.
struct Gated {
    bytes: Rc<RefCell<Vec<u8>>>,
    gate: Rc<Semaphore>,
    full: Rc<Cell<bool>>,
}

impl File for Gated {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        _: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let (bytes, gate, full) = (self.bytes.clone(), self.gate.clone(), self.full.get());
        async move {
            gate.acquire().await.expect("the gate is never closed").forget();
            if full {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let at = offset as usize;
            bytes.borrow_mut()[at..at + buffer.len()].copy_from_slice(buffer.as_slice());
            Ok(buffer)
        }
        .boxed_local()
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let found = AlignedBuffer::copy_of(&self.bytes.borrow()[offset as usize..][..length]);
        async move { Ok(found) }.boxed_local()
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        async { Ok(()) }.boxed_local()
    }
    fn allocate(&self, _: u64, _: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        async { Ok(()) }.boxed_local()
    }
    fn punch(&self, _: u64, _: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        async { Ok(()) }.boxed_local()
    }
    fn set_length(&self, _: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        async { Ok(()) }.boxed_local()
    }
    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        async { Ok(FileSize::default()) }.boxed_local()
    }
}

struct Place {
    table: Table,
    bytes: Rc<RefCell<Vec<u8>>>,
    gate: Rc<Semaphore>,
    full: Rc<Cell<bool>>,
}

fn place() -> Place {
    let who = ReplicaIdentity { group: GroupId(1), replica: ReplicaId(1) };
    let bytes = Rc::new(RefCell::new(vec![0; 64 * BLOCK_BYTES]));
    let (gate, full) = (Rc::new(Semaphore::new(0)), Rc::new(Cell::new(false)));
    let file = Gated { bytes: bytes.clone(), gate: gate.clone(), full: full.clone() };
    let table = Table {
        pages_max: Cell::new(1),
        ..Table::new(Rc::new(file), "table".into(), (who, LayerId::BASE), Rc::default())
    };
    Place { table, bytes, gate, full }
}

fn line(chunk: u64, index: u64) -> BTreeMap<ChunkIndex, Chunk> {
    let mut line = Chunk { last_index: LogIndex(index), ..Chunk::default() };
    line.set(0, BlockSum::Data(index as u32));
    BTreeMap::from([(ChunkIndex(chunk), line)])
}

async fn index_of(table: &Table, chunk: u64) -> u64 {
    table.chunk(ChunkIndex(chunk)).await.expect("is read").last_index.0
}

#[test]
fn a_page_that_is_read_while_it_is_written_is_not_older_afterwards() {
    holdfast_env::real::run(async {
        let Place { table, gate, .. } = place();
        let (other_page, same_page) = (5 * PAGE_CHUNKS, 1);
        {
            let mut writing = std::pin::pin!(table.write(line(0, 7)));
            assert!(futures_util::poll!(&mut writing).is_pending(), "the write is under way");
            // Memory has room for one page: this one drives out the page that is being written.
            assert_eq!(index_of(&table, other_page).await, 0);
            assert_eq!(index_of(&table, 0).await, 7, "the disk still shows the page as it was");
            gate.add_permits(1);
            writing.await.expect("is written");
        }
        // One for the first write's second copy.
        gate.add_permits(2);
        table.write(line(same_page, 8)).await.expect("is written");
        assert_eq!(index_of(&table, other_page).await, 0);
        assert_eq!(index_of(&table, 0).await, 7, "the newer line was written over by an older one");
        assert_eq!(index_of(&table, same_page).await, 8);
    });
}

#[test]
fn a_write_that_failed_is_tried_again_over_the_same_copy() {
    holdfast_env::real::run(async {
        let Place { table, bytes, gate, full } = place();
        gate.add_permits(4);
        table.write(line(0, 1)).await.expect("is written");
        let whole = bytes.borrow()[BLOCK_BYTES..2 * BLOCK_BYTES].to_vec();
        full.set(true);
        table.write(line(0, 2)).await.expect_err("the medium is full");
        assert_eq!(index_of(&table, 0).await, 1, "memory shows what was not written");
        assert_eq!(
            bytes.borrow()[BLOCK_BYTES..2 * BLOCK_BYTES],
            whole,
            "the only whole copy was written over"
        );
        full.set(false);
        table.write(line(0, 3)).await.expect("is written");
        assert_eq!(index_of(&table, 0).await, 3);
    });
}
