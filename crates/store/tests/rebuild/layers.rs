//! A rebuild brings every layer: change marks are trusted per layer (INV-MARK), and afterwards every view of the
//! receiver shows what it shows at the source, however either had cleaned and merged (INV-LAYER, INV-STAGE).

use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_store::testing::{MemoryDisk, Tear, simulate};
use holdfast_store::volume::{BlockSum, Clear, LayerId, LayerMark, View, VolumeData};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex, LogIndex};
use proptest::prelude::*;

use crate::replica::{At, Log, SIZE, checkpoint, reopened, replica_in, write};

/// Chunks that the steps touch.
const CHUNKS: u32 = 3;

#[derive(Clone, Debug)]
enum Wish {
    Write(u64, u32),
    Clear(u64, u32, bool),
    Snapshot,
    Drop(usize),
    Restore,
}

/// An entry of the log.
#[derive(Clone, Debug)]
enum Entry {
    Write(BlockRange),
    Clear(BlockRange, Clear),
    Snapshot,
    Drop(u64),
    Restore(u64),
    Nothing,
}

/// What a replica does after an entry.
#[derive(Clone, Copy, Debug, Default)]
struct Habit {
    cleans: bool,
    merges: bool,
}

fn wish() -> impl Strategy<Value = Wish> {
    let start = CHUNK_BLOCKS - 6..CHUNK_BLOCKS + 6;
    prop_oneof![
        5 => (start.clone(), 1u32..7).prop_map(|(start, count)| Wish::Write(start, count)),
        2 => (start, 1u32..7, any::<bool>()).prop_map(|(start, count, trim)| Wish::Clear(start, count, trim)),
        3 => Just(Wish::Snapshot),
        2 => any::<usize>().prop_map(Wish::Drop),
        1 => Just(Wish::Restore),
    ]
}

fn habit() -> impl Strategy<Value = Habit> {
    (prop::bool::weighted(0.3), prop::bool::weighted(0.5))
        .prop_map(|(cleans, merges)| Habit { cleans, merges })
}

/// The log that wishes lead to, and the living snapshots at its end.
fn log_of(wishes: &[Wish]) -> (Vec<Entry>, Vec<u64>) {
    let mut living: Vec<u64> = Vec::new();
    let range = |start: &u64, count: &u32| BlockRange::new(BlockIndex(*start), *count);
    let entries = (1u64..).zip(wishes).map(|(index, wish)| match wish {
        Wish::Write(start, count) => Entry::Write(range(start, count)),
        Wish::Clear(start, count, trim) => {
            Entry::Clear(range(start, count), if *trim { Clear::Trim } else { Clear::Zero })
        }
        Wish::Snapshot => {
            living.push(index);
            Entry::Snapshot
        }
        Wish::Drop(which) if !living.is_empty() => Entry::Drop(living.remove(which % living.len())),
        Wish::Restore if !living.is_empty() => Entry::Restore(living[living.len() - 1]),
        Wish::Drop(_) | Wish::Restore => Entry::Nothing,
    });
    (entries.collect(), living)
}

async fn apply(data: &VolumeData, log: &Log, index: u64, entry: &Entry) {
    match entry {
        Entry::Write(range) => write(data, log, index, *range, (index % 250) as u8 + 1),
        Entry::Clear(range, how) => data.apply_clear(LogIndex(index), *range, *how),
        Entry::Snapshot => data.apply_snapshot(LogIndex(index)),
        Entry::Drop(snapshot) => data.apply_drop_snapshot(LogIndex(index), LogIndex(*snapshot)),
        Entry::Restore(snapshot) => data.apply_restore(LogIndex(index), LogIndex(*snapshot)),
        Entry::Nothing => {}
    }
}

/// Applies entries from `first` on.
async fn live(data: &VolumeData, log: &Log, first: u64, entries: &[Entry], habits: &[Habit]) {
    for (n, entry) in entries.iter().enumerate() {
        let index = first + n as u64;
        apply(data, log, index, entry).await;
        let habit = habits.get(n).copied().unwrap_or_default();
        if habit.cleans {
            data.clean(&At(index)).await.expect("is cleaned");
        }
        if habit.merges {
            data.merge_step().await.expect("merges");
        }
    }
}

fn is_same(layer: LayerMark, ours: Option<BlockSum>, theirs: BlockSum) -> bool {
    let is_data = |sum: BlockSum| matches!(sum, BlockSum::Data(_));
    let both_zero = ours.is_some_and(|ours| !is_data(ours)) && !is_data(theirs);
    ours == Some(theirs) || (layer.id == LayerId::BASE && both_zero)
}

/// The chunks of a layer whose marks differ. Where they do not, the content must not either.
async fn differing(receiver: &VolumeData, source: &VolumeData, layer: LayerMark) -> Vec<ChunkIndex> {
    let ours = receiver.home_summaries(layer, ChunkIndex(0), CHUNKS).await.expect("is read");
    let theirs = source.chunk_summaries(layer.id, ChunkIndex(0), CHUNKS).await.expect("is read");
    let marks = |all: &[holdfast_store::volume::ChunkSummary]| -> BTreeMap<ChunkIndex, (u64, LogIndex)> {
        all.iter().map(|one| (one.chunk, (one.incarnation, one.last_index))).collect()
    };
    let (ours, theirs) = (marks(&ours), marks(&theirs));
    let mut out = Vec::new();
    for chunk in (0..u64::from(CHUNKS)).map(ChunkIndex) {
        if ours.get(&chunk) != theirs.get(&chunk) {
            out.push(chunk);
            continue;
        }
        let home = receiver.home_checksums(layer, chunk).await.expect("is read");
        let content = source.layer_checksums(layer.id, chunk).await.expect("is read");
        for (within, (home, content)) in home.iter().zip(content).enumerate() {
            let mark = ours.get(&chunk);
            assert!(
                is_same(layer, *home, content),
                "INV-MARK: {layer:?} {chunk:?} at {mark:?}, block {within}: {home:?}, {content:?}"
            );
        }
    }
    out
}

/// As a replica that is being rebuilt does it.
async fn pull(receiver: &VolumeData, source: &VolumeData, layers: &[LayerMark], index: u64) {
    let staging = receiver.begin_staging(layers.to_vec()).await.expect("begins");
    for layer in layers {
        for chunk in differing(receiver, source, *layer).await {
            let ours = receiver.home_checksums(*layer, chunk).await.expect("is read");
            let theirs = source.layer_checksums(layer.id, chunk).await.expect("is read");
            for (within, theirs) in theirs.iter().enumerate() {
                if is_same(*layer, ours[within], *theirs) {
                    continue;
                }
                let block = BlockIndex(chunk.first_block().0 + within as u64);
                let range = BlockRange::new(block, 1);
                let staged = match theirs {
                    BlockSum::Absent => staging.clear(layer.id, range).await,
                    BlockSum::Zero => staging.zero(layer.id, range).await,
                    BlockSum::Data(_) => {
                        let read = source.read_layer(layer.id, range).await.expect("is read");
                        staging.put(layer.id, range, read.data, &read.checksums).await
                    }
                };
                staged.expect("is staged");
            }
        }
    }
    staging.commit(checkpoint(index)).await.expect("is switched in");
}

async fn compare(receiver: &VolumeData, source: &VolumeData) {
    let layers = source.layers();
    assert_eq!(receiver.layers(), layers);
    for layer in layers {
        for chunk in (0..u64::from(CHUNKS)).map(ChunkIndex) {
            let ours = receiver.layer_checksums(layer.id, chunk).await.expect("is read");
            let theirs = source.layer_checksums(layer.id, chunk).await.expect("is read");
            for (ours, theirs) in ours.iter().zip(theirs) {
                assert!(is_same(layer, Some(*ours), theirs), "{layer:?} {chunk:?}: {ours:?}, {theirs:?}");
            }
        }
        let view = layer.frozen.map_or(View::Head, View::Snapshot);
        for start in (0..SIZE.0 / BLOCK_BYTES as u64).step_by(128) {
            let range = BlockRange::new(BlockIndex(start), 128);
            let ours = receiver.read_view(view, range).await.expect("is read");
            assert!(ours == source.read_view(view, range).await.expect("is read"), "{view:?} from {start}");
        }
    }
}

/// So that whatever is remembered of reads is there.
async fn read_views(data: &VolumeData) {
    for layer in data.layers() {
        let view = layer.frozen.map_or(View::Head, View::Snapshot);
        let range = BlockRange::new(BlockIndex(0), 128);
        data.read_view(view, range).await.expect("is read");
    }
}

async fn settle(data: &VolumeData, index: u64) {
    data.clean(&At(index)).await.expect("is cleaned");
    while data.merge_step().await.expect("merges") {}
    assert_eq!(data.pieces(), data.layers().len());
}

#[derive(Clone, Debug)]
struct Case {
    wishes: Vec<Wish>,
    /// Entries that the receiver has not.
    behind: usize,
    /// Entries that the source applies between the checkpoint that it offers and the pull.
    fuzzy: Vec<Wish>,
    ours: Vec<Habit>,
    theirs: Vec<Habit>,
}

fn case() -> impl Strategy<Value = Case> {
    let no_end = |wish: &Wish| !matches!(wish, Wish::Drop(_) | Wish::Restore);
    (
        prop::collection::vec(wish(), 1..24),
        0usize..14,
        prop::collection::vec(wish().prop_filter("a layer would end", no_end), 0..4),
        prop::collection::vec(habit(), 24),
        prop::collection::vec(habit(), 24),
    )
        .prop_map(|(wishes, behind, fuzzy, ours, theirs)| Case { wishes, behind, fuzzy, ours, theirs })
}

async fn run(case: &Case, disk: &MemoryDisk) {
    let log = Rc::new(Log::default());
    let (entries, _) = log_of(&case.wishes);
    let all = [case.wishes.as_slice(), &case.fuzzy].concat();
    let (with_fuzzy, _) = log_of(&all);
    let last = entries.len() as u64;
    let shorter = entries.len().saturating_sub(case.behind);
    let receiver = replica_in(disk.directory(), &log).await;
    live(&receiver, &log, 1, &entries[..shorter], &case.ours).await;
    // As a rebuild does before it compares.
    receiver.clean(&At(shorter as u64)).await.expect("is cleaned");
    let source = replica_in(MemoryDisk::new(2).directory(), &log).await;
    live(&source, &log, 1, &entries, &case.theirs).await;
    source.clean(&At(last)).await.expect("is cleaned");
    let layers = source.layers();
    live(&source, &log, last + 1, &with_fuzzy[entries.len()..], &[]).await;
    read_views(&receiver).await;
    // Its own log goes on while it is rebuilt.
    pull(&receiver, &source, &layers, last).await;
    live(&receiver, &log, last + 1, &with_fuzzy[entries.len()..], &[]).await;
    compare(&receiver, &source).await;
    let end = all.len() as u64;
    settle(&receiver, end).await;
    settle(&source, end).await;
    compare(&receiver, &source).await;
    for layer in source.layers() {
        differing(&receiver, &source, layer).await;
    }
    drop(receiver);
    disk.power_cut(Tear::Nothing);
    compare(&reopened(disk.directory(), &log).await.expect("opens"), &source).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_rebuild_brings_every_layer(case in case()) {
        let disk = MemoryDisk::new(1);
        simulate(1, run(&case, &disk));
    }
}

/// The layer between two snapshots was restored away and the snapshot dropped: what is left here of it is not taken for
/// the layer that came instead.
#[test]
fn a_layer_that_was_thrown_away_is_not_taken_for_the_one_that_came_after_it() {
    let wishes = vec![
        Wish::Write(60, 6),
        Wish::Snapshot,
        Wish::Write(62, 2),
        Wish::Clear(64, 2, true),
        Wish::Restore,
        Wish::Write(60, 1),
        Wish::Drop(0),
    ];
    let cleans = vec![Habit { cleans: true, merges: true }; 24];
    for behind in 0..=3 {
        let fuzzy = vec![Wish::Write(63, 1), Wish::Snapshot, Wish::Write(63, 2)];
        let case =
            Case { wishes: wishes.clone(), behind, fuzzy, ours: cleans.clone(), theirs: cleans.clone() };
        let disk = MemoryDisk::new(1);
        simulate(1, run(&case, &disk));
    }
}

/// The source was rebuilt itself before the layer was thrown away: the marks that it got then stand for no later layer.
#[test]
fn marks_of_a_source_that_was_rebuilt_stand_for_nothing_that_was_thrown_away() {
    simulate(1, async {
        let log = Rc::new(Log::default());
        let wishes = [Wish::Write(60, 6), Wish::Snapshot, Wish::Write(60, 6), Wish::Restore, Wish::Drop(0)];
        let (entries, _) = log_of(&wishes);
        let cleans = [Habit { cleans: true, merges: true }; 8];
        let receiver = replica_in(MemoryDisk::new(1).directory(), &log).await;
        live(&receiver, &log, 1, &entries[..3], &cleans).await;
        let source = replica_in(MemoryDisk::new(2).directory(), &log).await;
        pull(&source, &receiver, &receiver.layers(), 3).await;
        read_views(&source).await;
        live(&source, &log, 4, &entries[3..], &cleans).await;
        settle(&source, 5).await;
        pull(&receiver, &source, &source.layers(), 5).await;
        compare(&receiver, &source).await;
    });
}
