//! Bytes over blocks: every offset and length, and changes to one block from two sides.

mod memory;

use bytes::Bytes;
use holdfast_frontend::{DeviceError, Edge, RunKind};
use memory::Memory;
use proptest::prelude::*;

const SIZE: usize = 64 << 10;

#[derive(Clone, Debug)]
enum Change {
    Write(usize, usize, u8),
    Trim(usize, usize),
    Zero(usize, usize),
}

fn change() -> impl Strategy<Value = Change> {
    (0..3u8, 0..SIZE, 1..20_000usize, any::<u8>()).prop_map(|(what, at, length, value)| {
        let length = length.min(SIZE - at);
        match what {
            0 => Change::Write(at, length, value),
            1 => Change::Trim(at, length),
            _ => Change::Zero(at, length),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn bytes_are_as_on_a_flat_disk(changes in prop::collection::vec(change(), 1..20)) {
        holdfast_env::real::run(async move {
            let edge = Edge::new(Memory::new(SIZE as u64));
            let mut flat = vec![0u8; SIZE];
            for change in changes {
                match change {
                    Change::Write(at, length, value) => {
                        edge.write(at as u64, Bytes::from(vec![value; length])).await.expect("writes");
                        flat[at..at + length].fill(value);
                    }
                    Change::Trim(at, length) => {
                        edge.trim(at as u64, length as u64).await.expect("trims");
                        flat[at..at + length].fill(0);
                    }
                    Change::Zero(at, length) => {
                        edge.zero(at as u64, length as u64).await.expect("zeroes");
                        flat[at..at + length].fill(0);
                    }
                }
            }
            assert!(edge.read(0, SIZE as u64).await.expect("reads") == flat);
            assert!(edge.read(4095, 8193).await.expect("reads") == flat[4095..4095 + 8193]);
            let status = edge.status(0, SIZE as u64).await.expect("tells");
            let mut at = 0;
            for (length, kind) in status {
                let part = &flat[at..at + length as usize];
                assert!(kind == RunKind::Data || part.iter().all(|byte| *byte == 0));
                at += length as usize;
            }
            assert_eq!(at, SIZE);
        });
    }
}

#[test]
fn two_halves_of_a_block_are_both_written() {
    holdfast_env::real::run(async {
        let memory = Memory::new(4096);
        memory.slowness.set(5);
        let edge = Edge::new(memory);
        let halves = (0..8u64).map(|part| edge.write(part * 512, Bytes::from(vec![part as u8 + 1; 512])));
        for written in futures_util::future::join_all(halves).await {
            written.expect("writes");
        }
        let read = edge.read(0, 4096).await.expect("reads");
        for part in 0..8usize {
            assert!(read[part * 512..(part + 1) * 512].iter().all(|byte| usize::from(*byte) == part + 1));
        }
    });
}

#[test]
fn the_end_of_the_device_is_the_end() {
    holdfast_env::real::run(async {
        let edge = Edge::new(Memory::new(8192));
        assert_eq!(edge.read(8192, 1).await, Err(DeviceError::OutOfRange));
        assert_eq!(edge.write(u64::MAX, Bytes::from_static(b"x")).await, Err(DeviceError::OutOfRange));
        assert_eq!(edge.trim(1, u64::MAX).await, Err(DeviceError::OutOfRange));
        assert_eq!(edge.read(8191, 1).await.map(|read| read.len()), Ok(1));
    });
}
