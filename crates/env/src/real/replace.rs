//! Small files that are whole or not there at all, also after a power cut.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// Makes what a directory says of its entries durable.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

/// Puts `bytes` in place of the file's content; whole and durable when it returns. A crash leaves the old content, or the
/// new.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), sync_directory)
}
