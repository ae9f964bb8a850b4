//! `holdfast node ...`.

use std::process::ExitCode;

use holdfast_node::admin::pb;
use holdfast_types::{ErrorCode, UserError};

use super::bytes;
use crate::cli::{NodeCommand, not_built};
use crate::client::{reply, with_client};
use crate::output::{Output, table};

fn list(nodes: &[pb::Node]) -> String {
    let rows = nodes.iter().map(|node| {
        let store = node.stores.first();
        // A node that does not answer tells nothing; zero would be a figure.
        let told = |value: u64| if node.state == "unreachable" { "-".to_owned() } else { bytes(value) };
        let replicas = store.map_or(0, |store| store.replicas).to_string();
        vec![
            node.name.clone(),
            node.region.clone(),
            node.zone.clone(),
            node.state.clone(),
            if node.witness { "witness".into() } else { "data".into() },
            if node.state == "unreachable" { "-".into() } else { replicas },
            told(store.map_or(0, |store| store.available_bytes)),
            told(store.map_or(0, |store| store.total_bytes)),
        ]
    });
    table(&["name", "region", "zone", "state", "kind", "replicas", "free", "size"], rows.collect())
}

/// What the store of a node holds, by what it is for.
fn stands(node: &pb::Node) -> String {
    let Some(store) = node.stores.first().filter(|_| node.state != "unreachable") else {
        return String::new();
    };
    let row = |name: &str, value: u64| vec![name.to_owned(), bytes(value)];
    let capacity = match store.capacity_bytes {
        0 => vec!["capacity".to_owned(), "the medium's".to_owned()],
        capacity => row("capacity", capacity),
    };
    let rows = vec![
        capacity,
        row("allocated", store.allocated_bytes),
        row("blocks", store.blocks_bytes),
        row("of snapshots", store.snapshot_bytes),
        row("journal", store.journal_bytes),
        row("kept back", store.reserve_bytes),
    ];
    table(&["the store", "bytes"], rows)
}

/// A node with what its store holds.
fn one(node: &pb::Node) -> String {
    format!("{}\n{}", list(std::slice::from_ref(node)), stands(node))
}

/// Runs the command.
pub fn run(command: NodeCommand, admin: Option<String>, output: &Output) -> Result<ExitCode, UserError> {
    match command {
        NodeCommand::List => {
            let nodes = nodes(admin)?;
            output.show(&nodes, || list(&nodes));
        }
        NodeCommand::Show { name } => {
            let nodes = nodes(admin)?;
            let node = nodes.into_iter().find(|node| node.name == name).ok_or_else(|| {
                UserError::new(ErrorCode::NotFound, format!("there is no node {name}"))
                    .hint("`holdfast node list` shows them all")
            })?;
            output.show(&node, || one(&node));
        }
        NodeCommand::Cordon { name } => cordon(admin, name, true, output)?,
        NodeCommand::Uncordon { name } => cordon(admin, name, false, output)?,
        NodeCommand::Drain { .. } => return Err(not_built_verb("drain")),
        NodeCommand::CanDrain { .. } => return Err(not_built_verb("can-drain")),
        NodeCommand::Remove { .. } => return Err(not_built_verb("remove")),
    }
    Ok(ExitCode::SUCCESS)
}

fn not_built_verb(verb: &str) -> UserError {
    let mut error = not_built(&["explain".to_owned()], "holdfast node");
    error.message = format!("'node {verb}' is not built yet");
    error
}

fn nodes(admin: Option<String>) -> Result<Vec<pb::Node>, UserError> {
    with_client(admin, |mut client| async move {
        Ok(reply(client.list_nodes(pb::ListNodesRequest {}).await)?.nodes)
    })
}

fn cordon(admin: Option<String>, name: String, cordoned: bool, output: &Output) -> Result<(), UserError> {
    let node = with_client(admin, |mut client| async move {
        reply(client.set_cordon(pb::SetCordonRequest { name, cordoned }).await)
    })?;
    output.show(&node, || list(std::slice::from_ref(&node)));
    Ok(())
}
