//! Keeping the session's lease: renewals, and what they bring along.

use std::rc::{Rc, Weak};
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_env::net::Lane;
use holdfast_protocol::planted::is_planted;
use holdfast_replica::messages::{DataReply, DataRequest};

use crate::calls;
use crate::session::{Closed, Session};

/// Renewals per lease.
const RENEWALS: u32 = 4;

/// Renews until the session is closed.
pub(crate) async fn keep(session: Weak<Session>) {
    loop {
        let Some(this) = session.upgrade() else { return };
        if this.closed_now().is_some() {
            return;
        }
        let interval = this.lease_length() / RENEWALS;
        let renewed = renew(&this).await;
        let pause = if renewed { interval } else { interval / 4 };
        let closed = this.closed_event();
        drop(this);
        // Not closed meanwhile is the usual case.
        let _closed = holdfast_env::timeout(pause, closed).await;
    }
}

/// One renewal; true if it was granted.
async fn renew(session: &Rc<Session>) -> bool {
    let sent = session.with_lease(|lease| lease.on_sent(Instant::now().0));
    let to = session.members().leader_or_next();
    let request =
        DataRequest::Renew { group: session.group(), epoch: session.epoch(), session: session.id() };
    let deadline = (session.lease_length() / 2).max(Duration::from_millis(50));
    match calls::call(session.rpc(), to, Lane::Control, &request, Vec::new(), deadline).await {
        Ok((DataReply::Renewed { epoch, members, leader, size, error_after_seconds, lease_ms }, _)) => {
            if epoch != session.epoch() {
                session.close(Closed::Fenced { current: epoch, why: "a newer epoch exists".into() });
                return false;
            }
            let granted = Duration::from_millis(lease_ms.into());
            let from_answer = is_planted("lease-from-answer");
            session.with_lease(|lease| {
                let counts = if from_answer { lease.on_sent(Instant::now().0) } else { sent };
                lease.on_renewed(counts, granted);
            });
            let stores = members.iter().map(|(_, store)| *store).collect();
            session.members().replace(stores);
            session
                .members()
                .confirm_leader(members.iter().find(|(id, _)| *id == leader).map(|(_, store)| *store));
            session.renewed(size, error_after_seconds);
            true
        }
        Ok((DataReply::Fenced { current, why }, _)) => {
            session.close(Closed::Fenced { current, why });
            false
        }
        Ok((DataReply::Elsewhere { leader, why }, _)) => {
            tracing::debug!(%why, "the lease was not renewed");
            // A leader that cannot renew may have a successor that it has not heard of.
            session.members().set_leader(leader.filter(|leader| *leader != to));
            false
        }
        Ok((other, _)) => {
            tracing::warn!(?other, "a renewal was answered out of turn");
            session.members().set_leader(None);
            false
        }
        Err(error) => {
            tracing::debug!(%error, "the lease was not renewed");
            session.members().set_leader(None);
            false
        }
    }
}
