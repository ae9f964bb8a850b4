//! Crash points: a fault may wait for a node to reach a certain place, and cuts its power exactly there. Random kills
//! alone miss bugs whose window is one step wide.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::executor::Executor;
use crate::trace::Trace;

/// Where a node may be made to crash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum CrashPoint {
    /// Its answer to a request for its vote has just left.
    AfterVoteAnswer,
    /// Its answer to an append has just left.
    AfterAppendAnswer,
    /// An append of its own has just left.
    AfterAppendSent,
    /// A durable write or a flush has just been handed to the disk.
    BeforeFlush,
    /// A durable write or a flush has just been completed, and the node does not know yet.
    AfterFlush,
    /// A manifest or table page is being written: a checkpoint is under way.
    DuringCheckpoint,
    /// Blocks have just come home for good, and no checkpoint says so yet.
    AfterHomeFlush,
    /// What a rebuild has collected has just been switched in.
    AfterSwitch,
}

/// Those that are drawn; the others are for scenes.
pub(crate) const CRASH_POINTS: [CrashPoint; 6] = [
    CrashPoint::AfterVoteAnswer,
    CrashPoint::AfterAppendAnswer,
    CrashPoint::AfterAppendSent,
    CrashPoint::BeforeFlush,
    CrashPoint::AfterFlush,
    CrashPoint::DuringCheckpoint,
];

type OnCrash = Rc<dyn Fn(u64)>;

/// The crash points that are armed, by node.
pub(crate) struct Hooks {
    executor: Rc<Executor>,
    trace: Rc<Trace>,
    armed: RefCell<BTreeMap<u64, CrashPoint>>,
    on_crash: RefCell<Option<OnCrash>>,
}

impl Hooks {
    pub(crate) fn new(executor: Rc<Executor>, trace: Rc<Trace>) -> Rc<Self> {
        Rc::new(Self { executor, trace, armed: RefCell::default(), on_crash: RefCell::default() })
    }

    /// What is to be done with a node that has reached its crash point.
    pub(crate) fn set_on_crash(&self, on_crash: Option<OnCrash>) {
        *self.on_crash.borrow_mut() = on_crash;
    }

    pub(crate) fn arm(&self, node: u64, point: CrashPoint) {
        self.armed.borrow_mut().insert(node, point);
    }

    pub(crate) fn disarm_all(&self) {
        self.armed.borrow_mut().clear();
    }

    /// The node is at `point`: true if it crashes here, before anything else happens.
    pub(crate) fn reached(&self, node: u64, point: CrashPoint) -> bool {
        let hit = self.armed.borrow().get(&node) == Some(&point);
        if hit {
            self.armed.borrow_mut().remove(&node);
            self.trace.add(node, format_args!("CRASH POINT {point:?}"));
            self.trace.mark("crash points reached");
            let on_crash = self.on_crash.borrow().clone();
            if let Some(on_crash) = on_crash {
                self.executor.defer(move || on_crash(node));
            }
        }
        hit
    }
}
