//! Two data replicas and a witness (INV-WITNESS): the loss of any one of them loses nothing, what the witness alone holds
//! comes to the other data replica, and one that has given up more than its log is worth leads nobody.

mod group;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use group::steps::{Outcome, at, attached, expect, leads, test, until, within};
use group::{GROUP, Kind, Member, Switch, block, first_leads, replica, start, start_as};
use holdfast_env::net::Frame;
use holdfast_protocol::planted;
use holdfast_replica::messages::{DataReply, DataRequest, RAFT, RaftCall, ReplicaReport, raft_call};
use holdfast_replica::{Group, GroupError, Peer};
use holdfast_session::Session;
use holdfast_types::{BlockIndex, BlockRange, LogIndex, ReplicaId, StoreId};
use holdfast_wire::rpc::CallHead;

/// More than any test writes.
const PLENTY: u64 = 1 << 30;
/// Blocks of a large write.
const MEBIBYTE: u32 = 256;

fn group_of(member: &Member) -> Rc<Group> {
    match member.host.volume(GROUP) {
        Some(volume) => volume.group().clone(),
        None => member.host.witness(GROUP).expect("runs").group().clone(),
    }
}

async fn witness(place: &Path, switch: &Rc<Switch>, fresh: bool, budget: u64) -> Member {
    let path = place.join("n3");
    start_as(&path, switch, 3, fresh, |inner| inner, Kind::Witness(budget)).await
}

/// Two data replicas, the first of which leads, and a witness.
async fn members(place: &Path, switch: &Rc<Switch>, budget: u64) -> Outcome<Vec<Member>> {
    let mut members = Vec::new();
    for number in 1..=2 {
        members.push(start(place, switch, number, true).await);
    }
    members.push(witness(place, switch, true, budget).await);
    let peer = |n: u64| (n, Peer { store: StoreId(n.into()), witness: n == 3 });
    let voters: BTreeMap<u64, Peer> = (1..=3).map(peer).collect();
    group_of(&members[0]).bootstrap_with(voters).await.map_err(|error| error.to_string())?;
    within(30, "the first leads", data_leads(&members)).await?;
    within(30, "the first leads", first_leads(&members[..2])).await?;
    Ok(members)
}

/// Ends when a data replica leads.
async fn data_leads(members: &[Member]) {
    while !members[..2].iter().any(leads) {
        holdfast_env::sleep(Duration::from_millis(5)).await;
    }
}

/// Nothing goes to this store or comes from it any more, or all does again.
fn cut(switch: &Switch, number: u64, cut: bool) {
    for other in (1..=4).filter(|other| *other != number) {
        let (one, two) = (StoreId(number.into()), StoreId(other.into()));
        for link in [(one, two), (two, one)] {
            let mut links = switch.cut.borrow_mut();
            let _was_so = if cut { links.insert(link) } else { links.remove(&link) };
        }
    }
}

async fn write_large(session: &Session, number: u64, value: u8) -> Outcome<()> {
    let range = BlockRange::new(BlockIndex(number * u64::from(MEBIBYTE)), MEBIBYTE);
    let written = within(30, "a write", session.write(range, block(value, MEBIBYTE))).await?;
    written.map_err(|error| error.to_string())
}

async fn expect_large(session: &Session, number: u64, value: u8) -> Outcome<()> {
    let first = number * u64::from(MEBIBYTE);
    for block in [first, first + u64::from(MEBIBYTE) - 1] {
        expect(session, block, value).await?;
    }
    Ok(())
}

async fn digest(member: &Member, index: LogIndex) -> Outcome<String> {
    let volume = member.host.volume(GROUP).ok_or("no data stands there")?;
    match volume.answer(DataRequest::Digest { group: GROUP, index }, bytes::Bytes::new()).await.0 {
        DataReply::Digest { digest, bad_blocks: 0, .. } => Ok(digest),
        other => Err(format!("a digest was answered {other:?}")),
    }
}

/// Both data replicas hold the same once both have everything.
async fn both_equal(members: &[Member]) -> Outcome<()> {
    let last = || members[..2].iter().map(|member| group_of(member).report().last_log).max();
    let applied = |index| members[..2].iter().all(|member| group_of(member).report().applied >= index);
    until("both have everything", || last().is_some_and(applied)).await?;
    let index = last().unwrap_or_default();
    let (one, two) = (digest(&members[0], index).await?, digest(&members[1], index).await?);
    if one == two { Ok(()) } else { Err(format!("the data replicas differ at {index}: {one} and {two}")) }
}

fn report(witness: &Member) -> ReplicaReport {
    let running = witness.host.witness(GROUP).expect("runs");
    match running.answer(&witness.host, &DataRequest::Report { group: GROUP }) {
        DataReply::Report(report) => *report,
        other => panic!("a report was answered {other:?}"),
    }
}

/// A guest that writes one block after another and remembers what was acknowledged.
struct Guest {
    stop: Rc<Cell<bool>>,
    acknowledged: Rc<RefCell<BTreeMap<u64, u8>>>,
    count: Rc<Cell<u64>>,
    ended: tokio::sync::oneshot::Receiver<()>,
}

impl Guest {
    fn start(session: Rc<Session>) -> Self {
        let (stop, acknowledged) = (Rc::new(Cell::new(false)), Rc::new(RefCell::new(BTreeMap::new())));
        let count = Rc::new(Cell::new(0));
        let (ending, ended) = tokio::sync::oneshot::channel();
        let (stopped, noted, counted) = (stop.clone(), acknowledged.clone(), count.clone());
        holdfast_env::spawn("guest", async move {
            while !stopped.get() {
                let n = counted.get();
                let (number, value) = (n % 61, (n / 61 % 250) as u8 + 1);
                session.write(at(number), block(value, 1)).await.expect("a write never fails");
                noted.borrow_mut().insert(number, value);
                counted.set(n + 1);
                holdfast_env::sleep(Duration::from_millis(1)).await;
            }
            // Whoever waited for it may have given up.
            let _ = ending.send(());
        });
        Self { stop, acknowledged, count, ended }
    }

    async fn more(&self, count: u64) -> Outcome<()> {
        let enough = self.count.get() + count;
        until("I/O goes on", || self.count.get() >= enough).await
    }

    async fn end(self) -> Outcome<BTreeMap<u64, u8>> {
        self.stop.set(true);
        within(30, "the last write", self.ended).await?.map_err(|error| error.to_string())?;
        Ok(self.acknowledged.take())
    }
}

#[test]
fn the_loss_of_any_one_of_the_three_loses_nothing_and_writes_go_on() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut members = members(place, &switch, PLENTY).await?;
        // The guest's node is never lost: it is the second data replica's when that goes.
        for victim in [3, 2, 1] {
            let home = if victim == 2 { 0 } else { 1 };
            let session = attached(&members[home]).await?;
            let guest = Guest::start(session.clone());
            guest.more(50).await?;
            cut(&switch, victim, true);
            guest.more(200).await?;
            if victim == 3 {
                // Its daemon goes, too, and comes back with what its disk has.
                members[2].muted.set(true);
                members.remove(2).host.stop().await;
                members.push(witness(place, &switch, false, PLENTY).await);
            }
            cut(&switch, victim, false);
            guest.more(50).await?;
            for (number, value) in guest.end().await? {
                expect(&session, number, value).await?;
            }
            both_equal(&members).await?;
            until("a data replica leads", || members[..2].iter().any(leads)).await?;
            within(30, "the session ends", session.detach(Duration::from_secs(20)))
                .await?
                .map_err(|error| error.to_string())?;
        }
        assert_eq!(report(&members[2]).past_budget, "");
        Ok(())
    });
}

/// The second data replica is away while the first acknowledges with the witness, and then the first is gone.
async fn tail_of_the_witness(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let members = members(place, &switch, PLENTY).await?;
    let session = attached(&members[0]).await?;
    expect_nothing(&session).await?;
    cut(&switch, 2, true);
    let behind = group_of(&members[1]).report().last_log;
    // Enough for the witness to look what may go from its log.
    for number in 0..9 {
        write_large(&session, number, number as u8 + 1).await?;
    }
    let acknowledged = group_of(&members[0]).report().committed;
    let log = group_of(&members[2]).log().clone();
    until("the witness has everything", || report(&members[2]).applied >= acknowledged).await?;
    // Two media hold what was acknowledged since. One look may have begun before that.
    let purged = || log.purged().map_or(LogIndex::ZERO, |id| id.index);
    let looks = || members[2].host.witness(GROUP).expect("runs").looks();
    let seen = looks();
    until("the witness has looked what may go", || purged() > behind || looks() >= seen + 2).await?;
    let purged = purged();
    if purged > behind || log.flushed() < acknowledged {
        return Err(format!(
            "the second copy is gone: the witness's log begins after {purged}, the other data replica ends at {behind}"
        ));
    }
    cut(&switch, 1, true);
    cut(&switch, 2, false);
    cut(&switch, 1, true);
    until("the second data replica leads", || leads(&members[1])).await?;
    session.abort();
    let session = attached(&members[1]).await?;
    for number in 0..9 {
        expect_large(&session, number, number as u8 + 1).await?;
    }
    write_large(&session, 9, 100).await?;
    cut(&switch, 1, false);
    both_equal(&members).await?;
    // Everybody has everything: now it goes.
    let last = group_of(&members[1]).report().committed;
    until("the log of the witness goes", || log.purged().is_some_and(|id| id.index.0 + 8 > last.0)).await?;
    expect_large(&session, 9, 100).await
}

async fn expect_nothing(session: &Session) -> Outcome<()> {
    expect(session, 0, 0).await
}

#[test]
fn what_the_witness_alone_holds_comes_to_the_other_data_replica() {
    test(tail_of_the_witness);
}

#[test]
fn a_witness_that_purges_early_is_found() {
    planted::plant(&["witness-purges-early"]);
    let place = tempfile::tempdir().expect("a place");
    let outcome = holdfast_env::real::run(async { tail_of_the_witness(place.path()).await });
    let why = outcome.expect_err("it is found");
    assert!(why.contains("the second copy is gone"), "{why}");
}

/// Ends when somebody leads whom a majority follows, with its number; `None` if nobody does for so long.
async fn someone_leads(members: &[Member], long: Duration) -> Option<usize> {
    let leading = async {
        loop {
            if let Some(found) = members.iter().position(|member| group_of(member).is_leader()) {
                return found + 1;
            }
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
    };
    holdfast_env::timeout(long, leading).await.ok()
}

/// A small budget is used up while the second data replica is away; then the first is gone, and comes back.
async fn beyond_the_budget(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let members = members(place, &switch, 3 << 20).await?;
    let session = attached(&members[0]).await?;
    expect_nothing(&session).await?;
    cut(&switch, 2, true);
    for number in 0..6 {
        write_large(&session, number, number as u8 + 1).await?;
        holdfast_env::sleep(Duration::from_millis(300)).await;
    }
    until("the witness says so", || report(&members[2]).past_budget.contains("one full copy")).await?;
    println!("{}", report(&members[2]).past_budget);
    let transfer = group_of(&members[0]).transfer_to(ReplicaId(3)).await;
    assert!(matches!(transfer, Err(GroupError::Refused(_))), "{transfer:?}");
    write_large(&session, 6, 7).await?;
    cut(&switch, 1, true);
    cut(&switch, 2, false);
    cut(&switch, 1, true);
    let term = report(&members[2]).term;
    if let Some(who) = someone_leads(&members[1..], Duration::from_secs(3)).await {
        return Err(format!("member {} leads, which nobody can bring up to date", who + 1));
    }
    assert_eq!(report(&members[2]).term, term, "the witness did not campaign");
    cut(&switch, 1, false);
    until("a data replica leads", || members[..2].iter().any(leads)).await?;
    both_equal(&members).await?;
    until("there are two copies again", || report(&members[2]).past_budget.is_empty()).await?;
    session.abort();
    let session = attached(&members[1]).await?;
    for number in 0..7 {
        expect_large(&session, number, number as u8 + 1).await?;
    }
    Ok(())
}

#[test]
fn a_witness_beyond_its_budget_leads_nobody_and_says_why() {
    test(beyond_the_budget);
}

#[test]
fn a_witness_that_campaigns_without_the_log_is_found() {
    planted::plant(&["witness-campaigns-without-the-log"]);
    let place = tempfile::tempdir().expect("a place");
    let outcome = holdfast_env::real::run(async { beyond_the_budget(place.path()).await });
    let why = outcome.expect_err("it is found");
    assert!(why.contains("which nobody can bring up to date"), "{why}");
}

/// A new data replica that has nothing needs a snapshot, and the witness leads.
async fn no_snapshot_from_a_witness(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let members = members(place, &switch, PLENTY).await?;
    let session = attached(&members[0]).await?;
    for number in 0..9 {
        write_large(&session, number, number as u8 + 1).await?;
    }
    let log = group_of(&members[2]).log().clone();
    until("the log of the witness goes", || log.purged().is_some()).await?;
    cut(&switch, 4, true);
    let fourth = start(place, &switch, 4, true).await;
    let peer = Peer::data(StoreId(4));
    group_of(&members[0]).add_learner(ReplicaId(4), peer).await.map_err(|error| error.to_string())?;
    cut(&switch, 2, true);
    write_large(&session, 9, 10).await?;
    cut(&switch, 1, true);
    cut(&switch, 2, false);
    cut(&switch, 1, true);
    // What the witness sends the second data replica as a leader does not arrive, and its snapshots are counted.
    let snapshots = Rc::new(Cell::new(0u32));
    let counted = snapshots.clone();
    let look = move |from: StoreId, to: StoreId, frame: &mut Frame| {
        let Some(head) = CallHead::read(&frame.head).filter(|head| head.service == RAFT) else { return };
        match raft_call(head.rest) {
            Some(RaftCall::InstallSnapshot) if from == StoreId(3) => counted.set(counted.get() + 1),
            Some(RaftCall::Append | RaftCall::TransferLeader) if from == StoreId(3) && to == StoreId(2) => {
                frame.head.truncate(1);
            }
            _ => {}
        }
    };
    *switch.damage.borrow_mut() = Some(Box::new(look));
    cut(&switch, 4, false);
    cut(&switch, 1, true);
    until("the witness leads", || group_of(&members[2]).is_leader()).await?;
    holdfast_env::sleep(Duration::from_secs(2)).await;
    if snapshots.get() > 0 {
        return Err(format!("a witness has sent {} snapshots", snapshots.get()));
    }
    assert_eq!(group_of(&fourth).report().applied, LogIndex::ZERO);
    *switch.damage.borrow_mut() = None;
    until("a data replica leads", || leads(&members[1])).await?;
    session.abort();
    let session = attached(&members[1]).await?;
    expect_large(&session, 9, 10).await?;
    let last = group_of(&members[1]).report().committed;
    until("the new replica is filled by a data replica", || group_of(&fourth).report().applied >= last).await
}

#[test]
fn a_witness_that_leads_sends_no_snapshot() {
    test(no_snapshot_from_a_witness);
}

#[test]
fn a_witness_that_sends_a_snapshot_is_found() {
    planted::plant(&["witness-sends-a-snapshot"]);
    let place = tempfile::tempdir().expect("a place");
    let outcome = holdfast_env::real::run(async { no_snapshot_from_a_witness(place.path()).await });
    let why = outcome.expect_err("it is found");
    assert!(why.contains("a witness has sent"), "{why}");
}

#[test]
fn witnesses_and_data_do_not_stand_on_one_store() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let members = members(place, &switch, PLENTY).await?;
        let mut other = replica(9);
        other.id.group = holdfast_types::GroupId(78);
        let refused = members[2].host.create(&other).await.map(drop);
        assert!(matches!(refused, Err(GroupError::Refused(_))), "{refused:?}");
        let refused = members[0].host.create_witness(&other).await.map(drop);
        assert!(matches!(refused, Err(GroupError::Refused(_))), "{refused:?}");
        // What is made again is there, and what is removed is gone.
        members[2].host.create_witness(&replica(3)).await.map_err(|error| error.to_string())?;
        members[2].host.destroy(replica(3).id, 1).await.map_err(|error| error.to_string())?;
        assert!(members[2].host.witness(GROUP).is_none());
        Ok(())
    });
}
