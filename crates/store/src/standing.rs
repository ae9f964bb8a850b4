//! What stands on a store's medium, counted file by file in one go: what `du` would say at that moment.

use std::collections::BTreeMap;

use holdfast_env::Instant;
use holdfast_env::disk::FileSize;

/// The files of a store and what each takes. One pass over the directory: figures of one standing fit together.
#[derive(Clone, Debug)]
pub struct Standing {
    files: BTreeMap<String, FileSize>,
    at: Instant,
}

impl Standing {
    /// Of what a directory tells of its files ([`holdfast_env::disk::Directory::sizes`]).
    pub fn of(sizes: Vec<(String, FileSize)>) -> Self {
        Self { files: sizes.into_iter().collect(), at: Instant::now() }
    }

    /// When it was counted.
    pub fn at(&self) -> Instant {
        self.at
    }

    /// Bytes allocated for all files.
    pub fn total(&self) -> u64 {
        self.below("")
    }

    /// Bytes allocated for the journal.
    pub fn journal(&self) -> u64 {
        self.below("journal/")
    }

    /// Bytes allocated for the reserve; none while it is given up.
    pub fn reserve(&self) -> u64 {
        self.of_file(crate::reserve::NAME)
    }

    /// Bytes allocated for all that belongs to replicas.
    pub fn replicas(&self) -> u64 {
        self.below("replicas/")
    }

    /// Bytes allocated for one file.
    pub fn of_file(&self, name: &str) -> u64 {
        self.files.get(name).map_or(0, |size| size.allocated)
    }

    /// Bytes allocated for all files whose names begin so.
    pub fn below(&self, prefix: &str) -> u64 {
        let from =
            self.files.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.take_while(|(name, _)| name.starts_with(prefix)).map(|(_, size)| size.allocated).sum()
    }
}
