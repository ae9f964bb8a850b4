//! An NBD client as a process of its own, so that its processor time is told apart.

use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_frontend::nbd::NbdClient;

use crate::Outcome;
use crate::child::{requests, say};
use crate::load::{self, Target, Work};

struct Export(NbdClient);

impl Target for Export {
    async fn read(&self, offset: u64, bytes: u64) -> Outcome<()> {
        self.0.read(offset, bytes as u32).await.map(drop).map_err(|error| format!("a read: {error}"))
    }
    async fn write(&self, offset: u64, data: Bytes) -> Outcome<()> {
        self.0.write(offset, data).await.map_err(|error| format!("a write: {error}"))
    }
}

/// Runs loads until the parent is gone.
pub fn run(socket: &Path, export: &str) -> Outcome<()> {
    holdfast_env::real::run(async {
        let client = NbdClient::connect(socket, export).await;
        let client = Rc::new(Export(client.map_err(|error| format!("{}: {error}", socket.display()))?));
        say(&Ok(true))?;
        let mut orders = requests();
        while let Some(order) = orders.recv().await {
            let work: Work = serde_json::from_str(&order).map_err(|error| error.to_string())?;
            say(&load::run(&client, &work).await)?;
        }
        Ok(())
    })
}
