//! The floor of the network: one frame sent to two processes, the first reply awaited. Plain TCP, one thread each.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::Outcome;
use crate::child::{requests, say};
use crate::load::{Figures, times};

/// A frame with one block, and the reply to it, in bytes.
const FRAME: usize = 4096 + 96;
const REPLY: usize = 64;
/// The congestion control of the floor's sockets: BBR, where it is the default, is slow on loopback.
pub const CONGESTION_CONTROL: &str = "reno";

fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // Where it is not allowed, the default is measured.
    let _ = rustix::net::sockopt::set_tcp_congestion(stream, CONGESTION_CONTROL);
    Ok(())
}

/// Answers every frame.
pub fn answer(address: &str) -> Outcome<()> {
    let wrong = |error: std::io::Error| format!("echo at {address}: {error}");
    holdfast_env::real::run(async {
        let listener = TcpListener::bind(address).await.map_err(wrong)?;
        say(&Ok(true))?;
        let mut orders = requests();
        let echoing = async {
            loop {
                let (mut stream, _) = listener.accept().await?;
                tune(&stream)?;
                let mut frame = vec![0; FRAME];
                while stream.read_exact(&mut frame).await.is_ok() {
                    stream.write_all(&frame[..REPLY]).await?;
                }
            }
        };
        tokio::select! {
            result = echoing => { let result: std::io::Result<()> = result; result.map_err(wrong) }
            _ = orders.recv() => Ok(()),
        }
    })
}

async fn round_trips(streams: &mut [TcpStream; 2], milliseconds: u64) -> Outcome<Figures> {
    let wrong = |error: std::io::Error| format!("an echo: {error}");
    let mut times = times()?;
    let frame = vec![7; FRAME];
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(milliseconds) {
        let [first, second] = &mut *streams;
        let (mut a, mut b) = ([0; REPLY], [0; REPLY]);
        let sent = Instant::now();
        first.write_all(&frame).await.map_err(wrong)?;
        second.write_all(&frame).await.map_err(wrong)?;
        let first_is_ready = tokio::select! {
            ready = first.readable() => ready.map(|()| true),
            ready = second.readable() => ready.map(|()| false),
        };
        let first_is_ready = first_is_ready.map_err(wrong)?;
        if first_is_ready {
            first.read_exact(&mut a).await.map_err(wrong)?;
        } else {
            second.read_exact(&mut b).await.map_err(wrong)?;
        }
        let took = sent.elapsed();
        if first_is_ready {
            second.read_exact(&mut b).await.map_err(wrong)?;
        } else {
            first.read_exact(&mut a).await.map_err(wrong)?;
        }
        times.saturating_record(took.as_nanos() as u64);
    }
    Ok(Figures::of(&times, began.elapsed().as_secs_f64()))
}

/// Asks both, for as many milliseconds as each request says.
pub fn ask(addresses: &[String]) -> Outcome<()> {
    let wrong = |error: std::io::Error| format!("an echo: {error}");
    let [first, second] = addresses else { return Err("two addresses are needed".into()) };
    holdfast_env::real::run(async {
        let mut streams = [
            TcpStream::connect(first).await.map_err(wrong)?,
            TcpStream::connect(second).await.map_err(wrong)?,
        ];
        for stream in &streams {
            tune(stream).map_err(wrong)?;
        }
        say(&Ok(true))?;
        let mut orders = requests();
        while let Some(order) = orders.recv().await {
            let milliseconds: u64 = serde_json::from_str(&order).map_err(|error| error.to_string())?;
            say(&round_trips(&mut streams, milliseconds).await)?;
        }
        Ok(())
    })
}
