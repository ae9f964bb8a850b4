//! A device as a file and as a block device of the kernel: real mounts over a device in memory. Where the user or the
//! kernel has no such devices, each test says what is missing and ends.

mod memory;

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use holdfast_frontend::Edge;
use holdfast_frontend::kernel::{self, Close, KernelDevice, KernelError, Shown};
use memory::Memory;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom as SparseSeek};

const MIB: u64 = 1 << 20;
const BLOCK_DEVICE: Shown = Shown::Loop { direct_io: true };
/// Nothing in these tests may take longer.
const DEADLINE: Duration = Duration::from_secs(60);

/// A directory for mounts. Nothing of it is left, whatever the test does.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("holdfast-kernel").tempdir().expect("a directory"))
    }
    fn devices(&self) -> PathBuf {
        self.0.path().join("devices")
    }
    fn at(&self, name: &str) -> PathBuf {
        self.devices().join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A test that failed has left a mounted file system; it goes with its device.
        let mounted = self.0.path().join("mnt");
        if mounted.exists() {
            let _ = rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::DETACH);
        }
        kernel::clean(&self.devices()).expect("what a test left can be removed");
    }
}

/// Runs a test on a shard's thread, if this machine has what it needs.
fn with_device<F: Future<Output = ()>>(shown: Shown, test: impl FnOnce(Place) -> F) {
    let available = match shown {
        Shown::File => kernel::file_available(),
        Shown::Loop { .. } => kernel::loop_available(),
    };
    if let Err(missing) = available {
        println!("not run: {missing} ({})", missing.hint());
        return;
    }
    holdfast_env::real::run(async {
        holdfast_env::timeout(DEADLINE, test(Place::new())).await.expect("the test ends in time");
    });
}

/// What a guest does, on a thread of its own: it waits for the thread that runs the test.
async fn guest<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("the guest does not panic")
}

async fn open(memory: &Rc<Memory>, directory: &Path, shown: Shown) -> KernelDevice {
    let edge = Edge::new(memory.clone());
    KernelDevice::open(&edge, directory, shown).await.expect("the device is made")
}

fn writable(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("opens")
}

fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

/// A small generator: the same changes every time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Writes at any offset and length, against a flat model.
fn random_changes(file: &File, size: u64, changes: usize) {
    let mut random = Random(0x5eed);
    let mut flat = vec![0u8; size as usize];
    for n in 0..changes {
        let at = random.below(size);
        let length = (1 + random.below(3 * MIB / 2)).min(size - at) as usize;
        let data: Vec<u8> = (0..length).map(|byte| (byte as u64 + at + n as u64 * 7) as u8).collect();
        file.write_all_at(&data, at).expect("writes");
        flat[at as usize..at as usize + length].copy_from_slice(&data);
        let from = random.below(size);
        let mut back = vec![0; (1 + random.below(MIB)).min(size - from) as usize];
        file.read_exact_at(&mut back, from).expect("reads");
        assert!(back == flat[from as usize..from as usize + back.len()], "{n}: what was written is not read");
    }
    file.sync_all().expect("flushes");
    let mut whole = Vec::new();
    let mut file = file.try_clone().expect("a second descriptor");
    file.rewind().expect("seeks");
    file.read_to_end(&mut whole).expect("reads");
    assert!(whole == flat, "at the end the device differs");
}

#[test]
fn a_file_of_any_offset_and_length() {
    with_device(Shown::File, async |place| {
        let memory = Memory::new(8 * MIB);
        let device = open(&memory, &place.at("v"), Shown::File).await;
        let path = device.path().to_owned();
        guest(move || {
            assert_eq!(std::fs::metadata(&path).expect("is there").len(), 8 * MIB);
            random_changes(&writable(&path), 8 * MIB, 60);
        })
        .await;
        device.close(Close::Orderly).await.expect("closes");
        assert!(!place.at("v").exists(), "the mount point goes with the mount");
    });
}

#[test]
fn a_block_device_with_and_without_direct_io() {
    for direct_io in [true, false] {
        with_device(Shown::Loop { direct_io }, async |place| {
            let memory = Memory::new(8 * MIB);
            let device = open(&memory, &place.at("v"), Shown::Loop { direct_io }).await;
            assert_eq!(device.direct_io(), direct_io, "the kernel does as it is asked");
            let path = device.path().to_owned();
            guest(move || {
                random_changes(&writable(&path), 8 * MIB, 30);
                // By the guest's page cache and past it: the same content.
                let direct = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(OFlags::DIRECT.bits() as i32)
                    .open(&path)
                    .expect("opens");
                let mut aligned = AlignedBlock([0xA5; 4096]);
                direct.write_all_at(&aligned.0, 4 * MIB).expect("writes past the cache");
                aligned.0.fill(0);
                direct.read_exact_at(&mut aligned.0, 4 * MIB).expect("reads past the cache");
                assert!(aligned.0.iter().all(|byte| *byte == 0xA5));
            })
            .await;
            device.close(Close::Orderly).await.expect("closes");
            let written = memory.blocks.borrow().get(&(4 * MIB / 4096)).cloned().flatten();
            assert!(written.expect("is there").iter().all(|byte| *byte == 0xA5), "it has reached the device");
        });
    }
}

#[repr(align(4096))]
struct AlignedBlock([u8; 4096]);

#[test]
fn many_guests_at_once_share_blocks_and_lose_nothing() {
    with_device(Shown::File, async |place| {
        let memory = Memory::new(4 * MIB);
        memory.slowness.set(3);
        let device = open(&memory, &place.at("v"), Shown::File).await;
        // Sixteen guests write every sixteenth stretch of 1000 bytes: each block is shared by several.
        let guests = (0..16u8).map(|number| {
            let path = device.path().to_owned();
            guest(move || {
                let file = writable(&path);
                for stretch in (u64::from(number)..4000).step_by(16) {
                    let data = [number + 1; 1000];
                    file.write_all_at(&data, stretch * 1000).expect("writes");
                }
            })
        });
        futures_util::future::join_all(guests).await;
        let path = device.path().to_owned();
        guest(move || {
            let file = File::open(path).expect("opens");
            let mut data = [0; 1000];
            for stretch in 0..4000u64 {
                file.read_exact_at(&mut data, stretch * 1000).expect("reads");
                assert!(data.iter().all(|byte| u64::from(*byte) == stretch % 16 + 1), "stretch {stretch}");
            }
        })
        .await;
        device.close(Close::Orderly).await.expect("closes");
    });
}

#[test]
fn holes_are_punched_and_found() {
    with_device(BLOCK_DEVICE, async |place| {
        let memory = Memory::new(64 * MIB);
        let device = open(&memory, &place.at("f"), Shown::File).await;
        let path = device.path().to_owned();
        guest(move || {
            let file = writable(&path);
            assert_eq!(rustix::fs::seek(&file, SparseSeek::Data(0)), Err(rustix::io::Errno::NXIO));
            assert_eq!(rustix::fs::seek(&file, SparseSeek::Hole(5)), Ok(5));
            file.write_all_at(&[7; 65536], 8 * MIB).expect("writes");
            assert_eq!(rustix::fs::seek(&file, SparseSeek::Data(0)), Ok(8 * MIB));
            assert_eq!(rustix::fs::seek(&file, SparseSeek::Hole(8 * MIB)), Ok(8 * MIB + 65536));
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, punch, 8 * MIB + 100, 32768).expect("punches");
            let mut back = [1; 65536];
            file.read_exact_at(&mut back, 8 * MIB).expect("reads");
            assert!(back[..100].iter().all(|byte| *byte == 7) && back[100 + 32768..].iter().all(|b| *b == 7));
            assert!(back[100..100 + 32768].iter().all(|byte| *byte == 0));
            rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 8 * MIB, 4096).expect("zeroes");
            let refused = rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 64 * MIB, 4096);
            assert_eq!(refused, Err(rustix::io::Errno::NOSPC), "the file does not grow");
            let reserved = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 4096);
            assert_eq!(reserved, Err(rustix::io::Errno::OPNOTSUPP), "room is not promised");
        })
        .await;
        assert_eq!(memory.blocks.borrow().len(), 9, "one block zeroed, one in part, seven whole");
        device.close(Close::Orderly).await.expect("closes");

        let device = open(&memory, &place.at("l"), BLOCK_DEVICE).await;
        let path = device.path().display().to_string();
        guest(move || tool("blkdiscard", &[&path])).await;
        assert_eq!(memory.blocks.borrow().len(), 0, "the block device discards");
        device.close(Close::Orderly).await.expect("closes");
    });
}

#[test]
fn the_size_is_the_volumes() {
    with_device(BLOCK_DEVICE, async |place| {
        let memory = Memory::new(4 * MIB);
        let file = open(&memory, &place.at("f"), Shown::File).await;
        let block = open(&memory, &place.at("l"), BLOCK_DEVICE).await;
        let (path, blocks) = (file.path().to_owned(), block.path().to_owned());
        guest(move || {
            let file = writable(&path);
            let refused = file.set_len(MIB).expect_err("a volume does not shrink by truncation");
            assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
            let beyond = file.write_at(&[1; 10], 4 * MIB).expect_err("nothing is beyond the end");
            assert_eq!(beyond.kind(), std::io::ErrorKind::StorageFull);
            assert_eq!(file.read_at(&mut [0; 100], 4 * MIB - 10).expect("reads"), 10);
        })
        .await;
        memory.size.set(6 * MIB);
        file.resized().await.expect("is told");
        block.resized().await.expect("is told");
        let path = file.path().to_owned();
        guest(move || {
            assert_eq!(std::fs::metadata(&path).expect("is there").len(), 6 * MIB);
            writable(&path).write_all_at(&[1; 10], 5 * MIB).expect("writes");
            let end = File::open(blocks).and_then(|mut file| file.seek(SeekFrom::End(0)));
            assert_eq!(end.expect("opens"), 6 * MIB, "the block device has grown");
        })
        .await;
        file.close(Close::Orderly).await.expect("closes");
        block.close(Close::Orderly).await.expect("closes");
    });
}

#[test]
fn a_read_only_device_takes_no_writes() {
    with_device(BLOCK_DEVICE, async |place| {
        let memory = Rc::new(Memory { size: MIB.into(), read_only: true, ..Memory::default() });
        let file = open(&memory, &place.at("f"), Shown::File).await;
        let block = open(&memory, &place.at("l"), BLOCK_DEVICE).await;
        let (path, blocks) = (file.path().to_owned(), block.path().to_owned());
        guest(move || {
            let refused = OpenOptions::new().write(true).open(&path).expect_err("it is read-only");
            assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            assert_eq!(File::open(&path).and_then(|file| file.read_at(&mut [0; 9], 0)).expect("reads"), 9);
            let name = blocks.file_name().expect("has a name").to_str().expect("plain").to_owned();
            let read_only = std::fs::read_to_string(format!("/sys/block/{name}/ro")).expect("is told");
            assert_eq!(read_only.trim(), "1", "the kernel knows");
            let written =
                OpenOptions::new().write(true).open(&blocks).and_then(|file| file.write_at(&[1], 0));
            assert!(written.is_err());
        })
        .await;
        file.close(Close::Orderly).await.expect("closes");
        block.close(Close::Orderly).await.expect("closes");
    });
}

/// Waits until `holds`; others run meanwhile.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + DEADLINE / 2;
    while !holds() {
        assert!(Instant::now() < limit, "{what} does not happen");
        holdfast_env::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn a_device_that_has_ended_fails_and_does_not_hang() {
    with_device(BLOCK_DEVICE, async |place| {
        let memory = Memory::new(4 * MIB);
        let file = open(&memory, &place.at("f"), Shown::File).await;
        let block = open(&memory, &place.at("l"), BLOCK_DEVICE).await;
        memory.stuck.set(true);
        let errors = |path: PathBuf| {
            guest(move || {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(OFlags::DIRECT.bits() as i32)
                    .open(path)
                    .expect("opens");
                let mut block = AlignedBlock([1; 4096]);
                let under_way = file.write_at(&block.0, 4096).expect_err("the device ends").raw_os_error();
                let read = file.read_at(&mut block.0, 0).expect_err("it has ended").raw_os_error();
                let written = file.write_at(&block.0, 0).expect_err("it has ended").raw_os_error();
                let flushed = file.sync_all().expect_err("it has ended").raw_os_error();
                [under_way, read, written, flushed]
            })
        };
        let under_way = futures_util::future::join(errors(file.path().into()), errors(block.path().into()));
        let end = async {
            until("both requests under way", || memory.waiting.get() >= 2).await;
            memory.ended.replace(Some("fenced: another holds the volume".into()));
        };
        let ((of_file, of_block), ()) = futures_util::future::join(under_way, end).await;
        assert_eq!(of_file, [Some(rustix::io::Errno::IO.raw_os_error()); 4]);
        assert_eq!(of_block, [Some(rustix::io::Errno::IO.raw_os_error()); 4]);
        file.close(Close::Forced).await.expect("closes");
        block.close(Close::Forced).await.expect("closes");
    });
}

#[test]
fn what_is_in_use_is_taken_away_only_by_force() {
    with_device(BLOCK_DEVICE, async |place| {
        let memory = Memory::new(4 * MIB);
        let file = open(&memory, &place.at("f"), Shown::File).await;
        let path = file.path().to_owned();
        let held = guest(move || writable(&path)).await;
        assert!(matches!(file.close(Close::Orderly).await, Err(KernelError::InUse(_))));
        let held = guest(move || {
            held.write_all_at(b"still here", 0).expect("a refused close changes nothing");
            held
        })
        .await;
        file.close(Close::Forced).await.expect("closes");
        guest(move || held.write_all_at(b"gone", 0).expect_err("the file is dead")).await;

        let block = open(&memory, &place.at("l"), BLOCK_DEVICE).await;
        let path = block.path().to_owned();
        let claimed = guest(move || {
            let exclusive = OFlags::EXCL.bits() as i32;
            OpenOptions::new().read(true).custom_flags(exclusive).open(path).expect("opens")
        })
        .await;
        assert!(matches!(block.close(Close::Orderly).await, Err(KernelError::InUse(_))));
        drop(claimed);
        block.close(Close::Orderly).await.expect("closes once nobody uses it");
        assert_eq!(kernel::clean(&place.devices()).expect("looks"), 0, "nothing is left");
    });
}

#[test]
fn unmounted_under_load_and_made_anew_at_the_same_place() {
    with_device(BLOCK_DEVICE, async |place| {
        let memory = Memory::new(16 * MIB);
        memory.slowness.set(2);
        for shown in [Shown::File, BLOCK_DEVICE, Shown::File] {
            let device = open(&memory, &place.at("v"), shown).await;
            let guests = (0..8u64).map(|number| {
                let path = device.path().to_owned();
                guest(move || {
                    let file = OpenOptions::new()
                        .write(true)
                        .custom_flags(OFlags::DIRECT.bits() as i32)
                        .open(path)
                        .expect("opens");
                    let block = AlignedBlock([number as u8; 4096]);
                    let mut written = 0u64;
                    while file.write_at(&block.0, (number * MIB) + written % 256 * 4096).is_ok() {
                        written += 1;
                    }
                    written
                })
            });
            let load = futures_util::future::join_all(guests);
            let close = async {
                until("load", || memory.blocks.borrow().len() > 500).await;
                let began = Instant::now();
                device.close(Close::Forced).await.expect("closes");
                assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
            };
            let (written, ()) = futures_util::future::join(load, close).await;
            assert!(written.iter().sum::<u64>() > 500, "{written:?}");
            memory.blocks.borrow_mut().clear();
        }
    });
}

#[test]
fn ext4_lives_on_the_block_device() {
    with_device(BLOCK_DEVICE, async |place| {
        let memory = Memory::new(64 * MIB);
        let device = open(&memory, &place.at("v"), BLOCK_DEVICE).await;
        let path = device.path().display().to_string();
        let mnt = place.0.path().join("mnt");
        std::fs::create_dir(&mnt).expect("a directory");
        let mnt = mnt.display().to_string();
        let (block, at) = (path.clone(), mnt.clone());
        guest(move || {
            tool("mkfs.ext4", &["-q", "-F", &block]);
            tool("mount", &[&block, &at]);
            for file in 0..200 {
                std::fs::write(format!("{at}/{file}"), vec![file as u8; 100_000]).expect("writes");
            }
            for file in (0..200).step_by(3) {
                std::fs::remove_file(format!("{at}/{file}")).expect("removes");
            }
        })
        .await;
        assert!(matches!(device.close(Close::Orderly).await, Err(KernelError::InUse(_))), "it is mounted");
        guest(move || tool("umount", &[&mnt])).await;
        device.close(Close::Orderly).await.expect("closes");

        // Past every cache: made anew from what the device holds.
        let device = open(&memory, &place.at("v"), Shown::File).await;
        let path = device.path().display().to_string();
        let said = guest(move || tool("e2fsck", &["-f", "-n", &path])).await;
        // 133 files and the 11 inodes of the file system itself.
        assert!(said.contains(": 144/"), "the files are there: {said}");
        device.close(Close::Orderly).await.expect("closes");
    });
}
