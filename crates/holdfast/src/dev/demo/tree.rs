//! Real data: a directory tree of this machine, packed as a tar archive at the beginning of the volume, and the SHA-256
//! of every file, against which the archive is read back.
//!
//! The choice is deterministic: the first of a few well-known trees that is large enough, its files in the order of
//! their names until the budget is spent. Packing and comparing run on threads of their own; between them and the
//! volume lie channels of a few pieces.

use std::fs::Metadata;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use holdfast_frontend::nbd::NbdClient;
use holdfast_types::{BLOCK_BYTES, ErrorCode, UserError};
use ring::digest::{Context, Digest, SHA256, digest};
use tokio::sync::mpsc;

use super::failed;
use super::report::Counting;

/// Trees of which most machines have one.
const ROOTS: &[&str] = &["/usr/share", "/usr/lib", "/usr", "/etc"];
/// Bytes of one request.
const PIECE: usize = 512 << 10;
/// Requests in flight.
const IN_FLIGHT: usize = 8;
/// Pieces between the packing or comparing thread and the volume.
const QUEUE: usize = 4;
/// A file larger than this part of the budget is left out: many files are the better test.
const LARGEST_PART: u64 = 8;
/// An archive's headers, which come on top of the files.
const HEADER: u64 = 1024;

/// A file or symbolic link that is to be loaded.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Item {
    path: PathBuf,
    bytes: u64,
    is_link: bool,
}

/// What was loaded of a file: its path within the archive and the checksum of its content or target.
struct Entry {
    path: PathBuf,
    checksum: Digest,
}

/// A tree that was loaded.
pub(super) struct Tree {
    /// Where it came from.
    pub(super) root: PathBuf,
    /// Bytes of the archive on the volume, from offset 0.
    pub(super) archive_bytes: u64,
    /// Bytes of the files.
    pub(super) content_bytes: u64,
    /// How long it took.
    pub(super) took: Duration,
    entries: Arc<Vec<Entry>>,
}

impl Tree {
    /// Files and links.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// One checksum over all paths and checksums, for people: the first 16 digits.
    pub(super) fn checksum(&self) -> String {
        let mut all = Context::new(&SHA256);
        for entry in self.entries.iter() {
            all.update(entry.path.as_os_str().as_bytes());
            all.update(entry.checksum.as_ref());
        }
        all.finish().as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What a walk takes along.
struct Walk {
    budget: u64,
    left: u64,
    items: Vec<Item>,
}

impl Walk {
    /// Takes the files below a directory in the order of their names; what cannot be read is passed over.
    fn directory(&mut self, path: &Path) {
        let Ok(listed) = std::fs::read_dir(path) else { return };
        let mut children: Vec<PathBuf> = listed.flatten().map(|child| child.path()).collect();
        children.sort();
        for child in children {
            if self.left == 0 {
                return;
            }
            if let Ok(about) = std::fs::symlink_metadata(&child) {
                self.child(child, &about);
            }
        }
    }

    fn child(&mut self, path: PathBuf, about: &Metadata) {
        if about.is_dir() {
            return self.directory(&path);
        }
        let readable = about.is_symlink() || (about.is_file() && std::fs::File::open(&path).is_ok());
        if !readable || about.len() > self.budget / LARGEST_PART {
            return;
        }
        let costs = HEADER + about.len();
        if costs > self.left {
            self.left = 0;
            return;
        }
        self.left -= costs;
        self.items.push(Item { path, bytes: about.len(), is_link: about.is_symlink() });
    }
}

fn walk(root: &Path, budget: u64) -> Vec<Item> {
    let mut walk = Walk { budget, left: budget, items: Vec::new() };
    walk.directory(root);
    walk.items
}

/// The first tree that fills most of the budget, else the largest.
fn choose(roots: &[PathBuf], budget: u64) -> Result<(PathBuf, Vec<Item>), UserError> {
    let mut best: (u64, PathBuf, Vec<Item>) = (0, PathBuf::new(), Vec::new());
    for root in roots {
        let items = walk(root, budget);
        let bytes = items.iter().map(|item| HEADER + item.bytes).sum();
        if bytes > best.0 {
            best = (bytes, root.clone(), items);
        }
        if bytes >= budget / 4 * 3 {
            break;
        }
    }
    if best.2.is_empty() {
        return Err(UserError::new(ErrorCode::NotFound, "there is no directory tree that could be loaded")
            .hint(format!("one of {} must be readable", ROOTS.join(", "))));
    }
    Ok((best.1, best.2))
}

/// Writes what is written to it into a channel, in pieces.
struct Pieces {
    to: mpsc::Sender<Bytes>,
    piece: BytesMut,
}

impl Pieces {
    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, BytesMut::with_capacity(PIECE)).freeze();
        self.to.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// The last piece, filled up with zeros to whole blocks.
    fn end(mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        self.piece.resize(self.piece.len().next_multiple_of(BLOCK_BYTES), 0);
        self.send()
    }
}

impl Write for Pieces {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let some = data.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&data[..some]);
        if self.piece.len() == PIECE {
            self.send()?;
        }
        Ok(some)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what comes out of a channel.
struct Arriving {
    from: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Arriving {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.from.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let some = into.len().min(self.piece.len());
        into[..some].copy_from_slice(&self.piece.split_to(some));
        Ok(some)
    }
}

/// Packs the items; what has gone or changed its kind since the walk is left out.
fn pack(items: &[Item], to: mpsc::Sender<Bytes>) -> io::Result<(Vec<Entry>, u64)> {
    let mut archive = tar::Builder::new(Pieces { to, piece: BytesMut::with_capacity(PIECE) });
    let (mut entries, mut bytes) = (Vec::with_capacity(items.len()), 0);
    for item in items {
        let path = item.path.strip_prefix("/").unwrap_or(&item.path).to_owned();
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        let checksum = if item.is_link {
            let Ok(target) = std::fs::read_link(&item.path) else { continue };
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            archive.append_link(&mut header, &path, &target)?;
            digest(&SHA256, target.as_os_str().as_bytes())
        } else {
            // Read whole first: a file that grows meanwhile would spoil the archive.
            let Ok(content) = std::fs::read(&item.path) else { continue };
            if content.len() as u64 > item.bytes {
                continue;
            }
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, &path, &content[..])?;
            bytes += content.len() as u64;
            digest(&SHA256, &content)
        };
        entries.push(Entry { path, checksum });
    }
    archive.into_inner()?.end()?;
    Ok((entries, bytes))
}

/// Reads an archive and compares it with what was packed.
fn compare(entries: &[Entry], archive: impl Read) -> Result<(), String> {
    let mut archive = tar::Archive::new(archive);
    let unreadable = |error: io::Error| format!("the archive cannot be read: {error}");
    let mut expected = entries.iter();
    for found in archive.entries().map_err(unreadable)? {
        let mut found = found.map_err(unreadable)?;
        let path = found.path().map_err(unreadable)?.into_owned();
        let Some(entry) = expected.next() else {
            return Err(format!("{} was never written", path.display()));
        };
        if path != entry.path {
            return Err(format!("{} stands where {} was written", path.display(), entry.path.display()));
        }
        let mut checksum = Context::new(&SHA256);
        if found.header().entry_type().is_symlink() {
            let target = found.link_name().map_err(unreadable)?.unwrap_or_default();
            checksum.update(target.as_os_str().as_bytes());
        } else {
            let mut piece = vec![0; 64 << 10];
            loop {
                match found.read(&mut piece).map_err(unreadable)? {
                    0 => break,
                    some => checksum.update(&piece[..some]),
                }
            }
        }
        if checksum.finish().as_ref() != entry.checksum.as_ref() {
            return Err(format!("{} has another checksum than what was written", path.display()));
        }
    }
    match expected.next() {
        Some(entry) => Err(format!("{} and what follows it are not there", entry.path.display())),
        None => Ok(()),
    }
}

/// Loads a tree of at most `budget` bytes through the volume's front door, from offset 0.
pub(super) async fn load(client: &NbdClient, budget: u64, counting: &Counting) -> Result<Tree, UserError> {
    let began = Instant::now();
    let wrong = |error: &dyn std::fmt::Display| failed("the tree cannot be loaded", error);
    let roots: Vec<PathBuf> = ROOTS.iter().map(PathBuf::from).collect();
    let chosen = tokio::task::spawn_blocking(move || choose(&roots, budget)).await;
    let (root, items) = chosen.map_err(|error| wrong(&error))??;
    let (to, mut pieces) = mpsc::channel(QUEUE);
    let packing = tokio::task::spawn_blocking(move || pack(&items, to));
    let mut writing = FuturesUnordered::new();
    let mut offset = 0;
    while let Some(piece) = pieces.recv().await {
        let bytes = piece.len() as u64;
        writing.push(client.write(offset, piece));
        offset += bytes;
        counting.add(bytes);
        if writing.len() == IN_FLIGHT
            && let Some(done) = writing.next().await
        {
            done.map_err(|error| wrong(&error))?;
        }
    }
    while let Some(done) = writing.next().await {
        done.map_err(|error| wrong(&error))?;
    }
    let packed = packing.await.map_err(|error| wrong(&error))?;
    let (entries, content_bytes) = packed.map_err(|error| wrong(&error))?;
    Ok(Tree { root, archive_bytes: offset, content_bytes, took: began.elapsed(), entries: Arc::new(entries) })
}

/// Reads the whole tree back and compares every path and checksum.
pub(super) async fn check(client: &NbdClient, tree: &Tree, counting: &Counting) -> Result<String, String> {
    let began = Instant::now();
    let (to, from) = mpsc::channel(QUEUE);
    let entries = tree.entries.clone();
    let comparing =
        tokio::task::spawn_blocking(move || compare(&entries, Arriving { from, piece: Bytes::new() }));
    let offsets = (0..tree.archive_bytes).step_by(PIECE);
    let mut reading = stream::iter(offsets)
        .map(|offset| client.read(offset, (tree.archive_bytes - offset).min(PIECE as u64) as u32))
        .buffered(IN_FLIGHT);
    while let Some(piece) = reading.next().await {
        let piece = piece.map_err(|error| format!("a read failed: {error}"))?;
        counting.add(piece.len() as u64);
        if to.send(piece).await.is_err() {
            // The comparison has ended: at the archive's end, or at what is wrong with it.
            break;
        }
    }
    drop(to);
    comparing.await.map_err(|error| error.to_string())??;
    Ok(format!(
        "{} files and links read back, SHA-256 of each equal, {}",
        tree.len(),
        super::report::rate(tree.archive_bytes, began.elapsed())
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forest() -> tempfile::TempDir {
        let place = tempfile::tempdir().expect("a directory");
        for (name, content) in
            [("b/two", "22"), ("a/one", "1"), ("c", "three"), ("huge", &"h".repeat(90_000))]
        {
            let path = place.path().join(name);
            std::fs::create_dir_all(path.parent().expect("has one")).expect("a directory");
            std::fs::write(path, content).expect("a file");
        }
        std::os::unix::fs::symlink("c", place.path().join("link")).expect("a link");
        place
    }

    fn packed(items: &[Item]) -> (Vec<Entry>, Vec<u8>) {
        let (to, mut from) = mpsc::channel(64);
        let (entries, _) = pack(items, to).expect("packs");
        let mut archive = Vec::new();
        while let Some(piece) = from.blocking_recv() {
            archive.extend_from_slice(&piece);
        }
        (entries, archive)
    }

    #[test]
    fn a_walk_is_in_order_and_within_its_budget() {
        let place = forest();
        let names = |items: Vec<Item>| -> Vec<String> {
            let relative =
                |item: &Item| item.path.strip_prefix(place.path()).map(|p| p.display().to_string());
            items.iter().map(relative).collect::<Result<_, _>>().expect("is below the root")
        };
        assert_eq!(names(walk(place.path(), 1 << 20)), ["a/one", "b/two", "c", "huge", "link"]);
        assert_eq!(
            names(walk(place.path(), 200_000)),
            ["a/one", "b/two", "c", "link"],
            "without the huge one"
        );
        assert_eq!(names(walk(place.path(), 2 * HEADER + 3)), ["a/one", "b/two"]);
        let nowhere = place.path().join("nowhere");
        assert_eq!(
            choose(std::slice::from_ref(&nowhere), 1 << 20).map_err(|e| e.code),
            Err(ErrorCode::NotFound)
        );
        let chosen = choose(&[nowhere, place.path().to_owned()], 1 << 20).expect("finds one");
        assert_eq!(chosen.1.len(), 5);
    }

    #[test]
    fn an_archive_that_is_not_as_it_was_packed_is_noticed() {
        let place = forest();
        let (entries, archive) = packed(&walk(place.path(), 1 << 20));
        assert!(archive.len().is_multiple_of(BLOCK_BYTES));
        assert_eq!(compare(&entries, &archive[..]), Ok(()));
        let zeros = vec![0; archive.len()];
        assert!(compare(&entries, &zeros[..]).is_err(), "everything is gone");
        assert!(compare(&entries[1..], &archive[..]).is_err(), "a file too many");
        for block in 0..archive.len() / BLOCK_BYTES - 1 {
            let mut damaged = archive.clone();
            damaged[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES].fill(0);
            assert!(compare(&entries, &damaged[..]).is_err(), "block {block} was lost");
        }
    }
}
