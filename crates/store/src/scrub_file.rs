//! Where a store's scrub stands: one small file that may be lost. It is written without a flush; what does not decode
//! counts as nothing, and the scrub begins anew.

use std::rc::Rc;

use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, OpenMode};
use holdfast_types::{DecodeError, GroupId, Reader, Writer};

const NAME: &str = "scrub";
const MAGIC: u64 = 0x6873_6166_7363_3031;
const VERSION: u16 = 1;

/// Where the scrub stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubPlace {
    /// The replica's group.
    pub group: GroupId,
    /// The chunk that comes next.
    pub chunk: u64,
    /// Everything was looked at in this pass.
    pub done: bool,
    /// Seconds that the daemon ran since the pass began.
    pub seconds: u64,
}

impl Default for ScrubPlace {
    fn default() -> Self {
        Self { group: GroupId::NIL, chunk: 0, done: false, seconds: 0 }
    }
}

impl ScrubPlace {
    fn encode(&self) -> AlignedBuffer {
        let mut out = Writer::new();
        out.u64(MAGIC);
        out.u16(VERSION);
        self.group.encode(&mut out);
        out.u64(self.chunk);
        out.bool(self.done);
        out.u64(self.seconds);
        let crc = crc32fast::hash(out.as_slice());
        out.u32(crc);
        AlignedBuffer::copy_of(out.as_slice())
    }

    fn decode(block: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(block);
        let magic = input.u64()?;
        if magic != MAGIC || input.u16()? != VERSION {
            return Err(DecodeError::Unknown { what: "scrub magic", value: magic });
        }
        let place = Self {
            group: GroupId::decode(&mut input)?,
            chunk: input.u64()?,
            done: input.bool()?,
            seconds: input.u64()?,
        };
        let covered = block.len() - input.remaining();
        let crc = input.u32()?;
        if crc32fast::hash(&block[..covered]) != crc {
            return Err(DecodeError::Unknown { what: "scrub checksum", value: crc.into() });
        }
        Ok(place)
    }
}

/// The file; none where it cannot be made, which costs a pass at the next start.
pub struct ScrubFile(Option<Rc<dyn File>>);

impl ScrubFile {
    /// Opens it, or makes it.
    pub async fn open(directory: Rc<dyn Directory>) -> Self {
        let opened = match directory.open(NAME, OpenMode::Existing).await {
            Ok(file) => Ok(file),
            Err(_) => directory.open(NAME, OpenMode::CreateNew).await,
        };
        if let Err(error) = &opened {
            tracing::warn!(%error, "where the scrub stands is not kept");
        }
        Self(opened.ok())
    }

    /// Where it stood; the beginning if that is not known.
    pub async fn read(&self) -> ScrubPlace {
        let Some(file) = &self.0 else { return ScrubPlace::default() };
        let read = file.read_at(0, ALIGNMENT).await;
        read.ok().and_then(|block| ScrubPlace::decode(block.as_slice()).ok()).unwrap_or_default()
    }

    /// Writes down where it stands.
    pub async fn write(&self, place: &ScrubPlace) {
        let Some(file) = &self.0 else { return };
        if let Err(error) = file.write_at(0, place.encode(), Durability::Volatile).await {
            tracing::warn!(%error, "where the scrub stands is not written down");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MemoryDisk, simulate};

    #[test]
    fn the_place_is_found_again_and_rot_only_begins_anew() {
        let disk = MemoryDisk::new(1);
        let place = ScrubPlace { group: GroupId(7), chunk: 41, done: false, seconds: 99 };
        simulate(1, async {
            let file = ScrubFile::open(disk.directory()).await;
            assert_eq!(file.read().await, ScrubPlace::default());
            file.write(&place).await;
            assert_eq!(ScrubFile::open(disk.directory()).await.read().await, place);
            // Rot is of what the medium holds.
            file.0.as_ref().expect("the file was made").flush().await.expect("is flushed");
            disk.rot(NAME, 20, 1);
            assert_eq!(ScrubFile::open(disk.directory()).await.read().await, ScrubPlace::default());
        });
    }
}
