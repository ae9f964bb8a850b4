//! What users ask of the cluster, carried out from this node's shard.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use holdfast_catalog::volumes;
use holdfast_env::Instant;
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogReply, ReplicaPhase, ReplicaRecord, SourceOrder, VolumePhase, VolumeRecord,
};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::placement;
use holdfast_replica::administration::ShardRequest;
use holdfast_replica::messages::{DataReply, DataRequest};
use holdfast_types::{ByteSize, ErrorCode, LogIndex, NodeName, ReplicaId, SnapshotId, UserError, VolumeId};

use crate::admin::pb;
use crate::forward::{NodeAnswer, NodeRequest};
use crate::shard::Shard;
use crate::store::LocalStore;
use crate::{parameters, problems, snapshots, views};

/// How long reads and small changes of the catalog may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long a volume may take to be created.
pub(crate) const CREATE_PATIENCE: Duration = Duration::from_secs(30);
/// Between tries while a volume has no leader.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Looks at a volume that a majority answers for and nobody leads, and the pause between them: as long as an election.
const UNLED_LOOKS: usize = 10;
const UNLED_PAUSE: Duration = Duration::from_millis(60);
/// How long a forced detach waits for the catalog before it looks at what is attached here.
const FORCE_PATIENCE: Duration = Duration::from_secs(3);
/// How long a node may take to let go of a device.
const ABORT_DEADLINE: Duration = Duration::from_secs(2);
/// Volumes on one page of a list.
const PAGE_MAX: usize = 1000;
/// How long a device may take to show its new size.
const RESIZE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a digest of one replica may take: it reads everything.
const VERIFY_DEADLINE: Duration = Duration::from_secs(600);
/// Times that a verification of a volume that is being written begins anew.
const VERIFY_ROUNDS: usize = 20;

fn was_attached(was_attached: bool) -> pb::DetachVolumeReply {
    pb::DetachVolumeReply { was_attached, fence_certificate: String::new() }
}

fn expect_volume(reply: CatalogReply) -> Result<VolumeRecord, UserError> {
    match reply {
        CatalogReply::Volume { record } => Ok(*record),
        _ => Err(UserError::new(ErrorCode::NotFound, "the volume is gone")),
    }
}

/// A store of this node as it knows itself.
fn shown_store(store: &LocalStore) -> pb::Store {
    pb::Store {
        id: store.plan.store.to_string(),
        peer_address: store.plan.listen.clone(),
        directory: store.plan.directory.display().to_string(),
        replicas: store.host().map_or(0, |host| host.volumes().len() as u32),
        failed: store.why_not(),
        ..Default::default()
    }
}

impl Shard {
    pub(crate) async fn info(self: Rc<Self>) -> Result<pb::NodeInfo, UserError> {
        let location = &self.config.location;
        let mut stores = vec![shown_store(&self.store)];
        for other in &self.others {
            let told = other.ask(shown_store).await;
            stores.push(told.unwrap_or_else(|error| pb::Store {
                id: other.plan.store.to_string(),
                peer_address: other.plan.listen.clone(),
                directory: other.plan.directory.display().to_string(),
                failed: format!("{error}: the log says what became of it"),
                ..Default::default()
            }));
        }
        Ok(pb::NodeInfo {
            cluster: self.config.cluster.to_string(),
            name: location.node.to_string(),
            region: location.region.clone(),
            zone: location.zone.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            stores,
            daemon_start: self.start.to_string(),
        })
    }

    pub(crate) async fn status(self: Rc<Self>) -> Result<pb::Status, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let reports = volumes::store_reports(&self.rpc, &state).await;
        let shown = join_all(state.volumes.values().map(|record| self.show(record))).await;
        Ok(views::status(&state, &reports, &shown))
    }

    pub(crate) async fn nodes(self: Rc<Self>) -> Result<pb::ListNodesReply, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let reports = volumes::store_reports(&self.rpc, &state).await;
        let nodes = state.nodes.values().map(|record| views::node(record, &reports));
        Ok(pb::ListNodesReply { nodes: nodes.collect() })
    }

    pub(crate) async fn cordon(self: Rc<Self>, name: String, cordoned: bool) -> Result<pb::Node, UserError> {
        let node = NodeName::new(&name);
        self.catalog.apply(CatalogCommand::SetCordon { node: node.clone(), cordoned }, PATIENCE).await?;
        let state = self.catalog.state(PATIENCE).await?;
        let reports = volumes::store_reports(&self.rpc, &state).await;
        let record = state
            .nodes
            .get(&node)
            .ok_or_else(|| UserError::new(ErrorCode::NotFound, format!("there is no node {name}")))?;
        Ok(views::node(record, &reports))
    }

    /// A volume with what its replicas say now. While the leadership is handed over nobody leads for a moment, which is
    /// no loss of quorum: where a majority answers, another look is taken.
    pub(crate) async fn show(&self, record: &VolumeRecord) -> pb::Volume {
        for _ in 0..UNLED_LOOKS {
            let reports = volumes::replica_reports(&self.rpc, record).await;
            let answering = reports.values().filter(|report| report.is_ok()).count();
            if volumes::leader_of(&reports).is_some() || answering * 2 <= record.replicas.len() {
                return views::volume(record, &reports);
            }
            holdfast_env::sleep(UNLED_PAUSE).await;
        }
        views::volume(record, &volumes::replica_reports(&self.rpc, record).await)
    }

    /// Who holds a volume, empty for nobody; from a leader with a quorum, since what depends on it cannot be taken back.
    /// What other replicas say may be of before an attach.
    async fn holder(&self, record: &VolumeRecord) -> Result<String, UserError> {
        let until = Instant::now() + PATIENCE;
        loop {
            let reports = volumes::replica_reports(&self.rpc, record).await;
            if let Some((_, leader)) = volumes::leader_of(&reports) {
                return Ok(leader.holder.clone());
            }
            if Instant::now() >= until {
                let message = format!(
                    "volume {} has no leader now: nobody can tell whether it is attached",
                    record.spec.name
                );
                return Err(UserError::new(ErrorCode::Unavailable, message)
                    .hint("`holdfast volume show` tells which replicas answer"));
            }
            holdfast_env::sleep(Duration::from_millis(200)).await;
        }
    }

    pub(crate) async fn record(&self, name: &str) -> Result<VolumeRecord, UserError> {
        Ok(self.catalog.state(PATIENCE).await?.get(name)?.clone())
    }

    pub(crate) async fn create_volume(
        self: Rc<Self>,
        request: pb::CreateVolumeRequest,
    ) -> Result<pb::Volume, UserError> {
        let mut request = request;
        let source = self.source(&mut request).await?;
        let spec = parameters::spec(&request)?;
        let given: BTreeMap<String, String> = request.parameters.into_iter().collect();
        let record = self.catalog.create(spec, given, source, CREATE_PATIENCE).await?;
        Ok(self.show(&record).await)
    }

    /// What a new volume is to begin with. A size that nobody asks for is that of what is copied.
    async fn source(&self, request: &mut pb::CreateVolumeRequest) -> Result<Option<SourceOrder>, UserError> {
        let (of_volume, of_snapshot) = (&request.source_volume, &request.source_snapshot);
        if of_volume.is_empty() && of_snapshot.is_empty() {
            return Ok(None);
        }
        if !of_volume.is_empty() && !of_snapshot.is_empty() {
            let message = "a volume begins with a snapshot or with another volume, not with both";
            return Err(UserError::new(ErrorCode::InvalidArgument, message).hint("name one of them"));
        }
        let state = self.catalog.state(PATIENCE).await?;
        let created_ms = snapshots::now_ms();
        let (order, size) = if of_volume.is_empty() {
            let (record, volume) = snapshots::readable(&state, of_snapshot)?;
            (SourceOrder { volume: volume.id, snapshot: record.id, own: false, created_ms }, record.size)
        } else {
            let volume = state.get(of_volume)?;
            let snapshot = SnapshotId(holdfast_env::random_u128());
            (SourceOrder { volume: volume.id, snapshot, own: true, created_ms }, volume.spec.size)
        };
        if request.size_bytes == 0 {
            request.size_bytes = size.0;
        }
        Ok(Some(order))
    }

    pub(crate) async fn volume(self: Rc<Self>, name: String) -> Result<pb::Volume, UserError> {
        let record = self.record(&name).await?;
        let mut shown = self.show(&record).await;
        if !shown.attached_to.is_empty()
            && let Ok(store) = self.config.home_of(&shown.attached_to)
            && let Ok(NodeAnswer::Attached { view: Some(view) }) =
                self.ask_node(store, NodeRequest::Look { id: record.id }, Some(Duration::from_secs(2))).await
        {
            shown.frontend = view.frontend;
            shown.device = view.device;
        }
        Ok(shown)
    }

    pub(crate) async fn volumes(
        self: Rc<Self>,
        request: pb::ListVolumesRequest,
    ) -> Result<pb::ListVolumesReply, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let after: Option<VolumeId> = match request.token.as_str() {
            "" => None,
            token => Some(token.parse().map_err(|_| {
                UserError::new(ErrorCode::InvalidArgument, format!("'{token}' is no token of a list"))
                    .hint("begin the list anew, without a token")
            })?),
        };
        let alive = state.volumes.values().filter(|record| record.phase != VolumePhase::Deleting);
        let mut rest = alive.filter(|record| after.is_none_or(|after| record.id > after)).peekable();
        let max = if request.max == 0 { PAGE_MAX } else { (request.max as usize).min(PAGE_MAX) };
        let page: Vec<&VolumeRecord> = rest.by_ref().take(max).collect();
        let more = rest.peek().is_some();
        let next_token = page.last().filter(|_| more).map(|last| last.id.to_string()).unwrap_or_default();
        let shown = join_all(page.into_iter().map(|record| self.show(record))).await;
        Ok(pb::ListVolumesReply { volumes: shown, next_token })
    }

    pub(crate) async fn delete_volume(self: Rc<Self>, name: String) -> Result<bool, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let Some(record) = state.find(&name) else { return Ok(false) };
        // Nobody attaches a volume that is not ready.
        let holder = match record.phase {
            VolumePhase::Ready => self.holder(record).await?,
            _ => String::new(),
        };
        if !holder.is_empty() {
            let message = format!("volume {name} is attached to node {holder}");
            return Err(UserError::new(ErrorCode::Refused, message)
                .hint(format!("`holdfast volume detach {name}` first")));
        }
        self.catalog.apply(CatalogCommand::DeleteVolume { id: record.id }, PATIENCE).await?;
        // A dead node's replica stays on the list; the deletion is done all the same.
        if let Err(error) = self.catalog.settle(record.id, CREATE_PATIENCE).await {
            tracing::info!(volume = name, %error, "the reconciler finishes a deletion later");
        }
        Ok(true)
    }

    pub(crate) async fn resize_volume(
        self: Rc<Self>,
        request: pb::ResizeVolumeRequest,
    ) -> Result<pb::Volume, UserError> {
        let record = self.record(&request.name).await?;
        let size = parameters::size(request.size_bytes, request.limit_bytes)?;
        if size < record.spec.size {
            let message = format!("volume {} has {}: it cannot shrink", record.spec.name, record.spec.size);
            return Err(UserError::new(ErrorCode::InvalidArgument, message)
                .hint("make a smaller volume and copy the data"));
        }
        if size > record.spec.size {
            let state = self.catalog.state(PATIENCE).await?;
            let reports = volumes::store_reports(&self.rpc, &state).await;
            let more = size.0 - record.spec.size.0;
            for replica in record.data() {
                let room = reports.get(&replica.store).map(|report| report.available_bytes);
                if room.is_some_and(|room| room < more) {
                    let place = problems::subject(&state, replica.store);
                    let message = format!("{place} has no room for {more} bytes more");
                    return Err(UserError::new(ErrorCode::ResourceExhausted, message).hint("make room there"));
                }
            }
            let command = VolumeCommand::Resize { size };
            volumes::control(&self.rpc, record.group, &record.stores(), &command, PATIENCE).await?;
        }
        let reply = self.catalog.apply(CatalogCommand::SetSize { id: record.id, size }, PATIENCE).await?;
        let shown = self.show(&expect_volume(reply)?).await;
        if !shown.attached_to.is_empty()
            && let Err(error) = self.show_size_at(&shown.attached_to, record.id, size).await
        {
            // Its session learns it by itself; only the caller cannot rely on it yet.
            tracing::info!(volume = shown.name, %error, "the device does not show yet that its volume has grown");
        }
        Ok(shown)
    }

    /// Changes what may be changed of a volume in use. The reconciler brings it about.
    pub(crate) async fn set_volume(
        self: Rc<Self>,
        request: pb::SetVolumeRequest,
    ) -> Result<pb::Volume, UserError> {
        let record = self.record(&request.name).await?;
        let id = record.id;
        let mut commands = Vec::new();
        if !request.timers.is_empty() {
            let timers = parameters::timers(&request.timers)?;
            commands.push(CatalogCommand::SetTimers { id, timers });
        }
        if !request.snapshot_quota.is_empty() {
            let quota = parameters::snapshot_quota(&request.snapshot_quota)?;
            commands.push(CatalogCommand::SetSnapshotQuota { id, quota });
        }
        let mut record = record;
        for command in commands {
            record = expect_volume(self.catalog.apply(command, PATIENCE).await?)?;
        }
        Ok(self.show(&record).await)
    }

    async fn show_size_at(
        self: &Rc<Self>,
        node: &str,
        id: VolumeId,
        size: ByteSize,
    ) -> Result<NodeAnswer, UserError> {
        let store = self.config.home_of(node)?;
        self.ask_node(store, NodeRequest::ShowSize { id, size }, Some(RESIZE_DEADLINE)).await
    }

    pub(crate) async fn publish(self: Rc<Self>, request: pb::PublishVolumeRequest) -> Result<(), UserError> {
        let record = self.record(&request.name).await?;
        let command = CatalogCommand::Publish {
            id: record.id,
            node: NodeName::new(request.node),
            read_only: request.read_only,
        };
        self.catalog.apply(command, PATIENCE).await.map(drop)
    }

    pub(crate) async fn unpublish(
        self: Rc<Self>,
        request: pb::UnpublishVolumeRequest,
    ) -> Result<(), UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let Some(record) = state.find(&request.name) else { return Ok(()) };
        if record.phase == VolumePhase::Filling {
            // No guest has it, and none is permitted to.
            return Ok(());
        }
        // The permission ends first, and then what is attached: by its node or by force. A node that attaches
        // meanwhile looks for its permission again afterwards, so an unpublished node writes nothing. Only a leader
        // with a quorum knows that nothing is attached: without one this fails and is repeated.
        let node = (!request.node.is_empty()).then(|| NodeName::new(&request.node));
        self.catalog.apply(CatalogCommand::Unpublish { id: record.id, node }, PATIENCE).await?;
        let until = Instant::now() + PATIENCE;
        loop {
            match self.clone().detach_volume(record.spec.name.clone(), true, request.node.clone()).await {
                Err(error) if error.code == ErrorCode::NotFound => return Ok(()),
                // The node that dies may have led.
                Err(error) if error.code == ErrorCode::Unavailable && Instant::now() < until => {
                    holdfast_env::sleep(RETRY_PAUSE).await;
                }
                ended => return ended.map(drop),
            }
        }
    }

    pub(crate) async fn attach_volume(
        self: Rc<Self>,
        request: pb::AttachVolumeRequest,
    ) -> Result<pb::Attachment, UserError> {
        let node = if request.node.is_empty() { self.config.location.node.to_string() } else { request.node };
        let store = self.config.home_of(&node)?;
        let ask = NodeRequest::Attach {
            name: request.name,
            frontend: request.frontend,
            force: request.force,
            read_only: request.read_only,
        };
        match self.ask_node(store, ask, None).await? {
            NodeAnswer::Attached { view: Some(view) } => Ok(pb::Attachment {
                epoch: view.epoch.0,
                node: view.node,
                frontend: view.frontend,
                device: view.device,
            }),
            other => Err(UserError::new(ErrorCode::Internal, format!("an attach was answered {other:?}"))),
        }
    }

    /// Ends an attachment: at its node, or by force if that does not answer; then it succeeds only with a certificate
    /// that the node is fenced. By force a device that waits for a quorum is aborted at its node, which needs none.
    pub(crate) async fn detach_volume(
        self: Rc<Self>,
        name: String,
        force: bool,
        node: String,
    ) -> Result<pb::DetachVolumeReply, UserError> {
        let meant_node = node.clone();
        let detached = self.detach_with_quorum(&name, force, node).await;
        match detached {
            // Nobody knows who holds it: if it is held here, that can end without a quorum.
            Err(error)
                if force
                    && error.code == ErrorCode::Unavailable
                    && (meant_node.is_empty() || meant_node == self.config.location.node.as_str()) =>
            {
                let meant = |id: VolumeId, called: &str| called == name || id.to_string() == name;
                if self.abort_here(meant).await? { Ok(was_attached(true)) } else { Err(error) }
            }
            other => other,
        }
    }

    /// Asks the node that holds a volume, as its replicas remember, to let go of it; no quorum is needed.
    async fn abort_at_holder(
        self: &Rc<Self>,
        record: &VolumeRecord,
        reports: &volumes::Reports,
        meant: &str,
    ) -> bool {
        let newest =
            reports.values().filter_map(|report| report.as_ref().ok()).max_by_key(|r| (r.epoch, r.applied));
        let newest = newest.filter(|report| meant.is_empty() || report.holder == meant);
        let Some(Ok(store)) = newest.map(|report| self.config.home_of(&report.holder)) else { return false };
        let asked = self.ask_node(store, NodeRequest::Abort { id: record.id }, Some(ABORT_DEADLINE)).await;
        matches!(asked, Ok(NodeAnswer::Detached { held: true }))
    }

    async fn detach_with_quorum(
        self: &Rc<Self>,
        name: &str,
        force: bool,
        node: String,
    ) -> Result<pb::DetachVolumeReply, UserError> {
        let patience = if force { FORCE_PATIENCE } else { PATIENCE };
        let record = self.catalog.state(patience).await?.get(name)?.clone();
        if record.phase == VolumePhase::Filling {
            // It is held by the node that fills it, not by a guest.
            return Ok(was_attached(false));
        }
        let reports = volumes::replica_reports(&self.rpc, &record).await;
        let Some((_, leader)) = volumes::leader_of(&reports) else {
            if force && self.abort_at_holder(&record, &reports, &node).await {
                return Ok(was_attached(true));
            }
            let message = format!("volume {name} has no leader now: a majority of its replicas must answer");
            return Err(UserError::new(ErrorCode::Unavailable, message)
                .hint("`holdfast volume show` tells which replicas answer"));
        };
        let (holder, epoch) = (leader.holder.clone(), leader.epoch);
        if holder.is_empty() || (!node.is_empty() && node != holder) {
            let answers = self.take_down_ended(&record, &node).await;
            if answers || !force {
                return Ok(was_attached(false));
            }
            // As when it was fenced: who asks again is told the same.
            return self.fenced(&record, NodeName::new(node), false).await;
        }
        let at_node = async {
            let store = self.config.home_of(&holder)?;
            let deadline = force.then_some(Duration::from_secs(3));
            self.ask_node(store, NodeRequest::Detach { id: record.id, force }, deadline).await
        };
        match at_node.await {
            Ok(NodeAnswer::Detached { held: true }) => Ok(was_attached(true)),
            Ok(_) => {
                // Its daemon has no session for it any more: nothing is left that could write.
                let command = VolumeCommand::Detach { epoch, force: false, confirmed: true };
                let stores = record.stores();
                volumes::control(&self.rpc, record.group, &stores, &command, PATIENCE).await?;
                Ok(was_attached(true))
            }
            Err(error) if force => {
                tracing::warn!(volume = name, node = holder, %error, "detached by force");
                self.detach_by_force(&record, epoch).await?;
                self.fenced(&record, NodeName::new(holder), true).await
            }
            Err(error) if error.code == ErrorCode::Unavailable => {
                Err(error.hint("`--force` ends the attachment of a node that is dead or unreachable"))
            }
            Err(error) => Err(error),
        }
    }

    /// A detach of a node that does not answer, with the proof that it can do no harm.
    async fn fenced(
        self: &Rc<Self>,
        record: &VolumeRecord,
        node: NodeName,
        was_attached: bool,
    ) -> Result<pb::DetachVolumeReply, UserError> {
        let name = &record.spec.name;
        let certificate = self.certify(record.id, &node).await.map_err(|error| {
            let hint = format!(
                "ask again with `--node {node}`, or for the proof alone: `holdfast fence certify {name} --node {node}`"
            );
            let message = format!("there is no proof yet that node {node} is fenced: {}", error.message);
            // Not one that says that nobody knows who holds the volume: that is known.
            let code = if error.code == ErrorCode::Unavailable { ErrorCode::TimedOut } else { error.code };
            UserError::new(code, message).hint(hint)
        })?;
        Ok(pb::DetachVolumeReply { was_attached, fence_certificate: certificate.to_json()? })
    }

    /// A node that was fenced may still show the device of its ended session: it goes with the detach. False if the node
    /// does not answer.
    async fn take_down_ended(self: &Rc<Self>, record: &VolumeRecord, node: &str) -> bool {
        if node.is_empty() {
            return true;
        }
        let Ok(store) = self.config.home_of(node) else { return false };
        let ask = NodeRequest::Detach { id: record.id, force: true };
        match self.ask_node(store, ask, Some(Duration::from_secs(3))).await {
            Ok(_) => true,
            Err(error) => {
                tracing::info!(volume = record.spec.name, node, %error, "an ended session's device stays for now");
                error.code != ErrorCode::Unavailable
            }
        }
    }

    /// Digests of all replicas at one log index.
    pub(crate) async fn verify_volume(self: Rc<Self>, name: String) -> Result<pb::VerifyReport, UserError> {
        let record = self.record(&name).await?;
        let mut last = Err(UserError::new(ErrorCode::Unavailable, "no replica of the volume leads now"));
        for _ in 0..VERIFY_ROUNDS {
            last = self.verify_once(&record).await;
            match &last {
                Ok(report) if report.replicas.iter().all(|digest| digest.error.is_empty()) => return last,
                _ => holdfast_env::sleep(Duration::from_millis(200)).await,
            }
        }
        last
    }

    /// Lets every replica's store scrub the volume next. A replica that does not answer is left out, as the view shows.
    pub(crate) async fn scrub_volume(self: Rc<Self>, name: String) -> Result<pb::Volume, UserError> {
        let record = self.record(&name).await?;
        let before = self.show(&record).await;
        let request = ShardRequest::Scrub { group: record.group };
        let asked = record.data().map(|at| volumes::shard(&self.rpc, at.store, &request));
        let answers = join_all(asked).await;
        let told = answers.iter().filter(|answer| answer.is_ok()).count();
        match answers.into_iter().find_map(Result::err) {
            Some(error) if told == 0 => Err(error),
            _ => Ok(before),
        }
    }

    async fn verify_once(&self, record: &VolumeRecord) -> Result<pb::VerifyReport, UserError> {
        let reports = volumes::replica_reports(&self.rpc, record).await;
        let unled = || {
            UserError::new(ErrorCode::Unavailable, format!("volume {} has no leader now", record.spec.name))
                .hint("`holdfast volume show` tells which replicas answer")
        };
        let (_, leader) = volumes::leader_of(&reports).ok_or_else(unled)?;
        let index = LogIndex(leader.committed.0.max(1));
        let request = DataRequest::Digest { group: record.group, index };
        let asked = record.data().map(|replica| {
            let request = &request;
            async move {
                let node = replica.location.node.to_string();
                let failed =
                    |error: String| pb::ReplicaDigest { node: node.clone(), error, ..Default::default() };
                match volumes::ask(&self.rpc, replica.store, request, VERIFY_DEADLINE).await {
                    Ok(DataReply::Digest { index: at, digest, bad_blocks }) if at == index => {
                        pb::ReplicaDigest { node: node.clone(), digest, bad_blocks, error: String::new() }
                    }
                    Ok(DataReply::Digest { index: at, .. }) => failed(format!(
                        "the volume is being written: index {at} came before {index} was read"
                    )),
                    Ok(other) => failed(format!("{other:?}")),
                    Err(why) => failed(why),
                }
            }
        });
        let replicas = join_all(asked).await;
        let first = replicas.first().map(|digest| digest.digest.clone()).unwrap_or_default();
        let equal = replicas.iter().all(|d| d.error.is_empty() && d.bad_blocks == 0 && d.digest == first);
        Ok(pb::VerifyReport { index: index.0, equal, replicas })
    }

    pub(crate) async fn capacity(
        self: Rc<Self>,
        request: pb::GetCapacityRequest,
    ) -> Result<pb::Capacity, UserError> {
        let asked = pb::CreateVolumeRequest {
            name: "capacity".into(),
            size_bytes: 4096,
            preferred: request.accessible.clone(),
            parameters: request.parameters,
            ..Default::default()
        };
        let spec = parameters::spec(&asked)?;
        let state = self.catalog.state(PATIENCE).await?;
        let reports = volumes::store_reports(&self.rpc, &state).await;
        let candidates = volumes::candidates(&state, &reports);
        let largest = placement::largest(&spec, &candidates, &spec.preferred)
            .min(holdfast_types::limits::VOLUME_BYTES_MAX);
        let total = placement::total(&spec, &candidates, &spec.preferred);
        Ok(pb::Capacity { available_bytes: total, maximum_volume_bytes: largest })
    }

    pub(crate) async fn add_replica(
        self: Rc<Self>,
        volume: String,
        node: String,
    ) -> Result<pb::Volume, UserError> {
        let record = self.record(&volume).await?;
        self.check_place(&record, &node, None)?;
        let record = self.catalog.add_replica(record.id, &node, None, PATIENCE).await?;
        self.settled(record.id).await
    }

    /// Refuses a place that does not exist, or whose node holds another replica already; empty is any place. What is
    /// replaced may go to another store of its own node.
    fn check_place(
        &self,
        record: &VolumeRecord,
        place: &str,
        replaced: Option<&ReplicaRecord>,
    ) -> Result<(), UserError> {
        if place.is_empty() {
            return Ok(());
        }
        let (node, stores) = self.config.place(place)?;
        let moves_within = |replica: &ReplicaRecord| {
            replaced.is_some_and(|old| old.id == replica.id)
                && stores.iter().any(|store| *store != replica.store)
        };
        if record.replicas.iter().any(|replica| replica.location.node == node && !moves_within(replica)) {
            let message = format!("node {node} holds a replica of volume {} already", record.spec.name);
            return Err(UserError::new(ErrorCode::Refused, message)
                .hint("choose another node with --node, or leave the choice to the cluster"));
        }
        Ok(())
    }

    async fn settled(&self, id: VolumeId) -> Result<pb::Volume, UserError> {
        let gone = || UserError::new(ErrorCode::NotFound, "the volume is gone");
        let record = self.catalog.settle(id, CREATE_PATIENCE).await?.ok_or_else(gone)?;
        Ok(self.show(&record).await)
    }

    async fn mark_leaving(&self, record: &VolumeRecord, replica: ReplicaId) -> Result<(), UserError> {
        let command = CatalogCommand::SetReplica {
            id: record.id,
            revision: record.revision,
            replica,
            phase: ReplicaPhase::Leaving,
        };
        self.catalog.apply(command, PATIENCE).await.map(drop)
    }

    pub(crate) async fn remove_replica(
        self: Rc<Self>,
        volume: String,
        replica: u64,
    ) -> Result<pb::Volume, UserError> {
        let record = self.record(&volume).await?;
        let staying = record
            .replicas
            .iter()
            .filter(|other| other.id.0 != replica && other.phase == ReplicaPhase::Voter)
            .count();
        let needed = placement::voters(&record.spec)?;
        if staying < needed {
            let message = format!(
                "volume {volume} needs {needed} replicas to survive the loss of a {}; {staying} would stay",
                record.spec.survive.as_str()
            );
            return Err(UserError::new(ErrorCode::Refused, message)
                .hint("add another one first, or replace it: `holdfast replica move`"));
        }
        self.mark_leaving(&record, ReplicaId(replica)).await?;
        self.settled(record.id).await
    }

    /// Gives the leadership to a replica; it is refused while that replica is behind, and may be asked for again.
    pub(crate) async fn lead_replica(
        self: Rc<Self>,
        volume: String,
        replica: u64,
    ) -> Result<pb::Volume, UserError> {
        let record = self.record(&volume).await?;
        let to = ReplicaId(replica);
        if !record.data().any(|at| at.id == to && at.phase == ReplicaPhase::Voter) {
            let message = format!("volume {volume} has no voting replica {replica} with data");
            return Err(UserError::new(ErrorCode::NotFound, message)
                .hint(format!("`holdfast replica list {volume}` shows them")));
        }
        let until = Instant::now() + PATIENCE;
        let mut asked = false;
        loop {
            let reports = volumes::replica_reports(&self.rpc, &record).await;
            let leader = volumes::leader_of(&reports).map(|(id, _)| id);
            if leader == Some(to) {
                return Ok(self.show(&record).await);
            }
            if let Some(at) = record.replicas.iter().find(|at| Some(at.id) == leader)
                && !std::mem::replace(&mut asked, true)
            {
                let request = ShardRequest::Transfer { group: record.group, to };
                volumes::shard(&self.rpc, at.store, &request).await?;
            }
            if Instant::now() >= until {
                let message = format!("replica {replica} of volume {volume} does not lead in time");
                return Err(UserError::new(ErrorCode::TimedOut, message)
                    .hint("`holdfast volume show` tells which replicas answer"));
            }
            holdfast_env::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A new replica joins, then the old one leaves.
    pub(crate) async fn replace_replica(
        self: Rc<Self>,
        request: pb::ReplaceReplicaRequest,
    ) -> Result<pb::Volume, UserError> {
        let record = self.record(&request.volume).await?;
        let old =
            record.replicas.iter().find(|replica| replica.id.0 == request.replica).ok_or_else(|| {
                let message = format!("volume {} has no replica {}", request.volume, request.replica);
                UserError::new(ErrorCode::NotFound, message).hint("`holdfast replica list` shows them")
            })?;
        self.check_place(&record, &request.node, Some(old))?;
        self.catalog.add_replica(record.id, &request.node, Some(old.id), PATIENCE).await?;
        self.settled(record.id).await
    }
}
