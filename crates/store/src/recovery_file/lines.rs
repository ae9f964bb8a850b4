//! What is known of the replicas of one store that went through forced recoveries, and what may become of them: the pure
//! rules. `tests/model` runs them as they are.

use std::collections::BTreeMap;

use holdfast_types::{GroupId, RecoveryId, ReplicaId};

use crate::journal::planted;
use crate::{EntryId, ReplicaIdentity};

/// A forced recovery: the incarnation that it begins, and its id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Order {
    /// Number of the incarnation; a volume that was never recovered is its first.
    pub number: u64,
    /// The recovery.
    pub id: RecoveryId,
}

/// Why a store does not do what a recovery asks for, or does not run a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Barred {
    /// Another recovery of the same number has been here.
    #[error(
        "replica {replica} belongs to recovery {ours}, and recovery {theirs} asks for it: two operators have named \
         different survivors. Nothing of either is mixed. Decide which of the two is to go on, and recover the volume \
         anew from its survivors"
    )]
    Rivals {
        /// The replica.
        replica: ReplicaId,
        /// The recovery that it belongs to.
        ours: RecoveryId,
        /// The other one.
        theirs: RecoveryId,
    },
    /// The group has been replaced.
    #[error(
        "quarantined: recovery {by} has replaced the group of replica {replica} by incarnation {number} of its volume. \
         What it holds is kept and not served"
    )]
    Superseded {
        /// The replica.
        replica: ReplicaId,
        /// The incarnation.
        number: u64,
        /// The recovery.
        by: RecoveryId,
    },
    /// It was not sealed for this recovery.
    #[error("replica {replica} was not sealed for recovery {by}: it is not taken over")]
    NotSealed {
        /// The replica.
        replica: ReplicaId,
        /// The recovery.
        by: RecoveryId,
    },
    /// What was sealed is not known any more.
    #[error(
        "what was recovered on this store cannot be read any more, so no replica of a volume runs on it. Give the node \
         an empty data directory under a new name"
    )]
    Unreadable,
}

/// A replica that runs no more as what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sealed {
    /// By which recovery.
    pub order: Order,
    /// The last entry of its log.
    pub last: EntryId,
}

/// What is known of one replica, by the identity of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Line {
    /// The group as which it runs.
    pub group: GroupId,
    /// The group as which it ran before that; [`GroupId::NIL`] if that is the one of its files.
    pub before: GroupId,
    /// The recovery that began that group.
    pub order: Order,
    /// The last entry of its log that is of the group before.
    pub fork: EntryId,
    /// It does not run as that group any more.
    pub sealed: Option<Sealed>,
    /// Another recovery of the same number, which has asked for it; [`RecoveryId::NIL`] if none has.
    pub rival: RecoveryId,
}

impl Line {
    fn may_run(&self, replica: ReplicaId) -> Result<(), Barred> {
        if let Some(Sealed { order, .. }) = self.sealed {
            return Err(Barred::Superseded { replica, number: order.number, by: order.id });
        }
        if self.rival != RecoveryId::NIL {
            return Err(Barred::Rivals { replica, ours: self.order.id, theirs: self.rival });
        }
        Ok(())
    }

    pub(super) fn of(group: GroupId) -> Self {
        Self {
            group,
            before: GroupId::NIL,
            order: Order { number: 1, id: RecoveryId::NIL },
            fork: EntryId::default(),
            sealed: None,
            rival: RecoveryId::NIL,
        }
    }
}

/// Of each replica, by the identity of its files, what has become of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Lines(pub(super) BTreeMap<ReplicaIdentity, Line>);

impl Lines {
    /// Whether a replica may run that stands in files of this identity: the group as which it does.
    ///
    /// # Errors
    /// It may not.
    pub fn may_run(&self, files: ReplicaIdentity) -> Result<ReplicaIdentity, Barred> {
        let replica = files.replica;
        let Some(line) = self.0.get(&files) else { return Ok(files) };
        line.may_run(replica)?;
        Ok(ReplicaIdentity { group: line.group, replica })
    }

    /// As what a replica is known that stands in files of this identity, whether or not it may run.
    pub fn known_as(&self, files: ReplicaIdentity) -> ReplicaIdentity {
        let group = self.0.get(&files).map_or(files.group, |line| line.group);
        ReplicaIdentity { group, ..files }
    }

    /// Whether a recovery has been at a replica that is, or was, known as `id`.
    pub fn knows(&self, id: ReplicaIdentity) -> bool {
        self.0.contains_key(&self.files_of(id)) || self.former(id).is_some()
    }

    /// Whether a replica runs no more as `id`: it was sealed, or goes on as another.
    pub fn is_over(&self, id: ReplicaIdentity) -> bool {
        match self.may_run(self.files_of(id)) {
            Ok(runs_as) => runs_as != id,
            Err(barred) => matches!(barred, Barred::Superseded { .. }),
        }
    }

    /// Every replica with a line: as what it is known, and the line.
    pub fn known(&self) -> Vec<(ReplicaIdentity, Line)> {
        let known = |(files, line): (&ReplicaIdentity, &Line)| {
            (ReplicaIdentity { group: line.group, replica: files.replica }, *line)
        };
        self.0.iter().map(known).collect()
    }

    /// The identity of the files of a replica that runs as `id`.
    pub fn files_of(&self, id: ReplicaIdentity) -> ReplicaIdentity {
        let runs_as =
            |(files, line): &(&ReplicaIdentity, &Line)| line.group == id.group && files.replica == id.replica;
        self.0.iter().find(runs_as).map_or(id, |(files, _)| *files)
    }

    /// The line of a replica that was of this group before it was taken over.
    pub(super) fn former(&self, id: ReplicaIdentity) -> Option<(ReplicaIdentity, Line)> {
        let was = |(files, line): &(&ReplicaIdentity, &Line)| {
            files.replica == id.replica
                && line.group != id.group
                && (line.before == id.group || files.group == id.group)
        };
        self.0.iter().find(was).map(|(files, line)| (*files, *line))
    }

    /// Which recovery has replaced a group, as far as this store knows.
    pub fn superseded(&self, group: GroupId) -> Option<Order> {
        self.0.iter().find_map(|(files, line)| match &line.sealed {
            Some(sealed) if line.group == group => Some(sealed.order),
            _ if line.group != group && (line.before == group || files.group == group) => Some(line.order),
            _ => None,
        })
    }

    /// INV-RECOVER: a replica whose log ends with `last` runs as what it is no more. What it changes counts also where it
    /// says no.
    ///
    /// # Errors
    /// Another recovery was here.
    pub fn seal(&mut self, id: ReplicaIdentity, order: Order, last: EntryId) -> Result<EntryId, Barred> {
        let replica = id.replica;
        let rivals = |ours, theirs| Barred::Rivals { replica, ours, theirs };
        if let Some((files, line)) = self.former(id) {
            if line.order == order {
                return Ok(line.fork);
            }
            if line.order.number != order.number {
                return Err(Barred::Superseded { replica, number: line.order.number, by: line.order.id });
            }
            // Both have taken what one of them may have: neither goes on.
            if let Some(halted) = self.0.get_mut(&files) {
                halted.rival = order.id;
            }
            return Err(rivals(line.order.id, order.id));
        }
        let files = self.files_of(id);
        let mut line = self.0.get(&files).copied().unwrap_or(Line::of(id.group));
        match line.sealed {
            Some(sealed) if sealed.order == order => return Ok(sealed.last),
            Some(sealed) => return Err(rivals(sealed.order.id, order.id)),
            None => line.sealed = Some(Sealed { order, last }),
        }
        self.0.insert(files, line);
        Ok(last)
    }

    /// A replica that was sealed for a recovery runs as another group from here on.
    ///
    /// # Errors
    /// It was not, or not for this one.
    pub fn take_over(&mut self, id: ReplicaIdentity, group: GroupId, order: Order) -> Result<(), Barred> {
        let replica = id.replica;
        if let Some((_, line)) = self.former(id) {
            if line.order != order || line.group != group {
                return Err(Barred::Rivals { replica, ours: line.order.id, theirs: order.id });
            }
            // It went on once. What has ended it since counts: this may be an old request.
            return if planted("late-take-over") { Ok(()) } else { line.may_run(replica) };
        }
        let files = self.files_of(id);
        let not_sealed = Barred::NotSealed { replica, by: order.id };
        let line = self.0.get_mut(&files).ok_or(not_sealed)?;
        let sealed = line.sealed.ok_or(not_sealed)?;
        if sealed.order != order {
            return Err(Barred::Rivals { replica, ours: sealed.order.id, theirs: order.id });
        }
        *line = Line { before: line.group, order, fork: sealed.last, ..Line::of(group) };
        Ok(())
    }
}
