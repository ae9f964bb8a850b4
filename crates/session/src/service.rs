//! The sessions of one shard, and the calls that come to them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use bytes::Bytes;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::planted::is_planted;
use holdfast_replica::messages::{SESSION, SessionRequest};
use holdfast_types::{GroupId, SessionId, StoreId};
use holdfast_wire::rpc::{Handler, Responder, Rpc};

use crate::session::{Closed, Session};
use crate::usage::SessionUsage;

/// The running sessions of a shard.
#[derive(Default)]
pub struct Sessions {
    running: RefCell<BTreeMap<SessionId, Weak<Session>>>,
    /// By the volume's group; outlives the sessions, so that counters never fall.
    usage: RefCell<BTreeMap<GroupId, Rc<RefCell<SessionUsage>>>>,
    /// Other stores of the same machine.
    near: Rc<[StoreId]>,
}

/// Volumes of which counters are kept.
const USAGES_MAX: usize = 4096;

impl Sessions {
    /// Registers for the shard's calls to sessions.
    pub fn serve(rpc: &Rpc) -> Rc<Self> {
        Self::serve_near(rpc, Vec::new())
    }

    /// As [`Self::serve`], where other shards of the same machine have stores: a replica there is as near as one on this
    /// shard, but for the way to it.
    pub fn serve_near(rpc: &Rpc, near: Vec<StoreId>) -> Rc<Self> {
        let sessions = Rc::new(Self { near: near.into(), ..Self::default() });
        rpc.serve(SESSION, Rc::new(Service(Rc::downgrade(&sessions))));
        sessions
    }

    pub(crate) fn add(&self, session: &Rc<Session>) {
        let mut sessions = self.running.borrow_mut();
        sessions.retain(|_, weak| weak.strong_count() > 0);
        sessions.insert(session.id(), Rc::downgrade(session));
    }

    pub(crate) fn near(&self) -> Rc<[StoreId]> {
        self.near.clone()
    }

    /// The counters that sessions of a group share.
    pub(crate) fn usage_of(&self, group: GroupId) -> Rc<RefCell<SessionUsage>> {
        let mut usage = self.usage.borrow_mut();
        if usage.len() >= USAGES_MAX && !usage.contains_key(&group) {
            usage.retain(|_, counters| Rc::strong_count(counters) > 1);
        }
        usage.entry(group).or_default().clone()
    }

    /// What the sessions of each group did since the daemon started, ended ones included.
    pub fn usage(&self) -> Vec<(GroupId, SessionUsage)> {
        self.usage.borrow().iter().map(|(group, usage)| (*group, usage.borrow().clone())).collect()
    }
}

struct Service(Weak<Sessions>);

impl Handler for Service {
    fn handle(&self, _from: StoreId, _lane: Lane, request: Frame, responder: Responder) {
        let SessionRequest::Fence { session: id, epoch, .. } = match SessionRequest::decode(&request.head) {
            Ok(decoded) => decoded,
            Err(error) => return responder.refuse(error.to_string()),
        };
        let session =
            self.0.upgrade().and_then(|sessions| sessions.running.borrow().get(&id).and_then(Weak::upgrade));
        if let Some(session) = session.filter(|_| !is_planted("fence-not-obeyed")) {
            if session.epoch() >= epoch {
                return responder.refuse("the session holds that epoch or a later one");
            }
            session
                .close(Closed::Fenced { current: epoch, why: "another attachment replaced this one".into() });
        }
        // A session that does not run here any more serves nothing: that confirms it, too.
        responder.reply(Frame::small(Bytes::new()));
    }
}
