//! What the machine itself can do: three concurrent durable overwrites, and fio on a file that was written before.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_env::disk::AlignedBuffer;
use rustix::fs::{Mode, OFlags};
use rustix::io::ReadWriteFlags;
use serde_json::Value;

use crate::Outcome;
use crate::load::{Figures, Places, times};

/// Bytes of each of the three files, and of fio's.
const FILE_BYTES: u64 = 64 << 20;
const BLOCK: u64 = 4096;

fn open_written(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags | OFlags::DIRECT, Mode::from(0o600)) {
        // No direct I/O here (tmpfs); the figures then say little, but they are honest.
        Err(rustix::io::Errno::INVAL) => rustix::fs::open(path, flags, Mode::from(0o600))?,
        other => other?,
    };
    let chunk = AlignedBuffer::zeroed(1 << 20);
    for offset in (0..FILE_BYTES).step_by(chunk.len()) {
        rustix::io::pwrite(&file, chunk.as_slice(), offset)?;
    }
    rustix::fs::fsync(&file)?;
    Ok(file)
}

/// Three threads, each with a file of its own.
pub struct Three {
    files: Vec<Arc<OwnedFd>>,
}

impl Three {
    /// Writes the files in full.
    pub fn new(directory: &Path) -> Outcome<Self> {
        let open = |n: usize| {
            let path = directory.join(format!("raw-{n}"));
            open_written(&path).map(Arc::new).map_err(|error| format!("{}: {error}", path.display()))
        };
        Ok(Self { files: (0..3).map(open).collect::<Outcome<_>>()? })
    }

    /// A3: how long the second to finish of three concurrent durable overwrites of 4 KiB takes.
    pub fn second_of_three(&self, milliseconds: u64, seed: u64) -> Outcome<Figures> {
        let (begin, end) = (Arc::new(Barrier::new(4)), Arc::new(Barrier::new(4)));
        let round: Arc<Mutex<Vec<std::io::Result<Duration>>>> = Arc::default();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let mut times = times()?;
        let began = Instant::now();
        std::thread::scope(|scope| {
            for (n, file) in self.files.iter().enumerate() {
                let (begin, end, round, stop) = (begin.clone(), end.clone(), round.clone(), stop.clone());
                let mut places = Places::new(seed + n as u64);
                scope.spawn(move || {
                    let block = AlignedBuffer::copy_of(&[n as u8 + 1; BLOCK as usize]);
                    loop {
                        begin.wait();
                        if stop.load(std::sync::atomic::Ordering::SeqCst) {
                            return;
                        }
                        let offset = places.next() % (FILE_BYTES / BLOCK) * BLOCK;
                        let began = Instant::now();
                        let io = [std::io::IoSlice::new(block.as_slice())];
                        let written = rustix::io::pwritev2(&**file, &io, offset, ReadWriteFlags::DSYNC);
                        let took = began.elapsed();
                        let mut round = round.lock().unwrap_or_else(PoisonError::into_inner);
                        round.push(written.map(|_| took).map_err(Into::into));
                        drop(round);
                        end.wait();
                    }
                });
            }
            let mut failed = None;
            while began.elapsed() < Duration::from_millis(milliseconds) && failed.is_none() {
                begin.wait();
                end.wait();
                let taken = std::mem::take(&mut *round.lock().unwrap_or_else(PoisonError::into_inner));
                match taken.into_iter().collect::<std::io::Result<Vec<_>>>() {
                    Ok(mut each) => {
                        each.sort();
                        times.saturating_record(each[1].as_nanos() as u64);
                    }
                    Err(error) => failed = Some(format!("a raw write: {error}")),
                }
            }
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
            begin.wait();
            failed.map_or(Ok(()), Err)
        })?;
        Ok(Figures::of(&times, began.elapsed().as_secs_f64()))
    }
}

/// fio on one file.
pub struct Fio {
    file: PathBuf,
    bytes: u64,
}

/// One kind of raw access.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// fio's `rw`.
    pub kind: &'static str,
    /// fio's `bs`.
    pub block: &'static str,
    /// fio's `iodepth`.
    pub depth: u64,
    /// Whether each write is durable when it completes.
    pub durable: bool,
}

/// Installs fio where that is possible; else says what is missing.
pub fn find_fio() -> Outcome<()> {
    let there = || Command::new("fio").arg("--version").output().is_ok_and(|output| output.status.success());
    if there() {
        return Ok(());
    }
    println!("fio is missing; trying apt-get install -y fio");
    let installed = Command::new("apt-get").args(["install", "-y", "-qq", "fio"]).output();
    match installed {
        Ok(_) if there() => Ok(()),
        _ => Err("fio is needed for the floors: install the package fio".into()),
    }
}

impl Fio {
    /// Writes the file in full.
    pub fn new(directory: &Path, bytes: u64) -> Outcome<Self> {
        let fio = Self { file: directory.join("raw-fio"), bytes };
        fio.run(Raw { kind: "write", block: "1m", depth: 4, durable: false }, 0)?;
        Ok(fio)
    }

    /// Runs for so long; 0 for one pass over the file.
    pub fn run(&self, raw: Raw, milliseconds: u64) -> Outcome<Figures> {
        let mut command = Command::new("fio");
        command
            .arg("--name=raw")
            .arg(format!("--filename={}", self.file.display()))
            .args(["--direct=1", "--ioengine=libaio", "--output-format=json", "--randrepeat=0"])
            .arg(format!("--size={}", self.bytes))
            .arg(format!("--rw={}", raw.kind))
            .arg(format!("--bs={}", raw.block))
            .arg(format!("--iodepth={}", raw.depth));
        if raw.durable {
            command.arg("--sync=dsync");
        }
        if milliseconds > 0 {
            command.arg("--time_based").arg(format!("--runtime={milliseconds}ms"));
        }
        let output = command.output().map_err(|error| format!("fio: {error}"))?;
        if !output.status.success() {
            return Err(format!("fio: {}", String::from_utf8_lossy(&output.stderr)));
        }
        let json: Value = serde_json::from_slice(&output.stdout).map_err(|error| format!("fio: {error}"))?;
        let side = if raw.kind.ends_with("read") { "read" } else { "write" };
        figures(&json["jobs"][0][side]).ok_or_else(|| "fio's output is not understood".into())
    }
}

fn figures(side: &Value) -> Option<Figures> {
    let at = |quantile: &str| side["clat_ns"]["percentile"][quantile].as_f64().map(|ns| ns / 1e3);
    Some(Figures {
        count: side["total_ios"].as_u64()?,
        seconds: side["runtime"].as_f64()? / 1e3,
        p50_us: at("50.000000")?,
        p99_us: at("99.000000")?,
        p999_us: at("99.900000")?,
    })
}
