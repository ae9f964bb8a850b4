//! Three processes that hold one volume, the first of them with the session: the data path without a frontend.

use std::collections::BTreeMap;
use std::path::Path;

use holdfast_types::{ClusterId, NodeName, ReplicaId, StoreId};
use holdfast_wire::pki::{Authority, Credentials};
use serde::{Deserialize, Serialize};

use crate::Outcome;
use crate::child::{Worker, cpu_ns};
use crate::load::{Figures, Work};
use crate::usage::Usage;

/// Members.
pub const MEMBERS: usize = 3;

/// A member, as the others reach it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemberConfig {
    /// Its store.
    pub store: StoreId,
    /// Its node.
    pub node: NodeName,
    /// Where it listens.
    pub address: String,
}

/// What the members have in common.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrioConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// The members.
    pub members: Vec<MemberConfig>,
    /// Bytes of the volume.
    pub size: u64,
}

impl TrioConfig {
    /// Voters by replica.
    pub fn voters(&self) -> BTreeMap<ReplicaId, StoreId> {
        (1u64..).map(ReplicaId).zip(self.members.iter().map(|member| member.store)).collect()
    }
}

/// What a member is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Begin the group.
    Bootstrap,
    /// Whether it leads.
    Leads,
    /// Give the leadership to the first member.
    GiveAway,
    /// Attach the volume.
    Attach,
    /// Run a load on it.
    Work(Work),
    /// Let the disk stall from now on, or not any more.
    Stall(bool),
    /// Tell the counters.
    Usage,
}

/// The running processes.
pub struct Trio(Vec<Worker>);

fn write_credentials(directory: &Path, credentials: &Credentials) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    std::fs::write(directory.join("ca.pem"), &credentials.authority)?;
    std::fs::write(directory.join("node.pem"), &credentials.certificate)?;
    std::fs::write(directory.join("node.key"), &credentials.key)
}

impl Trio {
    /// Makes the stores and starts the processes; the first one leads and has the volume attached.
    pub fn start(directory: &Path, size: u64) -> Outcome<Self> {
        let wrong = |error: &dyn std::fmt::Display| format!("the three processes: {error}");
        let cluster = ClusterId(1);
        let authority = Authority::create(cluster).map_err(|error| wrong(&error))?;
        // A network of its own on loopback for every run.
        let part = std::process::id() % 60_000;
        let (a, b) = (part / 250 % 200 + 20, part % 250);
        let members: Vec<MemberConfig> = (1..=MEMBERS)
            .map(|n| MemberConfig {
                store: StoreId(n as u128),
                node: NodeName::new(format!("m{n}")),
                address: format!("127.{a}.{b}.{n}:7500"),
            })
            .collect();
        let config = TrioConfig { cluster, members, size };
        for member in &config.members {
            let credentials = authority.issue(&member.node).map_err(|error| wrong(&error))?;
            write_credentials(&directory.join(member.node.as_str()), &credentials)
                .map_err(|error| wrong(&error))?;
        }
        let json = serde_json::to_vec(&config).map_err(|error| wrong(&error))?;
        std::fs::write(directory.join("trio.json"), json).map_err(|error| wrong(&error))?;
        let place = directory.display().to_string();
        let spawn = |n: usize| {
            let arguments = ["member", "--directory", &place, "--number", &n.to_string()];
            Worker::spawn(&format!("member {n}"), &arguments)
        };
        let mut trio = Self((1..=MEMBERS).map(spawn).collect::<Outcome<_>>()?);
        trio.0.iter_mut().try_for_each(Worker::ready)?;
        trio.0[0].ask::<()>(&Order::Bootstrap)?;
        trio.lead_from_the_first()?;
        trio.0[0].ask::<()>(&Order::Attach)?;
        Ok(trio)
    }

    fn lead_from_the_first(&mut self) -> Outcome<()> {
        for _ in 0..200 {
            for n in 0..MEMBERS {
                if self.0[n].ask::<bool>(&Order::Leads)? {
                    if n == 0 {
                        return Ok(());
                    }
                    self.0[n].ask::<()>(&Order::GiveAway)?;
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Err("the first process does not become the leader".into())
    }

    /// Runs a load.
    pub fn work(&mut self, work: &Work) -> Outcome<Figures> {
        self.0[0].ask(&Order::Work(work.clone()))
    }

    /// Lets the disk of one of them stall from now on, or not any more.
    pub fn stall(&mut self, member: usize, stalls: bool) -> Outcome<()> {
        self.0[member].ask(&Order::Stall(stalls))
    }

    /// Counters of all.
    pub fn usage(&mut self) -> Outcome<Usage> {
        self.0.iter_mut().try_fold(Usage::default(), |sum, member| Ok(sum.plus(member.ask(&Order::Usage)?)))
    }

    /// Processor time of all so far.
    pub fn cpu_ns(&self) -> Outcome<u64> {
        self.0.iter().map(|member| cpu_ns(member.pid())).sum()
    }
}
