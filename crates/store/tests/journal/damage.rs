//! Damage to what is durable: it is reported, never cut, and never read as something else.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use holdfast_store::ReplicaIdentity;
use holdfast_store::journal::{Journal, RecoveredGroup, Recovery};
use holdfast_store::testing::{Fault, Image, MemoryDisk, Random, Tear, plant, simulate};

use crate::life::{formatted, identity, live, options, wander};
use crate::model::{self, Groups, PAYLOAD_MARK};

/// A block of the journal on the medium.
#[derive(Clone, Debug)]
pub struct Place {
    pub file: String,
    pub block: u64,
    pub bytes: Vec<u8>,
}

/// Blocks that were last written before an operation.
pub fn settled(disk: &MemoryDisk, before: u64) -> Vec<Place> {
    let mut out = Vec::new();
    for file in disk.names().into_iter().filter(|name| name != "journal/identity") {
        for (block, at) in disk.written(&file) {
            let bytes = disk.block(&file, block);
            if at < before && bytes.iter().any(|byte| *byte != 0) {
                out.push(Place { file: file.clone(), block, bytes });
            }
        }
    }
    out
}

/// A disk after a history that ended well: everything is acknowledged and the closing mark is written.
fn quiet(image: &Image, seed: u64) -> Result<(MemoryDisk, Groups), String> {
    let disk = MemoryDisk::from_image(image, seed);
    let groups = Groups::default();
    let next_group = Rc::new(Cell::new(0));
    for life in 0..2 {
        let (seed, next_group) = (seed * 2 + life, next_group.clone());
        live(&disk, &groups, seed, |life| async move {
            wander(life.clone(), seed, next_group).await;
            life.settle().await;
            holdfast_env::sleep(Duration::from_millis(500)).await;
        })?;
        disk.kill();
    }
    Ok((disk, groups))
}

fn reopen<T>(
    disk: &MemoryDisk,
    look: impl AsyncFnOnce(&Journal, Vec<RecoveredGroup>) -> Result<T, String>,
) -> Result<T, String> {
    simulate(9, async {
        let opened = Journal::open(disk.directory(), &identity(), &options()).await;
        let (journal, recovered) = opened.map_err(|error| error.to_string())?;
        let result = look(&journal, recovered).await;
        // Time for what recovery writes down.
        holdfast_env::sleep(Duration::from_secs(1)).await;
        result
    })
}

type Found = Vec<(ReplicaIdentity, Recovery)>;

fn recovered(disk: &MemoryDisk, groups: &Groups) -> Result<Found, String> {
    reopen(disk, async |_, recovered| model::check(groups, &recovered, true).await)
}

/// One block rots. A list has its second copy; a payload makes its entry faulty, and only that.
fn one_block(image: &Image, seed: u64, crash: bool) -> Result<(), String> {
    let random = Random::new(seed);
    let (disk, groups) = quiet(image, seed)?;
    let end = disk.operations();
    if crash {
        // And more is written that a power cut tears; what rots is older.
        disk.at(end + 6 + random.below(20), Fault::Freeze);
        let seed = random.next();
        live(&disk, &groups, seed, |life| wander(life, seed, Rc::new(Cell::new(50))))?;
        disk.power_cut(Tear::Random(random.next()));
    }
    // As often a block of a list as one of a payload.
    let (payloads, lists): (Vec<Place>, Vec<Place>) =
        settled(&disk, end).into_iter().partition(|place| place.bytes.starts_with(PAYLOAD_MARK));
    let places = if payloads.is_empty() || random.one_in(2) { lists } else { payloads };
    let place = &places[random.below(places.len() as u64) as usize];
    if random.one_in(3) {
        disk.make_unreadable(&place.file, place.block);
    } else {
        disk.rot(&place.file, place.block * 4096 + random.below(4096), 1 << random.below(8));
    }
    let wrap = |why: String| format!("{} block {}: {why}", place.file, place.block);
    let first = recovered(&disk, &groups).map_err(wrap)?;
    let text = String::from_utf8_lossy(&place.bytes[PAYLOAD_MARK.len()..120]).into_owned();
    let is_payload = place.bytes.starts_with(PAYLOAD_MARK);
    for (who, state) in &first {
        match state {
            // What no batch accounts for may have been anything.
            Recovery::Unknown(why) if crash && why.contains("cannot be read") => return Ok(()),
            Recovery::Unknown(why) => return Err(wrap(format!("one block makes everything unknown: {why}"))),
            Recovery::Faulty(ids) => {
                let [id] = ids[..] else { return Err(wrap(format!("one block, many entries: {ids:?}"))) };
                if !is_payload || !text.starts_with(&format!("{} {} {} ", who.group, id.term, id.index)) {
                    return Err(wrap(format!("{id:?} is called faulty, the block was of '{text}'")));
                }
            }
            Recovery::Clean => {}
        }
    }
    // It is found again, whatever was written meanwhile.
    disk.power_cut(Tear::Nothing);
    let again = recovered(&disk, &groups).map_err(wrap)?;
    if again == first { Ok(()) } else { Err(wrap(format!("found {first:?}, then {again:?}"))) }
}

fn each_seed(count: u64, case: impl Fn(&Image, u64) -> Result<(), String>) {
    let image = formatted();
    for seed in 0..count {
        if let Err(why) = case(&image, seed) {
            panic!("seed {seed}: {why}");
        }
    }
}

#[test]
fn a_rotten_block_is_reported_and_nothing_else() {
    each_seed(60, |image, seed| one_block(image, seed, false));
}

#[test]
fn a_rotten_block_after_a_power_cut_is_reported_and_nothing_else() {
    each_seed(60, |image, seed| one_block(image, seed, true));
}

#[test]
fn a_recovery_that_cuts_what_rotted_is_noticed() {
    let image = formatted();
    plant(&["cut-faulty-entry"]);
    assert!((0..60).any(|seed| one_block(&image, seed, false).is_err()));
    plant(&[]);
}

#[test]
fn a_recovery_that_forgets_the_second_list_is_noticed() {
    let image = formatted();
    plant(&["forget-second-list"]);
    assert!((0..60).any(|seed| one_block(&image, seed, false).is_err()));
    plant(&[]);
}

/// Lists by the batch that they are of: both copies.
fn lists(disk: &MemoryDisk, end: u64) -> BTreeMap<u64, Vec<Place>> {
    let mut out: BTreeMap<u64, Vec<Place>> = BTreeMap::new();
    for place in settled(disk, end) {
        let magic = u64::from_le_bytes(place.bytes[..8].try_into().expect("eight bytes"));
        if [0x6873_6166_6a62_6631, 0x6873_6166_6a62_6232].contains(&magic) {
            let seq = u64::from_le_bytes(place.bytes[44..52].try_into().expect("eight bytes"));
            out.entry(seq).or_default().push(place);
        }
    }
    out
}

/// Both copies of a list rot: every group is unknown from then on, whatever is written after.
fn both_lists(image: &Image, seed: u64) -> Result<bool, String> {
    let random = Random::new(seed);
    let (disk, groups) = quiet(image, seed)?;
    let lists = lists(&disk, disk.operations());
    let batches: Vec<_> = lists.values().filter(|copies| copies.len() == 2).collect();
    let copies = batches[random.below(batches.len() as u64) as usize];
    for place in copies {
        disk.rot(&place.file, place.block * 4096 + random.below(90), 1 << random.below(8));
    }
    let first = recovered(&disk, &groups)?;
    let unknown = |found: &Found| found.iter().filter(|(_, s)| matches!(s, Recovery::Unknown(_))).count();
    if unknown(&first) == 0 {
        return Ok(false); // no batch that is still needed, or the last mark
    }
    if unknown(&first) != first.len() {
        return Err(format!("only some groups are unknown: {first:?}"));
    }
    // A new group writes until every segment was used again; the others stay unknown.
    disk.power_cut(Tear::Nothing);
    let survivors: Vec<ReplicaIdentity> = first.iter().map(|(who, _)| *who).collect();
    for round in 0..3 {
        reopen(&disk, async |journal, recovered| {
            if !journal.doubt() {
                return Err(format!("round {round}: the journal has no doubt any more"));
            }
            for who in &survivors {
                let found = recovered.iter().find(|found| found.id == *who).ok_or("a group is gone")?;
                if !matches!(found.state, Recovery::Unknown(_)) || !found.vote_lost {
                    return Err(format!("round {round}: group {} is {:?}", who.group, found.state));
                }
            }
            // They are dropped but one, as replaced replicas are; else their entries keep the journal full.
            for who in &survivors[1..] {
                journal.drop_group(*who).await.map_err(|error| error.to_string())?;
            }
            let log = journal.group(survivors[0]).ok_or("no group")?;
            if let Some(last) = log.last() {
                log.purge(last).await.map_err(|error| error.to_string())?;
            }
            overwrite(journal, 70 + round).await;
            Ok(())
        })?;
        disk.power_cut(Tear::Nothing);
        if round == 0 && survivors.len() > 1 {
            let found = reopen(&disk, async |_, recovered| Ok(recovered.len()))?;
            if found != 2 {
                return Err(format!("{found} groups after all but one and the new one were dropped"));
            }
            return both_lists_rest(&disk, survivors[0]).map(|()| true);
        }
    }
    Ok(true)
}

fn both_lists_rest(disk: &MemoryDisk, who: ReplicaIdentity) -> Result<(), String> {
    disk.power_cut(Tear::Nothing);
    reopen(disk, async |journal, recovered| {
        let found = recovered.iter().find(|found| found.id == who).ok_or("the group is gone")?;
        let is_unknown = matches!(found.state, Recovery::Unknown(_)) && found.vote_lost && journal.doubt();
        if is_unknown { Ok(()) } else { Err(format!("{:?} after the journal was overwritten", found.state)) }
    })
}

/// A new group writes three times the journal's size.
pub async fn overwrite(journal: &Journal, number: u64) {
    let who = model::who(number);
    let log = match journal.group(who) {
        Some(log) => log,
        None => journal.create_group(who).await.expect("creates"),
    };
    for _ in 0..250 {
        let index = log.last().map_or(0, |id| id.index.0 + 1);
        let id = model::id(1, index);
        let mut entry = model::entry(who, id);
        entry.payload = vec![7; 128 << 10].into();
        log.append(vec![entry], Box::new(|result| result.expect("is flushed")));
        while log.flushed().0 < index {
            holdfast_env::yield_now().await;
        }
        if index % 4 == 3 {
            log.purge(id).await.expect("purges");
        }
    }
    // Else it would keep the segment of its last entries.
    log.purge(log.last().expect("entries")).await.expect("purges");
}

#[test]
fn a_batch_that_lost_both_lists_makes_every_group_unknown_for_good() {
    let hits = Cell::new(0);
    each_seed(40, |image, seed| {
        hits.set(hits.get() + u32::from(both_lists(image, seed)?));
        Ok(())
    });
    assert!(hits.get() >= 10, "only {} of the damaged batches were needed", hits.get());
}
