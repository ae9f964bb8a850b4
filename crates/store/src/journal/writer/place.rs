//! Where the records of a batch stand, and what becomes of them once it is durable.

use std::collections::BTreeSet;

use super::super::format::{List, Record};
use super::super::group::Place;
use super::{Journal, State, Superseded};
use crate::{EntryId, ReplicaIdentity};

/// An entry's place before and after it was copied. The copy counts once it is durable: until then it is read, and
/// found by a recovery, where it was.
pub(super) struct Moved {
    who: ReplicaIdentity,
    id: EntryId,
    from: Place,
    to: Place,
    bytes: u32,
}

/// What becomes of a batch's records once it is durable.
#[derive(Default)]
pub(super) struct Placed {
    pub(super) entries: Vec<(ReplicaIdentity, EntryId)>,
    pub(super) superseded: Superseded,
    pub(super) moved: Vec<Moved>,
}

impl Journal {
    /// Notes in the groups where the batch's records stand.
    pub(super) fn place(
        &self,
        state: &mut State,
        list: &List,
        start: u64,
        offsets: &[u64],
        moves: &BTreeSet<usize>,
    ) -> Placed {
        let segment = state.head;
        let groups = self.0.groups.borrow();
        let mut offsets = offsets.iter();
        let mut placed = Placed::default();
        for (n, record) in list.records.iter().enumerate() {
            match record {
                Record::State(who, _) => {
                    if let Some(group) = groups.get(who) {
                        group.borrow_mut().state_segment = Some(segment);
                    }
                }
                Record::Entry(who, entry) => {
                    let stored = record.payload_bytes() > 0;
                    let offset = if stored { offsets.next().copied().unwrap_or(0) } else { 0 };
                    let place = Place { segment, offset: start + offset };
                    let group = groups.get(who);
                    let mut group = group.map(|group| group.borrow_mut());
                    // Cut off or purged while it waited: its bytes are written, but nobody needs them.
                    let meta =
                        group.as_mut().and_then(|g| g.get_mut(entry.id.index)).filter(|m| m.id == entry.id);
                    if moves.contains(&n) {
                        // It is as durable, and as damaged, as it was.
                        if let Some(from) = meta.and_then(|meta| meta.place) {
                            let (who, id, bytes) = (*who, entry.id, entry.payload_bytes);
                            state.add_live(segment, bytes);
                            placed.moved.push(Moved { who, id, from, to: place, bytes });
                        }
                        continue;
                    }
                    if let Some(meta) = meta {
                        let before = meta.place.replace(place);
                        if entry.payload_bytes > 0 {
                            state.add_live(segment, entry.payload_bytes);
                            let before = before.map(|place| (place.segment, entry.payload_bytes));
                            placed.superseded.extend(before);
                        }
                    }
                    if !entry.copy || entry.payload_bytes > 0 {
                        placed.entries.push((*who, entry.id));
                        let mut usage = self.0.usage.get();
                        usage.entries_written += 1;
                        self.0.usage.set(usage);
                    }
                }
                Record::Cut { .. } => {}
            }
        }
        placed
    }

    /// An entry that was copied is where its copy is, unless it was repaired elsewhere, cut or purged meanwhile.
    pub(super) fn moved(&self, moved: &Moved) {
        let groups = self.0.groups.borrow();
        let mut group = groups.get(&moved.who).map(|group| group.borrow_mut());
        let meta = group.as_mut().and_then(|group| group.get_mut(moved.id.index));
        let meta = meta.filter(|meta| meta.id == moved.id && meta.place == Some(moved.from));
        let left = match meta {
            Some(meta) => {
                meta.place = Some(moved.to);
                moved.from.segment
            }
            None => moved.to.segment,
        };
        self.0.state.borrow_mut().remove_live(left, moved.bytes);
    }
}
