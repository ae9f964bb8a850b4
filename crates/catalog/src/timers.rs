//! The timers of volumes: what is asked for and what the network between their replicas allows, brought about step by
//! step.
//!
//! A change (`holdfast_protocol::timers`) begins with a command of the volume's log; then the replicas take up what the
//! state asks for, one at a time, so that at most one voter owes silence: followers first, and the leader last, which
//! hands over before. Then a second command ends the change, and they take up what is left, likewise. Every step bears
//! repetition, and each look finds out anew which one is next.

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_protocol::catalog::{CatalogState, ReplicaPhase, ReplicaRecord, VolumePhase, VolumeRecord};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::timers::{self, Timers};
use holdfast_replica::administration::ShardRequest;
use holdfast_replica::messages::ReplicaReport;
use holdfast_types::{ReplicaId, StoreId, VolumeId};

use crate::member::{AnswerError, Member};
use crate::reconciler::Step;
use crate::volumes;

/// Volumes that are looked at in one go, besides those whose timers are being changed.
const LOOKS: usize = 16;
/// Steps of one volume in one go.
const STEPS_MAX: usize = 16;
/// So many looks in a row must wish for slower timers before they are changed, and for faster ones: a network that is
/// worse for a moment is no other network.
const SLOWER_AFTER: u32 = 5;
const FASTER_AFTER: u32 = 60;
/// How long a command of a volume may take here. The end of a change waits for a lease.
const COMMAND_PATIENCE: Duration = Duration::from_secs(5);

/// What the reconciler remembers of the timers of one volume, while it leads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Notes {
    /// The timers that were wished for lately, and on how many looks in a row.
    wish: Option<(Timers, u32)>,
    /// Who led before it handed over for a change.
    led: Option<ReplicaId>,
    /// A change is under way.
    changing: bool,
}

/// Notes of all volumes, and the one that was looked at last.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    notes: BTreeMap<VolumeId, Notes>,
    last: Option<VolumeId>,
}

impl Ledger {
    /// Whoever leads anew counts anew.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Which volumes are looked at now: those that are being changed, and a few others in turn.
    fn turn(&mut self, state: &CatalogState) -> Vec<VolumeRecord> {
        self.notes.retain(|id, _| state.volumes.contains_key(id));
        let ready = |record: &&VolumeRecord| record.phase == VolumePhase::Ready;
        let after = state.volumes.values().filter(ready).filter(|record| Some(record.id) > self.last);
        let mut chosen: Vec<VolumeRecord> = after.take(LOOKS).cloned().collect();
        self.last = if chosen.len() < LOOKS { None } else { chosen.last().map(|record| record.id) };
        let changing = self.notes.iter().filter(|(_, notes)| notes.changing).map(|(id, _)| *id);
        let missing = changing.filter(|id| !chosen.iter().any(|record| record.id == *id));
        let missing: Vec<VolumeRecord> =
            missing.filter_map(|id| state.volumes.get(&id)).filter(ready).cloned().collect();
        chosen.extend(missing);
        chosen
    }

    /// Counts a wish; whether it has been the same for long enough.
    fn insists(&mut self, of: VolumeId, wish: Timers, now: Timers, at_once: bool) -> bool {
        let notes = self.notes.entry(of).or_default();
        if wish == now {
            notes.wish = None;
            return false;
        }
        let looks = notes.wish.filter(|(before, _)| *before == wish).map_or(0, |(_, looks)| looks) + 1;
        notes.wish = Some((wish, looks));
        let enough = if wish.heartbeat > now.heartbeat { SLOWER_AFTER } else { FASTER_AFTER };
        at_once || looks >= enough
    }
}

/// A volume's replicas as they report, all of them voters that run, and their leader.
struct Voters {
    all: Vec<(ReplicaId, StoreId, ReplicaReport)>,
    leader: usize,
}

impl Voters {
    fn leader(&self) -> &(ReplicaId, StoreId, ReplicaReport) {
        &self.all[self.leader]
    }
    fn followers(&self) -> impl Iterator<Item = &(ReplicaId, StoreId, ReplicaReport)> {
        let leader = self.leader().0;
        self.all.iter().filter(move |(id, ..)| *id != leader)
    }
}

impl Member {
    /// A look at the timers of some volumes.
    pub(crate) async fn settle_timers(&self, state: &CatalogState) {
        let records = self.timers.borrow_mut().turn(state);
        for record in records {
            for _ in 0..STEPS_MAX {
                match self.step_timers(&record).await {
                    Ok(Step::Progress) => {}
                    Ok(Step::Rest) => break,
                    Err(AnswerError::Refused(error)) => {
                        tracing::info!(volume = record.spec.name, %error, "its timers are changed later");
                        break;
                    }
                    Err(_) => return,
                }
            }
        }
    }

    /// Every replica of the volume, if all are there: a change waits for all voters.
    async fn voters(&self, record: &VolumeRecord) -> Option<Voters> {
        let reports = volumes::replica_reports(&self.rpc, record).await;
        let (leader, led) = volumes::leader_of(&reports).filter(|(_, led)| !led.is_witness)?;
        // One that leaves and votes no more may stand on a node that never comes back.
        let is_gone = |replica: &&ReplicaRecord| {
            let is_member = led.voters.contains(&replica.id) || led.learners.contains(&replica.id);
            replica.phase == ReplicaPhase::Leaving && !is_member
        };
        let staying: Vec<&ReplicaRecord> =
            record.replicas.iter().filter(|replica| !is_gone(replica)).collect();
        let settled = led.settled_membership && led.voters.len() == staying.len();
        let mut all = Vec::new();
        for replica in staying {
            let report = reports.get(&replica.id)?.as_ref().ok()?;
            if replica.phase != ReplicaPhase::Voter || !report.fault.is_empty() || report.repairing {
                return None;
            }
            all.push((replica.id, replica.store, report.clone()));
        }
        let leader = all.iter().position(|(id, ..)| *id == leader)?;
        settled.then_some(Voters { all, leader })
    }

    async fn step_timers(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        let Some(voters) = self.voters(record).await else { return Ok(Step::Rest) };
        let (leader, _, led) = voters.leader();
        let asked = led.timers;
        // What one of them has not applied it cannot take up, and one that is silent may be needed if another one goes.
        if voters.all.iter().any(|(.., report)| report.timers != asked || report.owes_silence) {
            return Ok(Step::Rest);
        }
        if let Some((id, store, _)) = voters.followers().find(|(.., report)| report.runs != asked.run()) {
            tracing::info!(volume = record.spec.name, replica = %id, "takes up other timers");
            return self.take_up(record, *store).await;
        }
        if led.runs != asked.run() {
            return self.leader_takes_up(record, &voters).await;
        }
        if let Some(change) = asked.change() {
            let settled = VolumeCommand::TimersSettled { since: change.since };
            self.command_timers(record, settled).await?;
            return Ok(Step::Progress);
        }
        let led_before = self.timers.borrow_mut().notes.get_mut(&record.id).and_then(|notes| {
            notes.changing = false;
            notes.led.take()
        });
        if let Some(before) = led_before.filter(|before| before != leader) {
            // The leader follows its attachment; it went for the change only.
            self.hand_over(record, &voters, before).await?;
            return Ok(Step::Progress);
        }
        let trip = Duration::from_micros(led.round_trip_us);
        let (wish, at_once) = timers::choose(record.spec.timers, trip, asked.settled());
        if !self.timers.borrow_mut().insists(record.id, wish, asked.settled(), at_once) {
            return Ok(Step::Rest);
        }
        tracing::info!(volume = record.spec.name, ?trip, heartbeat = ?wish.heartbeat, "its timers change");
        self.command_timers(record, VolumeCommand::ChangeTimers { to: wish }).await?;
        Ok(Step::Progress)
    }

    async fn take_up(&self, record: &VolumeRecord, store: StoreId) -> Result<Step, AnswerError> {
        let request = ShardRequest::TakeUpTimers { group: record.group };
        volumes::shard(&self.rpc, store, &request).await?;
        Ok(Step::Progress)
    }

    async fn leader_takes_up(&self, record: &VolumeRecord, voters: &Voters) -> Result<Step, AnswerError> {
        let (leader, store, _) = voters.leader();
        // A witness leads nothing for long.
        let next = voters.followers().find(|(.., report)| !report.is_witness);
        let Some((next, ..)) = next else { return self.take_up(record, *store).await };
        self.timers.borrow_mut().notes.entry(record.id).or_default().led.get_or_insert(*leader);
        self.hand_over(record, voters, *next).await?;
        Ok(Step::Progress)
    }

    async fn hand_over(
        &self,
        record: &VolumeRecord,
        voters: &Voters,
        to: ReplicaId,
    ) -> Result<(), AnswerError> {
        let request = ShardRequest::Transfer { group: record.group, to };
        volumes::shard(&self.rpc, voters.leader().1, &request).await?;
        Ok(())
    }

    async fn command_timers(&self, record: &VolumeRecord, command: VolumeCommand) -> Result<(), AnswerError> {
        self.timers.borrow_mut().notes.entry(record.id).or_default().changing = true;
        let stores = record.stores();
        volumes::control(&self.rpc, record.group, &stores, &command, COMMAND_PATIENCE).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_counts_only_if_it_stays_the_same() {
        let timers = |ms| Timers::of_heartbeat(Duration::from_millis(ms));
        let (id, now) = (VolumeId(1), timers(50));
        let mut ledger = Ledger::default();
        for _ in 1..SLOWER_AFTER {
            assert!(!ledger.insists(id, timers(100), now, false));
        }
        assert!(!ledger.insists(id, now, now, false), "it was for a moment");
        for _ in 1..SLOWER_AFTER {
            assert!(!ledger.insists(id, timers(100), now, false));
        }
        assert!(!ledger.insists(id, timers(200), now, false), "another wish counts anew");
        assert!((1..SLOWER_AFTER).any(|_| ledger.insists(id, timers(200), now, false)));
        for _ in 1..FASTER_AFTER {
            assert!(!ledger.insists(id, timers(20), now, false), "faster timers have time");
        }
        assert!(ledger.insists(id, timers(20), now, false));
        assert!(ledger.insists(VolumeId(2), timers(20), now, true), "what a user asks for comes at once");
    }
}
