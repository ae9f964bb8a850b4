//! The NBD protocol, spoken by hand: what is offered, what is refused, and how it ends.

mod memory;

use std::rc::Rc;
use std::time::Duration;

use holdfast_frontend::Edge;
use holdfast_frontend::nbd::{NbdClient, NbdServer};
use memory::Memory;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const OPTION: u64 = 0x4948_4156_454f_5054;
const REQUEST: u32 = 0x2560_9513;

struct Client(UnixStream);

impl Client {
    async fn connect(server: &NbdServer) -> Self {
        let mut stream = UnixStream::connect(server.path()).await.expect("connects");
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).await.expect("greets");
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        stream.write_u32(3).await.expect("is sent");
        Self(stream)
    }
    async fn option(&mut self, option: u32, data: &[u8]) {
        self.0.write_u64(OPTION).await.expect("is sent");
        self.0.write_u32(option).await.expect("is sent");
        self.0.write_u32(data.len() as u32).await.expect("is sent");
        self.0.write_all(data).await.expect("is sent");
    }
    /// Reads replies to an option until the last: (type, data).
    async fn replies(&mut self) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.0.read_u64().await.expect("answers"), 0x0003_e889_0455_65a9);
            let _option = self.0.read_u32().await.expect("answers");
            let kind = self.0.read_u32().await.expect("answers");
            let length = self.0.read_u32().await.expect("answers");
            let mut data = vec![0; length as usize];
            self.0.read_exact(&mut data).await.expect("answers");
            replies.push((kind, data));
            if kind == 1 || kind & (1 << 31) != 0 {
                return replies;
            }
        }
    }
    async fn go(&mut self, name: &str) {
        self.option(7, &named(name, &[0, 0])).await;
        let replies = self.replies().await;
        assert_eq!(replies.last().map(|reply| reply.0), Some(1), "{replies:?}");
    }
    async fn request(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> u32 {
        self.0.write_u32(REQUEST).await.expect("is sent");
        self.0.write_u16(flags).await.expect("is sent");
        self.0.write_u16(command).await.expect("is sent");
        self.0.write_u64(42).await.expect("is sent");
        self.0.write_u64(offset).await.expect("is sent");
        self.0.write_u32(length).await.expect("is sent");
        self.0.write_all(payload).await.expect("is sent");
        assert_eq!(self.0.read_u32().await.expect("answers"), 0x6744_6698, "a simple reply");
        let error = self.0.read_u32().await.expect("answers");
        assert_eq!(self.0.read_u64().await.expect("answers"), 42, "the request's cookie");
        error
    }
    async fn is_closed(&mut self) {
        let mut rest = Vec::new();
        let ended = holdfast_env::timeout(Duration::from_secs(10), self.0.read_to_end(&mut rest)).await;
        // A reset is an end, too.
        let _ = ended.expect("the connection is closed");
    }
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes(), rest].concat()
}

fn serve(place: &tempfile::TempDir, memory: &Rc<Memory>) -> NbdServer {
    let server = NbdServer::bind(&place.path().join("nbd.sock")).expect("listens");
    server.exports().add("disk", Edge::new(memory.clone()));
    server
}

#[test]
fn a_guest_reads_what_it_wrote_and_errors_have_numbers() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let memory = Memory::new(1 << 20);
        let server = serve(&place, &memory);
        let mut client = Client::connect(&server).await;
        client.option(99, b"what").await;
        assert_eq!(client.replies().await[0].0, (1 << 31) | 1, "an unknown option is refused");
        client.option(7, &named("nothing", &[0, 0])).await;
        assert_eq!(client.replies().await[0].0, (1 << 31) | 6, "an unknown export is refused");
        client.option(3, &[]).await;
        assert_eq!(client.replies().await[0], (2, named("disk", &[])));
        client.go("disk").await;
        assert_eq!(client.request(1, 1, 1000, 5000, &[7; 5000]).await, 0);
        assert_eq!(client.request(0, 0, 999, 5002, &[]).await, 0);
        let mut read = [9; 5002];
        client.0.read_exact(&mut read).await.expect("reads");
        assert!(read[0] == 0 && read[5001] == 0 && read[1..5001].iter().all(|byte| *byte == 7));
        assert_eq!(client.request(3, 0, 0, 0, &[]).await, 0, "flush");
        assert_eq!(client.request(4, 0, 0, 8192, &[]).await, 0, "trim");
        assert_eq!(client.request(1, 0, 1 << 20, 1, b"x").await, 28, "a write beyond the end");
        assert_eq!(client.request(0, 0, 1 << 20, 1, &[]).await, 22, "a read beyond the end");
        assert_eq!(client.request(77, 0, 0, 1, &[]).await, 22, "an unknown command");
        assert_eq!(client.request(0, 1 << 9, 0, 1, &[]).await, 22, "an unknown flag");
        memory.ended.replace(Some("fenced".into()));
        assert_eq!(client.request(1, 0, 0, 1, b"x").await, 108, "a write to what has ended");
        assert_eq!(client.request(3, 0, 0, 0, &[]).await, 108, "a flush of what has ended");
        server.exports().remove("disk");
        client.is_closed().await;
    });
}

#[test]
fn a_client_that_breaks_the_protocol_is_disconnected_and_counted() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let memory = Memory::new(1 << 20);
        let server = serve(&place, &memory);
        let mut client = Client::connect(&server).await;
        client.0.write_all(&[0xaa; 16]).await.expect("is sent");
        client.is_closed().await;
        let mut client = Client::connect(&server).await;
        client.0.write_u64(OPTION).await.expect("is sent");
        client.0.write_u64(u64::MAX).await.expect("is sent");
        client.is_closed().await;
        let mut client = Client::connect(&server).await;
        client.go("disk").await;
        client.0.write_all(&[0x55; 28]).await.expect("is sent");
        client.is_closed().await;
        while server.malformed() < 3 {
            holdfast_env::yield_now().await;
        }
        let mut client = Client::connect(&server).await;
        client.go("disk").await;
        assert_eq!(client.request(1, 0, 0, 1, b"x").await, 0, "others are served on");
    });
}

#[test]
fn the_client_speaks_with_the_server() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let memory = Memory::new(1 << 20);
        let server = serve(&place, &memory);
        let client = NbdClient::connect(server.path(), "disk").await.expect("connects");
        assert_eq!(client.size(), 1 << 20);
        let writes = (0..64u8).map(|n| client.write(u64::from(n) * 4096, vec![n; 4096].into()));
        for written in futures_util::future::join_all(writes).await {
            written.expect("writes");
        }
        client.trim(4096, 4096).await.expect("trims");
        let read = client.read(0, 12288).await.expect("reads");
        assert!(read[..8192].iter().all(|byte| *byte == 0) && read[8192..].iter().all(|byte| *byte == 2));
        assert_eq!(client.read(1 << 20, 1).await.map_err(|e| e.raw_os_error()), Err(Some(22)));
        let unknown = NbdClient::connect(server.path(), "nothing").await;
        assert!(unknown.is_err(), "an unknown export is refused");
        server.exports().remove("disk");
        let ended = holdfast_env::timeout(Duration::from_secs(10), client.read(0, 1)).await;
        assert!(ended.expect("ends").is_err());
    });
}
