//! How scripts are written: `cluster("name", &[21], "…").lead("a").attach("a").partition("a|bc")`.

use std::time::Duration;

use crate::step::{Condition, Deed, NodeName, Nodes, Only, Script, Step};

/// Requests of a guest at once, if a script says nothing else.
const WORKERS: u64 = 4;

/// So many seconds.
pub const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// So many milliseconds.
pub const fn milliseconds(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Begins a script: a cluster of three replicas on `a`, `b` and `c`, and a node `d` beside them.
pub fn cluster(name: &'static str, rows: &'static [u32], what: &'static str) -> Builder {
    Builder(Script {
        name,
        rows,
        what,
        only: Only::Everywhere,
        workers: WORKERS,
        stale_reads_allowed: Nodes::default(),
        steps: Vec::new(),
    })
}

/// A script that is being written.
pub struct Builder(Script);

/// The one node of a name.
fn node(name: &str) -> NodeName {
    match Nodes::of(name).0[..] {
        [node] => node,
        _ => panic!("'{name}' is not one node"),
    }
}

impl Builder {
    /// The script.
    pub fn script(self) -> Script {
        self.0
    }

    fn step(mut self, step: Step) -> Self {
        self.0.steps.push(step);
        self
    }
    fn deed(self, deed: Deed) -> Self {
        self.step(Step::Do(deed))
    }

    /// Not on real processes, and why.
    pub fn only_simulated(mut self, why: &'static str) -> Self {
        self.0.only = Only::Simulated(why);
        self
    }
    /// Not in the simulation, and why.
    pub fn only_real(mut self, why: &'static str) -> Self {
        self.0.only = Only::Real(why);
        self
    }
    /// Requests of a guest at once.
    pub fn workers(mut self, workers: u64) -> Self {
        self.0.workers = workers;
        self
    }
    /// What is read on these nodes may be stale: their clocks keep no bound.
    pub fn stale_reads_allowed(mut self, nodes: &str) -> Self {
        self.0.stale_reads_allowed = Nodes::of(nodes);
        self
    }

    /// The leadership is brought there.
    pub fn lead(self, name: &str) -> Self {
        self.deed(Deed::Lead(node(name)))
    }
    /// The volume is attached there, and a guest works.
    pub fn attach(self, name: &str) -> Self {
        self.deed(Deed::Attach { node: node(name), force: false })
    }
    /// The volume is taken there from whoever holds it.
    pub fn attach_by_force(self, name: &str) -> Self {
        self.deed(Deed::Attach { node: node(name), force: true })
    }
    /// So many MiB are written over the first `over` MiB of the volume.
    pub fn fill(self, mib: u64, over: u64) -> Self {
        self.deed(Deed::Fill { mib, over })
    }
    /// Frames pass within groups only: `a|bc`.
    pub fn partition(self, groups: &str) -> Self {
        self.deed(Deed::Partition(groups.split('|').map(Nodes::of).collect()))
    }
    /// Frames of `from` do not reach any of `to`.
    pub fn cut_one_way(mut self, from: &str, to: &str) -> Self {
        for from in Nodes::of(from).0 {
            for to in Nodes::of(to).0 {
                self = self.deed(Deed::CutOneWay { from, to });
            }
        }
        self
    }
    /// All cuts end.
    pub fn heal(self) -> Self {
        self.deed(Deed::Heal)
    }
    /// SIGKILL.
    pub fn kill(self, name: &str) -> Self {
        self.deed(Deed::Kill(node(name)))
    }
    /// It is started again.
    pub fn start(self, name: &str) -> Self {
        self.deed(Deed::Start(node(name)))
    }
    /// SIGSTOP.
    pub fn pause(self, name: &str) -> Self {
        self.deed(Deed::Pause(node(name)))
    }
    /// SIGCONT.
    pub fn resume(self, name: &str) -> Self {
        self.deed(Deed::Resume(node(name)))
    }
    /// The power is cut.
    pub fn cut_power(self, name: &str) -> Self {
        self.deed(Deed::PowerCut(node(name)))
    }
    /// Its clock runs faster by so many millionths from its next start on.
    pub fn clock_rate(self, name: &str, ppm: i64) -> Self {
        self.deed(Deed::ClockRate { node: node(name), ppm })
    }
    /// Its clock jumps ahead.
    pub fn clock_jump(self, name: &str, ahead: Duration) -> Self {
        self.deed(Deed::ClockJump { node: node(name), ahead })
    }
    /// Begins to replace the replica of `from` by a new one on `to`.
    pub fn replace(self, from: &str, to: &str) -> Self {
        self.deed(Deed::Replace { from: node(from), to: node(to) })
    }
    /// Answers, terms and bytes are counted from here on.
    pub fn mark(self) -> Self {
        self.deed(Deed::Mark)
    }
    /// Time passes.
    pub fn let_pass(self, duration: Duration) -> Self {
        self.step(Step::Let(duration))
    }

    /// The newest guest gets so many answers from here on. Moves the mark.
    pub fn work(self, answers: u64, within: Duration) -> Self {
        self.mark().until(Condition::Answered(answers), within)
    }
    /// One of these nodes leads, soon.
    pub fn leader(self, nodes: &str, within: Duration) -> Self {
        self.until(Condition::Leads(Nodes::of(nodes)), within)
    }
    /// The guest there is told, soon, that it has lost the volume.
    pub fn fenced(self, name: &str, within: Duration) -> Self {
        self.until(Condition::Fenced(node(name)), within)
    }
    /// The replica there has all that the leader has, soon.
    pub fn caught_up(self, name: &str, within: Duration) -> Self {
        self.until(Condition::CaughtUp(node(name)), within)
    }
    /// Exactly these nodes hold the volume, soon.
    pub fn members(self, nodes: &str, within: Duration) -> Self {
        self.until(Condition::Members(Nodes::of(nodes)), within)
    }
    /// Nothing of the volume is left there, soon.
    pub fn gone(self, name: &str, within: Duration) -> Self {
        self.until(Condition::Gone(node(name)), within)
    }
    /// The guest there, which asks, gets no answer for so long.
    pub fn unanswered(self, name: &str, lasts: Duration) -> Self {
        self.mark().hold(Condition::Unanswered(node(name)), lasts)
    }
    /// It becomes so, soon enough.
    pub fn until(self, what: Condition, within: Duration) -> Self {
        self.step(Step::Await { what, within })
    }
    /// It is so whenever one looks, for so long.
    pub fn hold(self, what: Condition, lasts: Duration) -> Self {
        self.step(Step::Hold { what, lasts })
    }
    /// It is so now.
    pub fn expect(self, what: Condition) -> Self {
        self.hold(what, Duration::ZERO)
    }
}
