//! The command line: nouns, verbs and flags.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use holdfast_node::cluster::LoopbackPlan;
use holdfast_types::{ByteSize, ErrorCode, UserError};

use crate::output::Format;

/// Replicated block volumes that survive a zone or a region.
#[derive(Parser)]
#[command(name = "holdfast", version, max_term_width = 100)]
pub struct Cli {
    /// Where the cluster's admin API is: `unix:PATH`.
    #[arg(long, global = true, env = "HOLDFAST_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<String>,
    /// How results are shown.
    #[arg(short = 'o', long = "output", global = true, default_value = "table", value_name = "FORMAT")]
    pub output: Format,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run a node's daemon (--data-dir), or look at nodes.
    #[command(args_conflicts_with_subcommands = true)]
    Node {
        /// The node's data directory; runs its daemon in the foreground.
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// Serve metrics over HTTP at this address instead of the configured one; without TLS or password, so keep
        /// it on loopback.
        #[arg(long, value_name = "HOST:PORT")]
        metrics: Option<String>,
        /// Begin a pass of the scrub every so many seconds instead of the configured time (a week).
        #[arg(long, value_name = "SECONDS")]
        scrub_period: Option<u64>,
        /// How the files of its stores are read and written, instead of the configured way (threads).
        #[arg(long, value_name = "ENGINE")]
        io_engine: Option<holdfast_node::config::IoEngine>,
        /// How much of its medium the store may take, journal included, instead of the configured part (all of it). It
        /// may be less than what stands: then writes wait until trims and deletions have made room. For a node of one
        /// store; each of several has its own in node.json.
        #[arg(long, value_name = "SIZE")]
        capacity: Option<ByteSize>,
        /// Take witnesses only: vote for volumes, and hold no data. A node is this from its first start on.
        #[arg(long)]
        witness: bool,
        /// As a witness: how much the log of one volume may hold for a data replica that is away (1GiB).
        #[arg(long, value_name = "SIZE")]
        witness_log: Option<ByteSize>,
        /// End when the process that started this one ends.
        #[arg(long, hide = true)]
        follow_parent: bool,
        #[command(subcommand)]
        command: Option<NodeCommand>,
    },
    /// Run a whole cluster on loopback, in the foreground.
    #[command(args_conflicts_with_subcommands = true)]
    Dev {
        #[command(flatten)]
        options: DevOptions,
        #[command(subcommand)]
        ctl: Option<DevCommand>,
    },
    /// Create, show, attach and delete volumes.
    Volume {
        #[command(subcommand)]
        command: VolumeCommand,
    },
    /// Make, compare, restore and delete snapshots of volumes.
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Look at replicas and move them.
    Replica {
        #[command(subcommand)]
        command: ReplicaCommand,
    },
    /// Prove that a node is fenced from a volume, and verify such a proof.
    Fence {
        #[command(subcommand)]
        command: FenceCommand,
    },
    /// Serve CSI, on a unix socket, over the admin API (--admin).
    Csi {
        #[command(subcommand)]
        command: CsiCommand,
    },
    /// Cluster health at a glance, what is wrong and what is being done about it.
    Status,
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    #[command(external_subcommand)]
    Later(Vec<String>),
}

#[derive(Args)]
pub struct DevOptions {
    /// Regions.
    #[arg(long, default_value_t = 1)]
    pub regions: usize,
    /// Zones of each region.
    #[arg(long, default_value_t = 3)]
    pub zones: usize,
    /// Nodes of each zone; 1, or 2 in a demonstration.
    #[arg(long, value_name = "N")]
    pub nodes_per_zone: Option<usize>,
    /// Stores of each node, each failing alone: directories, as if each were a disk.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub stores: usize,
    /// Add a witness node in a domain of its own.
    #[arg(long)]
    pub witness: bool,
    /// Where everything is kept; holdfast-dev, or in a demonstration a directory that is removed at its end.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Delay between regions, one way: for example 30ms.
    #[arg(long, value_name = "DELAY")]
    pub wan: Option<String>,
    /// Seconds after which a silent node is lost and its replicas are placed elsewhere.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub lost_after: u64,
    /// Size of each node's journal; 256MiB, or 64MiB in a demonstration.
    #[arg(long, value_name = "SIZE")]
    pub journal: Option<ByteSize>,
    /// What happens to a daemon's unflushed writes when it is killed: for trying power cuts.
    #[arg(long, default_value = "plain", value_name = "MODE")]
    pub disk: holdfast_node::config::DiskMode,
    /// How the nodes read and write their stores' files.
    #[arg(long, default_value = "threads", value_name = "ENGINE")]
    pub io_engine: holdfast_node::config::IoEngine,
    /// Play a demonstration, print what it showed, and exit; 0 only if every check held.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["regions", "zones", "nodes_per_zone"])]
    pub demo: Option<Demo>,
    /// How much of a directory tree the demonstration loads.
    #[arg(long, value_name = "SIZE", default_value = "300MiB", hide = true, requires = "demo")]
    pub demo_data: ByteSize,
}

impl DevOptions {
    /// The directory of a cluster that stays.
    pub fn directory(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_DIRECTORY))
    }

    /// The cluster that is asked for.
    pub fn plan(&self) -> LoopbackPlan {
        let demo = self.demo.is_some();
        LoopbackPlan {
            regions: self.regions,
            zones: self.zones,
            nodes_per_zone: self.nodes_per_zone.unwrap_or(if demo { 2 } else { 1 }),
            stores: self.stores,
            witness: self.witness,
            lost_after_seconds: self.lost_after,
            // A demonstration wants to see the log purged soon.
            journal_bytes: self.journal.map_or(if demo { 64 << 20 } else { 256 << 20 }, |size| size.0),
            disk: self.disk,
            io_engine: self.io_engine,
        }
    }
}

/// Where `dev` keeps a cluster if nothing else is said.
pub const DEFAULT_DIRECTORY: &str = "holdfast-dev";

/// A demonstration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Demo {
    /// A volume with a directory tree outlives the loss of zones.
    ZoneLoss,
    /// The same under PostgreSQL on ext4; needs root and PostgreSQL.
    Postgres,
}

#[derive(Subcommand)]
pub enum DevCommand {
    /// Faults on a running development cluster.
    Ctl {
        /// The cluster's directory; else the one that HOLDFAST_ADMIN points into, else holdfast-dev.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        #[command(subcommand)]
        action: CtlAction,
    },
}

#[derive(Subcommand, Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CtlAction {
    /// SIGKILL the daemons of a node, zone or region.
    Kill {
        /// NODE, ZONE or REGION.
        target: String,
        /// Spare the keeper (there is none yet: the same as without).
        #[arg(long)]
        daemon_only: bool,
    },
    /// Start daemons that were killed.
    Start {
        /// NODE, ZONE or REGION.
        target: String,
    },
    /// SIGSTOP daemons.
    Pause {
        /// NODE, ZONE or REGION.
        target: String,
    },
    /// SIGCONT daemons.
    Resume {
        /// NODE, ZONE or REGION.
        target: String,
    },
    /// Drop all peer traffic between these nodes and the others, silently, both ways.
    Partition {
        /// NODE, ZONE or REGION.
        target: String,
    },
    /// Drop peer traffic that these nodes receive, silently: they can send but not hear.
    Deafen {
        /// NODE, ZONE or REGION.
        target: String,
    },
    /// Drop what one of them sends to the other, silently; the other way stays open.
    Cut {
        /// NODE, ZONE or REGION that is not heard.
        from: String,
        /// NODE, ZONE or REGION that does not hear it.
        to: String,
    },
    /// Let the disk of a node's store fail: every call on it ends with an error, or none ends.
    BreakDisk {
        /// The node.
        node: String,
        /// The store, by id or by its directory within the node's.
        #[arg(long, default_value = "store")]
        store: String,
        /// It does not answer any more, instead of failing.
        #[arg(long)]
        hang: bool,
    },
    /// End partitions, cuts and delays, and mend disks. A store that has stopped stays so until its daemon is started anew.
    Heal,
    /// Delay peer traffic between two of them, one way each: for example 30ms.
    Delay {
        /// NODE, ZONE or REGION.
        a: String,
        /// NODE, ZONE or REGION.
        b: String,
        /// For example 30ms.
        delay: String,
    },
}

#[derive(Subcommand)]
pub enum NodeCommand {
    /// All nodes.
    List,
    /// One node.
    Show {
        /// Its name.
        name: String,
    },
    /// Place nothing new on a node.
    Cordon {
        /// Its name.
        name: String,
    },
    /// Place on a node again.
    Uncordon {
        /// Its name.
        name: String,
    },
    /// Move everything off a node.
    Drain {
        /// Its name.
        name: String,
    },
    /// Whether a node can be drained.
    CanDrain {
        /// Its name.
        name: String,
    },
    /// Forget a node.
    Remove {
        /// Its name.
        name: String,
    },
}

#[derive(Subcommand)]
pub enum VolumeCommand {
    /// Create a volume.
    Create {
        /// Its name.
        name: String,
        /// Its size, for example 1GiB; that of what is copied if left out.
        #[arg(long, required_unless_present_any = ["from_snapshot", "from_volume"])]
        size: Option<ByteSize>,
        /// The loss it survives: none, node, zone or region.
        #[arg(long)]
        survive: Option<String>,
        /// Data replicas: 1, 3 or 5.
        #[arg(long)]
        replicas: Option<u32>,
        /// Zones where its replicas may stand; the first is preferred.
        #[arg(long, value_delimiter = ',')]
        zones: Vec<String>,
        /// How soon a dead leader is missed: auto (as the network allows) or tight.
        #[arg(long)]
        timers: Option<String>,
        /// How much its snapshots may add to its size, on each replica, for example 10GiB.
        #[arg(long, value_name = "SIZE")]
        snapshot_quota: Option<String>,
        /// A StorageClass parameter, KEY=VALUE; may be repeated.
        #[arg(long = "parameter", value_name = "KEY=VALUE")]
        parameters: Vec<String>,
        /// Begin with a snapshot's content.
        #[arg(long, value_name = "VOLUME@SNAPSHOT")]
        from_snapshot: Option<String>,
        /// Begin with what another volume holds now, attached or not.
        #[arg(long, value_name = "VOLUME", conflicts_with = "from_snapshot")]
        from_volume: Option<String>,
    },
    /// All volumes.
    List,
    /// One volume with its replicas.
    Show {
        /// Its name or id.
        name: String,
    },
    /// Attach a volume to a node.
    Attach {
        /// Its name or id.
        name: String,
        /// The node.
        #[arg(long)]
        node: String,
        /// How the guest reaches it: nbd, fuse, loop or auto.
        #[arg(long, default_value = "auto")]
        frontend: String,
        /// Take it from a node that holds it; that node is fenced.
        #[arg(long)]
        force: bool,
        /// Only read.
        #[arg(long)]
        read_only: bool,
    },
    /// Detach a volume.
    Detach {
        /// Its name or id.
        name: String,
        /// End it even if the node that holds it does not answer; that node is fenced.
        #[arg(long)]
        force: bool,
        /// Only if this node holds it. By force also the proof that this node is fenced, if it held it before.
        #[arg(long)]
        node: Option<String>,
    },
    /// Grow a volume.
    Resize {
        /// Its name or id.
        name: String,
        /// The new size.
        #[arg(long)]
        size: ByteSize,
    },
    /// Change a volume in use.
    Set {
        /// Its name or id.
        name: String,
        /// How soon a dead leader is missed: auto (as the network allows) or tight.
        #[arg(long, required_unless_present = "snapshot_quota")]
        timers: Option<String>,
        /// How much its snapshots may add to its size, on each replica, for example 10GiB; none for no bound. What snapshots
        /// hold already stays.
        #[arg(long, value_name = "SIZE")]
        snapshot_quota: Option<String>,
    },
    /// Delete a volume and its data.
    Delete {
        /// Its name or id.
        name: String,
        /// Really.
        #[arg(long)]
        yes: bool,
    },
    /// Let a volume that has lost its majority for good go on from survivors. Without --accept-loss nothing is done, and it
    /// is told what would be lost.
    Recover {
        /// Its name or id.
        name: String,
        /// Replicas to go on from, by id or by node: all that can. The one that has most is taken.
        #[arg(long, value_delimiter = ',', value_name = "REPLICA")]
        survivors: Vec<String>,
        /// Do it: what only lost replicas hold is gone, and if they come back they are kept and not served.
        #[arg(long, requires = "survivors")]
        accept_loss: bool,
    },
    /// Let every replica be read from its disk, compared with the others and healed, without stopping at an index.
    Scrub {
        /// Its name or id.
        name: String,
        /// Return when every replica that answers was looked at.
        #[arg(long)]
        wait: bool,
    },
    /// Read every replica from disk at one log index and compare.
    Verify {
        /// Its name or id.
        name: String,
    },
    #[command(external_subcommand)]
    Later(Vec<String>),
}

#[derive(Subcommand)]
pub enum CsiCommand {
    /// The controller service; any number of them in a cluster.
    Controller {
        /// Where to serve: `unix:PATH`.
        #[arg(long, env = "CSI_ENDPOINT", value_name = "ADDRESS")]
        endpoint: String,
    },
    /// The node service, on each node, over the admin API of that node's daemon.
    Node {
        /// Where to serve: `unix:PATH`.
        #[arg(long, env = "CSI_ENDPOINT", value_name = "ADDRESS")]
        endpoint: String,
    },
}

#[derive(Subcommand)]
pub enum FenceCommand {
    /// Let a majority of a volume's voters sign that a node does not hold it and can change it no more.
    Certify {
        /// The volume, by name or id.
        volume: String,
        /// The node.
        #[arg(long)]
        node: String,
        /// Write the certificate to this file.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Verify a certificate: that a majority has signed it, unaltered, for the volume as it is now.
    Verify {
        /// The certificate.
        file: PathBuf,
        /// Ask no cluster: verify it by its authority's certificate (`pki/ca.pem` of any data directory). That does not tell
        /// whether a forced recovery has come since.
        #[arg(long, value_name = "CA.PEM")]
        authority: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
pub enum SnapshotCommand {
    /// Freeze what a volume holds, attached or not.
    Create {
        /// The volume, by name or id.
        volume: String,
        /// The snapshot's name, unique among the volume's snapshots.
        name: String,
    },
    /// The snapshots of a volume, or of all.
    List {
        /// The volume, by name or id.
        volume: Option<String>,
    },
    /// Delete a snapshot; its volume and its other snapshots stay as they are.
    Delete {
        /// VOLUME@SNAPSHOT, or its id.
        snapshot: String,
        /// Really.
        #[arg(long)]
        yes: bool,
    },
    /// Throw away what was changed after the newest snapshot of a detached volume.
    Restore {
        /// VOLUME@SNAPSHOT, or its id.
        snapshot: String,
        /// Really.
        #[arg(long)]
        yes: bool,
    },
    /// Extents that changed between two snapshots, or since one (give the volume as the second); with one argument,
    /// all that it holds.
    Diff {
        /// VOLUME@SNAPSHOT, the older first; a volume is what it holds now.
        #[arg(num_args = 1..=2, required = true, value_name = "SNAPSHOT")]
        ends: Vec<String>,
    },
    /// Write a snapshot as a sparse raw image.
    Export {
        /// VOLUME@SNAPSHOT, or its id.
        snapshot: String,
        /// The file, which must not be there yet.
        file: PathBuf,
    },
}

#[derive(Subcommand)]
pub enum ReplicaCommand {
    /// The replicas of a volume.
    List {
        /// The volume.
        volume: String,
    },
    /// One more replica.
    Add {
        /// The volume.
        volume: String,
        /// The node, or the id of a store; any if left out.
        #[arg(long)]
        node: Option<String>,
    },
    /// Remove a replica that is not needed.
    Remove {
        /// The volume.
        volume: String,
        /// The replica's number.
        replica: u64,
        /// Really.
        #[arg(long)]
        yes: bool,
    },
    /// Give the leadership to a replica, without an error and with a stall of milliseconds.
    Lead {
        /// The volume.
        volume: String,
        /// The replica's number.
        replica: u64,
    },
    /// Replace a replica by one on another node, or on another store of its node.
    Move {
        /// The volume.
        volume: String,
        /// The replica's number.
        replica: u64,
        /// The node, or the id of a store; any if left out.
        #[arg(long)]
        to: Option<String>,
    },
}

/// A wrong use of the command line.
pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> UserError {
    UserError::new(ErrorCode::InvalidArgument, message).hint(hint)
}

/// A command of the design that does not exist yet.
pub fn not_built(words: &[String], within: &str) -> UserError {
    const PLANNED: &[&str] =
        &["explain", "bench", "kube", "keeper", "adopt", "switchover", "failover", "top"];
    let first = words.first().map(String::as_str).unwrap_or_default();
    if PLANNED.contains(&first) {
        return UserError::new(ErrorCode::Unimplemented, format!("'{first}' is not built yet"))
            .hint("docs/roadmap.md tells what is");
    }
    usage(format!("there is no command '{first}'"), format!("`{within} --help` lists the commands"))
}

/// A destructive command needs its flag.
pub fn confirmed(yes: bool, what: &str) -> Result<(), UserError> {
    if yes {
        return Ok(());
    }
    Err(usage(format!("{what} cannot be undone"), "say --yes if you mean it"))
}

/// Whether a command line that could not be understood asked for JSON.
pub fn wants_json(arguments: &[String]) -> bool {
    let joined = |argument: &String| ["-ojson", "-o=json", "--output=json"].contains(&argument.as_str());
    let apart = |pair: &[String]| ["-o", "--output"].contains(&pair[0].as_str()) && pair[1] == "json";
    arguments.iter().any(joined) || arguments.windows(2).any(apart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn json_is_recognized_in_a_command_line_that_is_not_understood() {
        let wants = |text: &str| wants_json(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert!(wants("holdfast volume create -o json"));
        assert!(wants("holdfast --output=json nonsense"));
        assert!(!wants("holdfast volume create json"));
        assert!(!wants("holdfast -o"));
    }

    #[test]
    fn a_demonstration_has_two_nodes_in_a_zone_and_a_small_journal() {
        let plan = |line: &str| match Cli::try_parse_from(line.split(' ')).map(|cli| cli.command) {
            Ok(Command::Dev { options, .. }) => options.plan(),
            other => panic!("{line}: {:?}", other.err()),
        };
        let shown = plan("holdfast dev --demo zone-loss");
        assert_eq!((shown.zones, shown.nodes_per_zone, shown.journal_bytes), (3, 2, 64 << 20));
        let plain = plan("holdfast dev");
        assert_eq!((plain.zones, plain.nodes_per_zone, plain.journal_bytes), (3, 1, 256 << 20));
        assert_eq!(plan("holdfast dev --demo zone-loss --journal 128MiB").journal_bytes, 128 << 20);
        assert!(Cli::try_parse_from(["holdfast", "dev", "--demo", "zone-loss", "--zones", "4"]).is_err());
    }
}
