//! What goes from a witness's log, and when it campaigns.
//!
//! *The log.* A state is captured, and waits until every data voter is known to have everything that it covers; then it
//! becomes the checkpoint, and the log before it goes. While a data voter is away nothing goes, up to the budget of one
//! witness and to what the store's journal can take: a journal that is full would keep the witnesses of all volumes from
//! acknowledging. Beyond that the log goes, as far as a data replica that leads is known to have it, and the witness says
//! that there is one full copy. While no data replica leads nothing goes: the witness may hold the last copy.
//!
//! *Leading.* A data replica that can lead is to lead, so the witness leaves the others as long as an election takes
//! them. It campaigns when nobody has won by then: it alone holds the tail. It leads until a data replica has all of its
//! log, which it gives it the leadership with; nobody proposes anything to it.

use std::rc::{Rc, Weak};
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_protocol::planted::is_planted;
use holdfast_store::StoreError;
use holdfast_store::journal::{Journal, levels};
use holdfast_store::volume::{Checkpoint, CheckpointSource};
use holdfast_types::LogIndex;

use super::Witness;
use crate::group::GroupError;
use crate::host::Host;
use crate::past;

/// Payload in its log at which a witness looks what may go, in bytes.
const LOOK_AT_BYTES: u64 = 8 << 20;
/// Between two looks, at least: each asks the leader.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// A witness looks so often whatever comes: what is small costs memory, too.
const IDLE: Duration = Duration::from_secs(5);
/// What a data voter is behind for less long than this is under way to it.
const LATE_AFTER: Duration = Duration::from_secs(1);
/// Between two tries to hand the leadership over.
const HAND_OVER_PAUSE: Duration = Duration::from_millis(20);

/// A state that waits until everybody has what it covers.
struct Captured {
    state: Checkpoint,
    at: Instant,
}

/// Keeps the log of a witness within its bounds, until it is dropped or its store fails.
pub(super) async fn keep_log(witness: Weak<Witness>, host: Weak<Host>) {
    let mut captured = None;
    loop {
        let (Some(this), Some(host)) = (witness.upgrade(), host.upgrade()) else { return };
        let journal = host.journal().clone();
        if this.is_stopped() || journal.failed().is_some() {
            return;
        }
        if let Err(error) = this.look(&host, &journal, &mut captured).await {
            tracing::error!(group = %this.group.id().group, %error, "a witness makes no more checkpoints");
            *this.fault.borrow_mut() = Some(format!("it makes no more checkpoints: {error}"));
            return;
        }
        this.looks.set(this.looks.get() + 1);
        drop(host);
        this.wait(&journal).await;
    }
}

impl Witness {
    /// Ends when there may be something to do.
    async fn wait(&self, journal: &Journal) {
        holdfast_env::sleep(LOOK_PAUSE).await;
        let pressure_changed = journal.pressure_changed();
        let grown = self.machine.grown(LOOK_AT_BYTES);
        let is_pressed = journal.pressure().line_percent >= levels::WITNESS_LOOKS;
        if self.is_stopped() || (is_pressed && self.held_bytes() > 0) {
            return;
        }
        futures_util::pin_mut!(pressure_changed, grown);
        // Either way it is time to look.
        let _woken = holdfast_env::timeout(IDLE, futures_util::future::select(pressure_changed, grown)).await;
    }

    /// Lets go what may go.
    async fn look(
        &self,
        host: &Host,
        journal: &Journal,
        captured: &mut Option<Captured>,
    ) -> Result<(), StoreError> {
        let flushed = self.group.log().flushed();
        let covered = self.machine.file().newest().checkpoint.id.index;
        if captured.as_ref().is_none_or(|captured| captured.state.id.index <= covered) {
            let newest = self.group.machine().captured_up_to(flushed);
            let newest = newest.filter(|newest| newest.id.index > covered);
            *captured = newest.map(|state| Captured { state, at: Instant::now() });
        }
        // What a purge that came too late, or while this witness led, has left.
        if self.group.log().purged().map_or(LogIndex::ZERO, |id| id.index) < covered {
            self.purge(covered).await?;
        }
        let everywhere = past::everywhere(host, &self.group, &self.group.data_voters()).await;
        let may_go = if is_planted("witness-purges-early") { flushed } else { everywhere };
        if let Some(ready) = captured.take_if(|captured| captured.state.id.index <= may_go) {
            return self.cover(ready.state, may_go).await;
        }
        let is_late =
            captured.as_ref().is_some_and(|captured| Instant::now().since(captured.at) >= LATE_AFTER);
        if !is_late || !self.is_beyond_budget(host, journal) {
            return Ok(());
        }
        // INV-WITNESS: what goes stands on a data replica that leads. While none does, this may be the last copy.
        let data_voters = self.group.data_voters();
        let leader =
            self.group.leader().map(|(leader, _)| leader).filter(|leader| data_voters.contains(leader));
        // A vote for one that is gone stays as it is; what counts is that it has called lately.
        let heard = self.group.acknowledged().map(|at| Instant::now().since(at));
        let is_heard = heard.is_some_and(|since| since <= self.group.timers().election_max);
        let Some(leader) = leader.filter(|_| is_heard) else { return Ok(()) };
        let kept = flushed.min(past::known_everywhere(host, self.group.id().group, &[leader]));
        match self.group.machine().captured_up_to(kept).filter(|newest| newest.id.index > covered) {
            Some(newest) => {
                tracing::warn!(group = %self.group.id().group, index = %newest.id.index, %everywhere,
                    held = self.held_bytes(), "the log of a witness is beyond its budget: it goes, and there is one full copy");
                *captured = None;
                self.cover_at(newest, everywhere).await
            }
            None => Ok(()),
        }
    }

    /// Whether what somebody lacks goes, too: its log is beyond its own bound, or it is the largest on a journal that is
    /// filling up.
    fn is_beyond_budget(&self, host: &Host, journal: &Journal) -> bool {
        let (held, pressure) = (self.held_bytes(), journal.pressure());
        let is_filling = pressure.line_waits || pressure.line_percent >= levels::GIVE_UP;
        let is_largest = || host.witnesses().iter().all(|other| other.held_bytes() <= held);
        held > host.witnesses.budget.get() || (is_filling && held > 0 && is_largest())
    }

    /// INV-WITNESS: the checkpoint, up to which the log goes, covers nothing that a data voter may lack.
    async fn cover(&self, checkpoint: Checkpoint, everywhere: LogIndex) -> Result<(), StoreError> {
        assert!(
            checkpoint.id.index <= everywhere,
            "INV-WITNESS: {} would go, and every data voter has only {everywhere}",
            checkpoint.id.index
        );
        self.cover_at(checkpoint, everywhere).await
    }

    async fn cover_at(&self, checkpoint: Checkpoint, everywhere: LogIndex) -> Result<(), StoreError> {
        let (index, group) = (checkpoint.id.index, self.group.id().group);
        assert!(index <= self.group.log().flushed(), "INV-ACK: a checkpoint is of what is durable here");
        match self.machine.save(checkpoint, everywhere).await {
            Ok(()) => {}
            // It is small, and is tried again.
            Err(error) if error.is_full() => {
                tracing::warn!(%group, %error, "the medium is full: a witness makes no checkpoint this time");
                return match self.group.log().reserve() {
                    Some(reserve) if !reserve.is_full() => reserve.give_up().await,
                    _ => Ok(()),
                };
            }
            Err(error) => return Err(error),
        }
        self.purge(index).await
    }

    async fn purge(&self, index: LogIndex) -> Result<(), StoreError> {
        match self.group.purge(index).await {
            Err(GroupError::Stopped(why)) => Err(StoreError::Failed(why)),
            Err(error) => {
                tracing::warn!(group = %self.group.id().group, %error, "the log of a witness was not purged this time");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Lets a witness campaign when nobody else wins, and ends its leadership, until it is dropped.
pub(super) async fn keep_from_leading(witness: Weak<Witness>, host: Weak<Host>) {
    loop {
        let (Some(this), Some(host)) = (witness.upgrade(), host.upgrade()) else { return };
        if this.is_stopped() {
            return;
        }
        if this.group.is_leader() {
            drop(host);
            this.group.let_campaign(false);
            this.hand_over().await;
            continue;
        }
        let patience = this.group.timers().election_max * 2;
        let missing_since = this.heard_at() + patience;
        let is_missing = Instant::now() >= missing_since;
        let may_campaign = is_missing && !this.group.owes_silence() && this.may_campaign(&host);
        this.group.let_campaign(may_campaign);
        drop(host);
        let next = if is_missing { Instant::now() + patience / 6 } else { missing_since };
        let due = std::pin::pin!(holdfast_env::sleep_until(next));
        let changed = std::pin::pin!(this.group.leadership_changed());
        let stopped = std::pin::pin!(this.stopped.notified());
        futures_util::future::select(futures_util::future::select(due, changed), stopped).await;
    }
}

impl Witness {
    /// When a leader last called; before the first time, when the silence after a start ends.
    fn heard_at(&self) -> Instant {
        let silence = self.group.timers().startup_silence();
        self.group.heard_leader_at().unwrap_or(self.group.started() + silence)
    }

    fn may_campaign(&self, host: &Rc<Host>) -> bool {
        self.barred(host).is_none() || is_planted("witness-campaigns-without-the-log")
    }

    /// Gives the leadership to a data replica, as soon as one has everything. Nothing is proposed meanwhile, so one that
    /// can be reached will have it.
    async fn hand_over(&self) {
        while self.group.is_leader() && !self.is_stopped() {
            let Some(membership) = self.group.membership_as_leader() else { return };
            let voters = membership.voter_ids().collect();
            for target in self.group.by_progress(&voters) {
                match self.group.transfer_to(target).await {
                    Ok(()) => {
                        tracing::info!(group = %self.group.id().group, %target, "a witness has handed its leadership over");
                        return;
                    }
                    Err(error) => {
                        tracing::debug!(group = %self.group.id().group, %target, %error, "not handed over yet");
                    }
                }
            }
            holdfast_env::sleep(HAND_OVER_PAUSE).await;
        }
    }
}
