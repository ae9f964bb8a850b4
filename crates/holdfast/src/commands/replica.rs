//! `holdfast replica ...`.

use std::process::ExitCode;

use holdfast_node::admin::pb;
use holdfast_types::UserError;

use super::volume::replicas;
use crate::cli::{ReplicaCommand, confirmed};
use crate::client::{reply, with_client};
use crate::output::Output;

/// Runs the command.
pub fn run(command: ReplicaCommand, admin: Option<String>, output: &Output) -> Result<ExitCode, UserError> {
    let volume = with_client(admin, |mut client| async move {
        match command {
            ReplicaCommand::List { volume } => {
                reply(client.get_volume(pb::GetVolumeRequest { name: volume }).await)
            }
            ReplicaCommand::Add { volume, node } => {
                let node = node.unwrap_or_default();
                reply(client.add_replica(pb::AddReplicaRequest { volume, node }).await)
            }
            ReplicaCommand::Remove { volume, replica, yes } => {
                confirmed(yes, "removing a replica")?;
                reply(client.remove_replica(pb::RemoveReplicaRequest { volume, replica }).await)
            }
            ReplicaCommand::Lead { volume, replica } => {
                reply(client.lead_replica(pb::LeadReplicaRequest { volume, replica }).await)
            }
            ReplicaCommand::Move { volume, replica, to } => {
                let node = to.unwrap_or_default();
                reply(client.replace_replica(pb::ReplaceReplicaRequest { volume, replica, node }).await)
            }
        }
    })?;
    output.show(&volume.replicas, || replicas(&volume.replicas, true));
    Ok(ExitCode::SUCCESS)
}
