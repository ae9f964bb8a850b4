//! What of a replica is made anew when its timers change: Raft, and what adapts the replica's log and machine to it.
//!
//! openraft's configuration is fixed when Raft is made. A replica that is to run with other timers ends Raft and makes it
//! anew over the same journal, state machine and position, in the same process. To Raft this is a restart. What a restart
//! of the daemon gives by itself is seen to here:
//!
//! - Raft takes for durable whatever its log holds when it is made. So what was appended is durable first (INV-ACK).
//! - Nothing of the former Raft touches the state machine any more: it is retired before the next one begins.
//! - Voter leases are volatile in Raft. What was acknowledged in this process is known, so the silence is for the rest of
//!   that lease only (INV-LEASE, [`StartupSilence::existing`]).

use std::cell::Cell;
use std::rc::Rc;

use holdfast_env::Instant;
use holdfast_protocol::lease::{LeaseTerms, StartupSilence};
use holdfast_protocol::timers::Timers;
use holdfast_store::ReplicaIdentity;
use holdfast_store::journal::GroupLog;

use crate::config::{Raft, raft_config};
use crate::group::{Group, GroupEnvironment, GroupError, stopped};
use crate::log::Log;
use crate::machine::Machine;
use crate::network::Networks;
use crate::stall::{Stall, Stalled};
use crate::volume::DRIFT_PERMILLE;

impl GroupEnvironment {
    /// For a group with timers of its own. Its silence after a start is one of its own leases.
    #[must_use]
    pub(crate) fn with_timers(&self, timers: Timers, fresh: bool) -> Self {
        let silence = Instant::now() + timers.startup_silence();
        let is_longer = timers.startup_silence() > self.timers.startup_silence();
        let silent_until =
            if is_longer && !fresh { silence.max(self.silent_until) } else { self.silent_until };
        Self { rpc: self.rpc.clone(), timers, silent_until }
    }
}

/// Raft, as it runs now.
pub(crate) struct Core {
    pub(crate) raft: Raft,
    pub(crate) timers: Timers,
    pub(crate) stalled: Stalled,
    /// Tells it from those before and after it in this process.
    pub(crate) number: u64,
    retired: Rc<Cell<bool>>,
}

impl Core {
    /// Makes Raft over what there is.
    pub(crate) async fn start(
        id: ReplicaIdentity,
        timers: Timers,
        networks: &Networks,
        log: &GroupLog,
        machine: &Machine,
        number: u64,
    ) -> Result<Self, GroupError> {
        let config = raft_config(&timers, &id.group.to_string());
        let (stall, stalled) = Stall::new();
        let storage = Log::new(log.clone(), machine.position.clone(), stall);
        let machine = Machine { retired: Rc::default(), ..machine.clone() };
        let retired = machine.retired.clone();
        let raft =
            Raft::new(id.replica.0, config, networks.clone(), storage, machine).await.map_err(stopped)?;
        Ok(Self { raft, timers, stalled, number, retired })
    }
}

/// While it lasts, that Raft does not run is no fault.
struct Reloading<'g>(&'g Cell<bool>);

impl<'g> Reloading<'g> {
    fn begin(flag: &'g Cell<bool>) -> Result<Self, GroupError> {
        if flag.replace(true) {
            return Err(GroupError::Refused("the replica takes up other timers already".into()));
        }
        Ok(Self(flag))
    }
}

impl Drop for Reloading<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl Group {
    /// Lets Raft run with other timers from here on. Refused on a leader that others can stand in for: it hands over
    /// first. Refused, too, while Raft waits for the disk or a rebuild is being switched in: ask again.
    pub async fn reload(self: &Rc<Self>, timers: Timers) -> Result<(), GroupError> {
        if self.timers() == timers {
            return Ok(());
        }
        self.wake();
        self.wake_alone();
        let is_alone = self.is_only_voter();
        if self.is_leader() && !is_alone {
            return Err(GroupError::Refused("a leader hands over before it takes up other timers".into()));
        }
        if self.core_waits() || self.adaptor().is_installing() {
            return Err(GroupError::Refused(
                "Raft waits for the disk, or a rebuild is switched in: ask again".into(),
            ));
        }
        let _reloading = Reloading::begin(self.reloading())?;
        let silence = self.silence_for(self.timers(), timers, is_alone);
        let (raft, retired, number) = {
            let core = self.core().borrow();
            (core.raft.clone(), core.retired.clone(), core.number)
        };
        self.forget_streams();
        raft.shutdown().await.map_err(stopped)?;
        retired.set(true);
        // Raft does not wait for what its state machine was just given.
        self.adaptor().installed().await;
        // INV-ACK: the next Raft takes for durable what the log holds. The journal keeps the order of what it writes.
        self.log().prove_writable().await?;
        let next =
            Core::start(self.id(), timers, self.networks(), self.log(), self.adaptor(), number + 1).await?;
        *self.core().borrow_mut() = next;
        self.silent(silence);
        self.watch();
        tracing::info!(group = %self.id().group, heartbeat = ?timers.heartbeat, "runs with other timers");
        Ok(())
    }

    /// Until when the voter owes silence: the rest of the last lease that this process acknowledged, by the longer of
    /// the timers.
    fn silence_for(&self, before: Timers, after: Timers, is_alone: bool) -> Instant {
        if is_alone {
            // There is no other leader whom it might have promised anything.
            return Instant::now();
        }
        let longest = [before, after].map(|timers| timers.session_lease.max(timers.election_max));
        let terms = LeaseTerms { lease: longest[0].max(longest[1]), drift_permille: DRIFT_PERMILLE };
        let silence = StartupSilence::existing(&terms, self.started().0, self.acknowledged().map(|at| at.0));
        Instant(silence.until())
    }
}
