//! A machine with several stores: a session reads from the replica on another store of its machine first, as it would from
//! one beside it, whoever leads elsewhere.

mod harness;

use std::rc::Rc;
use std::time::Duration;

use harness::{GROUP, Switch, block, members, open, target};
use holdfast_replica::Timers;
use holdfast_session::{AttachOptions, Session, Sessions};
use holdfast_types::{BlockIndex, BlockRange, StoreId};

/// Well within a lease.
const SOON: Duration = Duration::from_millis(300);
/// The store beside which the session runs; no replica stands on it.
const FRONT: u64 = 9;

/// Whether a read is answered though nobody but the replica on the other store of the machine can be asked.
async fn reads_near(place: &std::path::Path, is_near: bool) -> bool {
    let switch = Rc::new(Switch::default());
    let members = members(place, &switch).await;
    let group = |at: usize| members[at].host.volume(GROUP).expect("runs").group().clone();
    let leader = async {
        loop {
            if let Some(leader) = (0..3).find(|at| group(*at).is_leader()) {
                return leader;
            }
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
    };
    let leader = holdfast_env::timeout(Duration::from_secs(20), leader).await.expect("one leads");
    let near = (leader + 1) % 3;
    let store = |at: usize| StoreId(at as u128 + 1);
    let (_front, rpc, node) = open(place, &switch, FRONT, true, Duration::ZERO).await;
    let sessions = Sessions::serve_near(&rpc, if is_near { vec![store(near)] } else { Vec::new() });
    let options = AttachOptions {
        node,
        force: false,
        read_only: false,
        resume: false,
        only_at: None,
        patience: Duration::from_secs(20),
    };
    let timers = Timers::default();
    let session = Session::attach(rpc, &sessions, target(), &options, &timers);
    let session = session.await.expect("attaches");
    let first = BlockRange::new(BlockIndex(0), 1);
    session.write(first, block(7, 1)).await.expect("writes");
    let written = group(leader).position().applied_index();
    group(near).position().reached(written).await;
    // The first read knows who leads.
    session.read(first).await.expect("reads");
    for other in (0..3).filter(|at| *at != near) {
        switch.held.borrow_mut().insert(store(other), Vec::new());
    }
    let read = holdfast_env::timeout(SOON, session.read(first)).await;
    read.is_ok_and(|read| read.expect("reads") == block(7, 1))
}

#[test]
fn a_replica_on_another_store_of_the_machine_is_asked_first() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        assert!(reads_near(&place.path().join("near"), true).await);
    });
    holdfast_env::real::run(async {
        assert!(!reads_near(&place.path().join("far"), false).await, "this shows nothing");
    });
}
