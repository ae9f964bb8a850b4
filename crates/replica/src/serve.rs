//! What a store answers to sessions, healers and those that repair their logs.

use holdfast_env::net::Frame;
use holdfast_protocol::command::VolumeCommand;
use holdfast_store::recovery_file::Barred;
use holdfast_types::{Epoch, GroupId, LogIndex, Reader};
use holdfast_wire::rpc::Responder;

use crate::codec;
use crate::host::{Faulty, Host};
use crate::messages::{DataReply, DataRequest, ReplicaReport};
use crate::{heal, repair};

/// Under which epoch something is asked for.
fn epoch_of(request: &DataRequest) -> Epoch {
    match request {
        DataRequest::Read { epoch, .. }
        | DataRequest::BlockStatus { epoch, .. }
        | DataRequest::Renew { epoch, .. } => *epoch,
        DataRequest::Propose { command, .. } => {
            let tag = VolumeCommand::decode(command).ok().and_then(|command| command.tag().copied());
            tag.map_or(Epoch::ZERO, |tag| tag.epoch)
        }
        _ => Epoch::ZERO,
    }
}

impl Host {
    pub(crate) fn on_data(&self, request: Frame, responder: Responder) {
        let decoded = match DataRequest::decode(&request.head) {
            Ok(decoded) => decoded,
            Err(error) => return responder.refuse(error.to_string()),
        };
        let group = decoded.group();
        if let Some(volume) = self.volume(group) {
            if matches!(decoded, DataRequest::Control { .. } | DataRequest::Propose { .. }) {
                volume.group().wanted_here();
            }
            return volume.handle(decoded, request.into_body(), responder);
        }
        if let Some(witness) = self.witnesses.get(group) {
            let reply = witness.answer(self, &decoded);
            return responder.reply(Frame::small(reply.encode()));
        }
        let faulty = self.faulty_of(group);
        let reply = match (&decoded, faulty) {
            (DataRequest::Report { .. }, Some(faulty)) => DataReply::Report(Box::new(self.report_of(faulty))),
            (_, _) if self.recoveries.superseded(group).is_some() => self.fenced(&decoded),
            (_, faulty) => {
                let why = faulty.map_or("no replica of the volume runs here".to_owned(), |faulty| faulty.why);
                DataReply::Elsewhere { leader: None, why }
            }
        };
        responder.reply(Frame::small(reply.encode()));
    }

    pub(crate) fn on_heal(&self, request: Frame, responder: Responder) {
        let mut input = Reader::new(&request.head);
        let group = match GroupId::decode(&mut input) {
            Ok(group) => group,
            Err(error) => return responder.refuse(error.to_string()),
        };
        let Some(volume) = self.volume(group) else {
            return responder.refuse("no replica of the group stands here");
        };
        let rest = request.head.slice(request.head.len() - input.remaining()..);
        holdfast_env::spawn("heal-serve", async move {
            match heal::serve(&volume, Reader::new(&rest)).await {
                Ok(frame) => responder.reply(frame),
                Err(error) => responder.refuse(error.to_string()),
            }
        });
    }

    /// A peer asks for entries that it cannot read. Whoever has them gives them, whether it runs or not; only a log
    /// that is not in doubt says that it never had one.
    pub(crate) fn on_repair(&self, request: &Frame, responder: Responder) {
        let group = match GroupId::decode(&mut Reader::new(&request.head)) {
            Ok(group) => group,
            Err(error) => return responder.refuse(error.to_string()),
        };
        if let Some(volume) = self.volume(group) {
            let is_trusted = volume.fault().is_none();
            return repair::serve(volume.log().clone(), is_trusted, request, responder);
        }
        if let Some(running) = self.group(group) {
            return repair::serve(running.log().clone(), running.fault().is_none(), request, responder);
        }
        match self.faulty_of(group).and_then(|faulty| self.log_of(faulty.id)) {
            Some(log) => repair::serve(log, false, request, responder),
            None => responder.refuse("no replica of the group stands here, or it is not loaded yet"),
        }
    }

    /// What a replica that does not run says of itself: its log is there all the same.
    fn report_of(&self, faulty: Faulty) -> ReplicaReport {
        let log = self.log_of(faulty.id);
        let last = log.as_ref().and_then(|log| log.last().or(log.purged())).unwrap_or_default();
        let committed = log.as_ref().and_then(|log| log.committed());
        let vote = log.as_ref().and_then(|log| log.vote());
        let files = self.recoveries.files_of(faulty.id);
        ReplicaReport {
            is_halted: matches!(self.recoveries.may_run(files), Err(Barred::Rivals { .. })),
            replica: faulty.id.replica,
            fault: faulty.why,
            repairing: faulty.repairing,
            term: vote.as_deref().and_then(codec::vote_term).unwrap_or_default(),
            last_log: last.index,
            last_term: last.term,
            is_damaged: log.as_ref().is_none_or(|log| !log.faulty().is_empty())
                || self.unknown_log(files).is_some(),
            committed: committed.map_or(LogIndex::ZERO, |id| id.index),
            ..Default::default()
        }
    }

    /// INV-RECOVER: the group of the request was replaced, and whoever held the volume holds it no more.
    fn fenced(&self, request: &DataRequest) -> DataReply {
        let why = match self.recoveries.superseded(request.group()) {
            Some(order) => format!("recovery {} has replaced the volume's group", order.id),
            None => "the volume's group was replaced".to_owned(),
        };
        DataReply::Fenced { current: epoch_of(request).next(), why }
    }
}
