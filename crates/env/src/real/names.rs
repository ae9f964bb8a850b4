//! Which directories hold names that are not on stable storage yet: files that were made, renamed or removed.
//!
//! A store may hold ten thousand replicas, each in a directory of its own, and makes files every now and then. So only
//! directories in which something has changed are flushed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the next flush has to cover.
enum Unflushed {
    /// Every directory: what a process before this one has changed is not known.
    All,
    /// These.
    Some(BTreeSet<PathBuf>),
    /// Nothing is known any more: a flush failed, and the next one would not tell what of it was lost.
    Failed,
}

/// The names below a root.
pub(super) struct Names {
    root: PathBuf,
    unflushed: Mutex<Unflushed>,
    /// One that makes directories at a time.
    making: Mutex<()>,
    /// One flush at a time: whoever comes second relies on what the first one has taken up.
    flushing: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that panics runs inside.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Names {
    pub(super) fn new(root: &Path) -> Self {
        let unflushed = Mutex::new(Unflushed::All);
        Self { root: root.to_owned(), unflushed, making: Mutex::default(), flushing: Mutex::default() }
    }

    /// Names in these directories have changed, or may have. Called after the change and before anybody is told of it: a flush
    /// that begins in between covers nothing that was promised.
    pub(super) fn changed(&self, directories: impl IntoIterator<Item = PathBuf>) {
        if let Unflushed::Some(known) = &mut *lock(&self.unflushed) {
            known.extend(directories);
        }
    }

    /// Makes the directories that lead to a file, those that are missing. One at a time: whoever finds one has to find it noted.
    pub(super) fn make_way(&self, path: &Path) -> io::Result<()> {
        let _one_at_a_time = lock(&self.making);
        let above = path.ancestors().skip(1).take_while(|above| above.starts_with(&self.root));
        let missing: Vec<&Path> = above.take_while(|above| !above.is_dir()).collect();
        for directory in missing.into_iter().rev() {
            let made = fs::create_dir(directory);
            self.changed(directory.parent().map(Path::to_owned));
            match made {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whatever was changed before this call is on stable storage when it returns `Ok`.
    pub(super) fn flush(&self) -> io::Result<()> {
        let _one_at_a_time = lock(&self.flushing);
        let these = match std::mem::replace(&mut *lock(&self.unflushed), Unflushed::Some(BTreeSet::new())) {
            Unflushed::All => all_below(&self.root),
            Unflushed::Some(these) => Ok(these),
            Unflushed::Failed => Err(io::Error::other("an earlier flush of the directory failed")),
        };
        let flushed = these.and_then(|these| these.iter().try_for_each(|directory| flush_one(directory)));
        if flushed.is_err() {
            *lock(&self.unflushed) = Unflushed::Failed;
        }
        flushed
    }
}

fn flush_one(directory: &Path) -> io::Result<()> {
    match fs::File::open(directory) {
        Ok(open) => open.sync_all(),
        // Somebody else has removed it, with all that was in it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn all_below(root: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let (mut all, mut pending) = (BTreeSet::new(), vec![root.to_owned()]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            }
        }
        all.insert(directory);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unflushed(names: &Names) -> Vec<PathBuf> {
        match &*lock(&names.unflushed) {
            Unflushed::Some(these) => these.iter().cloned().collect(),
            _ => panic!("it is not known"),
        }
    }

    #[test]
    fn only_what_has_changed_is_flushed_and_at_first_everything() {
        let place = tempfile::tempdir().expect("a place");
        let root = place.path().join("store");
        fs::create_dir_all(root.join("a/b")).expect("is made");
        let names = Names::new(&root);
        assert_eq!(all_below(&root).expect("lists"), [root.clone(), root.join("a"), root.join("a/b")].into());
        assert!(matches!(*lock(&names.unflushed), Unflushed::All));
        names.flush().expect("flushes");
        assert!(unflushed(&names).is_empty());
        names.make_way(&root.join("a/b/file")).expect("is there");
        assert!(unflushed(&names).is_empty(), "nothing was made");
        names.make_way(&root.join("c/d/file")).expect("is made");
        assert_eq!(unflushed(&names), [root.clone(), root.join("c")]);
        names.changed([root.join("c/d"), root.join("gone")]);
        names.flush().expect("flushes");
        assert!(unflushed(&names).is_empty());
    }

    #[test]
    fn after_a_flush_that_failed_none_succeeds() {
        let place = tempfile::tempdir().expect("a place");
        let names = Names::new(place.path());
        names.flush().expect("flushes");
        // What is no directory any more than it can be opened through.
        fs::write(place.path().join("file"), b"").expect("is written");
        names.changed([place.path().join("file/within")]);
        names.flush().expect_err("it cannot be opened");
        names.changed([place.path().to_owned()]);
        names.flush().expect_err("what was lost is not known");
    }
}
