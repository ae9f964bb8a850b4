//! What a ring must do that threads do by themselves.

use super::*;

fn open(name: &str, place: &std::path::Path) -> Arc<OwnedFd> {
    let path = place.join(name);
    let file = std::fs::File::options().create(true).truncate(false).read(true).write(true).open(path);
    Arc::new(file.expect("opens").into())
}

fn with_ring(work: impl AsyncFnOnce(Uring, &std::path::Path)) {
    let place = tempfile::tempdir().expect("a place");
    crate::real::run(async {
        match Uring::new() {
            Ok(ring) => work(ring, place.path()).await,
            Err(error) => println!("no ring here, nothing to test: {error}"),
        }
    });
}

#[test]
fn many_more_requests_than_fit_end_all() {
    with_ring(async |ring, place| {
        let file = open("a", place);
        let writes: Vec<_> = (0..500u64)
            .map(|n| {
                let block = AlignedBuffer::copy_of(&[n as u8; ALIGNMENT]);
                ring.write(&file, n * ALIGNMENT as u64, block, Durability::Volatile)
            })
            .collect();
        for write in writes {
            write.await.expect("is written");
        }
        ring.flush(&file).await.expect("is flushed");
        let reads: Vec<_> = (0..500u64)
            .map(|n| ring.read(&file, n * ALIGNMENT as u64, AlignedBuffer::zeroed(ALIGNMENT)))
            .collect();
        for (n, read) in reads.into_iter().enumerate() {
            assert_eq!(read.await.expect("is read").as_slice(), [n as u8; ALIGNMENT]);
        }
    });
}

/// Who asked is gone before anything has ended; and so is the ring's handle.
#[test]
fn what_nobody_waits_for_is_done_all_the_same() {
    with_ring(async |ring, place| {
        let file = open("a", place);
        for n in 0..200u64 {
            let block = AlignedBuffer::copy_of(&[7; 4 * ALIGNMENT]);
            drop(ring.write(&file, n * 4 * ALIGNMENT as u64, block, Durability::Durable));
            drop(ring.read(&file, n * ALIGNMENT as u64, AlignedBuffer::zeroed(16 * ALIGNMENT)));
        }
        let inner = Rc::downgrade(&ring.inner);
        drop(ring);
        while inner.strong_count() > 0 {
            tokio::task::yield_now().await;
        }
        let written = std::fs::read(place.join("a")).expect("is read");
        assert!(written.len() == 800 * ALIGNMENT && written.iter().all(|byte| *byte == 7));
    });
}

/// The runtime ends while requests are with the kernel: their memory is not given back before they have ended.
#[test]
fn a_ring_that_goes_waits_for_what_is_under_way() {
    let mut file = None;
    with_ring(async |ring, place| {
        let opened = open("a", place);
        for n in 0..64u64 {
            drop(ring.write(&opened, n << 20, AlignedBuffer::copy_of(&[5; 1 << 20]), Durability::Durable));
        }
        file = Some(opened);
    });
    if let Some(file) = file {
        assert_eq!(Arc::strong_count(&file), 1, "a request still holds it");
        let size = rustix::fs::fstat(&*file).expect("is there").st_size;
        assert_eq!(size, 64 << 20, "not everything that was handed over was written");
    }
}

#[test]
fn errors_are_those_of_the_call() {
    with_ring(async |ring, place| {
        std::fs::write(place.join("a"), b"x").expect("is written");
        let read_only: Arc<OwnedFd> = Arc::new(std::fs::File::open(place.join("a")).expect("opens").into());
        let block = AlignedBuffer::zeroed(ALIGNMENT);
        let refused = ring.write(&read_only, 0, block, Durability::Volatile).await;
        assert_eq!(refused.expect_err("is refused").raw_os_error(), Some(Errno::BADF.raw_os_error()));
        let short = ring.read(&read_only, 0, AlignedBuffer::zeroed(2 * ALIGNMENT)).await.expect("is read");
        assert_eq!((short.as_slice()[0], short.as_slice()[1], short.len()), (b'x', 0, 2 * ALIGNMENT));
    });
}

fn request(kind: Kind) -> Request {
    let file = Arc::new(std::fs::File::open("/dev/null").expect("opens").into());
    Request { file, kind, offset: 0, buffer: AlignedBuffer::zeroed(4 * ALIGNMENT), done: 0 }
}

#[test]
fn a_flush_is_never_repeated_and_a_part_goes_on() {
    let error = |errno: Errno| Err(io::Error::from_raw_os_error(errno.raw_os_error()));
    let mut flush = request(Kind::Flush);
    for errno in [Errno::INTR, Errno::AGAIN, Errno::IO] {
        assert!(matches!(next_of(&mut flush, false, error(errno)).0, Next::End(Err(_))));
    }
    let mut write = request(Kind::Write { durable: true });
    assert!(matches!(next_of(&mut write, false, error(Errno::INTR)).0, Next::Again));
    assert!(matches!(next_of(&mut write, false, Ok(ALIGNMENT)).0, Next::Again));
    assert_eq!(write.done, ALIGNMENT);
    assert!(matches!(next_of(&mut write, false, Ok(0)).0, Next::End(Err(_))));
    // No durable writes here: written again without, and then flushed.
    let (next, flush_after) = next_of(&mut write, false, error(Errno::OPNOTSUPP));
    assert!(matches!(next, Next::Again) && flush_after && write.kind == Kind::Write { durable: false });
    assert!(matches!(next_of(&mut write, true, Ok(3 * ALIGNMENT)).0, Next::Flush));
    assert!(matches!(next_of(&mut write, false, error(Errno::IO)).0, Next::End(Err(_))));
}
