//! Which replica of a volume is wrong about a chunk, when they differ.
//!
//! A checksum shows a block that is not what was written. It does not show one that is what was written *before*: a
//! disk that reports a write and drops it leaves an older block with an older checksum, each true to the other. Only the
//! other replicas tell. No index is stopped at for that: a chunk does not change between its last change and what its
//! replica has applied, so two replicas can be compared wherever these spans meet (INV-MARK), while writes go on
//! elsewhere.

use std::time::Duration;

use holdfast_env::net::Frame;
use holdfast_store::StoreError;
use holdfast_store::volume::{ChunkNow, LayerId, LayerMark, PAGE_CHUNKS};
use holdfast_types::{ChunkIndex, DecodeError, LogIndex, Reader, StoreId, Writer, limits};

use crate::heal::{self, CHUNKS_MAX, DIGESTS, HELD, HealError, LOST, Told};
use crate::volume::Volume;

/// Looks at chunks that are being written, until what the replicas say can be compared.
const ROUNDS_MAX: usize = 4;
/// How long this replica waits to apply what another one shows.
const FOLLOW_PATIENCE: Duration = Duration::from_millis(500);

/// What to do about a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is right here, or nothing shows that it is not.
    Keep,
    /// It is wrong here; this one has it right.
    Take(StoreId),
    /// They differ, and nothing shows who is right, or they could not be compared.
    Unsettled,
}

/// What one replica says of a chunk.
#[derive(Clone, Debug)]
struct Voice {
    store: StoreId,
    now: ChunkNow,
    applied: LogIndex,
}

impl Voice {
    /// Whether there is an entry as of which both tell of the chunk.
    fn meets(&self, other: &Self) -> bool {
        self.now.last_index <= other.applied && other.now.last_index <= self.applied
    }
}

/// Decides from what the replicas say of a chunk of a layer. `voters` of them there are; `ours` is none where this replica cannot tell, or
/// holds what it knows to be bad.
fn decide(layer: LayerId, ours: Option<&Voice>, others: &[Voice], voters: usize) -> Verdict {
    let met: Vec<&Voice> = others.iter().filter(|other| ours.is_none_or(|ours| ours.meets(other))).collect();
    let agree = |voice: &Voice| {
        let all = met.iter().copied().chain(ours);
        all.filter(|other| other.now.is_same(layer, &voice.now) && other.meets(voice)).count()
    };
    if ours.is_some_and(|ours| agree(ours) * 2 > voters) {
        return Verdict::Keep;
    }
    if let Some(right) = met.iter().find(|voice| agree(voice) * 2 > voters) {
        return Verdict::Take(right.store);
    }
    // Too few to outvote anybody. A change that one knows of and another does not was made: it came through the log.
    let newest = met.iter().max_by_key(|voice| voice.now.last_index);
    match (ours, newest) {
        (None, Some(newest)) => Verdict::Take(newest.store),
        (Some(ours), Some(newest)) if newest.now.last_index > ours.now.last_index => {
            if newest.now.is_same(layer, &ours.now) { Verdict::Keep } else { Verdict::Take(newest.store) }
        }
        (Some(ours), Some(_)) if met.iter().all(|other| other.now.is_same(layer, &ours.now)) => Verdict::Keep,
        (Some(ours), Some(newest)) if newest.now.last_index < ours.now.last_index => Verdict::Keep,
        _ => Verdict::Unsettled,
    }
}

/// Asks every other replica about a chunk of a layer, and decides. `bad` if this replica knows that it does not hold it.
pub(crate) async fn judge(
    volume: &Volume,
    layer: LayerMark,
    chunk: ChunkIndex,
    bad: bool,
) -> Result<Verdict, StoreError> {
    let mut verdict = Verdict::Unsettled;
    for _ in 0..ROUNDS_MAX {
        let mut others = Vec::new();
        for store in heal::peers(volume) {
            match heal::ask(volume, store, layer, &[chunk], 0).await.map(|mut all| all.pop()) {
                Ok(Some((Told { applied, now: Some(now), .. }, _))) => {
                    others.push(Voice { store, now, applied })
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%store, chunk = chunk.0, %error, "a peer does not tell of a chunk")
                }
            }
        }
        let newest = others.iter().map(|voice| voice.now.last_index).max().unwrap_or_default();
        // Not reached in time, they do not meet.
        let _late = holdfast_env::timeout(FOLLOW_PATIENCE, volume.group().position().reached(newest)).await;
        let Some(ours) = heal::look(volume, layer, chunk).await? else { return Ok(Verdict::Unsettled) };
        let own = volume.rpc().local();
        let ours = ours.now.filter(|_| !bad).map(|now| Voice { store: own, now, applied: ours.applied });
        let voters = volume.group().data_voters().len();
        verdict = decide(layer.id, ours.as_ref(), &others, voters);
        if verdict != Verdict::Unsettled {
            break;
        }
    }
    Ok(verdict)
}

/// Whether a majority of the voters that hold data, without this one, tells what every chunk of a chunk's page holds in a layer.
pub(crate) async fn others_hold_page(volume: &Volume, layer: LayerMark, chunk: ChunkIndex) -> bool {
    let group = volume.group();
    let first = chunk.0 - chunk.0 % PAGE_CHUNKS;
    let chunks: Vec<ChunkIndex> = (first..first + PAGE_CHUNKS).map(ChunkIndex).collect();
    let voters = group.data_voters();
    let mut hold = 0;
    for (id, store) in group.data_members() {
        if id == group.id().replica || !voters.contains(&id) {
            continue;
        }
        match heal::ask(volume, store, layer, &chunks, 0).await {
            Ok(told) => hold += usize::from(told.iter().all(|(told, _)| told.now.is_some())),
            Err(error) => tracing::debug!(%store, chunk = chunk.0, %error, "a peer does not tell of a page"),
        }
    }
    hold * 2 > voters.len()
}

/// Layers that one question names.
const LAYERS_MAX: usize = limits::SNAPSHOTS_PER_VOLUME_MAX + 1;
const _: () = assert!(LAYERS_MAX * (1 + CHUNKS_MAX * 9) <= limits::FRAME_HEAD_BYTES_MAX);

/// What each of some chunks of a layer holds, in brief; `None` for one of which nobody here knows.
type Digests = Vec<Option<u64>>;

/// `None` if there is no such layer here, or not any more.
async fn digests(
    volume: &Volume,
    layer: LayerMark,
    chunks: &[ChunkIndex],
) -> Result<Option<Digests>, StoreError> {
    let mut out = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let Some(told) = heal::look(volume, layer, *chunk).await? else { return Ok(None) };
        out.push(told.now.map(|now| now.digest(layer.id)));
    }
    Ok(Some(out))
}

/// Tells a peer in brief what chunks hold in each of some layers.
pub(crate) async fn serve_digests(volume: &Volume, mut input: Reader<'_>) -> Result<Frame, HealError> {
    let count = input.count("layers", LAYERS_MAX)?;
    let layers: Vec<LayerMark> =
        (0..count).map(|_| LayerMark::decode(&mut input)).collect::<Result<_, _>>()?;
    let count = input.count("chunks", CHUNKS_MAX)?;
    let chunks: Vec<ChunkIndex> =
        (0..count).map(|_| input.u64().map(ChunkIndex)).collect::<Result<_, _>>()?;
    input.end()?;
    let mut out = Writer::new();
    for layer in layers {
        let found = digests(volume, layer, &chunks).await?;
        out.bool(found.is_some());
        for digest in found.iter().flatten() {
            match digest {
                Some(digest) => {
                    out.u8(HELD);
                    out.u64(*digest);
                }
                None => out.u8(LOST),
            }
        }
    }
    Ok(Frame::small(out.finish()))
}

fn get_digest(input: &mut Reader<'_>) -> Result<Option<u64>, DecodeError> {
    match input.u8()? {
        LOST => Ok(None),
        HELD => Ok(Some(input.u64()?)),
        other => Err(DecodeError::Unknown { what: "chunk", value: other.into() }),
    }
}

/// What another replica's chunks hold in each layer; `None` for layers that it has not.
async fn ask_digests(
    volume: &Volume,
    store: StoreId,
    layers: &[LayerMark],
    chunks: &[ChunkIndex],
) -> Result<Vec<Option<Digests>>, HealError> {
    let mut question = heal::question(volume, DIGESTS);
    question.u32(layers.len() as u32);
    layers.iter().for_each(|layer| layer.encode(&mut question));
    question.u32(chunks.len() as u32);
    chunks.iter().for_each(|chunk| question.u64(chunk.0));
    let answer = heal::call(volume, store, question).await?;
    let mut input = Reader::new(&answer.head);
    let mut out = Vec::with_capacity(layers.len());
    for _ in layers {
        let is_there = input.bool()?;
        let digests = || chunks.iter().map(|_| get_digest(&mut input)).collect::<Result<Digests, _>>();
        out.push(is_there.then(digests).transpose()?);
    }
    input.end()?;
    Ok(out)
}

/// Chunks of layers that another replica shows otherwise than this one.
pub(crate) async fn differing(
    volume: &Volume,
    store: StoreId,
    chunks: &[ChunkIndex],
) -> Result<Vec<(LayerMark, ChunkIndex)>, StoreError> {
    let layers = volume.data().layers();
    let told = match ask_digests(volume, store, &layers, chunks).await {
        Ok(told) => told,
        Err(error) => {
            tracing::debug!(%store, %error, "chunks are not compared this time");
            return Ok(Vec::new());
        }
    };
    let mut out = Vec::new();
    for (layer, theirs) in layers.into_iter().zip(told) {
        let Some(theirs) = theirs else { continue };
        let Some(ours) = digests(volume, layer, chunks).await? else { continue };
        for ((chunk, ours), theirs) in chunks.iter().zip(ours).zip(theirs) {
            // Of which either knows nothing there is nothing to compare; it is healed.
            if ours.is_some() && theirs.is_some() && ours != theirs {
                out.push((layer, *chunk));
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use holdfast_store::volume::BlockSum;
    use holdfast_types::CHUNK_BLOCKS;

    use super::*;

    fn voice(store: u128, content: u32, last: u64, applied: u64) -> Voice {
        let mut sums = vec![BlockSum::Absent; CHUNK_BLOCKS as usize];
        sums[0] = BlockSum::Data(content);
        let now = ChunkNow { incarnation: 1, last_index: LogIndex(last), sums };
        Voice { store: StoreId(store), now, applied: LogIndex(applied) }
    }

    #[test]
    fn a_majority_is_right() {
        let others = [voice(2, 7, 50, 90), voice(3, 7, 50, 95)];
        assert_eq!(decide(LayerId::BASE, Some(&voice(1, 7, 50, 90)), &others, 3), Verdict::Keep);
        assert_eq!(decide(LayerId::BASE, Some(&voice(1, 6, 40, 90)), &others, 3), Verdict::Take(StoreId(2)));
        // Whatever its mark says: a rebuild marks what it brings with its own index.
        assert_eq!(decide(LayerId::BASE, Some(&voice(1, 6, 60, 90)), &others, 3), Verdict::Take(StoreId(2)));
        let others = [voice(2, 6, 40, 90), voice(3, 7, 50, 95)];
        assert_eq!(decide(LayerId::BASE, Some(&voice(1, 7, 50, 90)), &others, 3), Verdict::Keep);
    }

    #[test]
    fn what_tells_of_another_time_is_not_compared() {
        // It has not applied the last change of this one.
        assert_eq!(
            decide(LayerId::BASE, Some(&voice(1, 7, 50, 90)), &[voice(2, 6, 40, 49)], 3),
            Verdict::Unsettled
        );
        // It shows a change that this one has not applied.
        assert_eq!(
            decide(LayerId::BASE, Some(&voice(1, 7, 50, 90)), &[voice(2, 6, 91, 99)], 3),
            Verdict::Unsettled
        );
        let others = [voice(2, 6, 91, 99), voice(3, 6, 91, 99)];
        assert_eq!(decide(LayerId::BASE, Some(&voice(1, 7, 50, 90)), &others, 3), Verdict::Unsettled);
    }

    #[test]
    fn of_two_the_one_that_knows_a_later_change_is_right() {
        assert_eq!(
            decide(LayerId::BASE, Some(&voice(1, 6, 40, 90)), &[voice(2, 7, 50, 90)], 2),
            Verdict::Take(StoreId(2))
        );
        assert_eq!(
            decide(LayerId::BASE, Some(&voice(1, 7, 50, 90)), &[voice(2, 6, 40, 90)], 2),
            Verdict::Keep
        );
        assert_eq!(
            decide(LayerId::BASE, Some(&voice(1, 7, 50, 90)), &[voice(2, 6, 50, 90)], 2),
            Verdict::Unsettled
        );
    }

    #[test]
    fn who_knows_nothing_takes_what_most_say_else_the_newest() {
        let others = [voice(2, 6, 40, 90), voice(3, 7, 50, 90)];
        assert_eq!(decide(LayerId::BASE, None, &others, 3), Verdict::Take(StoreId(3)));
        let others = [voice(2, 7, 50, 90), voice(3, 7, 50, 90)];
        assert_eq!(decide(LayerId::BASE, None, &others, 3), Verdict::Take(StoreId(2)));
        assert_eq!(decide(LayerId::BASE, None, &[], 3), Verdict::Unsettled);
    }
}
