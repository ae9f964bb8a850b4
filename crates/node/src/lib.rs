//! The daemon: composes store, replicas, catalog, sessions and frontends, and serves the admin API.

pub mod admin;
