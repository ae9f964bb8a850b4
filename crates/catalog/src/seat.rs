//! The place of the catalog's member on a store. A member whose log is lost or cannot be trusted does not run: it may
//! have voted for somebody it does not remember. Its seat stays, says why it is empty, and takes a new member under a
//! new id when the catalog's leader asks for that (INV-TERM: a voter never comes back without its memory). One that has
//! its log asks the others first what they know of it, and is refused likewise if it was put back (INV-ROLLBACK).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use holdfast_env::net::{Frame, Lane};
use holdfast_replica::administration::user_error;
use holdfast_replica::host::usable;
use holdfast_replica::messages::CATALOG;
use holdfast_replica::{Faulty, Host, past};
use holdfast_store::ReplicaIdentity;
use holdfast_store::journal::GroupLog;
use holdfast_store::volume::Checkpoint;
use holdfast_types::{ErrorCode, GroupId, ReplicaId, StoreId, UserError, VolumeId};
use holdfast_wire::rpc::{Handler, Responder};
use tokio::sync::Mutex;

use crate::member::{AnswerError, Member, MemberOptions, checkpoint_of};
use crate::messages::{CatalogAnswer, CatalogRequest, from_frame, to_frame};

/// How long a seat may take to tell who sits there, and to take a new member.
const SEAT_DEADLINE: Duration = Duration::from_secs(3);
/// What the member knows of the others' past.
const PAST_FILE: &str = "catalog-past";
/// Entries that a new member may be behind when it becomes a voter.
const CAUGHT_UP_WITHIN: u64 = 64;

enum Sitting {
    Member(Rc<Member>),
    /// A member that asks the others what they know of it, and why that takes so long.
    Asking(ReplicaIdentity, String),
    /// Nobody; whose log is to be forgotten first, and why nobody runs.
    Nobody(Option<ReplicaIdentity>, String),
}

/// A seat.
pub struct Seat {
    host: Rc<Host>,
    options: MemberOptions,
    sitting: RefCell<Sitting>,
    changing: Mutex<()>,
}

fn identity(replica: ReplicaId) -> ReplicaIdentity {
    ReplicaIdentity { group: GroupId::CATALOG, replica }
}

fn failed(error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("the catalog does not run here: {error}"))
        .hint("its other members replace this one; `holdfast status` shows it")
}

impl Seat {
    /// Starts the member that stands on this store, if it is one of `members`. `stood`: a member has stood here before,
    /// so that a store without one has lost it.
    pub async fn start(
        host: &Rc<Host>,
        members: &BTreeMap<ReplicaId, StoreId>,
        options: MemberOptions,
        stood: bool,
    ) -> Result<Option<Rc<Self>>, UserError> {
        let store = host.identity().store;
        let Some(first) = members.iter().find(|(_, at)| **at == store).map(|(id, _)| *id) else {
            return Ok(None);
        };
        let (sitting, asking) = Self::recover(host, first, options, stood).await?;
        let seat =
            Self { host: host.clone(), options, sitting: RefCell::new(sitting), changing: Mutex::new(()) };
        let seat = Rc::new(seat);
        seat.tell();
        if let Some((log, checkpoint)) = asking {
            holdfast_env::spawn("catalog-seat", Self::ask_of_past(Rc::downgrade(&seat), log, checkpoint));
        }
        host.environment().rpc.serve(CATALOG, Rc::new(Service(Rc::downgrade(&seat))));
        if let Some(member) = seat.member().filter(|member| member.is_empty() && !stood)
            && members.keys().next() == Some(&first)
        {
            member.group.bootstrap(members).await.map_err(|error| user_error(&error))?;
        }
        Ok(Some(seat))
    }

    async fn recover(
        host: &Rc<Host>,
        first: ReplicaId,
        options: MemberOptions,
        stood: bool,
    ) -> Result<(Sitting, Option<(GroupLog, Checkpoint)>), UserError> {
        let nobody = |id, why| Ok((Sitting::Nobody(id, why), None));
        let (id, log, fresh) = match host.claim_group(GroupId::CATALOG) {
            Some(recovered) => match usable(&recovered) {
                Ok(()) => (recovered.id, recovered.log, false),
                Err(why) => return nobody(Some(recovered.id), why),
            },
            None if stood => {
                return nobody(None, "its log is gone: the store was emptied".into());
            }
            // INV-TERM: a power cut came between its end and its successor.
            None if host.may_make(identity(first)).is_err() => {
                return nobody(None, "its first member was given up: it takes one under a new id".into());
            }
            None if host.journal().doubt() => {
                let why = "part of the journal is unreadable and may have held its vote";
                return nobody(None, why.into());
            }
            None => {
                let id = identity(first);
                (id, host.journal().create_group(id).await.map_err(failed)?, true)
            }
        };
        host.remember_in(id, PAST_FILE.into()).await.map_err(failed)?;
        if !fresh && !log.is_unused() {
            let checkpoint = match checkpoint_of(host, id).await {
                Ok(checkpoint) => checkpoint,
                Err(error) => return nobody(Some(id), error.message),
            };
            return Ok((Sitting::Asking(id, String::new()), Some((log, checkpoint))));
        }
        match Member::run(host, id, log, fresh, options).await {
            Ok(member) => Ok((Sitting::Member(member), None)),
            Err(error) => nobody(Some(id), error.message),
        }
    }

    /// Runs the member once the others have said what they know of it.
    async fn ask_of_past(seat: Weak<Self>, log: GroupLog, checkpoint: Checkpoint) {
        let id = log.id();
        let (host, options) = match seat.upgrade() {
            Some(seat) => (Rc::downgrade(&seat.host), seat.options),
            None => return,
        };
        let said = |why: String| {
            if let Some(seat) = seat.upgrade() {
                *seat.sitting.borrow_mut() = Sitting::Asking(id, why);
                seat.tell();
            }
        };
        let may_run = past::may_run(host, log.clone(), checkpoint, said).await;
        let Some(seat) = seat.upgrade() else { return };
        let sitting = match may_run {
            Ok(()) => match Member::run(&seat.host, id, log, false, options).await {
                Ok(member) => Sitting::Member(member),
                Err(error) => Sitting::Nobody(Some(id), error.message),
            },
            Err(why) => Sitting::Nobody(Some(id), why),
        };
        *seat.sitting.borrow_mut() = sitting;
        seat.tell();
    }

    fn member(&self) -> Option<Rc<Member>> {
        match &*self.sitting.borrow() {
            Sitting::Member(member) => Some(member.clone()),
            Sitting::Asking(..) | Sitting::Nobody(..) => None,
        }
    }

    /// Whether a member stands here, running or about to.
    pub fn is_taken(&self) -> bool {
        !matches!(&*self.sitting.borrow(), Sitting::Nobody(..))
    }

    /// Lets the store's report say what is wrong.
    fn tell(&self) {
        let fault = match &*self.sitting.borrow() {
            Sitting::Member(_) => None,
            // Nothing to speak of while the answers are on their way.
            Sitting::Asking(_, why) if why.is_empty() => None,
            Sitting::Asking(id, why) => {
                Some(Faulty { id: *id, volume: VolumeId::NIL, why: why.clone(), repairing: true })
            }
            Sitting::Nobody(id, why) => {
                tracing::error!(%why, "the catalog's member does not run");
                let id = id.unwrap_or(identity(ReplicaId(0)));
                Some(Faulty { id, volume: VolumeId::NIL, why: why.clone(), repairing: false })
            }
        };
        self.host.set_faulty(GroupId::CATALOG, fault);
    }

    fn answer_for_seat(&self) -> CatalogAnswer {
        match &*self.sitting.borrow() {
            Sitting::Member(member) => {
                CatalogAnswer::Seat { replica: Some(member.group.id().replica), why: String::new() }
            }
            Sitting::Asking(id, why) => CatalogAnswer::Seat { replica: Some(id.replica), why: why.clone() },
            Sitting::Nobody(_, why) => CatalogAnswer::Seat { replica: None, why: why.clone() },
        }
    }

    async fn sit(&self, replica: ReplicaId) -> Result<CatalogAnswer, UserError> {
        let _one_at_a_time = self.changing.lock().await;
        let before = match &*self.sitting.borrow() {
            Sitting::Member(_) | Sitting::Asking(..) => return Ok(self.answer_for_seat()),
            Sitting::Nobody(before, _) => *before,
        };
        if let Some(before) = before {
            self.host.note_destroyed(before).await.map_err(failed)?;
        }
        // INV-TERM: the request may be an old one, of a member that was lost as well.
        let id = identity(replica);
        self.host.may_make(id).map_err(|error| user_error(&error))?;
        if let Some(before) = before {
            self.host.journal().drop_group(before).await.map_err(failed)?;
        }
        for files in ["catalog-state", PAST_FILE] {
            for name in self.host.directory().list(files).await.map_err(failed)? {
                self.host.directory().remove(&name).await.map_err(failed)?;
            }
        }
        self.host.directory().sync().await.map_err(failed)?;
        let log = self.host.journal().create_group(id).await.map_err(failed)?;
        self.host.remember_in(id, PAST_FILE.into()).await.map_err(failed)?;
        let member = Member::run(&self.host, id, log, true, self.options).await;
        *self.sitting.borrow_mut() = match member {
            Ok(member) => Sitting::Member(member),
            Err(error) => Sitting::Nobody(Some(id), error.message),
        };
        tracing::warn!(%replica, "a new member of the catalog was made here");
        self.tell();
        Ok(self.answer_for_seat())
    }

    async fn answer(&self, request: CatalogRequest) -> CatalogAnswer {
        match request {
            CatalogRequest::Seat => self.answer_for_seat(),
            CatalogRequest::Sit { replica } => {
                self.sit(replica).await.unwrap_or_else(|error| CatalogAnswer::Refused { error })
            }
            request => match self.member() {
                Some(member) => member.answer(request).await,
                None => CatalogAnswer::Elsewhere { leader: None },
            },
        }
    }
}

struct Service(Weak<Seat>);

impl Handler for Service {
    fn handle(&self, _from: StoreId, _lane: Lane, request: Frame, responder: Responder) {
        let Some(seat) = self.0.upgrade() else { return responder.refuse("the shard is stopping") };
        let request: CatalogRequest = match from_frame(request) {
            Ok(request) => request,
            Err(error) => return responder.refuse(error.to_string()),
        };
        holdfast_env::spawn("catalog-call", async move {
            match to_frame(&seat.answer(request).await) {
                Ok(frame) => responder.reply(frame),
                Err(error) => responder.refuse(error.to_string()),
            }
        });
    }
}

impl Member {
    async fn seat(&self, store: StoreId, request: &CatalogRequest) -> Option<Option<ReplicaId>> {
        let frame = to_frame(request).ok()?;
        let answer = self.rpc.call(store, Lane::Control, CATALOG, frame, SEAT_DEADLINE).await.ok()?;
        match from_frame(answer) {
            Ok(CatalogAnswer::Seat { replica, .. }) => Some(replica),
            other => {
                tracing::warn!(%store, ?other, "a seat of the catalog does not tell who sits there");
                None
            }
        }
    }

    /// As leader: fills empty seats with new members, one small step at a time (INV-MEMBER). A seat that does not
    /// answer is left as it is.
    pub(crate) async fn look_at_seats(&self) -> Result<(), AnswerError> {
        let report = self.group.report();
        if !report.settled_membership {
            return Ok(self.group.finish_change().await?);
        }
        let members = self.group.members();
        let mut stores: Vec<StoreId> = members.iter().map(|(_, store)| *store).collect();
        stores.sort_unstable();
        stores.dedup();
        let asked = stores
            .iter()
            .map(|store| async move { (*store, self.seat(*store, &CatalogRequest::Seat).await) });
        for (store, answer) in join_all(asked).await {
            let Some(sitting) = answer else { continue };
            let Some(replica) = sitting else {
                // Drawn, not counted: no leader, however old, can name an id that was used before.
                let replica = ReplicaId((holdfast_env::random_u64() >> 16) | (1 << 47));
                tracing::warn!(%store, %replica, "an empty seat of the catalog is filled");
                self.seat(store, &CatalogRequest::Sit { replica }).await;
                return Ok(());
            };
            if report.voters.contains(&replica) {
                continue;
            }
            if !report.learners.contains(&replica) {
                return Ok(self.group.add_learner(replica, store).await?);
            }
            let matched = report.matched.iter().find(|(id, _)| *id == replica).map_or(0, |(_, at)| at.0);
            if matched == 0 || matched + CAUGHT_UP_WITHIN < report.last_log.0 {
                continue;
            }
            let on_store = |id: &ReplicaId| members.iter().any(|(other, at)| other == id && *at == store);
            let mut voters: Vec<ReplicaId> =
                report.voters.iter().copied().filter(|id| !on_store(id)).collect();
            voters.push(replica);
            return Ok(self.group.change_voters(&voters).await?);
        }
        Ok(())
    }
}
