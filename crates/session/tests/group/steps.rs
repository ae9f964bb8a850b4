//! Steps of tests that end with what went wrong, so that a test can also demand that something does.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use holdfast_session::Session;
use holdfast_types::{BlockIndex, BlockRange};

use super::{GROUP, Member, attach, block};

pub type Outcome<T> = Result<T, String>;

/// One block.
pub fn at(number: u64) -> BlockRange {
    BlockRange::new(BlockIndex(number), 1)
}

/// Fails if `work` takes longer.
pub async fn within<T>(seconds: u64, what: &str, work: impl Future<Output = T>) -> Outcome<T> {
    let done = holdfast_env::timeout(Duration::from_secs(seconds), work).await;
    done.map_err(|_| format!("{what}: not within {seconds} s"))
}

/// Waits for something that no event tells of.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) -> Outcome<()> {
    let waiting = async {
        while !is_so() {
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
    };
    within(40, what, waiting).await
}

/// Fills a block with a value.
pub async fn write(session: &Session, number: u64, value: u8) -> Outcome<()> {
    let written = within(20, "a write", session.write(at(number), block(value, 1))).await?;
    written.map_err(|error| error.to_string())
}

/// A block must hold a value that was acknowledged.
pub async fn expect(session: &Session, number: u64, value: u8) -> Outcome<()> {
    let read = within(20, "a read", session.read(at(number))).await?.map_err(|error| error.to_string())?;
    if read == block(value, 1) {
        return Ok(());
    }
    Err(format!("an acknowledged write was lost: block {number} holds {} and not {value}", read[0]))
}

/// Attaches by force.
pub async fn attached(member: &Member) -> Outcome<Rc<Session>> {
    within(30, "an attachment", attach(member, true)).await?.map_err(|error| error.to_string())
}

/// Whether its replica runs.
pub fn runs(member: &Member) -> bool {
    member.host.volume(GROUP).is_some()
}

/// Whether its replica leads.
pub fn leads(member: &Member) -> bool {
    member.host.volume(GROUP).is_some_and(|volume| volume.group().is_leader())
}

/// Copies a directory with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("makes a directory");
    for entry in std::fs::read_dir(from).expect("lists") {
        let entry = entry.expect("an entry");
        let there = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &there);
        } else {
            std::fs::copy(entry.path(), there).expect("copies");
        }
    }
}

/// Runs a test in a place of its own.
pub fn test(work: impl AsyncFnOnce(&Path) -> Outcome<()>) {
    let place = tempfile::tempdir().expect("a place");
    let result = holdfast_env::real::run(async { work(place.path()).await });
    assert_eq!(result, Ok(()));
}
