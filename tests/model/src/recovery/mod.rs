//! Forced recovery (DESIGN §7, decisions 0155 and 0156): replicas of a volume are lost, operators name survivors, and the
//! reconciler carries it out in steps between which everything may happen: nodes crash and come back, requests arrive
//! late, twice or never, a leader of the catalog is deposed, and a second catalog, put back to before, does the same.
//!
//! What decides is the product's own: `CatalogState` with `may_recover` and `source_of`, and the `Lines` of a store. Around
//! it there is an abstract Raft for the volume's first group (`raft.rs`), what a store does (`store.rs`) and what a
//! reconciler does (`catalog.rs`).
//!
//! Without partitions the catalog hears everybody who is up, and so does a replica that asks before it runs. With them a
//! question may go unanswered wherever that helps what should not happen.

mod catalog;
mod raft;
mod store;
mod world;

use std::fmt;

use stateright::{Model, Property};

use world::{Entry, OLD, Runs, SITES, Site, Used, Wrong, named};
pub use world::{Mask, Request, World};

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// A fault of the product's own code.
    Planted(&'static str),
    /// A store does not know after a restart what it has sealed (the store's `forget-recovery`).
    SealForgotten,
    /// A replica that was sealed answers, votes and leads on.
    SealedAnswers,
    /// The reconciler looks at which log ends last before it seals.
    EndsBeforeSeal,
    /// The reconciler does not wait until every survivor is sealed.
    OneSealed,
    /// What goes on has what it knows to be committed, not all that its log holds.
    CommittedOnly,
    /// A store does not say that a group was replaced (`superseded-not-told`).
    SupersededUntold,
    /// What goes on is the same group, with other members (`recover-without-incarnation`).
    SameGroup,
    /// A store obeys the last of two recoveries.
    RivalObeyed,
    /// A recovery is called off, and the survivors do not hear of it first.
    CalledOffUnsaid,
    /// One that was sealed is kept (`sealed-is-kept`).
    SealedKept,
    /// Once one is sealed the others are sealed as was decided when none was.
    SealedOnOldRevision,
    /// A catalog does not hear that a replica goes on as a group that it knows nothing of.
    ReplacedUnheard,
    /// A catalog does not compare its recovery with what stands on the stores.
    NotCompared,
    /// Nothing: what the model shows is known, and is not promised.
    Known,
}

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Recovery {
    /// Replicas.
    pub replicas: u8,
    /// Whom operators may name, each set of them.
    pub survivors: &'static [Mask],
    /// Whether the survivors take a change of the voters to be under way, and so know of no majority.
    pub unsettled: bool,
    /// Whether anything may go unheard.
    pub partitions: bool,
    /// Catalogs: the second is the first, put back.
    pub catalogs: u8,
    /// Recoveries that are asked for.
    pub recoveries: u8,
    /// Changes of leader.
    pub elections: u8,
    /// Writes.
    pub writes: u8,
    /// Crashes beside the disaster, which takes everybody who is not named.
    pub crashes: u8,
    /// Survivors whose disk is lost.
    pub lost: u8,
    /// What is broken.
    pub broken: Option<Broken>,
}

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the Display says it")]
pub enum Action {
    Elect { candidate: u8, voters: Mask },
    Write(u8),
    Flush(u8),
    Send { leader: u8, to: u8 },
    Acknowledge(u8),
    Disaster(Mask),
    Crash(u8),
    Lose(u8),
    StopLeader(u8),
    StepDown(u8),
    Start(u8),
    Asked { replica: u8, hears: bool },
    Serve(u8),
    Ask { catalog: u8, survivors: Mask },
    Look { catalog: u8, hears: bool },
    LookAgain { catalog: u8, hears: bool },
    Choose { catalog: u8, hears: bool },
    GiveUp(u8),
    Finish(u8),
    Quarantine { catalog: u8, replica: u8 },
    Deliver(Request),
    Begin(Request),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |catalog: &u8| if *catalog == 0 { "the catalog" } else { "the other catalog" };
        let deaf = |hears: &bool| if *hears { "" } else { ", and hears the survivors only" };
        match self {
            Self::Elect { candidate, voters } => write!(f, "{} elect r{candidate}", named(*voters)),
            Self::Write(n) => write!(f, "r{n} takes a write"),
            Self::Flush(n) => write!(f, "r{n} flushes its own log"),
            Self::Send { leader, to } => write!(f, "r{leader} sends r{to} its log"),
            Self::Acknowledge(n) => write!(f, "r{n} acknowledges what a majority has"),
            Self::Disaster(mask) => write!(f, "everybody but {} is gone", named(*mask)),
            Self::Crash(n) => write!(f, "r{n} crashes"),
            Self::Lose(n) => write!(f, "r{n} is lost with its disk"),
            Self::StopLeader(n) => write!(f, "r{n}, which leads, is stopped as the recovery says"),
            Self::StepDown(n) => write!(f, "r{n} hears no majority and leads no more"),
            Self::Start(n) => write!(f, "r{n} starts"),
            Self::Asked { replica, hears: true } => {
                write!(f, "r{replica} asks the others, and does as they say")
            }
            Self::Asked { replica, .. } => {
                write!(f, "r{replica} hears only those that know nothing, and runs")
            }
            Self::Serve(n) => write!(f, "r{n} acknowledges as the new group"),
            Self::Ask { catalog, survivors } => {
                write!(f, "{} is told to recover from {}", of(catalog), named(*survivors))
            }
            Self::Look { catalog, hears } => write!(f, "{} looks{}", of(catalog), deaf(hears)),
            Self::LookAgain { catalog, hears } => write!(f, "{} looks again{}", of(catalog), deaf(hears)),
            Self::Choose { catalog, hears } => write!(f, "{} chooses{}", of(catalog), deaf(hears)),
            Self::GiveUp(catalog) => write!(f, "{} calls the recovery off", of(catalog)),
            Self::Finish(catalog) => write!(f, "{} notes that the volume goes on", of(catalog)),
            Self::Quarantine { catalog, replica } => write!(f, "{} has r{replica} rest", of(catalog)),
            Self::Deliver(request) => write!(f, "{request}"),
            Self::Begin(request) => write!(f, "{request}, and crashes half way"),
        }
    }
}

impl Recovery {
    fn plant(&self) {
        let planted = match self.broken {
            Some(Broken::Planted(fault)) => Some(fault),
            _ => None,
        };
        crate::plant(planted);
    }

    fn actions_of(&self, world: &World, n: usize, out: &mut Vec<Action>) {
        let (site, id) = (&world.sites[n], n as u8);
        if site.lost {
            return;
        }
        if !site.up {
            return out.push(Action::Start(id));
        }
        if world.used.crashes < self.crashes {
            out.push(Action::Crash(id));
        }
        if world.used.lost < self.lost {
            out.push(Action::Lose(id));
        }
        if world.leads_with_quorum(n) && self.waits_for_a_leader(world) {
            out.push(Action::StopLeader(id));
        }
        if site.leads.is_some() && !world.leads_with_quorum(n) {
            out.push(Action::StepDown(id));
        }
        if self.asks(world, n) {
            let hears: &[bool] = if self.partitions { &[true, false] } else { &[true] };
            out.extend(hears.iter().map(|hears| Action::Asked { replica: id, hears: *hears }));
        }
        match site.runs {
            Runs::Not => {}
            Runs::New(by) if !world.asked[usize::from(by) - 1].acknowledged => out.push(Action::Serve(id)),
            Runs::New(_) => {}
            Runs::Old if site.leads.is_some() => {
                if world.used.writes < self.writes {
                    out.push(Action::Write(id));
                }
                out.extend([Action::Flush(id), Action::Acknowledge(id)]);
                let others = (0..self.replicas).filter(|to| *to != id && world.running() & (1 << to) != 0);
                out.extend(others.map(|to| Action::Send { leader: id, to }));
            }
            Runs::Old => {
                if world.used.elections < self.elections {
                    let all = self.electors(world, n).into_iter();
                    out.extend(all.map(|voters| Action::Elect { candidate: id, voters }));
                }
            }
        }
    }

    fn actions_of_catalog(&self, world: &World, catalog: u8, out: &mut Vec<Action>) {
        let record = world.catalogs[usize::from(catalog)].record();
        let hears: &[bool] = if self.partitions { &[true, false] } else { &[true] };
        match &record.recovery {
            None => {
                if world.asked.len() < usize::from(self.recoveries) {
                    let all = self.survivors.iter();
                    out.extend(all.map(|survivors| Action::Ask { catalog, survivors: *survivors }));
                }
                let all = record.quarantined.iter().map(|kept| world::site_of(kept.replica) as u8);
                out.extend(all.map(|replica| Action::Quarantine { catalog, replica }));
            }
            Some(recovery) => {
                for hears in hears.iter().copied() {
                    if recovery.sealing {
                        let steps = [Action::LookAgain { catalog, hears }, Action::Choose { catalog, hears }];
                        out.extend(steps);
                    } else {
                        out.push(Action::Look { catalog, hears });
                    }
                }
                if recovery.sealing {
                    out.extend([Action::GiveUp(catalog), Action::Finish(catalog)]);
                }
            }
        }
    }

    /// Whether a recovery can come to an end from here: the volume is served, or two operators have halted it.
    pub fn is_settled(&self, world: &World) -> bool {
        let halted = |site: &Site| {
            let may = site.lines.known().into_iter().map(|(_, line)| line.rival.0 != 0);
            may.into_iter().any(|halted| halted)
        };
        (0..world.catalogs.len()).any(|catalog| self.serves(world, catalog)) || world.sites.iter().any(halted)
    }
}

fn done(changed: bool, next: World) -> Option<World> {
    changed.then_some(next)
}

impl Model for Recovery {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        self.plant();
        let first = Entry { term: 1, leader: 0 };
        let site = Site {
            up: true,
            runs: Runs::Old,
            lost: false,
            lines: std::sync::Arc::default(),
            kept: 0,
            vote: 1,
            log: vec![first],
            flushed: 1,
            committed: u8::from(self.broken == Some(Broken::CommittedOnly)),
            leads: None,
            ended: false,
            went_on: 0,
        };
        let mut sites = vec![site; self.replicas.into()];
        let mut matched = [0; SITES];
        matched[..usize::from(self.replicas)].fill(1);
        sites[0].leads = Some(matched);
        let catalog = catalog::with_replicas(self.replicas.into());
        vec![World {
            sites,
            catalogs: vec![catalog; self.catalogs.into()],
            sent: Default::default(),
            asked: Vec::new(),
            acknowledged: vec![first],
            wrong: Wrong::default(),
            used: Used::default(),
        }]
    }

    fn actions(&self, world: &World, out: &mut Vec<Action>) {
        // What is wrong once is not looked into further.
        if world.wrong != Wrong::default() {
            return;
        }
        (0..world.sites.len()).for_each(|n| self.actions_of(world, n, out));
        if world.used.disasters == 0 {
            out.extend(self.survivors.iter().map(|survivors| Action::Disaster(*survivors)));
            return;
        }
        (0..self.catalogs).for_each(|catalog| self.actions_of_catalog(world, catalog, out));
        out.extend(world.sent.iter().map(|request| Action::Deliver(*request)));
        if world.used.crashes < self.crashes {
            let half = |request: &&Request| matches!(request, Request::TakeOver { .. });
            out.extend(world.sent.iter().filter(half).map(|request| Action::Begin(*request)));
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        self.plant();
        let mut next = world.clone();
        let changed = match action {
            Action::Elect { candidate, voters } => {
                self.elect(&mut next, candidate.into(), voters);
                true
            }
            Action::Write(n) => {
                self.write(&mut next, n.into());
                true
            }
            Action::Flush(n) => {
                self.flush(&mut next, n.into());
                true
            }
            Action::Send { leader, to } => {
                self.send(&mut next, leader.into(), to.into());
                true
            }
            Action::Acknowledge(n) => self.acknowledge(&mut next, n.into()),
            Action::Disaster(survivors) => {
                next.used.disasters += 1;
                let gone = (0..world.sites.len()).filter(|n| survivors & (1 << n) == 0);
                gone.for_each(|n| self.crash(&mut next, n));
                true
            }
            Action::Crash(n) => {
                next.used.crashes += 1;
                self.crash(&mut next, n.into());
                true
            }
            Action::Lose(n) => {
                next.used.lost += 1;
                self.crash(&mut next, n.into());
                next.sites[usize::from(n)].lost = true;
                true
            }
            Action::StopLeader(n) => {
                self.crash(&mut next, n.into());
                true
            }
            Action::StepDown(n) => {
                next.sites[usize::from(n)].leads = None;
                true
            }
            Action::Start(n) => {
                self.start(&mut next, n.into());
                true
            }
            Action::Asked { replica, hears } => self.asked(&mut next, replica.into(), hears),
            Action::Serve(n) => {
                if let Runs::New(by) = world.sites[usize::from(n)].runs {
                    next.asked[usize::from(by) - 1].acknowledged = true;
                }
                true
            }
            Action::Ask { catalog, survivors } => self.ask(&mut next, catalog.into(), survivors),
            Action::Look { catalog, hears } => self.look(&mut next, catalog.into(), hears),
            Action::LookAgain { catalog, hears } => self.look_again(&mut next, catalog.into(), hears),
            Action::Choose { catalog, hears } => self.choose(&mut next, catalog.into(), hears),
            Action::GiveUp(catalog) => self.give_up(&mut next, catalog.into()),
            Action::Finish(catalog) => self.finish(&mut next, catalog.into()),
            Action::Quarantine { catalog, replica } => {
                self.quarantine(&mut next, catalog.into(), replica.into())
            }
            Action::Deliver(request) => {
                let to = match request {
                    Request::Seal { to, .. } | Request::Keep { to, .. } | Request::TakeOver { to, .. } => to,
                };
                world.sites[usize::from(to)].up && self.obey(&mut next, request)
            }
            Action::Begin(request) => {
                let Request::TakeOver { to, .. } = request else { return None };
                let begun = world.sites[usize::from(to)].up && self.begin(&mut next, request);
                next.used.crashes += 1;
                self.crash(&mut next, to.into());
                begun
            }
        };
        done(changed && next != *world, next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(
                "INV-RECOVER: nobody is sealed while somebody else answers",
                |_, world: &World| !world.wrong.answered,
            ),
            Property::always("INV-RECOVER: who was sealed is never again what it was", |_, world: &World| {
                !world.wrong.acts
            }),
            Property::always("INV-RECOVER: nothing that was acknowledged is lost", |_, world: &World| {
                !world.wrong.lost && !world.wrong.mixed
            }),
            Property::always("INV-RECOVER: what comes back rests", |_, world: &World| !world.wrong.returned),
            Property::always("INV-RECOVER: one replica goes on for one recovery", |_, world: &World| {
                !world.wrong.two_lives
            }),
            Property::always(
                "INV-RECOVER: a recovery that was called off ends nobody",
                |_, world: &World| {
                    let of = |id: u128| id > 0 && world.asked[id as usize - 1].called_off;
                    let ended = |site: &Site| {
                        let lines = site.lines.known().into_iter();
                        lines.into_iter().any(|(_, line)| {
                            of(line.order.id.0) || line.sealed.is_some_and(|sealed| of(sealed.order.id.0))
                        })
                    };
                    !world.sites.iter().any(ended)
                },
            ),
            Property::always("INV-TERM: the first group's log is one line", |_, world: &World| {
                !world.wrong.raft
            }),
            Property::sometimes("a volume goes on as a new group", |_, world: &World| {
                world.catalogs.iter().any(|catalog| catalog.record().group != OLD)
            }),
            Property::sometimes("what comes back rests", |model: &Self, world: &World| {
                let back = world.sites.iter().filter(|site| site.up && !site.lines.known().is_empty());
                back.count() == usize::from(model.replicas)
            }),
            Property::sometimes(
                "a recovery is called off after it was to be carried out",
                |_, world: &World| {
                    world.asked.iter().any(|asked| asked.called_off)
                        && world.sites.iter().any(|site| site.kept > 0)
                },
            ),
        ];
        if self.only_one_serves() {
            let one = |_: &Self, world: &World| {
                let serve = world.asked.iter().filter(|asked| asked.acknowledged && !asked.called_off);
                !world.wrong.both_serve && serve.count() < 2
            };
            properties.push(Property::always("INV-RECOVER: two groups never both serve", one));
        }
        if self.catalogs > 1 {
            let rivals = |_: &Self, world: &World| {
                let halted = |site: &Site| site.lines.known().iter().any(|(_, line)| line.rival.0 != 0);
                world.sites.iter().any(halted)
            };
            properties.push(Property::sometimes("two operators halt a volume", rivals));
        }
        properties
    }
}

impl Recovery {
    /// Whether two groups of the volume go on at this moment.
    pub fn two_go_on(&self, world: &World) -> bool {
        world.sites.iter().filter(|site| matches!(site.runs, Runs::New(_))).count() > 1
    }

    /// Whether it is promised that no two groups serve: where those who are not named are no majority, and there is one
    /// catalog, or what the other one has done answers. Else it is shown as what is known.
    fn only_one_serves(&self) -> bool {
        let quorum = u32::from(self.replicas / 2 + 1);
        let are_few = |named: &Mask| u32::from(self.replicas) - named.count_ones() < quorum;
        self.broken == Some(Broken::Known)
            || (self.catalogs == 1 && self.recoveries == 1 && self.survivors.iter().all(are_few))
            || (self.catalogs == 2 && self.crashes + self.elections == 0 && !self.partitions)
    }
}
