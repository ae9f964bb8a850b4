//! A disk that does not answer, in a node that is well otherwise.

mod group;

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use group::stalling::Stall;
use group::{GROUP, Member, Switch, attach, begin, block, first_leads, start, start_on};
use holdfast_env::net::{Frame, Lane};
use holdfast_replica::messages::{DATA, DataReply, DataRequest};
use holdfast_session::Session;
use holdfast_types::{BlockIndex, BlockRange, LogIndex, ReplicaId, StoreId};

const FIRST: BlockRange = BlockRange { start: BlockIndex(0), count: 1 };
const LONG: Duration = Duration::from_secs(20);

async fn within<T>(work: impl Future<Output = T>) -> T {
    holdfast_env::timeout(LONG, work).await.expect("within 20 s")
}

/// Three members, of which `stalling` has a disk that can stall; the first leads.
async fn members(place: &Path, switch: &Rc<Switch>, stalling: u64, stall: &Stall) -> Vec<Member> {
    let mut members = Vec::new();
    for number in 1..=3 {
        members.push(if number == stalling {
            let path = place.join(format!("n{number}"));
            start_on(&path, switch, number, true, |inner| stall.over(inner)).await
        } else {
            start(place, switch, number, true).await
        });
    }
    begin(&members).await;
    within(first_leads(&members)).await;
    members
}

async fn until_hung(member: &Member, hung: bool) {
    let look = async {
        // Time alone makes a disk a hung one: there is no event to wait for.
        while member.host.journal().is_hung() != hung {
            holdfast_env::sleep(Duration::from_millis(10)).await;
        }
    };
    within(look).await;
}

/// What one store answers to a session's read.
async fn read_at(from: &Member, store: StoreId, session: &Session) -> (DataReply, Bytes) {
    let request = DataRequest::Read {
        group: GROUP,
        range: FIRST,
        epoch: session.epoch(),
        session: session.id(),
        floor: LogIndex::ZERO,
    };
    let frame = Frame::small(request.encode());
    let answer = within(from.rpc.call(store, Lane::Bulk, DATA, frame, LONG)).await.expect("answers");
    (DataReply::decode(&answer.head).expect("is understood"), answer.into_body())
}

#[test]
fn a_follower_whose_disk_hangs_sends_readers_elsewhere() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, stall) = (Rc::new(Switch::default()), Stall::default());
        let members = members(place.path(), &switch, 2, &stall).await;
        let session = attach(&members[1], false).await.expect("attaches");
        session.write(FIRST, block(7, 1)).await.expect("writes");
        within(session.read(FIRST)).await.expect("reads");
        let (before, _) = read_at(&members[0], StoreId(2), &session).await;
        assert!(matches!(before, DataReply::Blocks { .. }), "{before:?}");
        stall.begin();
        within(session.write(FIRST, block(8, 1))).await.expect("the others are a majority");
        until_hung(&members[1], true).await;
        let (meanwhile, _) = read_at(&members[0], StoreId(2), &session).await;
        assert!(
            matches!(&meanwhile, DataReply::Elsewhere { leader: Some(leader), .. } if *leader == StoreId(1)),
            "{meanwhile:?}"
        );
        assert_eq!(within(session.read(FIRST)).await.expect("is read elsewhere"), block(8, 1));
        stall.end();
        until_hung(&members[1], false).await;
        let last = members[0].host.volume(GROUP).expect("runs").group().position().applied_index();
        within(members[1].host.volume(GROUP).expect("runs").group().position().reached(last)).await;
        let (after, body) = read_at(&members[0], StoreId(2), &session).await;
        assert!(matches!(after, DataReply::Blocks { .. }), "{after:?}");
        assert_eq!(body, block(8, 1));
    });
}

/// The core of a leader that was superseded waits for its disk, so it takes itself for the leader as ever.
#[test]
fn a_leader_that_waits_for_its_disk_sends_nobody_back_to_itself() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (switch, stall) = (Rc::new(Switch::default()), Stall::default());
        let members = members(place.path(), &switch, 1, &stall).await;
        let session = attach(&members[2], false).await.expect("attaches");
        session.write(FIRST, block(7, 1)).await.expect("writes");
        stall.begin();
        let group = |at: usize| members[at].host.volume(GROUP).expect("runs").group().clone();
        // That it has gone is what the old leader cannot see: it must save a vote first.
        let seen = group(0).transfer_to(ReplicaId(2)).await;
        assert!(seen.is_err(), "the old leader has seen that it leads no more: this shows nothing");
        let led = async {
            while !group(1).is_leader() {
                group(1).leadership_changed().await;
            }
        };
        within(led).await;
        assert!(group(0).is_leader(), "the old leader knows by now: this shows nothing");
        // Past the lease that the old leader granted.
        holdfast_env::sleep(2 * group(2).timers().session_lease).await;
        assert_eq!(within(session.read(FIRST)).await.expect("reads"), block(7, 1));
        within(session.write(FIRST, block(8, 1))).await.expect("writes");
        assert_eq!(within(session.read(FIRST)).await.expect("reads"), block(8, 1));
        stall.end();
    });
}
