//! Admission: as the line fills up, writes wait a little before they enter it, so that it never stops (INV-ADMIT).
//!
//! What makes room are cleaners, in passes, and a pass takes long. Writers that run freely until nothing is left would
//! then all wait for the end of a pass. So above a fill (`levels.rs`) what is let in per second is bounded: by the rate at
//! which the store's cleaners make room while they are at it, times what the fill allows. That factor is large where
//! the bound begins, one in the middle and nothing where the line stops: the fill settles where as much comes as goes.
//! What the cleaners are thought to do need not be right for that, it only moves the place.
//!
//! Beside that no more payload is on the way than the line may take out of the reserve, so that a vote is never behind more
//! than fits (INV-ROOM).
//!
//! Whoever waits stands in a queue of its own group. They are served in the order of start times (fair queueing): a
//! group has as much as another one, and who asks for little is served next. Every wait is bounded by whoever waits.
//! What leaders elsewhere send is slowed by itself, and not for long: they commit without this store meanwhile.
//!
//! It could be broken by a cleaner that waits for what waits here (it is told when the line has passed a bound of the
//! table), or by something that is kept in the journal above the fill where admission begins (the table's order).

use std::collections::BTreeMap;
use std::rc::Weak;
use std::time::Duration;

use holdfast_env::Instant;
use tokio::sync::oneshot;

use super::{Inner, Journal, levels, planted};
use crate::ReplicaIdentity;

/// Between two looks at the queue, at least and at most.
const LOOK_MIN: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(10);
/// In whatever state the cleaners are, so much time lets the whole line in: who waits is not forgotten.
const WHOLE_LINE_WITHIN: Duration = Duration::from_secs(60);
/// How long an append of a leader elsewhere is slowed, at most: several of a stream are under way, and an answer that is
/// late for long is taken for none.
pub const OTHERS_WAIT_MAX: Duration = Duration::from_millis(100);
/// After one was slowed others are taken to fill the line, too, for so long.
const OTHERS_COUNT_FOR: Duration = Duration::from_secs(1);
/// What the cleaners are taken to do before they have shown it: the whole line in so much time.
const WHOLE_LINE_AT_FIRST: Duration = Duration::from_secs(1);
/// That counts as much as what they show with so many parts of the line.
const FIRST_COUNTS: u64 = 8;

/// How fast the cleaners of a store make room while they are at it.
pub(super) struct Cleaning {
    /// Passes under way that do not wait for others.
    active: usize,
    since: Instant,
    /// When the last one ended or paused.
    idle_since: Instant,
    /// Time in which any pass was active, and the payload that they have made dispensable. Older parts count less.
    busy: Duration,
    bytes: u64,
    line_bytes: u64,
}

impl Cleaning {
    pub(super) fn new(line_bytes: u64) -> Self {
        let busy = WHOLE_LINE_AT_FIRST / FIRST_COUNTS as u32;
        let (since, idle_since) = (Instant::default(), Instant::default());
        Self { active: 0, since, idle_since, busy, bytes: line_bytes / FIRST_COUNTS, line_bytes }
    }

    fn settle(&mut self, now: Instant) {
        if self.active > 0 {
            self.busy += now.since(self.since);
        }
        self.since = now;
    }

    pub(super) fn begin(&mut self, now: Instant) {
        self.settle(now);
        self.active += 1;
    }

    pub(super) fn end(&mut self, now: Instant) {
        self.settle(now);
        self.active -= 1;
        self.idle_since = now;
    }

    /// Whether no pass was active since then.
    pub(super) fn is_idle_since(&self, then: Instant) -> bool {
        self.active == 0 && self.idle_since <= then
    }

    fn made(&mut self, bytes: u64, now: Instant) {
        self.settle(now);
        self.bytes += bytes;
        while self.bytes > self.line_bytes {
            (self.bytes, self.busy) = (self.bytes / 2, self.busy / 2);
        }
    }

    /// Bytes per second. A pass that takes long counts before it ends.
    fn rate(&self, now: Instant) -> f64 {
        let under_way = if self.active > 0 { now.since(self.since) } else { Duration::ZERO };
        let seconds = (self.busy + under_way).as_secs_f64().max(1e-6);
        (self.bytes as f64 / seconds).max(self.line_bytes as f64 / WHOLE_LINE_WITHIN.as_secs_f64())
    }
}

/// A pass of a cleaner that is under way.
pub struct CleaningPass {
    journal: Weak<Inner>,
}

impl CleaningPass {
    /// Nothing up to there, `bytes` more of payload than before, is needed in the journal any more.
    pub(super) fn made(&self, bytes: u64) {
        if let Some(inner) = self.journal.upgrade() {
            inner.cleaning.borrow_mut().made(bytes, Instant::now());
        }
    }
}

impl Drop for CleaningPass {
    fn drop(&mut self) {
        if let Some(inner) = self.journal.upgrade() {
            inner.cleaning.borrow_mut().end(Instant::now());
        }
    }
}

/// The right to put a payload into the journal; given back when it is dropped.
pub struct Admitted {
    journal: Weak<Inner>,
    bytes: u64,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let Some(journal) = self.journal.upgrade().map(Journal).filter(|_| self.bytes > 0) else { return };
        journal.0.admission.borrow_mut().on_the_way -= self.bytes;
        journal.admit_waiting();
    }
}

/// Bytes that come in at a rate.
#[derive(Default)]
struct Bucket {
    /// Below zero after a large request.
    credit: f64,
    looked: Instant,
}

impl Bucket {
    fn fill(&mut self, rate: f64, now: Instant) {
        let elapsed = now.since(self.looked).as_secs_f64();
        self.looked = now;
        self.credit = (self.credit + rate * elapsed).min(rate * LOOK_MAX.as_secs_f64());
    }

    /// When there is something in it again.
    fn is_empty_for(&self, rate: f64) -> Duration {
        Duration::from_secs_f64((-self.credit / rate).clamp(0.0, 1.0))
    }
}

/// Start time in virtual bytes, and the order of arrival.
type Turn = (u64, u64);

struct Waiting {
    bytes: u64,
    go: oneshot::Sender<Admitted>,
}

/// Who waits to be let in.
#[derive(Default)]
pub(super) struct Admission {
    waiting: BTreeMap<Turn, Waiting>,
    /// When what each group has asked for is served, in virtual bytes.
    ends: BTreeMap<ReplicaIdentity, u64>,
    /// The start time of who was served last.
    served: u64,
    arrived: u64,
    own: Bucket,
    others: Bucket,
    /// When one of them was last slowed.
    others_slowed: Option<Instant>,
    /// Somebody looks again in a while.
    is_watched: bool,
    /// Payload of whoever was admitted, durable here or not.
    on_the_way: u64,
    /// Writes that waited because the line was filling up, and how long.
    pub(super) slowed: u64,
    pub(super) waited: Duration,
}

impl Admission {
    fn enter(&mut self, who: ReplicaIdentity, bytes: u64, go: oneshot::Sender<Admitted>) -> Turn {
        let start = self.ends.get(&who).map_or(self.served, |end| self.served.max(*end));
        self.ends.insert(who, start + bytes);
        self.arrived += 1;
        let turn = if planted("first-come") { (0, self.arrived) } else { (start, self.arrived) };
        self.waiting.insert(turn, Waiting { bytes, go });
        turn
    }

    fn next_bytes(&self) -> Option<u64> {
        self.waiting.first_key_value().map(|(_, next)| next.bytes)
    }

    fn take_next(&mut self) -> Option<Waiting> {
        let ((start, _), next) = self.waiting.pop_first()?;
        self.served = self.served.max(start);
        self.own.credit -= next.bytes as f64;
        self.on_the_way += next.bytes;
        if self.waiting.is_empty() {
            self.ends.clear();
        }
        Some(next)
    }
}

/// A place in the queue; given up when it is dropped.
struct InLine<'j> {
    journal: &'j Journal,
    who: ReplicaIdentity,
    turn: Turn,
    since: Instant,
    /// The line was filling up when it came.
    is_slowed: bool,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        let mut admission = self.journal.0.admission.borrow_mut();
        if let Some(gone) = admission.waiting.remove(&self.turn)
            && let Some(end) = admission.ends.get_mut(&self.who)
        {
            // What a group was not given does not count against it.
            *end = end.saturating_sub(gone.bytes);
        }
        if admission.waiting.is_empty() {
            admission.ends.clear();
        }
        if self.is_slowed {
            admission.waited += Instant::now().since(self.since);
        }
    }
}

impl Journal {
    /// Payload that may be on the way at once.
    fn on_the_way_max(&self) -> u64 {
        let options = &self.0.options;
        let reserved = levels::kept_segments(options.segments as usize) - levels::RESERVE_FOR_ROOM;
        reserved as u64 * options.segment_bytes / 2
    }

    /// How many bytes a second are let in now, of which the next come so many at once; `None` while nobody is slowed.
    fn admission_rate(&self, bytes: u64, now: Instant) -> Option<f64> {
        if self.failed().is_some() || planted("no-admission") {
            return None;
        }
        let line = self.0.options.line_bytes() as f64;
        let from = line / 100.0 * f64::from(levels::ADMISSION);
        // What was let in comes into the line in a moment, and what it brings beside its payload, too: so what has just come
        // counts twice.
        let taken = {
            let (state, on_the_way) = (self.0.state.borrow(), self.0.admission.borrow().on_the_way);
            (state.line_taken() + state.waiting_bytes().max(on_the_way) + bytes) as f64
        };
        if taken <= from {
            return None;
        }
        let least = line / WHOLE_LINE_WITHIN.as_secs_f64();
        let fits = (line - taken).max(0.0) / (taken - from);
        Some((self.0.cleaning.borrow().rate(now) * fits).max(least))
    }

    /// The same of what is led here. What others send is not slowed for long and may fill the line by itself: half of the
    /// room that is made is not theirs.
    fn own_rate(&self, bytes: u64, now: Instant) -> Option<f64> {
        let rate = self.admission_rate(bytes, now)?;
        let others = self.0.admission.borrow().others_slowed;
        let beside_others = others.is_some_and(|at| now.since(at) <= OTHERS_COUNT_FOR);
        let half = self.0.cleaning.borrow().rate(now) / 2.0;
        Some(if beside_others { rate.max(half) } else { rate })
    }

    /// Whether so much more may be on the way.
    fn has_room_for(&self, bytes: u64) -> bool {
        let most = self.on_the_way_max();
        let is_short = self.0.state.borrow().waiting_bytes() <= most;
        self.failed().is_some() || is_short && self.0.admission.borrow().on_the_way + bytes <= most
    }

    /// Ends when little waits to be written, or the store has failed.
    async fn has_room(&self) {
        loop {
            let changed = self.0.shorter.notified();
            if self.0.state.borrow().waiting_bytes() <= self.on_the_way_max() || self.failed().is_some() {
                return;
            }
            changed.await;
        }
    }

    /// Waits until a payload may enter the line.
    pub(super) async fn admit(&self, who: ReplicaIdentity, bytes: usize) -> Admitted {
        if bytes == 0 {
            self.has_room().await;
            return Admitted { journal: self.downgrade(), bytes: 0 };
        }
        // One that is larger than all goes alone.
        let bytes = (bytes as u64).min(self.on_the_way_max());
        let now = Instant::now();
        let is_slowed = self.own_rate(bytes, now).is_some();
        let nobody_waits = self.0.admission.borrow().waiting.is_empty();
        if nobody_waits && !is_slowed && self.has_room_for(bytes) {
            self.0.admission.borrow_mut().on_the_way += bytes;
            return Admitted { journal: self.downgrade(), bytes };
        }
        let (go, gone) = oneshot::channel();
        let turn = {
            let mut admission = self.0.admission.borrow_mut();
            admission.slowed += u64::from(is_slowed);
            admission.enter(who, bytes, go)
        };
        let _in_line = InLine { journal: self, who, turn, since: now, is_slowed };
        self.admit_waiting();
        // Whoever would answer is gone with the journal, and then there is nothing to wait for.
        gone.await.unwrap_or(Admitted { journal: Weak::new(), bytes: 0 })
    }

    /// Lets in whom the line allows by now.
    pub(super) fn admit_waiting(&self) {
        let now = Instant::now();
        loop {
            let Some(bytes) = self.0.admission.borrow().next_bytes() else { return };
            match self.own_rate(bytes, now) {
                Some(rate) => self.0.admission.borrow_mut().own.fill(rate, now),
                None => self.0.admission.borrow_mut().own = Bucket { credit: 1.0, looked: now },
            }
            if self.0.admission.borrow().own.credit <= 0.0 {
                return self.look_again();
            }
            if !self.has_room_for(bytes) {
                // Whoever makes that room, or has it, looks again.
                return;
            }
            let Some(next) = self.0.admission.borrow_mut().take_next() else { return };
            // Who has gone meanwhile gives it back.
            drop(next.go.send(Admitted { journal: self.downgrade(), bytes: next.bytes }));
        }
    }

    /// Looks again in a while, as long as somebody waits for the rate.
    fn look_again(&self) {
        if std::mem::replace(&mut self.0.admission.borrow_mut().is_watched, true) {
            return;
        }
        let journal = self.downgrade();
        holdfast_env::spawn("journal-admission", async move {
            loop {
                let pause = {
                    let Some(journal) = journal.upgrade().map(Self) else { return };
                    journal.admit_waiting();
                    let bytes = journal.0.admission.borrow().next_bytes();
                    let rate = bytes.and_then(|bytes| journal.own_rate(bytes, Instant::now()));
                    let mut admission = journal.0.admission.borrow_mut();
                    let is_rate = admission.own.credit <= 0.0;
                    let Some(rate) = rate.filter(|_| is_rate) else {
                        admission.is_watched = false;
                        return;
                    };
                    admission.own.is_empty_for(rate).clamp(LOOK_MIN, LOOK_MAX)
                };
                holdfast_env::sleep(pause).await;
            }
        });
    }

    /// Ends when an append of a leader elsewhere may enter the line, with so much payload.
    pub(super) async fn take_in(&self, bytes: usize) {
        let now = Instant::now();
        if let Some(rate) = self.admission_rate(bytes as u64, now).filter(|_| bytes > 0) {
            let wait = {
                let mut admission = self.0.admission.borrow_mut();
                admission.others_slowed = Some(now);
                admission.others.fill(rate, now);
                admission.others.credit -= bytes as f64;
                let wait = admission.others.is_empty_for(rate).min(OTHERS_WAIT_MAX);
                // It waits no longer, so it owes no more.
                admission.others.credit = admission.others.credit.max(-rate * OTHERS_WAIT_MAX.as_secs_f64());
                wait
            };
            holdfast_env::sleep(wait).await;
        }
        self.has_room().await;
    }

    /// A pass of a cleaner begins.
    pub(super) fn begin_pass(&self) -> CleaningPass {
        self.0.cleaning.borrow_mut().begin(Instant::now());
        CleaningPass { journal: self.downgrade() }
    }
}
