//! When a volume is cleaned and its log purged: so that any volume can be overwritten for ever in bounded space.
//!
//! Cleaning moves applied blocks home and makes a checkpoint. Purging drops log entries that a checkpoint covers. A
//! follower that is away is healed by log for as long as the journal has room, and slows nobody when it has not.

use std::rc::{Rc, Weak};
use std::time::Duration;

use holdfast_store::journal::Journal;
use holdfast_types::LogIndex;

use crate::rebuild::PurgeHold;
use crate::volume::Volume;

/// Dirty payload at which a volume is cleaned without pressure, in bytes.
const CLEAN_AT_BYTES: u64 = 16 << 20;
/// A volume that has been quiet for this long is cleaned, so that restarts are short.
const IDLE: Duration = Duration::from_secs(5);
/// Fraction of the journal in use above which logs are purged, in percent.
const PURGE_ABOVE_PERCENT: u32 = 50;
/// Above this fraction the log is not kept for a rebuild any more: retention slows nobody. A rebuild that falls out of
/// the log begins again, and sends only what differs by then.
const HOLD_BELOW_PERCENT: u32 = 60;

/// Cleans one volume until it is dropped or its store fails.
pub(crate) async fn run(volume: Weak<Volume>, journal: Journal, hold: Rc<PurgeHold>) {
    loop {
        let Some(this) = volume.upgrade().filter(|this| !this.is_stopped()) else { return };
        if journal.failed().is_some() {
            return;
        }
        let pressed = journal.pressure().used_percent >= PURGE_ABOVE_PERCENT;
        let dirty = this.data().dirty();
        if (dirty.bytes >= CLEAN_AT_BYTES || (pressed && dirty.any)) && !clean(&this).await {
            return;
        }
        if pressed && !purge(&this, &journal, &hold).await {
            return;
        }
        let before = this.group().position().applied_index();
        wait(&this, &journal).await;
        let quiet = this.group().position().applied_index() == before;
        if quiet && this.data().dirty().any && !clean(&this).await {
            return;
        }
    }
}

/// Ends when there may be work: blocks were dirtied, the journal filled up, or it has been quiet for a while.
async fn wait(volume: &Rc<Volume>, journal: &Journal) {
    let dirtied = async {
        loop {
            volume.machine().dirtied.notified().await;
            if volume.data().dirty().bytes >= CLEAN_AT_BYTES || volume.is_stopped() {
                return;
            }
        }
    };
    let pressed = journal.pressure_changed();
    futures_util::pin_mut!(dirtied, pressed);
    let work = futures_util::future::select(dirtied, pressed);
    // Quiet for a while is a reason to look, too.
    let _quiet = holdfast_env::timeout(IDLE, work).await;
}

/// One cleaning pass; false if the store has failed.
pub(crate) async fn clean(volume: &Rc<Volume>) -> bool {
    match volume.data().clean(volume.group().machine()).await {
        Ok(checkpoint) => {
            tracing::trace!(group = %volume.group().id().group, index = %checkpoint.id.index, "cleaned");
            true
        }
        Err(error) => {
            tracing::error!(group = %volume.group().id().group, %error, "the cleaner has stopped");
            false
        }
    }
}

/// Purges the log to the checkpoint, or to what a rebuild from this replica still needs; false if the group stopped.
async fn purge(volume: &Rc<Volume>, journal: &Journal, hold: &PurgeHold) -> bool {
    let checkpoint = volume.data().checkpoint().id.index;
    let held = hold.index().filter(|_| journal.pressure().used_percent < HOLD_BELOW_PERCENT);
    let upto = held.map_or(checkpoint, |index| checkpoint.min(index));
    let purged = volume.log().purged().map_or(LogIndex::ZERO, |id| id.index);
    if upto <= purged {
        return true;
    }
    match volume.group().purge(upto).await {
        Ok(()) => true,
        Err(crate::group::GroupError::Stopped(why)) => {
            tracing::error!(group = %volume.group().id().group, %why, "the log is not purged any more");
            false
        }
        Err(error) => {
            tracing::warn!(group = %volume.group().id().group, %error, "the log was not purged this time");
            true
        }
    }
}
