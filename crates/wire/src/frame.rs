//! Frames on a stream of bytes: a fixed head with the lengths, then the frame's head, then its body.

use bytes::{Bytes, BytesMut};
use holdfast_env::net::{Frame, Lane};
use holdfast_types::{DecodeError, Reader, StoreId, Writer, limits};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Version of the framing and of the hello.
pub const VERSION: u8 = 1;
const MAGIC: u16 = 0x4846;
const FIXED_BYTES: usize = 12;

/// Why nothing more can be read from a stream.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream broke or ended.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The peer sends what is no frame.
    #[error("malformed frame: {0}")]
    Malformed(String),
}

impl From<DecodeError> for FrameError {
    fn from(error: DecodeError) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// Writes one frame; the caller flushes.
pub async fn write<W: AsyncWrite + Unpin>(stream: &mut W, frame: &Frame) -> std::io::Result<()> {
    let mut fixed = Writer::with_capacity(FIXED_BYTES);
    fixed.u16(MAGIC);
    fixed.u8(VERSION);
    fixed.u8(0);
    fixed.u32(frame.head.len() as u32);
    fixed.u32(frame.body_bytes() as u32);
    stream.write_all(&fixed.finish()).await?;
    stream.write_all(&frame.head).await?;
    for part in &frame.body {
        stream.write_all(part).await?;
    }
    Ok(())
}

/// Reads one frame, refusing lengths beyond the bounds before anything is allocated for them.
pub async fn read<R: AsyncRead + Unpin>(stream: &mut R) -> Result<Frame, FrameError> {
    let mut fixed = [0; FIXED_BYTES];
    stream.read_exact(&mut fixed).await?;
    let mut input = Reader::new(&fixed);
    let (magic, version, _reserved) = (input.u16()?, input.u8()?, input.u8()?);
    if magic != MAGIC || version != VERSION {
        return Err(FrameError::Malformed(format!("magic {magic:#06x}, version {version}")));
    }
    let (head, body) = (input.u32()? as usize, input.u32()? as usize);
    if head > limits::FRAME_HEAD_BYTES_MAX || head + body > limits::FRAME_BYTES_MAX {
        return Err(FrameError::Malformed(format!("{head} + {body} bytes are beyond the bound")));
    }
    let head = part(stream, head).await?;
    let body = if body == 0 { Vec::new() } else { vec![part(stream, body).await?] };
    Ok(Frame { head, body })
}

async fn part<R: AsyncRead + Unpin>(stream: &mut R, length: usize) -> std::io::Result<Bytes> {
    let mut bytes = BytesMut::zeroed(length);
    stream.read_exact(&mut bytes).await?;
    Ok(bytes.freeze())
}

/// The first frame of a connection, from the side that dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Who sends on this connection.
    pub from: StoreId,
    /// Whom it is meant for.
    pub to: StoreId,
    /// Which stream of the pair it is.
    pub lane: Lane,
}

impl Hello {
    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = Writer::new();
        out.u8(VERSION);
        self.from.encode(&mut out);
        self.to.encode(&mut out);
        out.u8(match self.lane {
            Lane::Control => 0,
            Lane::Bulk => 1,
        });
        Frame::small(out.finish())
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(frame: &Frame) -> Result<Self, DecodeError> {
        let mut input = Reader::new(&frame.head);
        let version = input.u8()?;
        if version != VERSION {
            return Err(DecodeError::Unknown { what: "hello version", value: version.into() });
        }
        let (from, to) = (StoreId::decode(&mut input)?, StoreId::decode(&mut input)?);
        let lane = match input.u8()? {
            0 => Lane::Control,
            1 => Lane::Bulk,
            other => return Err(DecodeError::Unknown { what: "lane", value: other.into() }),
        };
        input.end()?;
        Ok(Self { from, to, lane })
    }
}
