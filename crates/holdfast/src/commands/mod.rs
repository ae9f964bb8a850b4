//! Commands that ask the cluster.

pub mod csi;
pub mod fence;
pub mod node;
pub mod replica;
pub mod snapshot;
pub mod volume;

use std::process::ExitCode;

use holdfast_node::admin::pb;
use holdfast_types::UserError;

use crate::client::{reply, with_client};
use crate::output::Output;

/// `holdfast status`.
pub fn status(admin: Option<String>, output: &Output) -> Result<ExitCode, UserError> {
    let status =
        with_client(
            admin,
            |mut client| async move { reply(client.get_status(pb::GetStatusRequest {}).await) },
        )?;
    output.show(&status, || {
        let ready = status.nodes.iter().filter(|node| node.state == "ready").count();
        let mut volumes: Vec<_> = status.volumes.iter().collect();
        volumes.sort();
        let counts: Vec<String> = volumes.iter().map(|(health, count)| format!("{count} {health}")).collect();
        let mut text = format!(
            "{}: {ready} of {} nodes ready; volumes: {}",
            status.health,
            status.nodes.len(),
            if counts.is_empty() { "none".to_owned() } else { counts.join(", ") }
        );
        for problem in &status.problems {
            let since =
                if problem.since.is_empty() { String::new() } else { format!(" since {}", problem.since) };
            text += &format!("\n  {}: {}{since} ({})", problem.subject, problem.what, problem.doing);
        }
        text
    });
    Ok(ExitCode::SUCCESS)
}

/// Bytes for people.
pub fn bytes(count: u64) -> String {
    holdfast_types::ByteSize(count).to_string()
}

/// A text, or a dash.
pub fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}
