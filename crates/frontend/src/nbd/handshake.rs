//! The handshake: the client chooses an export and what it wants to speak.

use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::proto::*;
use super::server::{Export, Exports};

/// A client that has not chosen an export after this time is disconnected.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(30);
/// Options that a client may send.
const OPTIONS_MAX: usize = 1024;

/// What was agreed on.
pub(super) struct Negotiated {
    pub export: Export,
    pub structured: bool,
    pub allocation: bool,
}

pub(super) fn broken(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

/// Speaks with the client until it has chosen an export; `None` if it went away.
pub(super) async fn negotiate(stream: &mut UnixStream, exports: &Exports) -> io::Result<Option<Negotiated>> {
    holdfast_env::timeout(HANDSHAKE_DEADLINE, speak(stream, exports))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client chose no export in time"))?
}

async fn speak(stream: &mut UnixStream, exports: &Exports) -> io::Result<Option<Negotiated>> {
    let mut hello = BytesMut::new();
    hello.put_u64(MAGIC);
    hello.put_u64(OPTION_MAGIC);
    hello.put_u16(HANDSHAKE_FLAGS);
    stream.write_all(&hello).await?;
    let client_flags = stream.read_u32().await?;
    if client_flags & 1 == 0 || client_flags & !u32::from(HANDSHAKE_FLAGS) != 0 {
        return Err(broken("the client does not speak fixed newstyle"));
    }
    let mut talk = Talk { no_zeroes: client_flags & 2 != 0, structured: false, allocation_of: None };
    for _ in 0..OPTIONS_MAX {
        if stream.read_u64().await? != OPTION_MAGIC {
            return Err(broken("an option does not begin with its magic"));
        }
        let (option, length) = (stream.read_u32().await?, stream.read_u32().await?);
        if length > OPTION_BYTES_MAX {
            return Err(broken("an option is too long"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        match talk.option(option, Bytes::from(data), exports) {
            Answer::Replies(replies) => stream.write_all(&replies).await?,
            Answer::Chosen(replies, export, name) => {
                stream.write_all(&replies).await?;
                let allocation = talk.structured && talk.allocation_of.as_deref() == Some(&name);
                return Ok(Some(Negotiated { export, structured: talk.structured, allocation }));
            }
            Answer::Goodbye(replies) => {
                stream.write_all(&replies).await?;
                return Ok(None);
            }
            Answer::Close => return Ok(None),
        }
    }
    Err(broken("too many options"))
}

enum Answer {
    Replies(BytesMut),
    Chosen(BytesMut, Export, String),
    Goodbye(BytesMut),
    Close,
}

struct Talk {
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was chosen.
    allocation_of: Option<String>,
}

fn reply(option: u32, kind: u32, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(20 + data.len());
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

fn text(data: &mut Bytes, length: usize) -> Option<String> {
    if length > STRING_BYTES_MAX || length > data.len() {
        return None;
    }
    String::from_utf8(data.split_to(length).to_vec()).ok()
}

fn counted_text(data: &mut Bytes) -> Option<String> {
    if data.len() < 4 {
        return None;
    }
    let length = data.get_u32() as usize;
    text(data, length)
}

impl Talk {
    fn option(&mut self, option: u32, data: Bytes, exports: &Exports) -> Answer {
        match option {
            OPT_EXPORT_NAME => self.export_name(data, exports),
            OPT_ABORT => Answer::Goodbye(reply(option, REP_ACK, &[])),
            OPT_LIST if data.is_empty() => Answer::Replies(list(exports)),
            OPT_INFO | OPT_GO => self.go(option, data, exports),
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                Answer::Replies(reply(option, REP_ACK, &[]))
            }
            OPT_LIST | OPT_STRUCTURED_REPLY => {
                Answer::Replies(reply(option, REP_ERR_INVALID, b"the option takes no data"))
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                Answer::Replies(self.meta_context(option, data, exports))
            }
            _ => Answer::Replies(reply(option, REP_ERR_UNSUP, b"the option is not supported")),
        }
    }

    /// The old way to choose: it has no error reply, so an unknown name ends the connection.
    fn export_name(&self, mut data: Bytes, exports: &Exports) -> Answer {
        let length = data.len();
        let Some(name) = text(&mut data, length) else { return Answer::Close };
        let Some(export) = exports.get(&name) else { return Answer::Close };
        let mut out = BytesMut::new();
        out.put_u64(export.edge.size_bytes());
        out.put_u16(transmission_flags(export.edge.device().read_only()));
        if !self.no_zeroes {
            out.put_bytes(0, 124);
        }
        Answer::Chosen(out, export, name)
    }

    fn go(&self, option: u32, mut data: Bytes, exports: &Exports) -> Answer {
        let Some(name) = counted_text(&mut data) else {
            return Answer::Replies(reply(option, REP_ERR_INVALID, b"the export's name is malformed"));
        };
        if data.len() < 2 || data.len() != 2 + 2 * usize::from(u16::from_be_bytes([data[0], data[1]])) {
            return Answer::Replies(reply(option, REP_ERR_INVALID, b"the list of requests is malformed"));
        }
        let Some(export) = exports.get(&name) else {
            return Answer::Replies(reply(option, REP_ERR_UNKNOWN, b"no such export; is it attached here?"));
        };
        let mut out = BytesMut::new();
        let mut info = BytesMut::new();
        info.put_u16(INFO_EXPORT);
        info.put_u64(export.edge.size_bytes());
        info.put_u16(transmission_flags(export.edge.device().read_only()));
        out.unsplit(reply(option, REP_INFO, &info));
        info.clear();
        info.put_u16(INFO_NAME);
        info.put_slice(name.as_bytes());
        out.unsplit(reply(option, REP_INFO, &info));
        info.clear();
        info.put_u16(INFO_BLOCK_SIZE);
        info.put_u32(1);
        info.put_u32(4096);
        info.put_u32(PAYLOAD_BYTES_MAX);
        out.unsplit(reply(option, REP_INFO, &info));
        out.unsplit(reply(option, REP_ACK, &[]));
        if option == OPT_GO { Answer::Chosen(out, export, name) } else { Answer::Replies(out) }
    }

    fn meta_context(&mut self, option: u32, mut data: Bytes, exports: &Exports) -> BytesMut {
        let setting = option == OPT_SET_META_CONTEXT;
        if setting {
            self.allocation_of = None;
        }
        if setting && !self.structured {
            return reply(option, REP_ERR_INVALID, b"structured replies come first");
        }
        let malformed = || reply(option, REP_ERR_INVALID, b"the queries are malformed");
        let Some(name) = counted_text(&mut data) else { return malformed() };
        if data.len() < 4 {
            return malformed();
        }
        let count = data.get_u32();
        let mut wanted = count == 0 && !setting;
        for _ in 0..count {
            let Some(query) = counted_text(&mut data) else { return malformed() };
            let by_wildcard = !setting && query == "base:";
            wanted |= query == BASE_ALLOCATION || by_wildcard;
        }
        if !data.is_empty() {
            return malformed();
        }
        if exports.get(&name).is_none() {
            return reply(option, REP_ERR_UNKNOWN, b"no such export; is it attached here?");
        }
        let mut out = BytesMut::new();
        if wanted {
            let mut context = BytesMut::new();
            context.put_u32(if setting { BASE_ALLOCATION_ID } else { 0 });
            context.put_slice(BASE_ALLOCATION.as_bytes());
            out.unsplit(reply(option, REP_META_CONTEXT, &context));
            if setting {
                self.allocation_of = Some(name);
            }
        }
        out.unsplit(reply(option, REP_ACK, &[]));
        out
    }
}

fn list(exports: &Exports) -> BytesMut {
    let names = exports.names();
    if names.iter().map(String::len).sum::<usize>() > (1 << 20) {
        return reply(OPT_LIST, REP_ERR_TOO_BIG, b"too many exports");
    }
    let mut out = BytesMut::new();
    for name in names {
        let mut server = BytesMut::new();
        server.put_u32(name.len() as u32);
        server.put_slice(name.as_bytes());
        out.unsplit(reply(OPT_LIST, REP_SERVER, &server));
    }
    out.unsplit(reply(OPT_LIST, REP_ACK, &[]));
    out
}
