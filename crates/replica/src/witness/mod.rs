//! A witness: a voter of a volume's group that keeps the log and the fencing state, and no blocks (INV-WITNESS).
//!
//! With two data replicas and one witness in three places, the loss of any one of them leaves a majority. What it holds
//! of an entry is the second copy while a data replica is away, so an entry goes from its log only when every data voter
//! is known to have it, durably and committed (`past::everywhere`), or when its log is beyond its budget: then
//! there is one full copy, and it says so. `keeper` decides that, and when it campaigns.
//!
//! It is an ordinary voter: what it grants, acknowledges and repeats to others follows from its log as anybody's does.
//! It serves nobody: there is no code here that answers a session with anything but where else to ask. It never sends a
//! snapshot (`network.rs`), and nobody takes one from it (`host.rs`).
//!
//! How it could be broken: by a checkpoint that covers more than what may go from the log, since the log is purged up to
//! it; so `Witness::cover` is the only place where one is made.

mod hosting;
mod keeper;
mod machine;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_store::ReplicaIdentity;
use holdfast_types::{GroupId, LogIndex, ReplicaId, VolumeId, limits};
use tokio::sync::Notify;

use crate::config::Timers;
use crate::group::{Group, GroupError};
use crate::host::Host;
use crate::messages::{DataReply, DataRequest, ReplicaReport};
use crate::past;
use machine::WitnessMachine;

/// The witnesses of a store.
pub(crate) struct Witnesses {
    of: RefCell<BTreeMap<GroupId, Rc<Witness>>>,
    /// The store takes witnesses, and no data.
    only: Cell<bool>,
    /// Payload that the log of one may hold, in bytes.
    budget: Cell<u64>,
}

impl Default for Witnesses {
    fn default() -> Self {
        Self { of: RefCell::default(), only: Cell::new(false), budget: Cell::new(limits::WITNESS_LOG_BYTES) }
    }
}

impl Witnesses {
    pub(crate) fn get(&self, group: GroupId) -> Option<Rc<Witness>> {
        self.of.borrow().get(&group).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Rc<Witness>> {
        self.of.borrow().values().cloned().collect()
    }

    pub(crate) fn take(&self, id: ReplicaIdentity) -> Option<Rc<Witness>> {
        let mut of = self.of.borrow_mut();
        let is_it = of.get(&id.group).is_some_and(|witness| witness.group.id() == id);
        if is_it { of.remove(&id.group) } else { None }
    }

    pub(crate) async fn stop(&self) {
        let all: Vec<Rc<Witness>> = std::mem::take(&mut *self.of.borrow_mut()).into_values().collect();
        for witness in all {
            witness.stop().await;
        }
    }

    /// INV-PLACE: data stands on no witness node, and a witness on nothing else, whatever anybody asks for.
    pub(crate) fn check_takes(&self, witness: bool) -> Result<(), GroupError> {
        if self.only.get() == witness {
            return Ok(());
        }
        let why = if witness {
            "this node holds data: a witness stands on a node that was made with --witness"
        } else {
            "this node is a witness: it takes no data"
        };
        Err(GroupError::Refused(why.into()))
    }
}

impl Host {
    /// From now on the store takes witnesses, and no data. A log of theirs may hold so many bytes of payload.
    pub fn take_witnesses_only(&self, budget_bytes: u64) {
        self.witnesses.only.set(true);
        self.witnesses.budget.set(budget_bytes);
    }

    /// A witness that runs here.
    pub fn witness(&self, group: GroupId) -> Option<Rc<Witness>> {
        self.witnesses.get(group)
    }

    /// Every witness that runs here.
    pub fn witnesses(&self) -> Vec<Rc<Witness>> {
        self.witnesses.all()
    }
}

/// A running witness.
pub struct Witness {
    of: VolumeId,
    group: Rc<Group>,
    machine: Rc<WitnessMachine>,
    /// The timers of a volume whose state tells none.
    defaults: Timers,
    /// Why it makes no more checkpoints.
    fault: RefCell<Option<String>>,
    looks: Cell<u64>,
    stopped: Notify,
    is_stopped: Cell<bool>,
}

impl Witness {
    /// Its volume.
    pub fn of(&self) -> VolumeId {
        self.of
    }

    /// Its group.
    pub fn group(&self) -> &Rc<Group> {
        &self.group
    }

    /// Payload that its log holds, in bytes.
    pub fn held_bytes(&self) -> u64 {
        self.group.log().held_bytes()
    }

    /// How often it has looked what may go from its log since it runs.
    pub fn looks(&self) -> u64 {
        self.looks.get()
    }

    /// Why the replica does not do its work any more and must be replaced; a store that failed is another matter.
    pub fn fault(&self) -> Option<String> {
        self.fault.borrow().clone().or_else(|| self.group.fault())
    }

    /// What it has applied.
    pub(crate) fn state(&self) -> holdfast_protocol::volume::VolumeState {
        self.machine.state()
    }

    pub(crate) async fn stop(&self) {
        self.is_stopped.set(true);
        self.stopped.notify_waiters();
        self.machine.wake();
        self.group.stop().await;
    }

    /// Lets Raft run with the timers that the volume's state asks for: voters' leases are equal.
    pub async fn take_up_timers(&self) -> Result<(), GroupError> {
        self.group.reload(self.timers_to_run()).await
    }

    pub(crate) fn timers_to_run(&self) -> Timers {
        self.machine.state().timers().with_defaults(self.defaults).run()
    }

    fn is_stopped(&self) -> bool {
        self.is_stopped.get()
    }

    fn purged(&self) -> LogIndex {
        self.group.log().purged().map_or(LogIndex::ZERO, |id| id.index)
    }

    /// The data voters that need more than its log, as far as anybody has told it, and up to where everybody has
    /// everything.
    fn short_of(&self, host: &Host) -> (Vec<ReplicaId>, LogIndex) {
        let group = self.group.id().group;
        let purged = self.purged();
        let voters = self.group.data_voters();
        let everywhere =
            past::known_everywhere(host, group, &voters).max(self.machine.file().newest().everywhere);
        if everywhere >= purged {
            return (Vec::new(), everywhere);
        }
        let known = |voter: &ReplicaId| past::known_everywhere(host, group, &[*voter]);
        let short = voters.into_iter().filter(|voter| known(voter) < purged).collect();
        (short, everywhere)
    }

    /// Why it neither campaigns nor is worth electing: it has purged what a data voter lacks, and could not give it.
    pub(crate) fn barred(&self, host: &Host) -> Option<String> {
        let (short, everywhere) = self.short_of(host);
        if short.is_empty() {
            return None;
        }
        let list = short.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        Some(format!(
            "its log was purged up to {} when it was beyond its budget, and replica {list} is known to have \
             everything up to {everywhere} only: there is one full copy, and this witness does not campaign",
            self.purged()
        ))
    }

    /// Answers what anybody may ask a replica: how it is. Everything else is served elsewhere.
    pub fn answer(&self, host: &Host, request: &DataRequest) -> DataReply {
        if matches!(request, DataRequest::Report { .. }) {
            return DataReply::Report(Box::new(self.report(host)));
        }
        let own = self.group.id().replica;
        let leader = self.group.leader().filter(|(leader, _)| *leader != own).map(|(_, store)| store);
        DataReply::Elsewhere { leader, why: "this replica is a witness: it serves nobody".into() }
    }

    fn report(&self, host: &Host) -> ReplicaReport {
        let state = self.machine.state();
        let group = self.group.report();
        ReplicaReport {
            timers: state.timers().with_defaults(self.defaults),
            epoch: state.epoch(),
            holder: state.holder().map(|holder| holder.node.to_string()).unwrap_or_default(),
            size: state.size().0,
            snapshots: state.snapshots().len() as u32,
            used_bytes: self.held_bytes(),
            since_scrub_seconds: u64::MAX,
            fault: self.fault().unwrap_or_default(),
            is_full: self.group.log().is_full(),
            is_witness: true,
            past_budget: self.barred(host).unwrap_or_default(),
            ..group
        }
    }
}
