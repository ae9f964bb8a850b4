//! Writers are slowed by a journal that fills up, never by a follower that is away or whose disk cannot keep up
//! (INV-ADMIT). In virtual time, on devices whose time is shared by all who use them.

mod group;

use std::rc::Rc;
use std::time::Duration;

use group::{GROUP, Member, Switch, attach, begin, block, first_leads, start_on};
use holdfast_env::Instant;
use holdfast_protocol::planted;
use holdfast_store::journal::levels;
use holdfast_store::testing::{Device, MemoryDisk, Speed, simulate};
use holdfast_types::{BlockIndex, BlockRange, StoreId};

const MIB: u64 = 1 << 20;
const REQUEST_BLOCKS: u32 = 32;
const REQUEST_BYTES: u64 = 128 << 10;
/// Of the volume, in requests.
const PLACES: u64 = (64 << 20) / REQUEST_BYTES;
/// A disk that moves 100 MB a second, one that answers late, and one that cannot keep up with the guest.
const SPEED: Speed = Speed {
    each: Duration::from_micros(20),
    flush: Duration::from_micros(200),
    bytes_per_second: 100_000_000,
    flushed_per_second: 2_000_000_000,
};
const LATE: Speed = Speed { flush: Duration::from_millis(15), ..SPEED };
const SLOW: Speed = Speed { each: Duration::from_millis(5), bytes_per_second: 8_000_000, ..SPEED };
/// What the guest writes: several times what the journals have room for.
const WRITTEN: u64 = 96 * MIB;
/// A log that is to go has gone by then, whoever lacks it.
const GIVEN_UP_BY: Duration = Duration::from_secs(6);
/// Between two writes: less than a disk can do.
const PAUSE: Duration = Duration::from_millis(8);

/// What is wrong with the third store.
#[derive(Clone, Copy)]
enum Third {
    Nothing,
    Away,
    Late,
    Slow,
}

/// The times of a guest's writes, and how many of them were slowed at the leader.
async fn write_beside(third: Third) -> (Vec<Duration>, u64) {
    let place = tempfile::tempdir().expect("a place");
    let (switch, mut members) = (Rc::new(Switch::default()), Vec::<Member>::new());
    for number in 1..=3 {
        let speed = match third {
            Third::Slow if number == 3 => SLOW,
            Third::Late if number == 3 => LATE,
            _ => SPEED,
        };
        let device = Device::new(MemoryDisk::new(number).directory(), speed);
        let path = place.path().join(format!("n{number}"));
        members.push(start_on(&path, &switch, number, true, |_| Rc::new(device)).await);
    }
    begin(&members).await;
    first_leads(&members).await;
    let session = attach(&members[0], false).await.expect("attaches");
    if matches!(third, Third::Away) {
        let links =
            [1, 2].map(StoreId).into_iter().flat_map(|other| [(other, StoreId(3)), (StoreId(3), other)]);
        switch.cut.borrow_mut().extend(links);
    }
    let mut times = Vec::new();
    for request in 0..WRITTEN / REQUEST_BYTES {
        let at = BlockIndex(request * 7 % PLACES * u64::from(REQUEST_BLOCKS));
        let began = Instant::now();
        let range = BlockRange::new(at, REQUEST_BLOCKS);
        session.write(range, block(request as u8, REQUEST_BLOCKS)).await.expect("writes");
        times.push(Instant::now().since(began));
        holdfast_env::sleep(PAUSE).await;
    }
    let leader = members[0].host.volume(GROUP).expect("runs");
    assert!(leader.group().is_leader(), "the leadership has moved");
    let usage = members[0].host.journal().usage();
    println!(
        "mean {:?}, longest {:?}, {} slowed; the line at the end: {} of {}",
        times.iter().sum::<Duration>() / times.len() as u32,
        times.iter().max().expect("some"),
        usage.slowed_writes,
        usage.line_bytes_taken,
        usage.line_bytes
    );
    if matches!(third, Third::Nothing | Third::Late) {
        let last = leader.group().position().applied_index();
        for member in &members {
            let volume = member.host.volume(GROUP).expect("runs");
            volume.group().position().reached(last).await;
            assert_eq!(volume.healed_by_chunks(), 0, "one that answers was given up");
        }
    }
    assert!(leader.group().usage().purges > 4, "the log was purged again and again");
    for member in &members {
        member.host.stop().await;
    }
    (times, usage.slowed_writes)
}

fn longest(times: &[Duration]) -> Duration {
    times.iter().max().copied().expect("there were some")
}

#[test]
fn a_follower_that_is_away_or_slow_slows_nobody() {
    let (all, slowed) = simulate(1, write_beside(Third::Nothing));
    assert_eq!(slowed, 0, "the disk can do what the guest asks for");
    for third in [Third::Away, Third::Late] {
        let (times, slowed) = simulate(1, write_beside(third));
        assert_eq!(slowed, 0, "writes were slowed for one follower of three");
        assert!(longest(&times) < 2 * longest(&all), "they took longer than with all three");
    }
    // One that answers is waited for, but not for long.
    let (times, slowed) = simulate(1, write_beside(Third::Slow));
    assert!(slowed < times.len() as u64 / 20, "{slowed} of {} writes were slowed", times.len());
    assert!(longest(&times) < Duration::from_millis(200));
}

#[test]
fn a_log_that_is_kept_for_who_is_away_is_found() {
    planted::plant(&["keep-the-log-for-the-absent"]);
    let (times, slowed) = simulate(1, write_beside(Third::Away));
    assert!(slowed > 0 && longest(&times) > Duration::from_secs(1), "nobody has waited for it");
}

/// Whether a member that was away for a moment, when the journals were rather full of what everybody has, needs chunks.
async fn away_for_a_moment(away: usize) -> bool {
    let place = tempfile::tempdir().expect("a place");
    let (switch, mut members) = (Rc::new(Switch::default()), Vec::<Member>::new());
    for number in 1..=3 {
        let device = Device::new(MemoryDisk::new(number).directory(), SPEED);
        let path = place.path().join(format!("n{number}"));
        members.push(start_on(&path, &switch, number, true, |_| Rc::new(device)).await);
    }
    begin(&members).await;
    first_leads(&members).await;
    let session = attach(&members[1], false).await.expect("attaches");
    let volumes: Vec<_> = members.iter().map(|member| member.host.volume(GROUP).expect("runs")).collect();
    let purges = |number: usize| volumes[number].group().usage().purges;
    let percent = |number: usize| {
        let usage = members[number].host.journal().usage();
        usage.line_bytes_taken * 100 / usage.line_bytes
    };
    let mut request = 0;
    let mut write_until = async |is_enough: &dyn Fn() -> bool| {
        while !is_enough() {
            let at = BlockIndex(request * 7 % PLACES * u64::from(REQUEST_BLOCKS));
            let range = BlockRange::new(at, REQUEST_BLOCKS);
            session.write(range, block(request as u8, REQUEST_BLOCKS)).await.expect("writes");
            request += 1;
            holdfast_env::sleep(PAUSE).await;
        }
    };
    write_until(&|| (0..3).all(|number| purges(number) > 0)).await;
    let half = u64::from(levels::PURGE) - 35..u64::from(levels::PURGE) - 20;
    write_until(&|| (0..3).all(|number| half.contains(&percent(number)))).await;
    let last = volumes[0].group().position().applied_index();
    volumes[away].group().position().reached(last).await;

    let (gone, others) =
        (StoreId(away as u128 + 1), (1..=3).map(StoreId).filter(|id| id.0 != away as u128 + 1));
    switch.cut.borrow_mut().extend(others.flat_map(|other| [(other, gone), (gone, other)]));
    let purged = |number: usize| volumes[number].log().purged().map(|id| id.index);
    let before: Vec<_> = (0..3).map(purged).collect();
    let leads = |number: usize| number != away && volumes[number].group().is_leader();
    let is_pressed = |number: usize| {
        leads(number) && (purged(number) > before[number] || percent(number) > u64::from(levels::PURGE))
    };
    write_until(&|| (0..3).any(is_pressed)).await;
    // What is on its way to who does not answer is waited for no longer.
    holdfast_env::sleep(GIVEN_UP_BY).await;
    // Who was cut off may still take itself for the leader.
    let leader = (0..3).find(|number| leads(*number)).expect("somebody leads");
    switch.cut.borrow_mut().clear();
    volumes[away].group().position().reached(volumes[leader].group().position().applied_index()).await;
    let by_chunks = volumes[away].healed_by_chunks() > 0;
    for member in &members {
        member.host.stop().await;
    }
    by_chunks
}

#[test]
fn what_a_follower_lacks_is_kept_for_it_while_there_is_room() {
    assert!(!simulate(1, away_for_a_moment(2)), "it lacked little, and the journal had room for that");
}

#[test]
fn what_the_leader_before_lacks_is_kept_for_it_while_there_is_room() {
    assert!(!simulate(1, away_for_a_moment(0)), "it lacked little, and the journal had room for that");
}

#[test]
fn a_log_that_is_purged_of_what_others_lack_is_found() {
    planted::plant(&["purge-what-others-lack"]);
    for away in [2, 0] {
        assert!(simulate(1, away_for_a_moment(away)), "member {away} needs no chunks");
    }
}
