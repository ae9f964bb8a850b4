//! How full a journal may get, and what gives way at which fill: one table for all who keep something in it.
//!
//! In percent of what the *line* may take: the segments that entries may fill, without those that are kept for votes and
//! for what makes room (`writer.rs`). So a small journal, of which much is kept, has the same table as a large one.
//! What nobody needs any more does not count, whether its segments have been taken back already or not.
//!
//! The order is the point. What is kept for others, for a follower that may come back or a rebuild that pulls, goes
//! before any write has to wait: retention slows nobody (DESIGN §6). Writers are slowed before the line stops.

use super::StoreOptions;

/// A witness looks at once what of its log may go.
pub const WITNESS_LOOKS: u32 = 50;
/// Logs are purged as far as nobody needs them. What is not home is brought there.
pub const PURGE: u32 = 65;
/// Nothing is kept any more for a follower that is away or far behind: it is not healed by log any more.
pub const FOLLOWER_GIVEN_UP: u32 = 70;
/// Nothing is kept any more for a rebuild that pulls, nor by a witness for a data voter that is away.
pub const GIVE_UP: u32 = 75;
/// Of what is not home: from here on the cleaner gives way less to whoever writes, and from there on not at all.
pub(super) const YIELD_LESS: u32 = 35;
pub(super) const YIELD_NOT: u32 = 55;
/// Whatever is applied is moved home at once.
pub const URGENT: u32 = 75;
/// From here on writers are slowed (`admission.rs`).
pub const ADMISSION: u32 = 80;
/// The line stops.
const STOPS: u32 = 100;

/// Bounds at which whoever keeps something in the journal, or waits for it, looks again.
pub(super) const BOUNDS: [u32; 5] = [WITNESS_LOOKS, PURGE, FOLLOWER_GIVEN_UP, GIVE_UP, ADMISSION];

/// While the medium is full: logs are purged from here on (INV-SPACE).
pub const PURGE_WHEN_FULL: u32 = 20;
/// Then data of leaders elsewhere is taken below that, and nothing is kept for a rebuild from there on.
pub const FULL_TAKES_BELOW: u32 = 40;

/// Segments that only what makes room may take (purges, copies of small records, declarations), so that room can
/// always be made (INV-ROOM).
pub(super) const RESERVE_FOR_ROOM: usize = 1;
/// Segments that entries alone may not take: they are for a vote or a truncation, which Raft waits for, and for the
/// entries that stand in line before it. A quarter of the journal, so that the line fits.
pub(super) const RESERVE_FOR_STATE: usize = 4;
/// Segments of the smallest journal.
pub(super) const SEGMENTS_MIN: usize = 4;
/// A volume is cleaned without pressure when so much of what the line may take, in percent, is not home.
const CLEAN_AT: u64 = 25;

const _: () = {
    assert!(WITNESS_LOOKS < PURGE && PURGE < FOLLOWER_GIVEN_UP && FOLLOWER_GIVEN_UP < GIVE_UP);
    assert!(GIVE_UP < ADMISSION && ADMISSION < STOPS);
    assert!(URGENT > PURGE && URGENT < ADMISSION, "cleaning hurries before anybody waits");
    assert!(CLEAN_AT < YIELD_LESS as u64 && YIELD_LESS < YIELD_NOT && YIELD_NOT < PURGE);
    assert!(PURGE_WHEN_FULL < FULL_TAKES_BELOW && FULL_TAKES_BELOW < ADMISSION);
    // INV-ADMIT: when logs are purged and given up there is a whole segment to be had, also in the smallest journal.
    assert!(PURGE as usize * line_segments(SEGMENTS_MIN) > 100);
    // Twice what is cleaned at once, that and what comes meanwhile, is taken without slowing anybody.
    assert!(2 * CLEAN_AT < ADMISSION as u64);
};

/// Free segments that entries may not take, of so many.
pub(super) const fn kept_segments(segments: usize) -> usize {
    let few = segments / 4;
    RESERVE_FOR_ROOM + if few < RESERVE_FOR_STATE { few } else { RESERVE_FOR_STATE }
}

/// Segments that the line may fill.
pub(super) const fn line_segments(segments: usize) -> usize {
    segments - kept_segments(segments)
}

impl StoreOptions {
    /// Bytes that entries may fill before they wait for room.
    pub(super) fn line_bytes(&self) -> u64 {
        line_segments(self.segments as usize) as u64 * self.segment_bytes
    }

    /// Bytes of a volume that are not home at which it is cleaned without pressure, if the journal has a say in it.
    pub(super) fn clean_at_bytes(&self) -> u64 {
        self.line_bytes() / 100 * CLEAN_AT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_for_journals_of_every_size() {
        for segments in SEGMENTS_MIN..300 {
            let (line, kept) = (line_segments(segments), kept_segments(segments));
            assert!(line >= 2 && kept >= 2 && line + kept == segments);
            let whole = |percent: u32| percent as usize * line / 100;
            assert!(whole(PURGE) >= 1, "of {segments} segments a purge frees one");
        }
    }
}
