//! The operations, and which sequences of them are worth it.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Block A is written and committed.
    WriteA,
    /// A and the block behind it, in the next chunk.
    WriteAB,
    TrimA,
    /// A write of A that is appended and not committed.
    Append,
    /// What is not committed is cut off.
    Truncate,
    /// Everything so far is waited for.
    Flush,
    /// A cleaning pass, which makes a checkpoint, and merges what dropped snapshots have left.
    Clean,
    /// The log up to the checkpoint.
    Purge,
    Vote,
    Snapshot,
    /// The newest snapshot goes.
    Drop,
    /// The oldest goes.
    DropOldest,
    /// Back to the newest.
    Restore,
}

impl Op {
    pub const PLAIN: [Self; 9] = [
        Self::WriteA,
        Self::WriteAB,
        Self::TrimA,
        Self::Append,
        Self::Truncate,
        Self::Flush,
        Self::Clean,
        Self::Purge,
        Self::Vote,
    ];

    /// Those of a volume with snapshots; votes and purges know nothing of layers.
    pub const LAYERED: [Self; 10] = [
        Self::WriteA,
        Self::TrimA,
        Self::Append,
        Self::Truncate,
        Self::Flush,
        Self::Clean,
        Self::Snapshot,
        Self::Drop,
        Self::DropOldest,
        Self::Restore,
    ];

    pub const GO_ON: [Self; 8] = [
        Self::Append,
        Self::Truncate,
        Self::WriteAB,
        Self::TrimA,
        Self::Vote,
        Self::Clean,
        Self::Flush,
        Self::Purge,
    ];

    /// Ends with everything merged.
    pub const GO_ON_LAYERED: [Self; 9] = [
        Self::Append,
        Self::Truncate,
        Self::WriteAB,
        Self::Snapshot,
        Self::TrimA,
        Self::Clean,
        Self::DropOldest,
        Self::Flush,
        Self::Clean,
    ];

    fn is_of_layers(self) -> bool {
        matches!(self, Self::Snapshot | Self::Drop | Self::DropOldest | Self::Restore)
    }
}

/// Whether an operation in it does nothing at all, so that a shorter sequence plays the same: a cleaning pass that finds
/// everything home, a flush that waits for nothing, and one at the end, where everything is waited for anyway.
pub fn is_idle(sequence: &[Op]) -> bool {
    let begins = matches!(sequence.first(), Some(Op::Flush | Op::Clean)) && sequence.len() > 1;
    begins
        || sequence.last() == Some(&Op::Flush)
        || sequence.windows(2).any(|pair| pair == [Op::Flush, Op::Flush])
}

/// Whether a sequence over a volume with one snapshot tells anything that a shorter one, or one over a volume without
/// snapshots, does not: it changes layers, each of its operations does something, and what is appended is cut, for
/// otherwise it is a write like any other.
pub fn is_of_layers(sequence: &[Op]) -> bool {
    let mut living = 1;
    let mut is_appended = false;
    for op in sequence {
        let does_something = match op {
            Op::Append | Op::Flush | Op::Clean => true,
            Op::Truncate => is_appended,
            Op::Drop | Op::Restore => !is_appended && living > 0,
            // Of one it is the newest.
            Op::DropOldest => !is_appended && living > 1,
            _ => !is_appended,
        };
        if !does_something {
            return false;
        }
        match op {
            Op::Snapshot => living += 1,
            Op::Drop | Op::DropOldest => living -= 1,
            Op::Append => is_appended = true,
            Op::Truncate => is_appended = false,
            _ => {}
        }
    }
    !is_appended && sequence.iter().any(|op| op.is_of_layers())
}
