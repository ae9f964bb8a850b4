//! The exactly-once window of an attachment: which request numbers were applied, and which must not land any more.
//!
//! Invariants: `oldest <= floor + 1`; every number in `applied` is in `(floor + 1, floor + WINDOW_SEQS_MAX]`. So the
//! window is bounded whatever a session sends.

use std::collections::BTreeSet;

use holdfast_types::{DecodeError, Reader, Seq, Writer, limits};

use crate::planted::is_planted;
use crate::refusal::Refusal;

/// The largest request number that a command may carry; beyond it, sums could wrap.
pub(crate) const SEQ_MAX: Seq = Seq(u64::MAX / 2);

/// Which numbers of an attachment were applied.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Window {
    /// Every number up to here was applied or given up.
    floor: Seq,
    /// The applied ones above.
    applied: BTreeSet<Seq>,
    /// The highest `oldest` seen: nothing below it may land any more.
    oldest: Seq,
}

/// What the window says about a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Admission {
    /// Apply it.
    Fresh,
    /// It was applied before; answer as then, repeat no effect.
    Duplicate,
}

impl Window {
    /// Decides on a number and, if it is fresh, remembers it. INV-ONCE: fresh once. INV-LATE: never below the highest
    /// `oldest`; that comes first, because whether such a number was applied is forgotten.
    pub(crate) fn admit(&mut self, seq: Seq, oldest: Seq) -> Result<Admission, Refusal> {
        self.raise(oldest);
        if seq < self.oldest {
            if is_planted("late-write-applied") {
                return Ok(Admission::Fresh);
            }
            return Err(Refusal::TooOld { oldest: self.oldest });
        }
        if seq <= self.floor || self.applied.contains(&seq) {
            let again = is_planted("retry-applied-twice");
            return Ok(if again { Admission::Fresh } else { Admission::Duplicate });
        }
        if seq.0 - self.floor.0 > limits::WINDOW_SEQS_MAX {
            return Err(Refusal::BeyondWindow);
        }
        self.applied.insert(seq);
        self.advance();
        Ok(Admission::Fresh)
    }

    /// The session waits for nothing below `oldest` any more.
    pub(crate) fn raise(&mut self, oldest: Seq) {
        if oldest <= self.oldest {
            return;
        }
        self.oldest = oldest;
        let floor = Seq(oldest.0 - 1);
        if floor > self.floor {
            self.floor = floor;
            self.applied = self.applied.split_off(&oldest);
        }
        self.advance();
    }

    /// The first number above every one that was ever applied or given up.
    pub(crate) fn next(&self) -> Seq {
        self.applied.last().copied().unwrap_or(self.floor).max(self.floor).next()
    }

    fn advance(&mut self) {
        while self.applied.remove(&self.floor.next()) {
            self.floor = self.floor.next();
        }
        assert!(self.applied.len() as u64 <= limits::WINDOW_SEQS_MAX, "INV-ONCE: the window is bounded");
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        self.floor.encode(out);
        self.oldest.encode(out);
        out.u32(self.applied.len() as u32);
        for seq in &self.applied {
            out.u16(
                u16::try_from(seq.0 - self.floor.0).expect("a number is within the window above the floor"),
            );
        }
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let floor = Seq::decode(input)?;
        let oldest = Seq::decode(input)?;
        if floor > SEQ_MAX || oldest > floor.next() {
            return Err(DecodeError::Unknown { what: "window floor", value: floor.0 });
        }
        let mut applied = BTreeSet::new();
        let mut before = 1;
        for _ in 0..input.count("window", limits::WINDOW_SEQS_MAX as usize)? {
            let above = input.u16()?;
            if above <= before || u64::from(above) > limits::WINDOW_SEQS_MAX {
                return Err(DecodeError::Unknown { what: "window entry", value: above.into() });
            }
            before = above;
            applied.insert(Seq(floor.0 + u64::from(above)));
        }
        Ok(Self { floor, applied, oldest })
    }
}

const _: () = assert!(limits::WINDOW_SEQS_MAX <= u16::MAX as u64);

#[cfg(test)]
mod tests {
    use super::*;

    fn admit(window: &mut Window, seq: u64, oldest: u64) -> Result<Admission, Refusal> {
        window.admit(Seq(seq), Seq(oldest))
    }

    #[test]
    fn each_number_is_fresh_once_in_any_order() {
        let mut window = Window::default();
        for seq in [3, 1, 5, 2, 4] {
            assert_eq!(admit(&mut window, seq, 1), Ok(Admission::Fresh));
        }
        for seq in 1..=5 {
            assert_eq!(admit(&mut window, seq, 1), Ok(Admission::Duplicate));
        }
        assert_eq!((window.floor, window.applied.len(), window.next()), (Seq(5), 0, Seq(6)));
    }

    #[test]
    fn nothing_lands_below_the_highest_oldest() {
        let mut window = Window::default();
        assert_eq!(admit(&mut window, 9, 7), Ok(Admission::Fresh));
        let too_old = Err(Refusal::TooOld { oldest: Seq(7) });
        assert_eq!(admit(&mut window, 6, 1), too_old);
        assert_eq!(admit(&mut window, 6, 6), too_old, "a lower claim does not take a higher one back");
        assert_eq!(admit(&mut window, 7, 7), Ok(Admission::Fresh));
        assert_eq!(admit(&mut window, 9, 8), Ok(Admission::Duplicate));
        assert_eq!(admit(&mut window, 7, 8), Err(Refusal::TooOld { oldest: Seq(8) }));
    }

    #[test]
    fn the_window_ends_exactly_at_its_bound() {
        let mut window = Window::default();
        let max = limits::WINDOW_SEQS_MAX;
        assert_eq!(admit(&mut window, max + 1, 1), Err(Refusal::BeyondWindow));
        assert_eq!(admit(&mut window, max, 1), Ok(Admission::Fresh));
        assert_eq!(admit(&mut window, 1, 1), Ok(Admission::Fresh));
        assert_eq!(admit(&mut window, max + 1, 1), Ok(Admission::Fresh));
        assert_eq!(window.next(), Seq(max + 2));
    }

    #[test]
    fn a_full_window_survives_encoding_and_a_damaged_one_is_refused() {
        let mut window = Window::default();
        for seq in 2..=limits::WINDOW_SEQS_MAX {
            assert_eq!(admit(&mut window, seq, 1), Ok(Admission::Fresh));
        }
        let mut out = Writer::new();
        window.encode(&mut out);
        let bytes = out.finish();
        assert_eq!(Window::decode(&mut Reader::new(&bytes)), Ok(window));
        // Two entries out of order; an entry next to the floor; an `oldest` above the floor.
        for (floor, oldest, entries) in
            [(5, 0, vec![4_u16, 3]), (5, 0, vec![1]), (5, 7, vec![]), (0, 0, vec![4097])]
        {
            let mut out = Writer::new();
            out.u64(floor);
            out.u64(oldest);
            out.u32(entries.len() as u32);
            entries.iter().for_each(|entry| out.u16(*entry));
            assert!(
                Window::decode(&mut Reader::new(out.as_slice())).is_err(),
                "{floor} {oldest} {entries:?}"
            );
        }
    }
}
