//! A small binary codec: fixed little-endian integers, length-prefixed bytes, every read bounds-checked. Used on
//! disk and on the wire, where the bytes are laid down in `docs/FORMAT.md`; nothing here is self-describing.

use bytes::{BufMut, Bytes, BytesMut};

/// Input that is not what it should be: too short, beyond a bound, or with an unknown tag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the field needs.
    #[error("input ends {missing} bytes early")]
    Short {
        /// Bytes that are missing.
        missing: usize,
    },
    /// A length beyond its bound.
    #[error("{what} of {length} is beyond the bound of {max}")]
    TooLong {
        /// What was read.
        what: &'static str,
        /// Its claimed length.
        length: u64,
        /// The largest allowed.
        max: u64,
    },
    /// A tag or value that this version does not know.
    #[error("{what} {value} is unknown to this version")]
    Unknown {
        /// What was read.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Text that is not UTF-8.
    #[error("text is not UTF-8")]
    NotText,
    /// Bytes after the end of the message.
    #[error("{extra} bytes after the end")]
    Trailing {
        /// How many.
        extra: usize,
    },
}

/// Appends fields to a growing buffer.
#[derive(Default, Debug)]
pub struct Writer(BytesMut);

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }
    /// An empty writer with room for `bytes`.
    pub fn with_capacity(bytes: usize) -> Self {
        Self(BytesMut::with_capacity(bytes))
    }
    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.0.put_u8(value);
    }
    /// One byte, 0 or 1.
    pub fn bool(&mut self, value: bool) {
        self.0.put_u8(value.into());
    }
    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.0.put_u16_le(value);
    }
    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.0.put_u32_le(value);
    }
    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.0.put_u64_le(value);
    }
    /// Sixteen bytes.
    pub fn u128(&mut self, value: u128) {
        self.0.put_u128_le(value);
    }
    /// Bytes as they are, without a length.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.put_slice(bytes);
    }
    /// A length of four bytes, then the bytes. The caller keeps within the reader's bound.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).expect("a field is below 4 GiB"));
        self.raw(bytes);
    }
    /// Text as [`Self::bytes`].
    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }
    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// What was written.
    pub fn finish(self) -> Bytes {
        self.0.freeze()
    }
    /// What was written so far.
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

/// Reads fields from a slice.
#[derive(Clone, Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Reads from the start of `input`.
    pub fn new(input: &'a [u8]) -> Self {
        Self(input)
    }
    /// Bytes left.
    pub fn remaining(&self) -> usize {
        self.0.len()
    }
    /// `length` bytes as they are.
    pub fn raw(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        if self.0.len() < length {
            return Err(DecodeError::Short { missing: length - self.0.len() });
        }
        let (head, tail) = self.0.split_at(length);
        self.0 = tail;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.raw(N)?);
        Ok(out)
    }
    /// One byte.
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }
    /// One byte, 0 or 1.
    pub fn bool(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DecodeError::Unknown { what: "boolean", value: other.into() }),
        }
    }
    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// Sixteen bytes.
    pub fn u128(&mut self) -> Result<u128, DecodeError> {
        Ok(u128::from_le_bytes(self.array()?))
    }
    /// A length of four bytes, at most `max`, then the bytes.
    pub fn bytes(&mut self, max: usize) -> Result<&'a [u8], DecodeError> {
        let length = self.count("byte string", max)?;
        self.raw(length)
    }
    /// A count of four bytes, at most `max`.
    pub fn count(&mut self, what: &'static str, max: usize) -> Result<usize, DecodeError> {
        let length = self.u32()? as usize;
        if length > max {
            return Err(DecodeError::TooLong { what, length: length as u64, max: max as u64 });
        }
        Ok(length)
    }
    /// Text of at most `max` bytes.
    pub fn text(&mut self, max: usize) -> Result<String, DecodeError> {
        let bytes = self.bytes(max)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| DecodeError::NotText)
    }
    /// Refuses what is left over.
    pub fn end(self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Trailing { extra: self.0.len() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_and_bounds_hold() {
        let mut out = Writer::new();
        out.u8(7);
        out.u64(1 << 40);
        out.text("zone");
        let bytes = out.finish();
        let mut input = Reader::new(&bytes);
        assert_eq!(input.u8(), Ok(7));
        assert_eq!(input.u64(), Ok(1 << 40));
        assert_eq!(
            input.clone().text(3),
            Err(DecodeError::TooLong { what: "byte string", length: 4, max: 3 })
        );
        assert_eq!(input.text(4).as_deref(), Ok("zone"));
        assert_eq!(input.clone().u16(), Err(DecodeError::Short { missing: 2 }));
        assert_eq!(input.end(), Ok(()));
        assert_eq!(Reader::new(&[2]).bool(), Err(DecodeError::Unknown { what: "boolean", value: 2 }));
        assert_eq!(Reader::new(&[2]).end(), Err(DecodeError::Trailing { extra: 1 }));
    }
}
