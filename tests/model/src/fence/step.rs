//! The steps of the model of fencing.

use std::sync::Arc;

use holdfast_protocol::lease::{AttachDecision, SettleWait, admit_renewal, decide_attach};
use holdfast_protocol::volume::{VolumeReply, VolumeState};
use holdfast_types::{Epoch, LogIndex};

use super::world::{Message, Session, World, session_id};
use super::{Action, Broken, Fence, NODES, terms};

/// What can happen next, within the scope.
pub(super) fn actions(model: &Fence, world: &World, out: &mut Vec<Action>) {
    let scope = &model.scope;
    if world.tick < scope.ticks {
        out.push(Action::Tick);
    }
    // Before the first command, one leader is like another.
    if world.leaders.len() <= usize::from(scope.elections) && !world.log.is_empty() {
        out.push(Action::Elect);
    }
    for node in 0..NODES {
        of_session(model, world, node, out);
    }
    for leader in 0..world.leaders.len() {
        of_leader(model, world, leader, out);
    }
    if world.used.detaches < scope.detaches && world.tenure.is_some() {
        out.push(Action::ForceDetach);
    }
    out.extend(world.proposals.iter().map(|message| Action::Commit(*message)));
}

fn of_session(model: &Fence, world: &World, number: usize, out: &mut Vec<Action>) {
    let (scope, node) = (&model.scope, number as u8);
    if world.used.attaches < scope.attaches {
        out.extend([false, true].map(|force| Action::Ask { node, force }));
    }
    let Some(session) = &world.sessions[number] else { return };
    if session.epoch.is_none() {
        if attached(world, session).is_some() {
            out.push(Action::Learn { node });
        }
        return;
    }
    if world.used.renewals < scope.renewals {
        let who = if model.broken == Some(Broken::RenewUnconfirmed) { 0 } else { world.leaders.len() - 1 };
        out.extend((who..world.leaders.len()).map(|leader| Action::Renew { node, leader: leader as u8 }));
    }
    let granted = world.grants.iter().filter(|(id, _)| *id == session.id);
    out.extend(granted.map(|(_, number)| Action::Renewed { node, number: *number }));
    if world.used.writes < scope.writes {
        out.push(Action::Write { node });
    }
    for seq in &session.waiting {
        out.push(Action::GiveUp { node, seq: *seq });
        if world.applied.contains_key(&(session.id, *seq)) {
            out.push(Action::Acknowledge { node, seq: *seq });
        }
    }
    if world.used.detaches < scope.detaches {
        out.push(Action::Detach { node });
    }
}

fn of_leader(model: &Fence, world: &World, number: usize, out: &mut Vec<Action>) {
    let leader = number as u8;
    let Some(settle) = &world.leaders[number].settle else { return };
    if settle.is_over(world.leader_clock()) || model.broken == Some(Broken::SettleAtOnce) {
        out.push(Action::ProposeSettled { leader });
        return;
    }
    let mut known = world.states.iter().filter_map(|state| state.unsettled());
    if let Some(unsettled) = known.find(|unsettled| unsettled.epoch == settle.epoch()) {
        out.extend(
            unsettled
                .holders
                .iter()
                .map(|holder| Action::AskFormer { leader, session: (holder.session.0 - 1) as u8 }),
        );
    }
}

/// The epoch and the index of a session's Attach, if the log holds it.
fn attached(world: &World, session: &Session) -> Option<(u8, u8)> {
    let is_it =
        |message: &Message| matches!(message, Message::Attach { session: id, .. } if *id == session.id);
    let at = world.log.iter().rposition(is_it)?;
    Some((world.states[at + 1].epoch().0 as u8, at as u8 + 1))
}

/// Takes a step; false if it changes nothing that matters.
pub(super) fn take(model: &Fence, world: &mut World, action: Action) -> bool {
    match action {
        Action::Tick => world.tick += 1,
        Action::Elect => {
            world.elect(model.broken == Some(Broken::NewLeaderPresumesDead));
            if model.broken != Some(Broken::RenewUnconfirmed) {
                world.forget_what_the_deposed_know();
            }
        }
        Action::Ask { node, force } => return ask(world, node, force),
        Action::Commit(message) => return commit(world, message),
        Action::ForceDetach => {
            world.used.detaches += 1;
            world.proposals.insert(Message::Detach { epoch: world.head_epoch(), confirmed: false });
        }
        Action::AskFormer { leader, session } => return ask_former(model, world, leader.into(), session),
        Action::ProposeSettled { leader } => {
            let Some(settle) = world.leaders[usize::from(leader)].settle.take() else { return false };
            world.proposals.insert(Message::Settled { epoch: settle.epoch().0 as u8 });
        }
        Action::Renew { node, leader } => return renew(world, node.into(), leader.into()),
        Action::Learn { node } | Action::Renewed { node, .. } => {
            return lease(model, world, node.into(), action);
        }
        Action::Write { node }
        | Action::Acknowledge { node, .. }
        | Action::GiveUp { node, .. }
        | Action::Detach { node } => return write(world, node.into(), action),
    }
    true
}

/// A node asks the leader, which decides at once; what it proposes is on its way.
fn ask(world: &mut World, node: u8, force: bool) -> bool {
    world.used.attaches += 1;
    // A session that waits for its answer asks again, with what it has learned of the epoch; any other is replaced, as
    // when its daemon starts again.
    let waits = world.sessions[usize::from(node)].as_ref().filter(|session| session.epoch.is_none());
    let session = match waits {
        Some(session) => session.id,
        None => {
            let id = world.next_session;
            world.next_session += 1;
            world.sessions[usize::from(node)] = Some(Session::new(id));
            id
        }
    };
    let request = Message::Attach { node, session, expected: world.head_epoch(), force, confirmed: false };
    let (now, clock, state) = (world.leader_clock(), world.session_clock(), world.head().clone());
    let AttachDecision::Propose { confirmed } =
        decide_attach(&state, &mut world.leader().watch, &request.command(), now)
    else {
        return true;
    };
    let other = state.holder().filter(|holder| holder.node.as_str() != format!("n{node}") && !force);
    if let Some(holder) = other {
        let lives = world.living().any(|s| s.session_id() == holder.session && s.lease.valid(clock));
        world.wrong.courtesy |= lives;
    }
    world.proposals.insert(Message::Attach { node, session, expected: world.head_epoch(), force, confirmed });
    true
}

/// A session sends a renewal, and a leader grants it; the answer is on its way.
fn renew(world: &mut World, node: usize, leader: usize) -> bool {
    let (now, clock) = (world.session_clock(), world.leader_clock());
    let known = usize::from(world.leaders[leader].knows.unwrap_or(world.end()));
    let state = world.states[known].clone();
    let Some(session) = &mut world.sessions[node] else { return false };
    let Some(epoch) =
        session.epoch.filter(|epoch| admit_renewal(&state, Epoch((*epoch).into()), session_id(session.id)))
    else {
        return false;
    };
    let number = session.lease.on_sent(now) as u8;
    world.grants.insert((session.id, number));
    world.used.renewals += 1;
    world.leaders[leader].watch.granted(clock);
    epoch > 0
}

fn commit(world: &mut World, message: Message) -> bool {
    // As it is proposed: what the leader decided stands in `confirmed`.
    let command = match (message.command(), message) {
        (command, Message::Attach { confirmed, .. }) => command.admitted(confirmed),
        (command, _) => command,
    };
    let before = world.head().clone();
    let mut after = VolumeState::clone(&before);
    let index = world.end() + 1;
    let reply = after.apply(LogIndex(index.into()), &command);
    // What changes nothing needs no place in the log; a repetition is answered as the first time.
    if after == *before && !matches!(reply, VolumeReply::Done { fresh: true }) {
        return false;
    }
    world.log.push(message);
    world.states.push(Arc::new(after));
    match (message, reply) {
        (Message::Write { session, epoch, seq, oldest }, VolumeReply::Done { fresh }) => {
            wrote(world, session, epoch, seq, oldest, fresh);
        }
        (Message::Attach { session, expected, .. }, VolumeReply::Attached { epoch, .. }) => {
            // Compare and set: the epoch is the next one, and who attached expected the one before.
            world.tenures += 1;
            let epoch = epoch.0 as u8;
            world.wrong.fence |=
                u64::from(expected) != before.epoch().0 || u64::from(epoch) != before.epoch().0 + 1;
            world.tenure = Some((session, epoch));
        }
        (Message::Detach { .. }, VolumeReply::Done { fresh: true }) => world.tenure = None,
        _ => {}
    }
    world.see_unsettled();
    true
}

/// INV-FENCE, INV-ONCE, INV-LATE, told by the log alone.
fn wrote(world: &mut World, session: u8, epoch: u8, seq: u8, oldest: u8, fresh: bool) {
    let attachment =
        world.states[world.log.len()].holder().map(|holder| holder.attachment).unwrap_or_default();
    let given_up = world.oldest.entry(attachment).or_default();
    if fresh {
        world.wrong.late |= seq < *given_up;
        world.wrong.fence |= world.tenure != Some((session, epoch));
        world.wrong.once |= !world.effects.insert((attachment, seq));
        world.written_in = world.written_in.max(epoch);
        let index = world.log.len() as u8;
        world.applied.entry((session, seq)).or_insert(index);
    }
    *given_up = oldest.max(*given_up);
}

/// The node of a former holder's session is asked. One that does not run there (any more, or yet) serves nothing.
fn ask_former(model: &Fence, world: &mut World, leader: usize, session: u8) -> bool {
    let Some(epoch) = world.leaders[leader].settle.as_ref().map(SettleWait::epoch) else { return false };
    let is_it = |living: &Session| living.id == session && living.epoch.is_some();
    let running = world.sessions.iter_mut().find(|living| living.as_ref().is_some_and(is_it));
    if let Some(living) = running {
        if living.as_ref().and_then(|living| living.epoch).is_some_and(|own| u64::from(own) >= epoch.0) {
            return false;
        }
        if model.broken != Some(Broken::ConfirmWithoutEnding) {
            *living = None;
        }
    }
    let Some(settle) = &mut world.leaders[leader].settle else { return false };
    settle.confirmed_end(session_id(session));
    true
}

fn lease(model: &Fence, world: &mut World, node: usize, action: Action) -> bool {
    let now = world.session_clock();
    let Some(session) = &world.sessions[node] else { return false };
    let found = attached(world, session).map(|(epoch, index)| {
        // The answer is what applying it again says.
        let mut state = VolumeState::clone(&world.states[usize::from(index)]);
        let again = world.log[usize::from(index) - 1].command();
        match state.apply(LogIndex(index.into()), &again) {
            VolumeReply::Attached { next, .. } => (epoch, index, next.0 as u8),
            _ => (epoch, index, 1),
        }
    });
    let Some(session) = &mut world.sessions[node] else { return false };
    match (action, found) {
        (Action::Learn { .. }, Some((epoch, index, next))) => {
            (session.epoch, session.floor, session.next) = (Some(epoch), index, next);
            true
        }
        (Action::Renewed { number, .. }, _) => {
            let before = session.lease.clone();
            if model.broken == Some(Broken::LeaseFromAnswer) {
                let now = session.lease.on_sent(now);
                session.lease.on_renewed(now, terms().lease);
            } else {
                session.lease.on_renewed(number.into(), terms().lease);
            }
            session.lease != before
        }
        _ => false,
    }
}

fn write(world: &mut World, node: usize, action: Action) -> bool {
    let Some(session) = &mut world.sessions[node] else { return false };
    let Some(epoch) = session.epoch else { return false };
    match action {
        Action::Write { .. } => {
            world.used.writes += 1;
            let seq = session.next;
            session.next += 1;
            session.waiting.insert(seq);
            let oldest = session.waiting.first().copied().unwrap_or(seq);
            world.proposals.insert(Message::Write { session: session.id, epoch, seq, oldest });
        }
        Action::Acknowledge { seq, .. } => {
            let Some(index) = world.applied.get(&(session.id, seq)) else { return false };
            session.waiting.remove(&seq);
            session.floor = session.floor.max(*index);
            world.acknowledged = world.acknowledged.max(*index);
        }
        Action::GiveUp { seq, .. } => {
            session.waiting.remove(&seq);
        }
        Action::Detach { .. } => {
            world.used.detaches += 1;
            world.proposals.insert(Message::Detach { epoch, confirmed: true });
            world.sessions[node] = None;
        }
        _ => return false,
    }
    true
}
