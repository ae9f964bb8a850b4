//! What happened, in order: a running hash that two runs of one seed must share, the text on demand, marks that count
//! what was covered, and the violations found.
//!
//! Every line carries the virtual time and the number of polls so far, so that a difference anywhere shows at once.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::rc::Rc;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, span};

use crate::executor::{Executor, MICROSECOND, Owner};

/// Violations kept; the first is what matters.
const VIOLATIONS_MAX: usize = 5;

/// The record of one simulation.
pub(crate) struct Trace {
    executor: Rc<Executor>,
    hash: Cell<u64>,
    lines: Cell<u64>,
    out: RefCell<Option<Box<dyn std::io::Write>>>,
    line: RefCell<String>,
    marks: RefCell<BTreeMap<&'static str, u64>>,
    violations: RefCell<Vec<String>>,
    /// Node names of owners, for the text.
    names: RefCell<BTreeMap<Owner, u64>>,
}

impl Trace {
    pub(crate) fn new(executor: Rc<Executor>, out: Option<Box<dyn std::io::Write>>) -> Rc<Self> {
        Rc::new(Self {
            executor,
            hash: Cell::new(0xcbf2_9ce4_8422_2325),
            lines: Cell::new(0),
            out: RefCell::new(out),
            line: RefCell::default(),
            marks: RefCell::default(),
            violations: RefCell::default(),
            names: RefCell::default(),
        })
    }

    /// `owner` is a boot of this node.
    pub(crate) fn name(&self, owner: Owner, node: u64) {
        self.names.borrow_mut().insert(owner, node);
    }

    /// Adds a line about a node; 0 is the world.
    pub(crate) fn add(&self, node: u64, what: fmt::Arguments<'_>) {
        let mut line = self.line.borrow_mut();
        line.clear();
        let (at, polls) = (self.executor.time() / MICROSECOND, self.executor.polls());
        // Writing into a string does not fail.
        let _ = writeln!(line, "{}.{:06} p{polls} n{node} {what}", at / 1_000_000, at % 1_000_000);
        let mut hash = self.hash.get();
        for byte in line.as_bytes() {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self.hash.set(hash);
        self.lines.set(self.lines.get() + 1);
        self.write(&line);
    }

    fn write(&self, line: &str) {
        if let Some(out) = self.out.borrow_mut().as_mut() {
            out.write_all(line.as_bytes()).expect("the trace's file can be written");
        }
    }

    /// Counts one more of what was covered.
    pub(crate) fn mark(&self, what: &'static str) {
        *self.marks.borrow_mut().entry(what).or_default() += 1;
    }

    /// A rule is broken.
    pub(crate) fn violation(&self, what: fmt::Arguments<'_>) {
        self.add(0, format_args!("VIOLATION {what}"));
        let mut violations = self.violations.borrow_mut();
        if violations.len() < VIOLATIONS_MAX {
            let at = self.executor.time() / MICROSECOND;
            violations.push(format!("at {}.{:06} s: {what}", at / 1_000_000, at % 1_000_000));
        }
    }

    pub(crate) fn has_violations(&self) -> bool {
        !self.violations.borrow().is_empty()
    }
    pub(crate) fn violations(&self) -> Vec<String> {
        self.violations.borrow().clone()
    }
    pub(crate) fn hash(&self) -> u64 {
        self.hash.get()
    }
    pub(crate) fn lines(&self) -> u64 {
        self.lines.get()
    }
    pub(crate) fn marks(&self) -> BTreeMap<&'static str, u64> {
        self.marks.borrow().clone()
    }
    pub(crate) fn has_text(&self) -> bool {
        self.out.borrow().is_some()
    }

    /// A message of the product, seen by the subscriber. Only in the text: the hash must not depend on whether
    /// somebody reads along.
    fn message(&self, level: Level, target: &str, message: &str) {
        for (text, mark) in MESSAGE_MARKS {
            if message.starts_with(text) {
                self.mark(mark);
            }
        }
        if !self.has_text() {
            return;
        }
        let node = self.names.borrow().get(&self.executor.current()).copied().unwrap_or(0);
        let (at, polls) = (self.executor.time() / MICROSECOND, self.executor.polls());
        let line = format!(
            "{}.{:06} p{polls} n{node} {level} {target}: {message}\n",
            at / 1_000_000,
            at % 1_000_000
        );
        self.write(&line);
    }

    /// Writes what is buffered.
    pub(crate) fn flush(&self) {
        if let Some(out) = self.out.borrow_mut().as_mut() {
            out.flush().expect("the trace's file can be written");
        }
    }
}

/// Messages of the product that say that something was covered.
const MESSAGE_MARKS: [(&str, &str); 4] = [
    ("the torn tail of the journal", "recoveries with a torn tail"),
    ("the session has ended", "sessions ended"),
    ("the disk below the leader hangs: it falls silent", "leaders that fell silent"),
    ("the former holder has not confirmed", "former holders that did not confirm"),
];

thread_local! {
    static TRACE: RefCell<Option<Rc<Trace>>> = const { RefCell::new(None) };
}

/// Lets the product's messages of this thread go to `trace`.
pub(crate) fn listen(trace: Option<Rc<Trace>>) {
    TRACE.with(|slot| *slot.borrow_mut() = trace);
}

/// Installs what carries the product's messages to the trace; once per process.
pub(crate) fn install_subscriber(debug: bool) {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    // A second installation is the tests', which share a process; the first does for all.
    let _ = tracing::subscriber::set_global_default(Messages { level });
}

struct Messages {
    level: Level,
}

impl tracing::Subscriber for Messages {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level && metadata.target().starts_with("holdfast")
    }
    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(tracing::level_filters::LevelFilter::from_level(self.level))
    }
    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}
    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let trace = TRACE.with(|slot| slot.borrow().clone());
        let Some(trace) = trace else { return };
        let mut text = Text::default();
        event.record(&mut text);
        let message = text.message + &text.fields;
        trace.message(*event.metadata().level(), event.metadata().target(), &message);
    }
    fn enter(&self, _span: &span::Id) {}
    fn exit(&self, _span: &span::Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing into a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
