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
        let serving = node.stores.iter().filter(|store| store.state == "ready").count();
        // A node that does not answer tells nothing; zero would be a figure.
        let told = |value: &dyn Fn(&pb::Store) -> u64| match node.state.as_str() {
            "unreachable" => None,
            _ => Some(node.stores.iter().map(value).sum::<u64>()),
        };
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        vec![
            node.name.clone(),
            node.region.clone(),
            node.zone.clone(),
            node.state.clone(),
            if node.witness { "witness".into() } else { "data".into() },
            format!("{serving}/{}", node.stores.len()),
            or_dash(told(&|store| store.replicas.into()).map(|count| count.to_string())),
            or_dash(told(&|store| store.available_bytes).map(bytes)),
            or_dash(told(&|store| store.total_bytes).map(bytes)),
        ]
    });
    table(&["name", "region", "zone", "state", "kind", "stores", "replicas", "free", "size"], rows.collect())
}

/// What a store holds, by what it is for.
fn stands(store: &pb::Store) -> String {
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

/// The stores of a node that has several.
fn stores(node: &pb::Node) -> String {
    let rows = node.stores.iter().map(|store| {
        let serves = store.state == "ready";
        let told = |value: u64| if serves { bytes(value) } else { "-".to_owned() };
        vec![
            store.id.clone(),
            store.directory.clone(),
            store.state.clone(),
            if serves { store.replicas.to_string() } else { "-".into() },
            told(store.available_bytes),
            told(store.total_bytes),
            told(store.allocated_bytes),
            told(store.blocks_bytes),
            told(store.snapshot_bytes),
            told(store.journal_bytes),
            told(store.reserve_bytes),
            if store.capacity_bytes == 0 { "-".into() } else { told(store.capacity_bytes) },
        ]
    });
    let names = [
        "store",
        "directory",
        "state",
        "replicas",
        "free",
        "size",
        "allocated",
        "blocks",
        "of snapshots",
        "journal",
        "kept back",
        "capacity",
    ];
    let failed = node.stores.iter().filter(|store| !store.failed.is_empty());
    let why: String = failed.map(|store| format!("\n{}: {}", store.directory, store.failed)).collect();
    format!("{}{why}", table(&names, rows.collect()))
}

/// A node with what its stores hold.
fn one(node: &pb::Node) -> String {
    let below = match node.stores.as_slice() {
        [_] if node.state == "unreachable" => String::new(),
        [store] => stands(store),
        _ => stores(node),
    };
    format!("{}\n{below}", list(std::slice::from_ref(node)))
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
