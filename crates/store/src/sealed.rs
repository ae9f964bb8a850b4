//! How the small files of a store are written: a magic number, a version, a length, a checksum, and a body. A slot that
//! was torn, or belongs to something else, does not open.

use holdfast_env::disk::AlignedBuffer;
use holdfast_types::{DecodeError, Reader, Writer};

/// What a kind of file begins with.
pub(crate) struct Seal {
    pub(crate) magic: u64,
    pub(crate) version: u16,
    /// Largest body, in bytes.
    pub(crate) body_bytes_max: usize,
}

impl Seal {
    /// A slot with this body.
    pub(crate) fn close(&self, body: &[u8]) -> AlignedBuffer {
        let mut whole = Writer::new();
        whole.u64(self.magic);
        whole.u16(self.version);
        whole.u32(body.len() as u32);
        whole.u32(crc32fast::hash(body));
        whole.raw(body);
        AlignedBuffer::copy_of(whole.as_slice())
    }

    /// The body of a slot.
    pub(crate) fn open<'s>(&self, slot: &'s [u8]) -> Result<&'s [u8], DecodeError> {
        let mut input = Reader::new(slot);
        let magic = input.u64()?;
        if magic != self.magic {
            return Err(DecodeError::Unknown { what: "magic", value: magic });
        }
        let version = input.u16()?;
        if version != self.version {
            return Err(DecodeError::Unknown { what: "version", value: version.into() });
        }
        let length = input.count("bytes of the body", self.body_bytes_max)?;
        let crc = input.u32()?;
        let body = input.raw(length)?;
        if crc32fast::hash(body) != crc {
            return Err(DecodeError::Unknown { what: "checksum", value: crc.into() });
        }
        Ok(body)
    }
}
