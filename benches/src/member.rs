//! One process that holds a replica: a store with its journal, its groups and its network, and a session on demand. What
//! a daemon's shard is made of, without its catalog, admin API and frontend.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::Instant;
use holdfast_env::real::disk::RealDirectory;
use holdfast_replica::{GroupEnvironment, Host, NewReplica, Timers};
use holdfast_session::{AttachOptions, Session, Sessions, VolumeTarget};
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::{ReplicaIdentity, StoreIdentity};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, ByteSize, GroupId, ReplicaId, VolumeId};
use holdfast_wire::pki::Credentials;
use holdfast_wire::rpc::Rpc;
use holdfast_wire::tcp::{Peer, TcpNetwork};
use holdfast_wire::tls::Tls;

use crate::Outcome;
use crate::child::{requests, say};
use crate::disk::Stalls;
use crate::load::{self, Target};
use crate::trio::{Order, TrioConfig};
use crate::usage::Usage;

const GROUP: GroupId = GroupId(1);
const ATTACH_PATIENCE: Duration = Duration::from_secs(30);

struct Attached(Rc<Session>);

fn range(offset: u64, bytes: u64) -> BlockRange {
    let block = BLOCK_BYTES as u64;
    BlockRange::new(BlockIndex(offset / block), (bytes / block) as u32)
}

impl Target for Attached {
    async fn read(&self, offset: u64, bytes: u64) -> Outcome<()> {
        let read = self.0.read(range(offset, bytes)).await;
        read.map(drop).map_err(|error| format!("a read: {error}"))
    }
    async fn write(&self, offset: u64, data: Bytes) -> Outcome<()> {
        let written = self.0.write(range(offset, data.len() as u64), data).await;
        written.map_err(|error| format!("a write: {error}"))
    }
}

struct Member {
    config: TrioConfig,
    number: usize,
    host: Rc<Host>,
    rpc: Rpc,
    stalls: Stalls,
    sessions: Rc<Sessions>,
    session: Option<Rc<Attached>>,
    /// Held for as long as the member runs.
    _network: Rc<TcpNetwork>,
}

impl Member {
    async fn start(directory: &Path, number: usize) -> Outcome<Self> {
        let wrong = |error: &dyn std::fmt::Display| error.to_string();
        let text = std::fs::read(directory.join("trio.json")).map_err(|error| wrong(&error))?;
        let config: TrioConfig = serde_json::from_slice(&text).map_err(|error| wrong(&error))?;
        let me = config.members.get(number - 1).ok_or("there is no member of that number")?.clone();
        let place = directory.join(me.node.as_str());
        let stalls = Stalls::default();
        let real = stalls.over(RealDirectory::open(&place.join("store")).map_err(|error| wrong(&error))?);
        let identity = StoreIdentity { cluster: config.cluster, node: me.node.clone(), store: me.store };
        let options = StoreOptions::default();
        Journal::format(real.clone(), &identity, &options).await.map_err(|error| wrong(&error))?;
        let text = |name: &str| std::fs::read_to_string(place.join(name)).map_err(|error| error.to_string());
        let credentials = Credentials {
            authority: text("ca.pem")?,
            certificate: text("node.pem")?,
            key: text("node.key")?,
        };
        let tls = Tls::new(config.cluster, &credentials).map_err(|error| wrong(&error))?;
        let network = TcpNetwork::listen(me.store, &me.address, tls).await.map_err(|error| wrong(&error))?;
        let peers = config.members.iter().map(|member| {
            (member.store, Peer { node: member.node.clone(), address: member.address.clone() })
        });
        network.set_peers(peers.collect());
        let rpc = Rpc::new(network.clone());
        let environment =
            GroupEnvironment { rpc: rpc.clone(), timers: Timers::default(), silent_until: Instant::now() };
        let host = Host::open(environment, real, identity, &options).await.map_err(|error| wrong(&error))?;
        host.load().await.map_err(|error| wrong(&error))?;
        let new = NewReplica {
            volume: VolumeId(1),
            id: ReplicaIdentity { group: GROUP, replica: ReplicaId(number as u64) },
            size: ByteSize(config.size),
            spec_json: Bytes::new(),
        };
        host.create(&new).await.map_err(|error| wrong(&error))?;
        let sessions = Sessions::serve(&rpc);
        Ok(Self { config, number, host, rpc, stalls, sessions, session: None, _network: network })
    }

    async fn attach(&mut self) -> Outcome<()> {
        let options = AttachOptions {
            node: self.config.members[self.number - 1].node.clone(),
            force: false,
            read_only: false,
            resume: false,
            only_at: None,
            patience: ATTACH_PATIENCE,
        };
        let stores = self.config.members.iter().map(|member| member.store).collect();
        let target = VolumeTarget { group: GROUP, stores };
        let timers = Timers::default();
        let session = Session::attach(self.rpc.clone(), &self.sessions, target, &options, &timers).await;
        self.session = Some(Rc::new(Attached(session.map_err(|error| error.to_string())?)));
        Ok(())
    }

    fn usage(&self) -> Outcome<Usage> {
        let volume = self.host.volume(GROUP).ok_or("the replica does not run")?;
        let (journal, data) = (self.host.journal().usage(), volume.data().usage());
        let group = volume.group().usage();
        Ok(Usage {
            journal_flushes: journal.flushes as f64,
            flush_seconds: self.host.journal().flush_latency().sum().as_secs_f64(),
            other_flushes: data.flushes as f64,
            journal_bytes: journal.bytes_written as f64,
            home_bytes: data.home_bytes_written as f64,
            table_bytes: (data.table_bytes_written + data.manifest_bytes_written) as f64,
            appends: group.appends_received as f64,
            appended: group.entries_received as f64,
            dirty_bytes: volume.data().dirty().bytes as f64,
        })
    }

    /// Carries out one order and tells its result.
    async fn obey(&mut self, order: Order) -> Outcome<()> {
        let group = self.host.volume(GROUP).ok_or("the replica does not run")?.group().clone();
        match order {
            Order::Bootstrap => {
                let begun = group.bootstrap(&self.config.voters()).await;
                say(&begun.map_err(|error| error.to_string()))
            }
            Order::Leads => say(&Ok(group.is_leader())),
            Order::GiveAway => say(&group.transfer_to(ReplicaId(1)).await.map_err(|error| error.to_string())),
            Order::Attach => say(&self.attach().await),
            Order::Work(work) => match &self.session {
                Some(session) => say(&load::run(session, &work).await),
                None => say(&Err::<(), _>("nothing is attached".to_owned())),
            },
            Order::Stall(stalls) => {
                self.stalls.set(stalls);
                say(&Ok(()))
            }
            Order::Usage => say(&self.usage()),
        }
    }
}

/// Runs until the parent is gone.
pub fn run(directory: &Path, number: usize) -> Outcome<()> {
    holdfast_env::real::run(async {
        let mut member = Member::start(directory, number).await?;
        say(&Ok(true))?;
        let mut orders = requests();
        while let Some(order) = orders.recv().await {
            let order: Order = serde_json::from_str(&order).map_err(|error| error.to_string())?;
            member.obey(order).await?;
        }
        Ok(())
    })
}
