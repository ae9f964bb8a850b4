//! `holdfast fence ...`.

use std::path::Path;
use std::process::ExitCode;

use holdfast_node::admin::pb;
use holdfast_node::fence::{FenceCertificate, since_1970, verified};
use holdfast_types::{ErrorCode, UserError};

use super::or_dash;
use crate::cli::FenceCommand;
use crate::client::{reply, with_client};
use crate::output::{Output, table};

fn unusable(path: &Path, error: &std::io::Error) -> UserError {
    UserError::new(ErrorCode::InvalidArgument, format!("{}: {error}", path.display()))
        .hint("name a file that can be read or written")
}

fn read(path: &Path) -> Result<String, UserError> {
    std::fs::read_to_string(path).map_err(|error| unusable(path, &error))
}

fn shown(fence: &pb::VerifiedFence) -> String {
    let name = if fence.volume.is_empty() { &fence.volume_id } else { &fence.volume };
    let row = vec![
        name.clone(),
        fence.incarnation.clone(),
        fence.fenced.clone(),
        fence.epoch.to_string(),
        or_dash(&fence.holder),
        fence.index.to_string(),
        fence.signers.join(", "),
    ];
    table(&["volume", "incarnation", "fenced", "epoch", "holder", "index", "signed by"], vec![row])
}

/// What the authority's certificate alone tells.
fn verify_offline(json: &str, authority: &Path) -> Result<pb::VerifiedFence, UserError> {
    let certificate = FenceCertificate::from_json(json)?;
    let signers = certificate.verify(&read(authority)?, since_1970())?;
    Ok(verified(&certificate, String::new(), &signers))
}

/// Runs the command.
pub fn run(command: FenceCommand, admin: Option<String>, output: &Output) -> Result<ExitCode, UserError> {
    match command {
        FenceCommand::Certify { volume, node, out } => with_client(admin, |mut client| async move {
            let request = pb::CertifyFenceRequest { name: volume, node };
            let certificate = reply(client.certify_fence(request).await)?;
            match out {
                Some(path) => {
                    std::fs::write(&path, &certificate.json).map_err(|error| unusable(&path, &error))?;
                    output.show(&certificate, || format!("{}", path.display()));
                }
                None => output.show(&certificate, || certificate.json.clone()),
            }
            Ok(ExitCode::SUCCESS)
        }),
        FenceCommand::Verify { file, authority: Some(authority) } => {
            let fence = verify_offline(&read(&file)?, &authority)?;
            output.show(&fence, || shown(&fence));
            Ok(ExitCode::SUCCESS)
        }
        FenceCommand::Verify { file, authority: None } => with_client(admin, |mut client| async move {
            let fence = reply(client.verify_fence(pb::FenceCertificate { json: read(&file)? }).await)?;
            output.show(&fence, || shown(&fence));
            Ok(ExitCode::SUCCESS)
        }),
    }
}
