//! The words of the language. Everything here is data.

use std::fmt;
use std::time::Duration;

/// A node, by its letter: `a`, `b` and `c` hold the replicas when a script begins, later ones stand beside.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct NodeName(pub char);

impl NodeName {
    /// Its place: `a` is 0.
    pub fn place(self) -> usize {
        self.0 as usize - 'a' as usize
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Some nodes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Nodes(pub Vec<NodeName>);

impl Nodes {
    /// From letters: `bc`.
    ///
    /// # Panics
    /// If a character is no small letter: a script is written wrong.
    pub fn of(letters: &str) -> Self {
        assert!(letters.chars().all(|letter| letter.is_ascii_lowercase()), "'{letters}' names no nodes");
        Self(letters.chars().map(NodeName).collect())
    }
    /// Whether it is one of them.
    pub fn contains(&self, node: NodeName) -> bool {
        self.0.contains(&node)
    }
}

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|node| write!(f, "{node}"))
    }
}

/// What is done to the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Deed {
    /// The leadership is brought to this node, by whatever means the backend has.
    Lead(NodeName),
    /// The volume is attached here, and a guest begins to read, write and trim all the time.
    Attach {
        /// Where.
        node: NodeName,
        /// Whether it is taken from whoever holds it.
        force: bool,
    },
    /// So many MiB of writes through the newest guest's attachment, over blocks of the volume's first part again and
    /// again, beside what the guest does by itself.
    Fill {
        /// MiB that are written in all.
        mib: u64,
        /// MiB of the volume over which they are spread.
        over: u64,
    },
    /// Frames pass within each of these groups only. Nodes that are not named are in no group: nothing changes for them.
    Partition(Vec<Nodes>),
    /// Frames of one node do not reach another; the other way is open.
    CutOneWay {
        /// Whose frames are lost.
        from: NodeName,
        /// Who does not hear them.
        to: NodeName,
    },
    /// All cuts end.
    Heal,
    /// SIGKILL.
    Kill(NodeName),
    /// What was killed or lost its power is started.
    Start(NodeName),
    /// SIGSTOP.
    Pause(NodeName),
    /// SIGCONT.
    Resume(NodeName),
    /// The power is cut: what was not flushed is lost or torn.
    PowerCut(NodeName),
    /// The node's monotonic clock runs faster by so many millionths from its next start on (slower if negative).
    ClockRate {
        /// Whose.
        node: NodeName,
        /// Millionths.
        ppm: i64,
    },
    /// The node's monotonic clock jumps ahead, as after the sleep of a whole machine.
    ClockJump {
        /// Whose.
        node: NodeName,
        /// By so much.
        ahead: Duration,
    },
    /// The replica of one node is to be replaced by a new one on another: the beginning of it.
    Replace {
        /// Whose replica goes.
        from: NodeName,
        /// Where the new one is made.
        to: NodeName,
    },
    /// Answers, terms and bytes are counted from here on.
    Mark,
}

/// What is so, or is not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    /// One of these leads.
    Leads(Nodes),
    /// The newest guest has had so many answers since the last mark.
    Answered(u64),
    /// The guest on this node has had no answer since the last mark, though it asks.
    Unanswered(NodeName),
    /// The guest on this node holds the volume no more, and has been told so.
    Fenced(NodeName),
    /// The highest term that any replica knows has grown by no more than so many since the last mark.
    TermsAtMost(u64),
    /// The replica on this node has applied everything that the leader has.
    CaughtUp(NodeName),
    /// Exactly these nodes hold the volume, in one settled configuration.
    Members(Nodes),
    /// Nothing of the volume is left on this node.
    Gone(NodeName),
    /// The replica on this node was last healed by comparing chunks, and no more than so many MiB were sent for it. If
    /// its daemon has ended since, what it had said before counts.
    HealedByChunks {
        /// Whose.
        node: NodeName,
        /// MiB.
        at_most: u64,
    },
    /// No more than so many MiB were sent between nodes since the last mark.
    SentAtMost(u64),
}

/// One line of a script.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Something is done.
    Do(Deed),
    /// It becomes so, soon enough.
    Await {
        /// What.
        what: Condition,
        /// How soon, at most.
        within: Duration,
    },
    /// It is so whenever one looks, for so long.
    Hold {
        /// What.
        what: Condition,
        /// How long.
        lasts: Duration,
    },
    /// Time passes.
    Let(Duration),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Do(deed) => write!(f, "{deed}"),
            Self::Await { what, within } => write!(f, "await {what} within {within:?}"),
            Self::Hold { what, lasts } => write!(f, "hold {what} for {lasts:?}"),
            Self::Let(duration) => write!(f, "let {duration:?} pass"),
        }
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lead(node) => write!(f, "lead {node}"),
            Self::Attach { node, force: false } => write!(f, "attach {node}"),
            Self::Attach { node, force: true } => write!(f, "attach {node} by force"),
            Self::Fill { mib, over } => write!(f, "fill {mib} MiB over {over}"),
            Self::Partition(groups) => {
                let groups: Vec<String> = groups.iter().map(Nodes::to_string).collect();
                write!(f, "partition {}", groups.join("|"))
            }
            Self::CutOneWay { from, to } => write!(f, "cut {from}>{to}"),
            Self::Heal => write!(f, "heal"),
            Self::Kill(node) => write!(f, "kill {node}"),
            Self::Start(node) => write!(f, "start {node}"),
            Self::Pause(node) => write!(f, "pause {node}"),
            Self::Resume(node) => write!(f, "resume {node}"),
            Self::PowerCut(node) => write!(f, "cut the power of {node}"),
            Self::ClockRate { node, ppm } => write!(f, "the clock of {node} runs {ppm} ppm fast"),
            Self::ClockJump { node, ahead } => write!(f, "the clock of {node} jumps by {ahead:?}"),
            Self::Replace { from, to } => write!(f, "replace {from} by {to}"),
            Self::Mark => write!(f, "mark"),
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leads(nodes) => write!(f, "a leader of {nodes}"),
            Self::Answered(answers) => write!(f, "{answers} answers"),
            Self::Unanswered(node) => write!(f, "no answer at {node}"),
            Self::Fenced(node) => write!(f, "the end of {node}'s attachment"),
            Self::TermsAtMost(terms) => write!(f, "at most {terms} new terms"),
            Self::CaughtUp(node) => write!(f, "{node} caught up"),
            Self::Members(nodes) => write!(f, "the members {nodes}"),
            Self::Gone(node) => write!(f, "nothing left on {node}"),
            Self::HealedByChunks { node, at_most } => write!(f, "{node} healed by at most {at_most} MiB"),
            Self::SentAtMost(mib) => write!(f, "at most {mib} MiB sent"),
        }
    }
}

/// Where a script is played.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Only {
    /// In the simulation and on real processes.
    Everywhere,
    /// In the simulation only, and why.
    Simulated(&'static str),
    /// On real processes only, and why.
    Real(&'static str),
}

/// A script.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Script {
    /// What it is called: the fault.
    pub name: &'static str,
    /// Rows of the list of faults.
    pub rows: &'static [u32],
    /// What is done and what must come of it, in a line.
    pub what: &'static str,
    /// Where it is played.
    pub only: Only,
    /// Requests of a guest at once.
    pub workers: u64,
    /// Whether reads on these nodes are trusted: a clock that keeps no bound may make them stale, and nothing else.
    pub stale_reads_allowed: Nodes,
    /// What is done, in order.
    pub steps: Vec<Step>,
}
