//! The streams of appends that leaders send: in order, a bounded number of each waits for Raft, and their answers go back
//! in order.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::rc::Rc;

use futures_util::future::Either;
use futures_util::{FutureExt, StreamExt};
use holdfast_env::net::{Frame, Lane};
use holdfast_store::journal::GroupLog;
use holdfast_types::ReplicaId;
use holdfast_wire::rpc::Responder;
use openraft::raft::AppendEntriesRequest;
use tokio::sync::{mpsc, oneshot};

use crate::codec;
use crate::config::{Entry, Raft, Types};

/// Appends of one stream that wait for Raft; the sender keeps fewer in flight.
const QUEUE_MAX: usize = 64;

type Append = (AppendEntriesRequest<Types>, Responder);

/// The newest stream of each peer and lane: heartbeats have one of their own.
#[derive(Default)]
pub(crate) struct AppendStreams(RefCell<BTreeMap<(ReplicaId, Lane), AppendStream>>);

struct AppendStream {
    id: u64,
    requests: mpsc::Sender<Append>,
    /// Dropped with the stream: then its input ends, and what it still holds goes. Raft feeds itself from a task of its
    /// own, so that a disk that hangs would otherwise gather one stream after another.
    _ended: oneshot::Sender<()>,
}

impl AppendStreams {
    /// Takes an append of a peer's stream of this number; a new number replaces the peer's stream before.
    pub(crate) fn append(
        &self,
        raft: &Raft,
        log: &GroupLog,
        (from, number): (ReplicaId, u64),
        request: AppendEntriesRequest<Types>,
        responder: Responder,
    ) {
        let mut streams = self.0.borrow_mut();
        let from = (from, responder.lane());
        let current = streams.get(&from).filter(|stream| stream.id == number && !stream.requests.is_closed());
        let sender = match current {
            Some(stream) => stream.requests.clone(),
            None => {
                let (sender, receiver) = mpsc::channel(QUEUE_MAX);
                let (_ended, replaced) = oneshot::channel::<()>();
                streams.insert(from, AppendStream { id: number, requests: sender.clone(), _ended });
                let replaced = replaced.map(drop).shared();
                let serving = serve(raft.clone(), log.clone(), receiver, replaced.clone());
                holdfast_env::spawn("raft-stream", async move {
                    futures_util::pin_mut!(serving);
                    futures_util::future::select(replaced, serving).await;
                });
                sender
            }
        };
        drop(streams);
        if let Err(error) = sender.try_send((request, responder)) {
            let (_, responder) = error.into_inner();
            responder.refuse("too many appends are waiting");
        }
    }

    /// What still waits is refused.
    pub(crate) fn clear(&self) {
        self.0.borrow_mut().clear();
    }
}

/// Block data that entries bring, in bytes.
fn payload_of(entries: &[Entry]) -> usize {
    let payload = |entry: &Entry| match &entry.payload {
        openraft::EntryPayload::Normal(data) => data.payload.len(),
        _ => 0,
    };
    entries.iter().map(payload).sum()
}

/// Feeds one stream of appends to Raft and gives its answers to the responders, in order.
async fn serve(
    raft: Raft,
    log: GroupLog,
    receiver: mpsc::Receiver<Append>,
    replaced: impl Future<Output = ()> + Clone + Unpin + 'static,
) {
    let waiting: Rc<RefCell<VecDeque<Responder>>> = Rc::default();
    let (queue, answering) = (waiting.clone(), log.clone());
    let requests = futures_util::stream::unfold(receiver, move |mut receiver| {
        let (queue, log, replaced) = (queue.clone(), log.clone(), replaced.clone());
        async move {
            let next = async {
                let (request, responder) = receiver.recv().await?;
                if !request.entries.is_empty() {
                    log.take_in(payload_of(&request.entries)).await;
                }
                Some((request, responder))
            };
            let next = match futures_util::future::select(std::pin::pin!(next), replaced).await {
                Either::Left((next, _)) => next,
                Either::Right(_) => None,
            };
            let (request, responder) = next?;
            queue.borrow_mut().push_back(responder);
            Some((request, receiver))
        }
    });
    let mut answers = std::pin::pin!(raft.stream_append(requests));
    while let Some(answer) = answers.next().await {
        let Some(responder) = waiting.borrow_mut().pop_front() else { return };
        match answer {
            Ok(result) => {
                responder.reply(Frame::small(codec::stream_result(&result, answering.is_full())));
            }
            Err(fatal) => responder.refuse(fatal.to_string()),
        }
    }
}
