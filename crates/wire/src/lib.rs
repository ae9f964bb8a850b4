//! The peer transport: calls between shards ([`rpc`]), and their real form, framed TCP with mutual TLS ([`tcp`],
//! [`tls`], [`pki`], [`frame`]), and what nodes sign ([`signing`]). Byte layouts are in `docs/wire.md`.
//!
//! **Architecture invariant:** `rpc` knows no socket; the simulator runs it over its own network.

pub mod frame;
mod link;
pub mod pki;
pub mod rpc;
pub mod signing;
pub mod tcp;
pub mod tls;
