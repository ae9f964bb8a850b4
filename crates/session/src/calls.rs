//! Calls to the replicas of a volume: whom to ask, and whom next.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::net::{Frame, Lane};
use holdfast_replica::messages::{DATA, DataReply, DataRequest};
use holdfast_types::StoreId;
use holdfast_wire::rpc::{CallError, Rpc};
use tokio::sync::Notify;

/// The replicas of a volume as a session knows them.
pub(crate) struct Members {
    stores: RefCell<Vec<StoreId>>,
    leader: Cell<Option<StoreId>>,
    next: Cell<usize>,
    /// Woken whenever a leader has proved itself by renewing the lease.
    confirmed: Notify,
}

impl Members {
    pub(crate) fn new(stores: Vec<StoreId>) -> Self {
        Self {
            stores: RefCell::new(stores),
            leader: Cell::new(None),
            next: Cell::new(0),
            confirmed: Notify::new(),
        }
    }
    pub(crate) fn replace(&self, stores: Vec<StoreId>) {
        if !stores.is_empty() {
            *self.stores.borrow_mut() = stores;
        }
    }
    pub(crate) fn set_leader(&self, leader: Option<StoreId>) {
        self.leader.set(leader);
    }
    /// This one leads: it has renewed the lease.
    pub(crate) fn confirm_leader(&self, leader: Option<StoreId>) {
        self.leader.set(leader);
        self.confirmed.notify_waiters();
    }
    /// Ends when another than `store` has proved to lead: an answer from there need not be waited for.
    pub(crate) async fn led_elsewhere(&self, store: StoreId) {
        loop {
            self.confirmed.notified().await;
            if self.leader.get().is_some_and(|leader| leader != store) {
                return;
            }
        }
    }
    /// Whom to send what only a leader can do: the leader if it is known, else each in turn.
    pub(crate) fn leader_or_next(&self) -> StoreId {
        if let Some(leader) = self.leader.get() {
            return leader;
        }
        let stores = self.stores.borrow();
        let at = self.next.get() % stores.len().max(1);
        self.next.set(at + 1);
        stores.get(at).copied().unwrap_or(StoreId::NIL)
    }
    pub(crate) fn has(&self, store: StoreId) -> bool {
        self.stores.borrow().contains(&store)
    }
    pub(crate) fn others(&self, than: StoreId) -> Vec<StoreId> {
        self.stores.borrow().iter().copied().filter(|store| *store != than).collect()
    }
}

/// One call; the reply with its block data.
pub(crate) async fn call(
    rpc: &Rpc,
    to: StoreId,
    lane: Lane,
    request: &DataRequest,
    body: Vec<Bytes>,
    deadline: Duration,
) -> Result<(DataReply, Bytes), CallError> {
    let frame = Frame { head: request.encode(), body };
    let answer = rpc.call(to, lane, DATA, frame, deadline).await?;
    let reply = DataReply::decode(&answer.head).map_err(|error| CallError::Malformed(error.to_string()))?;
    Ok((reply, answer.into_body()))
}
