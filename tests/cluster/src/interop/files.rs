//! A mounted file system and a load of files in it that knows what must be there.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use rustix::mount::{UnmountFlags, unmount};

use super::tools::tool;
use crate::Outcome;
use crate::random::mix;

/// Files that the load keeps.
const FILES_MAX: usize = 300;
/// Largest file, in bytes.
const FILE_BYTES_MAX: u64 = 200_000;
/// Between checks of a file that was written earlier, in files.
const CHECK_EVERY: u64 = 8;

/// A mounted file system; unmounted at the end, gracefully or lazily.
pub struct Guest {
    path: PathBuf,
    mounted: bool,
}

impl Guest {
    /// Mounts `device` at `path`, which is made.
    pub async fn mount(device: &str, path: &Path) -> Outcome<Self> {
        std::fs::create_dir_all(path).map_err(|error| error.to_string())?;
        tool("mount", &[device, &path.display().to_string()]).await?;
        Ok(Self { path: path.to_owned(), mounted: true })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts it: everything is on the device afterwards.
    pub async fn unmount(mut self) -> Outcome<()> {
        self.mounted = false;
        tool("umount", &[&self.path.display().to_string()]).await.map(drop)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = unmount(&self.path, UnmountFlags::DETACH)
        {
            println!("{} stays mounted: {error}", self.path.display());
        }
    }
}

/// Unmounts whatever is mounted under `directory` itself, not what daemons have mounted.
pub fn unmount_under(directory: &Path) -> Outcome<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
    for line in mounts.lines() {
        let mut words = line.split(' ');
        let (Some(source), Some(path)) = (words.next(), words.next()) else { continue };
        if source.starts_with("/dev/loop") && Path::new(path).starts_with(directory) {
            unmount(path, UnmountFlags::DETACH).map_err(|error| format!("{path} stays mounted: {error}"))?;
        }
    }
    Ok(())
}

/// A checksum of every file of a tree, in order.
pub async fn tree_sums(tree: &str) -> Outcome<String> {
    tool("sh", &["-c", "cd \"$1\" && find . -type f -print0 | sort -z | xargs -0 sha256sum", "sh", tree])
        .await
}

/// What the load knows.
#[derive(Default)]
struct Known {
    /// Files whose content and name are flushed, by number.
    flushed: BTreeMap<u64, u64>,
    longest: Duration,
    checked: u64,
}

/// A load of files.
pub struct Load {
    known: Arc<Mutex<Known>>,
    stop: Arc<AtomicBool>,
    ended: tokio::sync::oneshot::Receiver<Outcome<()>>,
}

/// What a load leaves.
pub struct Flushed {
    files: BTreeMap<u64, u64>,
    /// Longest time that one file took to be written and flushed.
    pub longest: Duration,
    /// Files read back while it ran.
    pub checked: u64,
    /// How it ended.
    pub ended: Outcome<()>,
}

fn name(number: u64) -> String {
    format!("{:02}/{number}", number % 16)
}

fn content(number: u64, length: u64) -> Vec<u8> {
    (0..length / 8 + 1).flat_map(|word| mix(mix(number) ^ word).to_le_bytes()).take(length as usize).collect()
}

/// Writes one file so that it is there whole or not at all, and flushed when this returns.
fn write_file(directory: &Path, number: u64, length: u64) -> std::io::Result<()> {
    let path = directory.join(name(number));
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&content(number, length))?;
    file.sync_all()?;
    std::fs::rename(&new, &path)?;
    File::open(path.parent().unwrap_or(directory))?.sync_all()
}

/// Reads a file from the device, not from the page cache, and checks it.
fn check_file(directory: &Path, number: u64, length: u64) -> Outcome<()> {
    let path = directory.join(name(number));
    let wrong = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut file = File::open(&path).map_err(wrong)?;
    fadvise(&file, 0, None, Advice::DontNeed).map_err(|error| wrong(error.into()))?;
    let mut data = Vec::new();
    file.read_to_end(&mut data).map_err(wrong)?;
    if data == content(number, length) {
        return Ok(());
    }
    Err(format!("{} is not what was flushed ({} bytes of {length})", path.display(), data.len()))
}

fn with<T>(known: &Mutex<Known>, use_known: impl FnOnce(&mut Known) -> T) -> T {
    use_known(&mut known.lock().unwrap_or_else(PoisonError::into_inner))
}

fn work(directory: &Path, known: &Mutex<Known>, stop: &AtomicBool) -> Outcome<()> {
    for part in 0..16 {
        std::fs::create_dir_all(directory.join(format!("{part:02}"))).map_err(|error| error.to_string())?;
    }
    let mut kept: VecDeque<(u64, u64)> = VecDeque::new();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let length = 1 + mix(number ^ 0xf11e) % FILE_BYTES_MAX;
        let began = Instant::now();
        write_file(directory, number, length).map_err(|error| format!("file {number}: {error}"))?;
        let took = began.elapsed();
        with(known, |known| {
            known.flushed.insert(number, length);
            known.longest = known.longest.max(took);
        });
        kept.push_back((number, length));
        if number.is_multiple_of(CHECK_EVERY) {
            let (number, length) = kept[mix(number) as usize % kept.len()];
            check_file(directory, number, length)?;
            with(known, |known| known.checked += 1);
        }
        if kept.len() > FILES_MAX
            && let Some((oldest, _)) = kept.pop_front()
        {
            // From here on it may be there or not.
            with(known, |known| known.flushed.remove(&oldest));
            std::fs::remove_file(directory.join(name(oldest))).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

impl Load {
    /// Starts writing files into `directory`.
    pub fn start(directory: &Path) -> Self {
        let (known, stop) = (Arc::<Mutex<Known>>::default(), Arc::<AtomicBool>::default());
        let (done, ended) = tokio::sync::oneshot::channel();
        let (directory, theirs, stopped) = (directory.to_owned(), known.clone(), stop.clone());
        std::thread::spawn(move || {
            // Whoever gave up waiting has reported it already.
            let _ = done.send(work(&directory, &theirs, &stopped));
        });
        Self { known, stop, ended }
    }

    /// Waits until `more` files more are flushed.
    pub async fn progress(&mut self, more: u64, patience: Duration) -> Outcome<()> {
        let highest =
            |known: &Mutex<Known>| with(known, |known| known.flushed.last_key_value().map_or(0, |(n, _)| *n));
        let goal = highest(&self.known) + more;
        let until = Instant::now() + patience;
        while highest(&self.known) < goal {
            if let Ok(ended) = self.ended.try_recv() {
                return Err(format!("the guest's load ended: {ended:?}"));
            }
            if Instant::now() > until {
                return Err(format!("{more} files are not written within {patience:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Lets it end, by itself if it is told to stop, or by an error that must come.
    async fn end(self, patience: Duration) -> Outcome<Flushed> {
        let late = |_| format!("the guest hangs: its load does not end within {patience:?}");
        let ended = tokio::time::timeout(patience, self.ended).await.map_err(late)?;
        let ended = ended.map_err(|_| "the guest's thread panicked")?;
        let (files, longest, checked) =
            with(&self.known, |known| (std::mem::take(&mut known.flushed), known.longest, known.checked));
        Ok(Flushed { files, longest, checked, ended })
    }

    /// Stops it.
    pub async fn stop(self) -> Outcome<Flushed> {
        self.stop.store(true, Ordering::Relaxed);
        self.end(Duration::from_secs(60)).await
    }

    /// Waits for the error that ends it.
    pub async fn fail(self) -> Outcome<Flushed> {
        self.end(Duration::from_secs(60)).await
    }
}

impl Flushed {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// Checks every file.
    pub fn check(&self, directory: &Path) -> Outcome<()> {
        self.files.iter().try_for_each(|(number, length)| check_file(directory, *number, *length))
    }
}
