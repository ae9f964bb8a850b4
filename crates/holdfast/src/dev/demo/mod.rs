//! `holdfast dev --demo`: a cluster of three zones that plays a story of loss, checks every sentence of it, and reports.
//!
//! The demonstration uses the cluster as a user does: the admin API through the supervisor's socket, faults as `dev
//! ctl` makes them, I/O over NBD. What it started is stopped and what it wrote is removed when it ends, interrupted or
//! not; a directory that was given stays.

mod acts;
mod database;
mod guest;
mod mounted;
mod postgres;
mod report;
mod stage;
mod tree;
mod zone_loss;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use holdfast_types::{ByteSize, ErrorCode, UserError};

use super::{Shared, absolute, with_cluster};
use crate::cli::{Demo, DevOptions, usage};
use crate::client::runtime;
use crate::output::Output;
use report::Report;
use stage::Stage;

/// The volume that a demonstration makes.
const VOLUME_BYTES: u64 = 1 << 30;
/// Where the blocks begin that the guest overwrites; what is loaded lies before them.
const SCRATCH_AT: u64 = VOLUME_BYTES / 2;
const _: () = assert!(SCRATCH_AT + guest::AREA_BYTES <= VOLUME_BYTES);

fn failed(what: &str, error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("{what}: {error}"))
}

/// Plays a demonstration.
pub fn run(which: Demo, options: &DevOptions, output: &Output) -> Result<ExitCode, UserError> {
    let tools = match which {
        Demo::ZoneLoss => None,
        Demo::Postgres => Some(database::Tools::find()?),
    };
    let place = Place::new(options)?;
    if tools.is_some() {
        place.open_to_others()?;
    }
    let mut report = Report::new(output, which);
    let played = runtime()?.block_on(async {
        let work = async |cluster: Shared| {
            let stage = Stage::new(cluster, place.path()).await;
            match which {
                Demo::ZoneLoss => {
                    zone_loss::play(&stage, &mut report, options.demo_data.0, options.plan().journal_bytes)
                        .await
                }
                Demo::Postgres => postgres::play(&stage, &mut report, tools.as_ref()).await,
            }
        };
        with_cluster(place.path(), options, work).await
    });
    report.quiet();
    place.leave()?;
    match played? {
        Some(()) => Ok(report.finish()),
        None => {
            eprintln!("interrupted; everything that was started has been stopped");
            Ok(ExitCode::from(1))
        }
    }
}

/// Where the cluster lives.
struct Place {
    path: PathBuf,
    /// Removed at the end.
    temporary: Option<tempfile::TempDir>,
}

impl Place {
    fn new(options: &DevOptions) -> Result<Self, UserError> {
        let place = match &options.dir {
            Some(given) => {
                let path = absolute(given)?;
                if path.join("nodes.json").exists() {
                    let message = format!("{} holds a cluster already", path.display());
                    return Err(UserError::new(ErrorCode::Refused, message)
                        .hint("a demonstration wants a cluster of its own: leave --dir out, or name a new directory"));
                }
                Self { path, temporary: None }
            }
            None => {
                let made = tempfile::Builder::new().prefix("holdfast-demo-").tempdir();
                let made = made.map_err(|error| {
                    failed("no temporary directory", error).hint("set TMPDIR, or give --dir")
                })?;
                Self { path: absolute(made.path())?, temporary: Some(made) }
            }
        };
        place.has_room(options)?;
        Ok(place)
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// A demonstration that would run out of disk is not begun.
    fn has_room(&self, options: &DevOptions) -> Result<(), UserError> {
        let plan = options.plan();
        let nodes = (plan.regions * plan.zones * plan.nodes_per_zone) as u64;
        let needed = needed_bytes(nodes, plan.journal_bytes, options.demo_data.0);
        let space = rustix::fs::statvfs(&self.path).map_err(|error| failed("the free space", error))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free >= needed {
            return Ok(());
        }
        let message = format!(
            "the demonstration needs {} in {}, and {} are free",
            ByteSize(needed),
            self.path.display(),
            ByteSize(free)
        );
        Err(UserError::new(ErrorCode::ResourceExhausted, message)
            .hint("give --dir on a larger disk, or set TMPDIR"))
    }

    /// Lets users pass through on their way to what they were given; nothing else is readable to them.
    fn open_to_others(&self) -> Result<(), UserError> {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(&self.path, mode).map_err(|error| failed("the directory's mode", error))
    }

    /// Removes what is not to stay.
    fn leave(self) -> Result<(), UserError> {
        match self.temporary {
            Some(temporary) => {
                temporary.close().map_err(|error| failed("the temporary directory stays behind", error))
            }
            None => Ok(()),
        }
    }
}

/// Journals, three copies of the content, and room enough left that a volume of this size may be placed.
fn needed_bytes(nodes: u64, journal: u64, data: u64) -> u64 {
    const RESERVE: u64 = 512 << 20;
    nodes * journal + 3 * (data + guest::AREA_BYTES) + VOLUME_BYTES + RESERVE
}

/// What is loaded has to end where the guest's blocks begin.
fn check_data(bytes: u64) -> Result<(), UserError> {
    // Headers of an archive take room beside the content.
    if (1 << 20..=SCRATCH_AT * 3 / 4).contains(&bytes) {
        return Ok(());
    }
    Err(usage(
        format!("--demo-data {} does not fit", ByteSize(bytes)),
        format!("give 1MiB to {}", ByteSize(SCRATCH_AT * 3 / 4)),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_stays_below_the_guests_blocks() {
        for (bytes, fits) in [(0, false), (32 << 20, true), (300 << 20, true), (500 << 20, false)] {
            assert_eq!(check_data(bytes).is_ok(), fits, "{bytes}");
        }
        assert!(needed_bytes(6, 64 << 20, 300 << 20) > 2 << 30);
    }
}
