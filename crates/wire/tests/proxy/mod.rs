//! A proxy between two shards that damages what it passes on, once per connection, somewhere.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What is done to a run of bytes.
#[derive(Clone, Copy, Debug)]
pub enum Damage {
    /// A bit of it flips.
    Flip,
    /// Some of it does not arrive.
    Lose,
    /// It arrives twice.
    Repeat,
    /// Its end arrives before its beginning.
    Reorder,
}

pub const ALL: [Damage; 4] = [Damage::Flip, Damage::Lose, Damage::Repeat, Damage::Reorder];

/// Bytes that are passed on at once.
const RUN: usize = 4096;
/// Within so many bytes of a connection the damage is done: in its handshake, or later.
const WITHIN: u64 = 64 << 10;

#[derive(Clone)]
pub struct Proxy {
    pub address: SocketAddr,
    damage: Damage,
    active: Rc<Cell<bool>>,
    damaged: Rc<Cell<u64>>,
}

impl Proxy {
    /// Passes on what is sent to its address to `to`.
    pub async fn listen(to: SocketAddr, damage: Damage) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let address = listener.local_addr().expect("has an address");
        let proxy = Self { address, damage, active: Rc::new(Cell::new(true)), damaged: Rc::default() };
        let serving = proxy.clone();
        holdfast_env::spawn("proxy", async move {
            let mut number = 0_u64;
            while let Ok((from, _)) = listener.accept().await {
                number += 1;
                // Spread over the range by a multiplication, so that handshakes and frames are both hit.
                let at = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % WITHIN;
                holdfast_env::spawn("proxy-connection", serving.clone().pass(from, to, at));
            }
        });
        proxy
    }

    /// How many connections were damaged.
    pub fn damaged(&self) -> u64 {
        self.damaged.get()
    }
    /// Nothing is damaged any more.
    pub fn heal(&self) {
        self.active.set(false);
    }

    async fn pass(self, from: TcpStream, to: SocketAddr, at: u64) {
        let Ok(to) = TcpStream::connect(to).await else { return };
        let ((mut here, mut back), (mut there, mut out)) = (from.into_split(), to.into_split());
        let forth = async {
            let (mut passed, mut run) = (0, vec![0; RUN]);
            loop {
                let Ok(length @ 1..) = here.read(&mut run).await else { return };
                let mut bytes = run[..length].to_vec();
                let is_here = (passed..passed + length as u64).contains(&at);
                passed += length as u64;
                if is_here && self.active.get() {
                    self.damaged.set(self.damaged.get() + 1);
                    self.damage(&mut bytes);
                }
                if out.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        };
        let answers = tokio::io::copy(&mut there, &mut back);
        futures_util::pin_mut!(forth, answers);
        // Either side may end it.
        drop(futures_util::future::select(forth, answers).await);
    }

    fn damage(&self, bytes: &mut Vec<u8>) {
        let middle = bytes.len() / 2;
        match self.damage {
            Damage::Flip => bytes[middle] ^= 0x10,
            Damage::Lose => drop(bytes.drain(middle..)),
            Damage::Repeat => bytes.extend_from_within(..),
            Damage::Reorder => bytes.rotate_left(middle.max(1)),
        }
    }
}
