//! The floor: threads that each have one request under way on one file that was written before.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use holdfast_env::disk::AlignedBuffer;
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

use crate::Outcome;
use crate::load::{Figures, Operation, Pattern, Places, times};

/// Bytes of one call while a file is made.
const FILL_BYTES: usize = 1 << 20;

/// A file that was written in full.
pub struct Raw {
    file: OwnedFd,
    bytes: u64,
}

/// One kind of raw access.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// What.
    pub operation: Operation,
    /// Where.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub bytes: u64,
    /// Threads.
    pub depth: u64,
}

fn open(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags | OFlags::DIRECT, Mode::from(0o600)) {
        // No direct I/O here (tmpfs); the figures then say little, but they are honest.
        Err(Errno::INVAL) => Ok(rustix::fs::open(path, flags, Mode::from(0o600))?),
        other => Ok(other?),
    }
}

impl Raw {
    /// Writes the file.
    pub fn new(path: &Path, bytes: u64) -> Outcome<Self> {
        let wrong = |error: std::io::Error| format!("{}: {error}", path.display());
        let file = open(path).map_err(wrong)?;
        let block = AlignedBuffer::copy_of(&vec![0x5a; FILL_BYTES]);
        for offset in (0..bytes).step_by(FILL_BYTES) {
            rustix::io::pwrite(&file, block.as_slice(), offset).map_err(|error| wrong(error.into()))?;
        }
        rustix::fs::fsync(&file).map_err(|error| wrong(error.into()))?;
        Ok(Self { file, bytes })
    }

    fn once(&self, access: Access, offset: u64, buffer: &mut AlignedBuffer) -> rustix::io::Result<()> {
        let done = match access.operation {
            Operation::Read => rustix::io::pread(&self.file, buffer.as_mut_slice(), offset)?,
            Operation::Write => {
                let io = [std::io::IoSlice::new(buffer.as_slice())];
                rustix::io::pwritev2(&self.file, &io, offset, ReadWriteFlags::DSYNC)?
            }
        };
        if done == buffer.len() { Ok(()) } else { Err(Errno::IO) }
    }

    /// Runs for so long.
    pub fn run(&self, access: Access, milliseconds: u64, seed: u64) -> Outcome<Figures> {
        let began = Instant::now();
        let until = began + Duration::from_millis(milliseconds);
        let (slots, next) = (self.bytes / access.bytes, AtomicU64::new(0));
        let worker = |number: u64| -> Outcome<_> {
            let (mut times, mut places) = (times()?, Places::new(seed * 131 + number));
            let mut buffer = AlignedBuffer::copy_of(&vec![number as u8 + 1; access.bytes as usize]);
            while Instant::now() < until {
                let slot = match access.pattern {
                    Pattern::Random => places.next(),
                    Pattern::Sequential => next.fetch_add(1, Ordering::Relaxed),
                };
                let began = Instant::now();
                let done = self.once(access, slot % slots * access.bytes, &mut buffer);
                done.map_err(|error| format!("the raw file: {error}"))?;
                times.saturating_record(began.elapsed().as_nanos() as u64);
            }
            Ok(times)
        };
        let worker = &worker;
        let mut all = times()?;
        std::thread::scope(|scope| -> Outcome<()> {
            let threads: Vec<_> = (0..access.depth).map(|n| scope.spawn(move || worker(n))).collect();
            for thread in threads {
                let times = thread.join().map_err(|_| "a raw thread has panicked".to_owned())??;
                all.add(times).map_err(|error| error.to_string())?;
            }
            Ok(())
        })?;
        Ok(Figures::of(&all, began.elapsed().as_secs_f64()))
    }
}
