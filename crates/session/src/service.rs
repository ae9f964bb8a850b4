//! The sessions of one shard, and the calls that come to them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use bytes::Bytes;
use holdfast_env::net::{Frame, Lane};
use holdfast_replica::messages::{SESSION, SessionRequest};
use holdfast_types::{SessionId, StoreId};
use holdfast_wire::rpc::{Handler, Responder, Rpc};

use crate::session::{Closed, Session};

/// The running sessions of a shard.
#[derive(Default)]
pub struct Sessions(RefCell<BTreeMap<SessionId, Weak<Session>>>);

impl Sessions {
    /// Registers for the shard's calls to sessions.
    pub fn serve(rpc: &Rpc) -> Rc<Self> {
        let sessions = Rc::new(Self::default());
        rpc.serve(SESSION, Rc::new(Service(Rc::downgrade(&sessions))));
        sessions
    }

    pub(crate) fn add(&self, session: &Rc<Session>) {
        let mut sessions = self.0.borrow_mut();
        sessions.retain(|_, weak| weak.strong_count() > 0);
        sessions.insert(session.id(), Rc::downgrade(session));
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
            self.0.upgrade().and_then(|sessions| sessions.0.borrow().get(&id).and_then(Weak::upgrade));
        if let Some(session) = session {
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
