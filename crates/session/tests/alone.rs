//! A volume with one replica has a quorum for as long as that replica leads, and no other volume has one for that.

mod group;

use std::rc::Rc;
use std::time::Duration;

use group::{GROUP, Member, Switch, attach, begin, block, first_leads, start_on};
use holdfast_replica::messages::ReplicaReport;
use holdfast_store::testing::{MemoryDisk, simulate};
use holdfast_types::{BlockIndex, BlockRange, LogIndex, ReplicaId, StoreId};

/// Longer than the answers of others count.
const LONG: Duration = Duration::from_secs(5);

fn report(member: &Member) -> ReplicaReport {
    member.host.volume(GROUP).expect("runs").group().report()
}

#[test]
fn who_votes_alone_keeps_its_quorum_though_nobody_answers() {
    let place = tempfile::tempdir().expect("a place");
    simulate(1, async {
        let (switch, disk) = (Rc::new(Switch::default()), MemoryDisk::new(1));
        let member = start_on(place.path(), &switch, 1, true, |_| disk.directory()).await;
        let group = member.host.volume(GROUP).expect("runs").group().clone();
        group.bootstrap(&[(ReplicaId(1), StoreId(1))].into()).await.expect("begins");
        // Its members first, then a leader's first entry.
        group.position().reached(LogIndex(1)).await;
        for _ in 0..3 {
            holdfast_env::sleep(LONG).await;
            let now = report(&member);
            assert!(now.is_leader && now.has_quorum, "{now:?}");
        }
        let session = attach(&member, false).await.expect("attaches");
        session.write(BlockRange::new(BlockIndex(0), 1), block(7, 1)).await.expect("writes");
        assert!(report(&member).has_quorum);
        member.host.stop().await;
    });
}

#[test]
fn a_leader_of_three_that_nobody_answers_has_none() {
    let place = tempfile::tempdir().expect("a place");
    simulate(2, async {
        let switch = Rc::new(Switch::default());
        let mut members = Vec::new();
        for number in 1..=3 {
            let disk = MemoryDisk::new(number);
            let at = place.path().join(format!("n{number}"));
            members.push(start_on(&at, &switch, number, true, |_| disk.directory()).await);
        }
        begin(&members).await;
        first_leads(&members).await;
        assert!(report(&members[0]).has_quorum);
        for other in &members[1..] {
            other.host.stop().await;
        }
        holdfast_env::sleep(LONG).await;
        let now = report(&members[0]);
        assert!(!now.has_quorum, "{now:?}");
        members[0].host.stop().await;
    });
}
