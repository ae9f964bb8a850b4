//! The volume's first group, as far as it matters here: that Raft makes one line of its log is shown by the model of
//! membership. An election is one step of a quorum; a leader sends all it has at once, and a follower answers at once.

use super::world::{Entry, Mask, Runs, SITES, World};
use super::{Broken, Recovery};

impl Recovery {
    /// Quorums that would elect `candidate`, no larger than they need to be.
    pub(super) fn electors(&self, world: &World, candidate: usize) -> Vec<Mask> {
        let site = &world.sites[candidate];
        let would = |n: &usize| world.sites[*n].last() <= site.last();
        let willing = world.running() & (0..world.sites.len()).filter(would).fold(0, |mask, n| mask | 1 << n);
        let is_one = |mask: &Mask| {
            mask & !willing == 0
                && mask & (1 << candidate) != 0
                && mask.count_ones() as usize == world.quorum()
        };
        (0..1 << SITES).filter(is_one).collect()
    }

    pub(super) fn elect(&self, world: &mut World, candidate: usize, voters: Mask) {
        world.used.elections += 1;
        let of = |n: &usize| voters & (1 << n) != 0;
        let all: Vec<usize> = (0..world.sites.len()).filter(of).collect();
        let term = all.iter().map(|n| world.sites[*n].vote).max().unwrap_or_default() + 1;
        for n in all {
            let site = &mut world.sites[n];
            world.wrong.acts |= site.ended;
            (site.vote, site.leads) = (term, None);
        }
        let site = &mut world.sites[candidate];
        site.log.push(Entry { term, leader: candidate as u8 });
        let mut matched = [0; SITES];
        matched[candidate] = site.flushed;
        site.leads = Some(matched);
    }

    pub(super) fn write(&self, world: &mut World, leader: usize) {
        world.used.writes += 1;
        let site = &mut world.sites[leader];
        world.wrong.acts |= site.ended;
        site.log.push(Entry { term: site.vote, leader: leader as u8 });
    }

    pub(super) fn flush(&self, world: &mut World, leader: usize) {
        let site = &mut world.sites[leader];
        site.flushed = site.log.len() as u8;
        if let Some(matched) = &mut site.leads {
            matched[leader] = site.flushed;
        }
    }

    pub(super) fn send(&self, world: &mut World, leader: usize, to: usize) {
        let source = world.sites[leader].clone();
        let target = &mut world.sites[to];
        if target.vote > source.vote {
            let vote = target.vote;
            (world.sites[leader].vote, world.sites[leader].leads) = (vote, None);
            return;
        }
        world.wrong.acts |= target.ended;
        (target.vote, target.leads, target.log) = (source.vote, None, source.log);
        target.flushed = target.log.len() as u8;
        target.committed = target.committed.max(source.committed);
        let has = target.flushed;
        if let Some(matched) = &mut world.sites[leader].leads {
            matched[to] = has;
        }
    }

    /// The leader acknowledges what a quorum has.
    pub(super) fn acknowledge(&self, world: &mut World, leader: usize) -> bool {
        let site = &world.sites[leader];
        let Some(matched) = site.leads else { return false };
        let have = |end: usize| {
            let has = |n: &usize| usize::from(matched[*n]) >= end;
            (0..world.sites.len()).filter(has).fold(0_u8, |mask, n| mask | 1 << n)
        };
        let is_safe = |end: &usize| {
            site.log[end - 1].term == site.vote && have(*end).count_ones() as usize >= world.quorum()
        };
        let Some(end) = (1..=site.log.len()).rev().find(is_safe) else { return false };
        let (by, log) = (have(end), site.log[..end].to_vec());
        for asked in &world.asked {
            let Some(new) = &asked.log else { continue };
            if !new.starts_with(&log) {
                world.wrong.mixed |= by & asked.survivors != 0;
                world.wrong.both_serve |= asked.acknowledged && self.only_one_serves();
            }
        }
        let agrees = world.acknowledged.iter().zip(&log).all(|(a, b)| a == b);
        world.wrong.raft |= !agrees;
        if log.len() > world.acknowledged.len() {
            world.acknowledged = log;
        }
        if self.broken == Some(Broken::CommittedOnly) {
            world.sites[leader].committed = end as u8;
        }
        true
    }

    pub(super) fn crash(&self, world: &mut World, n: usize) {
        let site = &mut world.sites[n];
        if self.broken == Some(Broken::SealForgotten) {
            site.lines = std::sync::Arc::default();
        }
        site.log.truncate(site.flushed.into());
        (site.up, site.runs, site.leads, site.committed) = (false, Runs::Not, None, 0);
    }
}
