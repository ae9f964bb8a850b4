//! Numbers of the protocol.

use bytes::{BufMut, Bytes, BytesMut};

use crate::device::DeviceError;

pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Server: fixed newstyle, and no 124 zero bytes after EXPORT_NAME.
pub const HANDSHAKE_FLAGS: u16 = 0b11;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
const ERROR_BIT: u32 = 1 << 31;
pub const REP_ERR_UNSUP: u32 = ERROR_BIT | 1;
pub const REP_ERR_INVALID: u32 = ERROR_BIT | 3;
pub const REP_ERR_UNKNOWN: u32 = ERROR_BIT | 6;
pub const REP_ERR_TOO_BIG: u32 = ERROR_BIT | 9;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_BLOCK_SIZE: u16 = 3;

const FLAG_HAS_FLAGS: u16 = 1;
const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_FUA: u16 = 1 << 3;
const FLAG_SEND_TRIM: u16 = 1 << 5;
const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
const FLAG_SEND_DF: u16 = 1 << 7;
const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
const FLAG_SEND_CACHE: u16 = 1 << 10;
const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_CACHE: u16 = 5;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const CMD_BLOCK_STATUS: u16 = 7;

pub const CMD_FLAG_FUA: u16 = 1;
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub const CMD_FLAG_DF: u16 = 1 << 2;
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

const CHUNK_DONE: u16 = 1;
pub const CHUNK_NONE: u16 = 0;
pub const CHUNK_OFFSET_DATA: u16 = 1;
pub const CHUNK_BLOCK_STATUS: u16 = 5;
pub const CHUNK_ERROR: u16 = (1 << 15) | 1;

pub const STATE_HOLE: u32 = 1;
pub const STATE_ZERO: u32 = 2;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EOVERFLOW: u32 = 75;
pub const ESHUTDOWN: u32 = 108;

/// Largest payload of one request, in bytes.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// The one meta context that is offered.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its id.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// Longest option that a client may send, in bytes: a name and a few contexts.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Longest string of the protocol, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;

/// What an export can do.
pub fn transmission_flags(read_only: bool) -> u16 {
    // Several connections see each other's writes: all go through one session, and nothing acknowledged is volatile.
    let mut flags = FLAG_HAS_FLAGS
        | FLAG_SEND_FLUSH
        | FLAG_SEND_FUA
        | FLAG_SEND_TRIM
        | FLAG_SEND_WRITE_ZEROES
        | FLAG_SEND_DF
        | FLAG_CAN_MULTI_CONN
        | FLAG_SEND_CACHE
        | FLAG_SEND_FAST_ZERO;
    if read_only {
        flags |= FLAG_READ_ONLY;
    }
    flags
}

/// The error number of a failed request.
pub fn error_number(error: &DeviceError, writing: bool) -> u32 {
    match error {
        DeviceError::Ended(_) => ESHUTDOWN,
        DeviceError::ReadOnly => EPERM,
        DeviceError::OutOfRange if writing => ENOSPC,
        DeviceError::OutOfRange => EINVAL,
        DeviceError::Failed(_) => EIO,
    }
}

/// A simple reply's head.
pub fn simple_reply(error: u32, cookie: u64) -> Bytes {
    let mut out = BytesMut::with_capacity(16);
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error);
    out.put_u64(cookie);
    out.freeze()
}

/// The only chunk of a structured reply: head and `payload`, followed by `more` bytes that the caller sends.
pub fn final_chunk(kind: u16, cookie: u64, payload: &[u8], more: usize) -> Bytes {
    let mut out = BytesMut::with_capacity(20 + payload.len());
    out.put_u32(CHUNK_MAGIC);
    out.put_u16(CHUNK_DONE);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32((payload.len() + more) as u32);
    out.put_slice(payload);
    out.freeze()
}

/// A structured error.
pub fn error_chunk(error: u32, cookie: u64, message: &str) -> Bytes {
    let text = &message.as_bytes()[..message.len().min(STRING_BYTES_MAX)];
    let mut payload = BytesMut::with_capacity(6 + text.len());
    payload.put_u32(error);
    payload.put_u16(text.len() as u16);
    payload.put_slice(text);
    final_chunk(CHUNK_ERROR, cookie, &payload, 0)
}
