//! A daemon's metrics: counters are plain numbers where the work is done, on the shard's thread; a scrape asks the
//! shard for a copy by message and writes it as Prometheus text on the admin runtime.
//!
//! `docs/metrics.md` lists every name. Names, labels and meaning are a contract: add, do not change.

mod http;
mod snapshot;
mod text;

pub(crate) use http::{Server, bind};
