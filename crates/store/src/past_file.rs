//! What a replica knows of the past of its group's others: how far each of them has certainly come. One small file in
//! two generations, each checksummed. Losing it only costs knowledge; what is in it is true for ever.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, OpenMode};
use holdfast_types::{DecodeError, LogIndex, Reader, ReplicaId, Term, Writer};
use tokio::sync::Mutex;

use crate::sealed::Seal;
use crate::state_file::StateIdentity;
use crate::{ReplicaIdentity, StoreError};

const SEAL: Seal = Seal { magic: 0x6873_6166_7073_3031, version: 1, body_bytes_max: BODY_BYTES_MAX };
/// Room for one generation.
const SLOT_BYTES: usize = ALIGNMENT;
/// Replicas of which a file can tell: as many as a membership may have.
pub const LINES_MAX: usize = 64;
const HEAD_BYTES: usize = 8 + 2 + 4 + 4;
const BODY_BYTES_MAX: usize = 16 + 16 + 24 + 8 + 4 + LINES_MAX * 40;
const _: () = assert!(HEAD_BYTES + BODY_BYTES_MAX <= SLOT_BYTES, "every line has room in a slot");

/// How far a replica has certainly come, durably: it held this when somebody was told so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Acknowledged {
    /// Its vote was for the leader of this term, or a later one.
    pub term: Term,
    /// That leader.
    pub leader: ReplicaId,
    /// It had that leader's log up to here. What it has is cut for a later leader only.
    pub matched: LogIndex,
    /// It had everything up to here, and all of that was committed. That is never cut.
    pub committed: LogIndex,
}

impl Acknowledged {
    /// Puts together what two know; whether that is more than this one knew.
    pub fn learn(&mut self, other: &Self) -> bool {
        let before = *self;
        let (mine, its) = ((self.term, self.leader), (other.term, other.leader));
        match mine.cmp(&its) {
            std::cmp::Ordering::Less => {
                (self.term, self.leader, self.matched) = (other.term, other.leader, other.matched);
            }
            std::cmp::Ordering::Equal => self.matched = self.matched.max(other.matched),
            std::cmp::Ordering::Greater => {}
        }
        self.committed = self.committed.max(other.committed);
        *self != before
    }

    /// Writes it: 32 bytes.
    pub fn encode(&self, out: &mut Writer) {
        self.term.encode(out);
        self.leader.encode(out);
        self.matched.encode(out);
        self.committed.encode(out);
    }

    /// Reads it.
    pub fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (term, leader) = (Term::decode(input)?, ReplicaId::decode(input)?);
        Ok(Self { term, leader, matched: LogIndex::decode(input)?, committed: LogIndex::decode(input)? })
    }
}

/// What is known of each replica.
pub type Lines = BTreeMap<ReplicaId, Acknowledged>;

/// The file. It is made when there is something to write.
pub struct PastFile {
    directory: Rc<dyn Directory>,
    name: String,
    identity: StateIdentity,
    file: RefCell<Option<Rc<dyn File>>>,
    generation: Cell<u64>,
    writing: Mutex<()>,
}

fn encode(identity: &StateIdentity, generation: u64, lines: &Lines) -> AlignedBuffer {
    assert!(lines.len() <= LINES_MAX, "the lines are bounded");
    let mut out = Writer::new();
    identity.encode(&mut out);
    out.u64(generation);
    out.u32(lines.len() as u32);
    for (replica, known) in lines {
        replica.encode(&mut out);
        known.encode(&mut out);
    }
    let body = out.finish();
    SEAL.close(&body)
}

fn decode(slot: &[u8]) -> Result<(StateIdentity, u64, Lines), DecodeError> {
    let body = SEAL.open(slot)?;
    let mut input = Reader::new(body);
    let identity = StateIdentity::decode(&mut input)?;
    let generation = input.u64()?;
    let mut lines = Lines::new();
    for _ in 0..input.count("lines", LINES_MAX)? {
        lines.insert(ReplicaId::decode(&mut input)?, Acknowledged::decode(&mut input)?);
    }
    input.end()?;
    Ok((identity, generation, lines))
}

/// For fuzzing: reads `body` as if the file held it; what is read is written as it was meant.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(body: &[u8]) {
    let whole = SEAL.close(body);
    if let Ok((identity, generation, lines)) = decode(whole.as_slice()) {
        let again = decode(encode(&identity, generation, &lines).as_slice());
        assert_eq!(again, Ok((identity, generation, lines)), "a past is written otherwise");
    }
}

/// The name of a volume's replica's file.
pub fn name_of(id: ReplicaIdentity) -> String {
    format!("replicas/{}-{}/past", id.group, id.replica)
}

impl PastFile {
    /// Opens the file with what it holds; nothing, if it is not there or tells of somebody else.
    pub async fn open(
        directory: &Rc<dyn Directory>,
        name: String,
        identity: StateIdentity,
    ) -> Result<(Self, Lines), StoreError> {
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        let found = directory.list(&name).await.map_err(wrap)?.contains(&name);
        let file = if found {
            let file = directory.open(&name, OpenMode::Existing).await.map_err(wrap)?;
            // A killed daemon may have left the newest generation in a cache.
            file.flush().await.map_err(wrap)?;
            Some(file)
        } else {
            None
        };
        let past = Self {
            directory: directory.clone(),
            name,
            identity,
            file: RefCell::new(file),
            generation: Cell::new(0),
            writing: Mutex::default(),
        };
        let lines = past.load().await?;
        Ok((past, lines))
    }

    async fn load(&self) -> Result<Lines, StoreError> {
        let mut newest = Lines::new();
        let Some(file) = self.file.borrow().clone() else { return Ok(newest) };
        for slot in 0..2 {
            let read = file.read_at(slot * SLOT_BYTES as u64, SLOT_BYTES).await;
            let decoded = match read {
                Ok(block) if block.as_slice().iter().all(|byte| *byte == 0) => continue,
                Ok(block) => decode(block.as_slice()).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match decoded {
                Ok((identity, ..)) if identity != self.identity => {
                    tracing::warn!(file = self.name, "it tells of another replica and is not believed");
                }
                Ok((_, generation, lines)) if generation > self.generation.get() => {
                    self.generation.set(generation);
                    newest = lines;
                }
                Ok(_) => {}
                Err(why) => {
                    tracing::warn!(file = self.name, %why, "a part of what is known of others is lost")
                }
            }
        }
        Ok(newest)
    }

    /// Replaces what it holds; durable when it returns.
    pub async fn write(&self, lines: &Lines) -> Result<(), StoreError> {
        let _one_at_a_time = self.writing.lock().await;
        let wrap = |error: std::io::Error| StoreError::io(&self.name, &error);
        let opened = self.file.borrow().clone();
        let file = match opened {
            Some(file) => file,
            None => {
                // A try before this one may have found no room for it.
                let there = self.directory.open(&self.name, OpenMode::Existing).await;
                let file = match there {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        self.directory.open(&self.name, OpenMode::CreateNew).await.map_err(wrap)?
                    }
                    there => there.map_err(wrap)?,
                };
                file.set_length(2 * SLOT_BYTES as u64).await.map_err(wrap)?;
                file.flush().await.map_err(wrap)?;
                self.directory.sync().await.map_err(wrap)?;
                *self.file.borrow_mut() = Some(file.clone());
                file
            }
        };
        let generation = self.generation.get() + 1;
        let bytes = encode(&self.identity, generation, lines);
        let offset = generation % 2 * SLOT_BYTES as u64;
        file.write_at(offset, bytes, Durability::Durable).await.map_err(wrap)?;
        self.generation.set(generation);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use holdfast_types::{ClusterId, GroupId, StoreId};

    use super::*;
    use crate::testing::{MemoryDisk, simulate};

    fn known(term: u64, leader: u64, matched: u64, committed: u64) -> Acknowledged {
        let (matched, committed) = (LogIndex(matched), LogIndex(committed));
        Acknowledged { term: Term(term), leader: ReplicaId(leader), matched, committed }
    }

    #[test]
    fn what_is_learned_only_grows_and_what_a_later_leader_may_cut_is_not_kept() {
        let mut line = known(3, 1, 10, 7);
        assert!(!line.learn(&known(2, 2, 40, 5)), "an earlier leader's log may have been cut");
        assert!(line.learn(&known(3, 1, 12, 0)));
        assert_eq!(line, known(3, 1, 12, 7));
        assert!(line.learn(&known(3, 2, 8, 8)));
        assert_eq!(line, known(3, 2, 8, 8));
        assert!(line.learn(&known(1, 1, 90, 9)), "what is committed stays whoever leads");
        assert_eq!(line, known(3, 2, 8, 9));
    }

    #[test]
    fn the_newest_whole_generation_counts_and_rot_costs_one() {
        let disk = MemoryDisk::new(1);
        let id = ReplicaIdentity { group: GroupId(7), replica: ReplicaId(2) };
        let identity = StateIdentity { cluster: ClusterId(1), store: StoreId(2), id };
        let name = name_of(id);
        simulate(1, async {
            let open = async |identity| {
                PastFile::open(&disk.directory(), name.clone(), identity).await.expect("opens")
            };
            let (file, lines) = open(identity).await;
            assert_eq!(lines, Lines::new());
            for index in 1..=3 {
                file.write(&[(ReplicaId(1), known(1, 1, index, 0))].into()).await.expect("writes");
            }
            assert_eq!(open(identity).await.1, [(ReplicaId(1), known(1, 1, 3, 0))].into());
            let somebody = StateIdentity { store: StoreId(3), ..identity };
            assert_eq!(open(somebody).await.1, Lines::new());
            disk.rot(&name, SLOT_BYTES as u64 + 30, 1);
            assert_eq!(open(identity).await.1, [(ReplicaId(1), known(1, 1, 2, 0))].into());
        });
    }
}
