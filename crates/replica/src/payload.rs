//! The block data of an entry, or where it is.

use bytes::Bytes;

/// Block data of an entry.
///
/// Entries are applied without it: what they bring stands in the journal, and is found there by the entry's index. So an
/// entry that is only applied, as all are after a start, is not read from the disk for it. Such an entry is not whole: it is
/// neither sent nor appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// In memory; empty for commands without block data.
    Here(Bytes),
    /// So many bytes, in the journal.
    InJournal(u32),
}

impl Payload {
    /// Of a command without block data.
    pub const NONE: Self = Self::Here(Bytes::new());

    /// In bytes, wherever it is.
    pub fn len(&self) -> usize {
        match self {
            Self::Here(bytes) => bytes.len(),
            Self::InJournal(bytes) => *bytes as usize,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The block data of an entry that was proposed, received, or read to be sent.
    ///
    /// # Panics
    ///
    /// If it was left in the journal: sent or appended like this, it would pass for an entry without block data.
    pub fn whole(&self) -> &Bytes {
        match self {
            Self::Here(bytes) => bytes,
            Self::InJournal(bytes) => panic!("{bytes} bytes of block data were left in the journal"),
        }
    }
}
