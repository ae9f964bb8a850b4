//! The HTTP end of the metrics: GET /metrics, nothing else. Without TLS and without a password: for loopback, or behind
//! what guards the node.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_types::{ErrorCode, UserError};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::snapshot::Snapshot;
use super::text;
use crate::handle::ShardHandle;

/// Connections at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 16;
/// How long a client may take to say what it wants.
const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// How long a connection may last.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(600);
/// Largest request head, in bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A bound server that is about to serve.
pub(crate) struct Server {
    listener: std::net::TcpListener,
    address: SocketAddr,
}

/// Binds the port, so that a taken one is an error at the start.
pub(crate) fn bind(address: &str) -> Result<Server, UserError> {
    let wrong = |error: std::io::Error| {
        UserError::new(ErrorCode::Internal, format!("cannot serve metrics on {address}: {error}"))
            .hint("give another address with --metrics, for example 127.0.0.1:0")
    };
    let listener = std::net::TcpListener::bind(address).map_err(wrong)?;
    listener.set_nonblocking(true).map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    Ok(Server { listener, address })
}

impl Server {
    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until dropped.
    pub(crate) async fn serve(self, shard: ShardHandle) -> std::io::Result<()> {
        let listener = TcpListener::from_std(self.listener)?;
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else { return Ok(()) };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection for metrics was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let shard = shard.clone();
            tokio::spawn(async move {
                let answering = service_fn(move |request| answer(request, shard.clone()));
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_DEADLINE)
                    .max_buf_size(HEAD_BYTES_MAX)
                    .serve_connection(TokioIo::new(stream), answering);
                // One that lasts too long is closed without a word.
                if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_DEADLINE, connection).await {
                    tracing::debug!(%error, "a connection for metrics has ended badly");
                }
                drop(permit);
            });
        }
    }
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(TEXT));
    response
}

async fn answer(request: Request<Incoming>, shard: ShardHandle) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().path() != "/metrics" {
        return Ok(plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n"));
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return Ok(response);
    }
    let taken = shard.run(|shard| async move { Ok(Snapshot::take(&shard).await) }).await;
    let text = taken.and_then(|snapshot| {
        text::encode(snapshot)
            .map_err(|error| UserError::new(ErrorCode::Internal, format!("the metrics' text: {error}")))
    });
    Ok(match text {
        Ok(text) => plain(StatusCode::OK, text),
        Err(error) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
    })
}
