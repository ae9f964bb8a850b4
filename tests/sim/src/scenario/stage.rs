//! The simulation as a place where scripts are played.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use holdfast_replica::messages::ReplicaReport;
use holdfast_scenario::{Backend, Condition, Deed, NodeName, Nodes, Script};
use holdfast_types::{BlockIndex, BlockRange, LogIndex, ReplicaId};

use super::membership::Membership;
use super::nanoseconds;
use crate::disk::CutMode;
use crate::executor::SECOND;
use crate::faults;
use crate::guests::{Guest, Guests};
use crate::network::Cut;
use crate::run;
use crate::world::World;

/// How long whatever has no bound of its own may take.
const DEED_WITHIN: u64 = 30 * SECOND;
/// How long much writing may take.
const FILL_WITHIN: u64 = 100 * SECOND;
/// Writers of a filling, and blocks that each writes at once.
const FILLERS: u64 = 4;
const FILL_RUN: u64 = 64;
const BLOCKS_PER_MIB: u64 = 256;

/// What was so when it was marked.
#[derive(Default)]
struct Mark {
    /// Answers of every guest, in their order.
    answers: Vec<u64>,
    term: u64,
    sent: u64,
}

/// A world on which a script is played.
pub(crate) struct Stage {
    world: Rc<World>,
    guests: Rc<Guests>,
    membership: Rc<Membership>,
    mark: Mark,
    /// What the leader had committed at the last look.
    committed: LogIndex,
}

fn number(node: NodeName) -> u64 {
    node.place() as u64 + 1
}

impl Stage {
    /// Brings the cluster up.
    pub(crate) async fn set_up(world: &Rc<World>, script: &Script) -> Option<Self> {
        if !run::set_up(world).await {
            return None;
        }
        for node in &script.stale_reads_allowed.0 {
            world.history.allow_stale_reads(number(*node));
            world.oracle.leases_hold.set(false);
        }
        world.spawn(run::observe(world.clone()));
        let guests = Guests::new(world.clone());
        let (world, membership) = (world.clone(), Membership::new(world));
        Some(Self { world, guests, membership, mark: Mark::default(), committed: LogIndex::default() })
    }

    async fn soon(&self, what: &str, is_so: impl FnMut() -> bool) -> Result<(), String> {
        let became = self.world.wait_until(DEED_WITHIN, is_so).await;
        if became { Ok(()) } else { Err(format!("{what}: not within {} s", DEED_WITHIN / SECOND)) }
    }

    fn reports(&self) -> Vec<(u64, ReplicaReport)> {
        let nodes = self.world.nodes().iter();
        nodes.filter_map(|node| Some((node.number, node.volume()?.group().report()))).collect()
    }
    fn term(&self) -> u64 {
        self.reports().iter().map(|(_, report)| report.term.0).max().unwrap_or(0)
    }
    fn newest(&self) -> Option<Rc<Guest>> {
        self.guests.all().last().cloned()
    }
    fn guest_on(&self, node: NodeName) -> Result<Rc<Guest>, String> {
        let guests = self.guests.all();
        let guest = guests.into_iter().rev().find(|guest| guest.node == number(node));
        guest.ok_or_else(|| format!("there never was a guest on {node}"))
    }
    fn answers_since_mark(&self, guest: &Guest) -> u64 {
        let before = self.mark.answers.get(guest.number as usize - 1).copied().unwrap_or(0);
        guest.done() - before
    }

    async fn lead(&self, node: NodeName) -> Result<(), String> {
        let (world, to) = (&self.world, number(node));
        let until = world.executor.time() + DEED_WITHIN;
        while world.leader() != Some(to) {
            if world.executor.time() > until {
                return Err(format!("n{:?} leads", world.leader()));
            }
            let volume = world.leader().and_then(|leader| Some((leader, world.node(leader).volume()?)));
            if let Some((leader, volume)) = volume {
                let given = async move { volume.group().transfer_to(ReplicaId(to)).await.is_ok() };
                let given = world.run_on(leader, given);
                let bound = world.executor.sleep_for(3 * SECOND);
                drop(futures_util::future::select(Box::pin(given), Box::pin(bound)).await);
            }
            world.wait_until(SECOND, || world.leader() == Some(to)).await;
        }
        Ok(())
    }

    async fn attach(&self, node: NodeName, force: bool) -> Result<(), String> {
        let patience = Duration::from_nanos(DEED_WITHIN);
        let guest = self.guests.start(number(node), force, patience);
        let guest = guest.ok_or_else(|| format!("no daemon runs on {node}"))?;
        self.soon("an attach", || guest.has_ended() || guest.session().is_some()).await?;
        if guest.has_ended() { Err("it was refused".to_owned()) } else { Ok(()) }
    }

    /// Writers that share what is to be written.
    async fn fill(&self, mib: u64, over: u64) -> Result<(), String> {
        let guest = self.newest().ok_or("nobody is attached")?;
        let session = guest.session().ok_or("the newest guest holds nothing")?;
        let (runs, places) = (mib * BLOCKS_PER_MIB / FILL_RUN, over * BLOCKS_PER_MIB / FILL_RUN);
        let (next, written, failed) =
            (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
        for _ in 0..FILLERS {
            let (world, session, node) = (self.world.clone(), session.clone(), guest.node);
            let (next, written, failed) = (next.clone(), written.clone(), failed.clone());
            drop(self.world.run_on(guest.node, async move {
                while next.get() < runs {
                    let place = next.replace(next.get() + 1) % places;
                    let range = BlockRange::new(BlockIndex(place * FILL_RUN), FILL_RUN as u32);
                    let (id, data) = world.history.write(world.at(), node, session.epoch(), range);
                    if session.write(range, data).await.is_err() {
                        return failed.set(true);
                    }
                    world.history.acknowledged(world.at(), id);
                    written.set(written.get() + 1);
                }
            }));
        }
        let ended = || failed.get() || written.get() == runs;
        if !self.world.wait_until(FILL_WITHIN, ended).await || failed.get() {
            let written = written.get() * FILL_RUN / BLOCKS_PER_MIB;
            return Err(format!("{written} of {mib} MiB were written, and no more"));
        }
        Ok(())
    }

    fn cut_between(&self, one: &Nodes, other: &Nodes) {
        for one in &one.0 {
            for other in &other.0 {
                self.world.network.cut(number(*one), number(*other), Cut::Swallow);
                self.world.network.cut(number(*other), number(*one), Cut::Swallow);
            }
        }
    }

    fn set_mark(&mut self) {
        self.mark = Mark {
            answers: self.guests.all().iter().map(|guest| guest.done()).collect(),
            term: self.term(),
            sent: self.world.network.sent_bytes(),
        };
    }

    fn caught_up(&mut self, node: NodeName) -> Result<(), String> {
        let reports = self.reports();
        let leading = reports.iter().filter(|(_, report)| report.is_leader).max_by_key(|(_, r)| r.term);
        let (_, leading) = leading.ok_or("nobody leads")?;
        // The leader does not stand still: what it had a moment ago counts.
        let goal = std::mem::replace(&mut self.committed, leading.committed);
        let report = reports.iter().find(|(at, _)| *at == number(node)).ok_or("its replica does not run")?;
        if goal > LogIndex::default() && report.1.applied >= goal && report.1.term == leading.term {
            return Ok(());
        }
        Err(format!(
            "it has applied {} of {goal}, in term {} of {}",
            report.1.applied, report.1.term, leading.term
        ))
    }
}

impl Backend for Stage {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.world.executor.time())
    }
    async fn pause(&self, duration: Duration) {
        self.world.sleep(nanoseconds(duration)).await;
    }
    fn look_every(&self) -> Duration {
        Duration::from_millis(20)
    }
    fn patience(&self, within: Duration) -> Duration {
        within
    }

    async fn perform(&mut self, deed: &Deed) -> Result<(), String> {
        let world = self.world.clone();
        world.trace.add(0, format_args!("DEED {deed}"));
        match deed {
            Deed::Lead(node) => return self.lead(*node).await,
            Deed::Attach { node, force } => return self.attach(*node, *force).await,
            Deed::Fill { mib, over } => return self.fill(*mib, *over).await,
            Deed::Partition(groups) => {
                for (at, one) in groups.iter().enumerate() {
                    groups[at + 1..].iter().for_each(|other| self.cut_between(one, other));
                }
            }
            Deed::CutOneWay { from, to } => world.network.cut(number(*from), number(*to), Cut::Swallow),
            Deed::Heal => world.network.heal_all(),
            Deed::Kill(node) => world.kill(number(*node)),
            Deed::PowerCut(node) => world.cut_power(number(*node), CutMode::Tear),
            Deed::Start(node) => {
                world.boot(number(*node));
                let node = world.node(number(*node));
                return self.soon("its start", || node.daemon().is_some()).await;
            }
            Deed::Pause(node) => world.set_paused(number(*node), true),
            Deed::Resume(node) => world.set_paused(number(*node), false),
            Deed::ClockRate { node, ppm } => world.node(number(*node)).set_drift(*ppm),
            Deed::ClockJump { node, ahead } => world.jump_clock(number(*node), nanoseconds(*ahead)),
            Deed::Replace { from, to } => return self.membership.replace(number(*from), number(*to)),
            Deed::Mark => self.set_mark(),
        }
        Ok(())
    }

    async fn is_so(&mut self, condition: &Condition) -> Result<(), String> {
        let world = &self.world;
        let verdict = |holds: bool, instead: String| if holds { Ok(()) } else { Err(instead) };
        match condition {
            Condition::Leads(nodes) => {
                let leader = world.leader();
                let is_one = leader.is_some_and(|leader| nodes.0.iter().any(|node| number(*node) == leader));
                verdict(is_one, format!("the leader is n{leader:?}"))
            }
            Condition::Answered(answers) => {
                let guest = self.newest().ok_or("nobody is attached")?;
                let had = self.answers_since_mark(&guest);
                let ended = if guest.has_ended() { ", and it has ended" } else { "" };
                verdict(had >= *answers, format!("guest {} had {had} answers{ended}", guest.number))
            }
            Condition::Unanswered(node) => {
                let guest = self.guest_on(*node)?;
                let had = self.answers_since_mark(&guest);
                let asks = guest.waits();
                verdict(had == 0 && asks, format!("it had {had} answers, and waits for one: {asks}"))
            }
            Condition::Fenced(node) => {
                let guest = self.guest_on(*node)?;
                verdict(guest.has_ended(), format!("guest {} is attached", guest.number))
            }
            Condition::TermsAtMost(terms) => {
                let grown = self.term().saturating_sub(self.mark.term);
                verdict(grown <= *terms, format!("{grown} new terms"))
            }
            Condition::CaughtUp(node) => self.caught_up(*node),
            Condition::Members(nodes) => {
                let nodes: Vec<u64> = nodes.0.iter().map(|node| number(*node)).collect();
                self.membership.are(&nodes)
            }
            Condition::Gone(node) => {
                verdict(self.membership.is_gone(number(*node)), "its replica is there".to_owned())
            }
            Condition::HealedByChunks { node, at_most } => {
                let bytes = world.node(number(*node)).healed_by_chunks();
                verdict((1..=at_most << 20).contains(&bytes), format!("{bytes} bytes of chunks healed it"))
            }
            Condition::SentAtMost(mib) => {
                let sent = world.network.sent_bytes() - self.mark.sent;
                verdict(sent <= mib << 20, format!("{:.1} MiB were sent", sent as f64 / f64::from(1 << 20)))
            }
        }
    }

    fn sound(&self) -> Result<(), String> {
        if self.world.trace.has_violations() { Err("a rule is broken".to_owned()) } else { Ok(()) }
    }

    async fn finish(&mut self) -> Result<(), String> {
        faults::heal_all(&self.world);
        let converged = run::converge(&self.world, &self.guests).await;
        if converged { Ok(()) } else { Err("the cluster does not become one again".to_owned()) }
    }
}
