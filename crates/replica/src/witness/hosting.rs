//! How a store makes witnesses, and starts those that stand on it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use holdfast_protocol::volume::VolumeState;
use holdfast_store::EntryId;
use holdfast_store::journal::GroupLog;
use holdfast_store::volume::Checkpoint;
use holdfast_store::witness_file::{WitnessFile, WitnessManifest};
use holdfast_types::{LogIndex, VolumeId};
use tokio::sync::Notify;

use super::machine::WitnessMachine;
use super::{Witness, keeper};
use crate::config::Role;
use crate::group::{Group, GroupError};
use crate::host::{Host, NewReplica, reaches};
use crate::machine::{Position, StateMachine};

impl Host {
    /// Makes a witness, durably. Making it again gives the one that is there. Refused where data stands (INV-PLACE).
    pub async fn create_witness(self: &Rc<Self>, new: &NewReplica) -> Result<Rc<Witness>, GroupError> {
        self.check_loaded()?;
        self.witnesses.check_takes(true)?;
        let turn = self.turn(new.id.group);
        let _one_at_a_time = turn.lock().await;
        if let Some(witness) = self.witness(new.id.group) {
            let other = witness.group().id();
            if other == new.id {
                return Ok(witness);
            }
            return Err(GroupError::Refused(format!(
                "this store holds replica {} of the volume; remove it before another comes here",
                other.replica
            )));
        }
        let log = self.new_log(new.id).await?;
        let made = self.make_witness(new, log.clone()).await;
        if made.is_err() {
            self.not_made(log);
        }
        made
    }

    async fn make_witness(
        self: &Rc<Self>,
        new: &NewReplica,
        log: GroupLog,
    ) -> Result<Rc<Witness>, GroupError> {
        let initial = Checkpoint {
            id: EntryId::default(),
            membership: Bytes::new(),
            state: VolumeState::new(new.size).encode(),
            serve_floor: LogIndex::ZERO,
        };
        self.remember(new.id).await?;
        let identity = self.file_identity(new);
        let file = WitnessFile::create(self.directory(), identity, new.spec_json.clone(), initial).await?;
        self.run_witness(new.volume, log, file, true).await
    }

    pub(crate) async fn open_and_run_witness(
        self: &Rc<Self>,
        manifest: &WitnessManifest,
        log: GroupLog,
    ) -> Result<(), String> {
        let file = WitnessFile::open(self.directory(), &manifest.identity).await;
        let file = file.map_err(|error| error.to_string())?;
        reaches(&log, &file.newest().checkpoint)?;
        let running = self.run_witness(manifest.identity.volume, log, file, false).await;
        running.map(drop).map_err(|error| error.to_string())
    }

    async fn run_witness(
        self: &Rc<Self>,
        of: VolumeId,
        log: GroupLog,
        file: WitnessFile,
        fresh: bool,
    ) -> Result<Rc<Witness>, GroupError> {
        log.set_parked(false);
        let checkpoint = file.newest().checkpoint;
        let state = VolumeState::decode(&checkpoint.state)
            .map_err(|error| GroupError::Stopped(format!("the checkpoint's state is damaged: {error}")))?;
        let position = Rc::new(Position::recovered(Some(&checkpoint), log.committed())?);
        let defaults = self.environment().timers;
        let environment = self.environment().with_timers(state.timers().with_defaults(defaults).run(), fresh);
        let machine = WitnessMachine::new(state, file);
        let inner: Rc<dyn StateMachine> = machine.clone();
        let id = log.id();
        let group = Group::start_as(Role::Witness, &environment, id, log, inner, position, fresh).await?;
        let witness = Rc::new(Witness {
            of,
            group: group.clone(),
            machine,
            defaults,
            fault: RefCell::default(),
            looks: Cell::new(0),
            stopped: Notify::new(),
            is_stopped: Cell::new(false),
        });
        self.register(group);
        self.witnesses.of.borrow_mut().insert(id.group, witness.clone());
        holdfast_env::spawn("witness-log", keeper::keep_log(Rc::downgrade(&witness), Rc::downgrade(self)));
        holdfast_env::spawn(
            "witness-lead",
            keeper::keep_from_leading(Rc::downgrade(&witness), Rc::downgrade(self)),
        );
        Ok(witness)
    }
}
