//! The exactly-once window of an attachment.

use std::collections::BTreeSet;

use holdfast_types::{DecodeError, Reader, Seq, Writer, limits};

use crate::planted::is_planted;
use crate::refusal::Refusal;

/// Which numbers of an attachment were applied: all up to `floor`, and those in `applied` above it. Bounded by
/// `limits::WINDOW_SEQS_MAX`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Window {
    floor: Seq,
    applied: BTreeSet<Seq>,
    /// The highest `oldest` seen: nothing below it may land any more.
    oldest: Seq,
}

/// What the window says about a number.
pub(crate) enum Admission {
    /// Apply it.
    Fresh,
    /// It was applied before; answer as then, repeat no effect.
    Duplicate,
}

impl Window {
    /// Decides on a number and, if it is fresh, remembers it. INV-ONCE, INV-LATE.
    pub(crate) fn admit(&mut self, seq: Seq, oldest: Seq) -> Result<Admission, Refusal> {
        self.raise(oldest);
        if seq <= self.floor || self.applied.contains(&seq) {
            if is_planted("retry-applied-twice") {
                return Ok(Admission::Fresh);
            }
            // A number below `oldest` that was applied is a duplicate like any other; whether it was applied is
            // forgotten once the floor has passed it, and then the session does not wait for it either.
            if seq < self.oldest && !self.applied.contains(&seq) {
                return Err(Refusal::TooOld { oldest: self.oldest });
            }
            return Ok(Admission::Duplicate);
        }
        if seq < self.oldest && !is_planted("late-write-applied") {
            return Err(Refusal::TooOld { oldest: self.oldest });
        }
        if seq.0 > self.floor.0 + limits::WINDOW_SEQS_MAX {
            return Err(Refusal::BeyondWindow);
        }
        self.applied.insert(seq);
        self.advance();
        Ok(Admission::Fresh)
    }

    fn raise(&mut self, oldest: Seq) {
        if oldest <= self.oldest {
            return;
        }
        self.oldest = oldest;
        // Nothing below `oldest` will be waited for again: the floor follows it.
        let floor = Seq(oldest.0 - 1);
        if floor > self.floor {
            self.floor = floor;
            self.applied = self.applied.split_off(&oldest);
        }
        self.advance();
    }

    fn advance(&mut self) {
        while self.applied.remove(&self.floor.next()) {
            self.floor = self.floor.next();
        }
        debug_assert!(self.applied.len() as u64 <= limits::WINDOW_SEQS_MAX, "the window is bounded");
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        self.floor.encode(out);
        self.oldest.encode(out);
        out.u32(self.applied.len() as u32);
        self.applied.iter().for_each(|seq| seq.encode(out));
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let floor = Seq::decode(input)?;
        let oldest = Seq::decode(input)?;
        let count = input.count("window", limits::WINDOW_SEQS_MAX as usize)?;
        let applied = (0..count).map(|_| Seq::decode(input)).collect::<Result<_, _>>()?;
        Ok(Self { floor, applied, oldest })
    }
}
