//! What one daemon asks another for a user: to attach and detach there.

use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::net::{Frame, Lane};
use holdfast_types::{ByteSize, ErrorCode, StoreId, UserError, VolumeId};
use holdfast_wire::rpc::{Handler, Responder, Service};
use serde::{Deserialize, Serialize};

use crate::attachments::AttachmentView;
use crate::shard::Shard;

/// Calls between daemons.
const NODE: Service = Service(7);
/// How long the other daemon may take.
const DEADLINE: Duration = Duration::from_secs(45);

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub(crate) enum NodeRequest {
    Attach {
        name: String,
        frontend: String,
        force: bool,
        read_only: bool,
    },
    Detach {
        id: VolumeId,
        /// Even if its device is in use.
        #[serde(default)]
        force: bool,
    },
    /// The volume has grown: the device should show it.
    ShowSize {
        id: VolumeId,
        size: ByteSize,
    },
    /// Ends an attachment without a quorum.
    Abort {
        id: VolumeId,
    },
    /// Whether and how a volume is attached there.
    Look {
        id: VolumeId,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub(crate) enum NodeAnswer {
    Attached {
        view: Option<AttachmentView>,
    },
    Detached {
        held: bool,
    },
    /// Whether the volume is attached there, and its device shows its size.
    SizeShown {
        held: bool,
    },
}

type Outcome = Result<NodeAnswer, UserError>;

fn internal(error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("a message between daemons is not understood: {error}"))
}

/// Lets the shard answer other daemons.
pub(crate) fn serve(shard: &Rc<Shard>) {
    shard.rpc.serve(NODE, Rc::new(Forwarded(Rc::downgrade(shard))));
}

struct Forwarded(Weak<Shard>);

impl Handler for Forwarded {
    fn handle(&self, _from: StoreId, _lane: Lane, request: Frame, responder: Responder) {
        let Some(shard) = self.0.upgrade() else { return responder.refuse("the daemon is stopping") };
        let request: NodeRequest = match serde_json::from_slice(&request.head) {
            Ok(request) => request,
            Err(error) => return responder.refuse(error.to_string()),
        };
        holdfast_env::spawn("forwarded", async move {
            let outcome = carry_out(&shard, request).await;
            match serde_json::to_vec(&outcome) {
                Ok(json) => responder.reply(Frame::small(Bytes::from(json))),
                Err(error) => responder.refuse(error.to_string()),
            }
        });
    }
}

async fn carry_out(shard: &Rc<Shard>, request: NodeRequest) -> Outcome {
    match request {
        NodeRequest::Attach { name, frontend, force, read_only } => {
            let view = shard.attach(&name, &frontend, force, read_only).await?;
            Ok(NodeAnswer::Attached { view: Some(view) })
        }
        NodeRequest::Detach { id, force } => {
            Ok(NodeAnswer::Detached { held: shard.detach_here(id, force).await? })
        }
        NodeRequest::ShowSize { id, size } => {
            Ok(NodeAnswer::SizeShown { held: shard.show_size(id, size).await? })
        }
        NodeRequest::Abort { id } => {
            Ok(NodeAnswer::Detached { held: shard.abort_here(|other, _| other == id).await? })
        }
        NodeRequest::Look { id } => Ok(NodeAnswer::Attached { view: shard.look(id) }),
    }
}

impl Shard {
    /// Asks the daemon of a store (or this one).
    pub(crate) async fn ask_node(
        self: &Rc<Self>,
        store: StoreId,
        request: NodeRequest,
        deadline: Option<Duration>,
    ) -> Outcome {
        if store == self.config.store {
            return carry_out(self, request).await;
        }
        let json = serde_json::to_vec(&request).map_err(internal)?;
        let frame = Frame::small(Bytes::from(json));
        let deadline = deadline.unwrap_or(DEADLINE);
        let answer = self.rpc.call(store, Lane::Control, NODE, frame, deadline).await.map_err(|error| {
            let node = self.config.node_of(store);
            UserError::new(ErrorCode::Unavailable, format!("node {node} does not answer: {error}"))
                .hint("is its daemon running? `holdfast node list` shows it")
        })?;
        serde_json::from_slice::<Outcome>(&answer.head).map_err(internal)?
    }
}
