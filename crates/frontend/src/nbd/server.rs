//! The socket and what it exports.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;

use super::{handshake, transmission};
use crate::edge::Edge;

/// Connections at once; more are closed at once.
const CONNECTIONS_MAX: usize = 256;

/// One export: the device and the word that it is gone.
#[derive(Clone)]
pub(super) struct Export {
    pub edge: Rc<Edge>,
    pub gone: Rc<Gone>,
}

/// Set once when an export is removed.
#[derive(Default)]
pub(super) struct Gone {
    set: Cell<bool>,
    notify: Notify,
}

impl Gone {
    fn set(&self) {
        self.set.set(true);
        self.notify.notify_waiters();
    }
    /// Ends when the export has been removed.
    pub async fn wait(&self) {
        loop {
            let notified = self.notify.notified();
            if self.set.get() {
                return;
            }
            notified.await;
        }
    }
}

/// The exports by name. Shared by the server and whoever attaches and detaches.
#[derive(Default)]
pub struct Exports(RefCell<BTreeMap<String, Export>>);

impl Exports {
    /// Adds an export, or replaces the one of that name: its connections end.
    pub fn add(&self, name: &str, edge: Rc<Edge>) {
        let export = Export { edge, gone: Rc::default() };
        if let Some(old) = self.0.borrow_mut().insert(name.to_owned(), export) {
            old.gone.set();
        }
    }
    /// Removes an export; its connections end. False if there was none.
    pub fn remove(&self, name: &str) -> bool {
        let removed = self.0.borrow_mut().remove(name);
        if let Some(export) = &removed {
            export.gone.set();
        }
        removed.is_some()
    }
    /// Names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.0.borrow().keys().cloned().collect()
    }
    /// An export; the empty name means the only one.
    pub(super) fn get(&self, name: &str) -> Option<Export> {
        let exports = self.0.borrow();
        if name.is_empty() && exports.len() == 1 {
            return exports.values().next().cloned();
        }
        exports.get(name).cloned()
    }
}

/// A running server. Dropping it stops accepting; connections end with their exports.
pub struct NbdServer {
    exports: Rc<Exports>,
    path: PathBuf,
    stop: Rc<Gone>,
    malformed: Rc<Cell<u64>>,
}

impl NbdServer {
    /// Listens on a unix socket at `path`, readable and writable by its owner only. Replaces a socket that an earlier
    /// daemon left; the caller holds the lock of the directory around it. Must run on a shard's thread.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let server = Self {
            exports: Rc::default(),
            path: path.to_owned(),
            stop: Rc::default(),
            malformed: Rc::default(),
        };
        let accepting =
            accept(listener, server.exports.clone(), server.stop.clone(), server.malformed.clone());
        holdfast_env::spawn("nbd-accept", accepting);
        Ok(server)
    }
    /// What it exports.
    pub fn exports(&self) -> &Rc<Exports> {
        &self.exports
    }
    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Clients that broke the protocol and were disconnected.
    pub fn malformed(&self) -> u64 {
        self.malformed.get()
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop.set();
        for name in self.exports.names() {
            self.exports.remove(&name);
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "the socket was gone already");
        }
    }
}

async fn accept(listener: UnixListener, exports: Rc<Exports>, stop: Rc<Gone>, malformed: Rc<Cell<u64>>) {
    let connections = Rc::new(Cell::new(0usize));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.wait() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                holdfast_env::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        if connections.get() >= CONNECTIONS_MAX {
            tracing::warn!("{CONNECTIONS_MAX} connections are open; another is closed");
            continue;
        }
        connections.set(connections.get() + 1);
        let (exports, malformed, connections) = (exports.clone(), malformed.clone(), connections.clone());
        holdfast_env::spawn("nbd-connection", async move {
            if let Err(error) = serve(stream, &exports).await {
                if error.kind() == io::ErrorKind::InvalidData {
                    malformed.set(malformed.get() + 1);
                }
                tracing::debug!(%error, "a connection has ended");
            }
            connections.set(connections.get() - 1);
        });
    }
}

async fn serve(mut stream: UnixStream, exports: &Exports) -> io::Result<()> {
    let Some(negotiated) = handshake::negotiate(&mut stream, exports).await? else { return Ok(()) };
    let gone = negotiated.export.gone.clone();
    tokio::select! {
        result = transmission::run(stream, negotiated) => result,
        () = gone.wait() => Ok(()),
    }
}
