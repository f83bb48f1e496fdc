//! A link between a client and a server on loopback: latency and a bandwidth that all connections share.
//!
//! ```text
//!  client ──▶ half a round trip (a whole one more before the first bytes: the handshake) ──▶ server
//!  client ◀── half a round trip ◀── one queue, emptied at the link's rate ◀── in order of arrival
//! ```
//!
//! It knows bytes, not messages: TLS passes as well as HTTP. In the direction of the client every
//! piece reserves its place in one queue for all connections, and a connection whose last piece
//! waits for more than a full buffer is not read from: the server feels the back-pressure. What is
//! left out is TCP's slow start and loss: a new connection has the whole rate at once.
//!
//! Threads and not async tasks, because timers of the runtime tick in milliseconds, a tenth of the
//! round trips that are wanted here.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Bytes that are queued and sent as one: 0.13 ms at 1 Gbit/s.
const PIECE: usize = 16 << 10;
/// Least size of the queue.
const LEAST_BUFFER: u64 = 256 << 10;

/// What the link is like.
#[derive(Clone, Copy, Debug)]
pub struct LinkOptions {
    /// There and back, without any queue.
    pub round_trip: Duration,
    /// Bytes a second towards the clients, of all connections together; above 0.
    pub rate: u64,
}

impl LinkOptions {
    /// Bytes that are on their way when the link is busy for one round trip.
    fn bandwidth_delay(&self) -> u64 {
        // Rates and delays of real links are far from the limits of f64 and u64.
        (self.rate as f64 * self.round_trip.as_secs_f64()) as u64
    }

    fn duration(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate as f64)
    }
}

/// The queue in front of the slowest part of the way, seen as the moment when it will be empty.
#[derive(Debug)]
struct Bottleneck {
    options: LinkOptions,
    /// What a full buffer takes to leave.
    buffer: Duration,
    empty_at: Instant,
}

/// The place of a piece in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    /// Its last byte reaches the client.
    due: Instant,
    /// From then on there is room for another piece.
    room: Instant,
}

impl Bottleneck {
    fn new(options: LinkOptions, now: Instant) -> Self {
        let buffer = options.duration(options.bandwidth_delay().max(LEAST_BUFFER));
        Self { options, buffer, empty_at: now }
    }

    /// A piece of `bytes` arrives at `now` and queues behind all that came before it.
    fn queue(&mut self, now: Instant, bytes: u64) -> Slot {
        let leaves = self.empty_at.max(now) + self.options.duration(bytes);
        self.empty_at = leaves;
        Slot {
            due: leaves + self.options.round_trip / 2,
            room: leaves.checked_sub(self.buffer).unwrap_or(now).max(now),
        }
    }
}

/// What went over the link so far.
#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    requests: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
}

/// The link; it ends when dropped, with all its connections.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    listener: TcpListener,
    address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    options: LinkOptions,
    started: Instant,
    bottleneck: Mutex<Bottleneck>,
    counters: Counters,
    /// Both ends of every open connection, to be shut at the end.
    open: Mutex<Vec<(u64, TcpStream, TcpStream)>>,
    /// Request heads, with the milliseconds since the start and the connection's number.
    log: Mutex<Option<Box<dyn WriteDebug>>>,
}

/// Where request heads are logged to.
pub trait WriteDebug: Write + Send + std::fmt::Debug {}
impl<T: Write + Send + std::fmt::Debug> WriteDebug for T {}

impl Link {
    /// Listens at `listen` (port 0: any free one) for what goes on to `upstream`.
    ///
    /// # Errors
    /// The address is taken.
    pub fn start(listen: SocketAddr, upstream: SocketAddr, options: LinkOptions) -> io::Result<Self> {
        let listener = TcpListener::bind(listen)?;
        let address = listener.local_addr()?;
        let now = Instant::now();
        let shared = Arc::new(Shared {
            upstream,
            options,
            started: now,
            bottleneck: Mutex::new(Bottleneck::new(options, now)),
            counters: Counters::default(),
            open: Mutex::default(),
            log: Mutex::default(),
        });
        let (accepting, clients) = (Arc::clone(&shared), listener.try_clone()?);
        thread::spawn(move || accept(&clients, &accepting));
        Ok(Self { shared, listener, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes a line for every request from now on.
    pub fn log_to(&self, log: impl Write + Send + std::fmt::Debug + 'static) {
        *lock(&self.shared.log) = Some(Box::new(log));
    }

    /// `connections`, `requests` (heads of plain HTTP/1.1 without bodies), and bytes `up` and `down`.
    pub fn counters(&self) -> Value {
        self.shared.counters.json()
    }

    /// Answers every HTTP request at `listen` with [`Link::counters`]; returns where it listens.
    ///
    /// # Errors
    /// The address is taken.
    pub fn serve_counters(&self, listen: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(listen)?;
        let address = listener.local_addr()?;
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Who asks and hangs up is its own affair.
                let _ = answer(stream, &shared.counters.json());
            }
        });
        Ok(address)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Wakes `accept`, which ends then.
        let _ = nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&self.listener),
            nix::sys::socket::Shutdown::Both,
        );
        for (_, client, server) in lock(&self.shared.open).drain(..) {
            hang_up(&client, &server);
        }
    }
}

impl Counters {
    fn json(&self) -> Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "connections": get(&self.connections),
            "requests": get(&self.requests),
            "up": get(&self.up),
            "down": get(&self.down),
        })
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(mut stream: TcpStream, counters: &Value) -> io::Result<()> {
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let text = counters.to_string();
    let length = text.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}"
    )
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((client, _)) = listener.accept() {
        let number = shared.counters.connections.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            // A server that can not be reached looks to the client like one that hangs up.
            let _ = connect(&shared, number, client);
            lock(&shared.open).retain(|(other, ..)| *other != number);
        });
    }
}

/// Serves one connection until both directions have ended.
fn connect(shared: &Arc<Shared>, number: u64, client: TcpStream) -> io::Result<()> {
    let accepted = Instant::now();
    let server = TcpStream::connect(shared.upstream)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    lock(&shared.open).push((number, client.try_clone()?, server.try_clone()?));
    let round_trip = shared.options.round_trip;

    let (sender, receiver) = sync_channel(64);
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    let deliver_up = thread::spawn(move || deliver(&receiver, to));
    let ours = Arc::clone(shared);
    let up = thread::spawn(move || {
        let mut heads = Heads::default();
        pump(from, &sender, |piece| {
            ours.counters.up.fetch_add(piece.len() as u64, Ordering::Relaxed);
            heads.see(piece, |head| ours.request(number, head));
            // The client has sent this after a handshake that loopback does in no time.
            let due = Instant::now().max(accepted + round_trip) + round_trip / 2;
            Slot { due, room: Instant::now() }
        });
    });

    // What one connection may have on its way: a window of a few round trips.
    let window = 4 * shared.options.bandwidth_delay() / PIECE as u64 + 16;
    let (sender, receiver) = sync_channel(usize::try_from(window).unwrap_or(usize::MAX));
    let (from, to) = (server.try_clone()?, client.try_clone()?);
    let deliver_down = thread::spawn(move || deliver(&receiver, to));
    pump(from, &sender, |piece| {
        let bytes = piece.len() as u64;
        shared.counters.down.fetch_add(bytes, Ordering::Relaxed);
        lock(&shared.bottleneck).queue(Instant::now(), bytes)
    });
    drop(sender);
    // The server has said all; what is on its way arrives, then nothing more goes either way.
    let _ = deliver_down.join();
    hang_up(&client, &server);
    let _ = up.join();
    let _ = deliver_up.join();
    Ok(())
}

fn hang_up(client: &TcpStream, server: &TcpStream) {
    // Both may be closed already.
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}

/// Reads pieces, gives each its slot, and hands them on, until either side ends.
fn pump(mut from: TcpStream, to: &SyncSender<(Instant, Vec<u8>)>, mut slot: impl FnMut(&[u8]) -> Slot) {
    let mut buffer = vec![0; PIECE];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let slot = slot(&buffer[..count]);
        if to.send((slot.due, buffer[..count].to_vec())).is_err() {
            // Nobody wants the rest.
            let _ = from.shutdown(Shutdown::Both);
            return;
        }
        sleep_until(slot.room);
    }
}

/// Writes every piece when it is due; after the last one the direction ends.
fn deliver(pieces: &Receiver<(Instant, Vec<u8>)>, mut to: TcpStream) {
    for (due, piece) in pieces {
        sleep_until(due);
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    // The other end may have closed it already.
    let _ = to.shutdown(Shutdown::Write);
}

fn sleep_until(moment: Instant) {
    let left = moment.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        thread::sleep(left);
    }
}

impl Shared {
    fn request(&self, connection: u64, head: &[u8]) {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        if let Some(log) = lock(&self.log).as_mut() {
            let text = String::from_utf8_lossy(head);
            let mut lines = text.lines();
            let first = lines.next().unwrap_or_default();
            let range =
                lines.find(|line| line.to_ascii_lowercase().starts_with("range:")).unwrap_or_default();
            let ms = self.started.elapsed().as_secs_f64() * 1e3;
            // A log that can not be written is no reason to stop.
            let _ = writeln!(log, "{ms:10.2} {connection:3} {first} {range}");
        }
    }
}

/// Finds the heads of requests without bodies in the bytes of a connection.
#[derive(Debug, Default)]
struct Heads {
    head: Vec<u8>,
}

impl Heads {
    /// No head is longer than this; what is, is no HTTP.
    const LIMIT: usize = 64 << 10;

    fn see(&mut self, piece: &[u8], mut found: impl FnMut(&[u8])) {
        for byte in piece {
            self.head.push(*byte);
            if self.head.ends_with(b"\r\n\r\n") {
                found(&self.head);
                self.head.clear();
            }
            if self.head.len() > Self::LIMIT {
                self.head.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: LinkOptions = LinkOptions { round_trip: Duration::from_millis(10), rate: 1_000_000 };

    #[test]
    fn pieces_leave_one_after_the_other_at_the_rate() {
        let start = Instant::now();
        let ms = |n| start + Duration::from_millis(n);
        let mut queue = Bottleneck::new(LINK, start);
        // 1000 bytes take 1 ms, and half a round trip is 5 ms.
        assert_eq!(queue.queue(start, 1000).due, ms(6));
        // Behind it, whoever sends.
        assert_eq!(queue.queue(start, 2000).due, ms(8));
        // After a pause the link is free.
        assert_eq!(queue.queue(ms(100), 1000).due, ms(106));
    }

    #[test]
    fn a_full_buffer_holds_the_sender_until_there_is_room() {
        let start = Instant::now();
        let mut queue = Bottleneck::new(LINK, start);
        let buffer = Duration::from_secs_f64(LEAST_BUFFER as f64 / LINK.rate as f64);
        assert_eq!(queue.queue(start, LEAST_BUFFER).room, start);
        let slot = queue.queue(start, 3000);
        assert_eq!(slot.room, start + Duration::from_millis(3));
        assert_eq!(slot.due, start + buffer + Duration::from_millis(8));
        // As large as what is on its way, where that is more.
        let wide = LinkOptions { round_trip: Duration::from_secs(1), rate: 1_000_000 };
        assert_eq!(Bottleneck::new(wide, start).buffer, Duration::from_secs(1));
    }

    #[test]
    fn heads_are_counted_however_they_are_cut() {
        let text = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.1\r\nRange: bytes=0-1\r\n\r\n";
        for size in [1, 3, 7, text.len()] {
            let (mut heads, mut seen) = (Heads::default(), Vec::new());
            for piece in text.chunks(size) {
                heads.see(piece, |head| seen.push(head[5]));
            }
            assert_eq!(seen, b"ab", "pieces of {size}");
        }
    }

    /// Bytes arrive whole and in order both ways, are counted, and the end of the server is passed on.
    #[test]
    fn bytes_pass_and_are_counted() -> io::Result<()> {
        let server = TcpListener::bind("127.0.0.1:0")?;
        let upstream = server.local_addr()?;
        let body: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let sent = body.clone();
        let serving = thread::spawn(move || -> io::Result<Vec<u8>> {
            let (mut stream, _) = server.accept()?;
            let mut request = [0; 18];
            stream.read_exact(&mut request)?;
            stream.write_all(&sent)?;
            Ok(request.to_vec())
        });
        let fast = LinkOptions { round_trip: Duration::from_millis(1), rate: 1 << 30 };
        let link = Link::start(([127, 0, 0, 1], 0).into(), upstream, fast)?;
        let mut client = TcpStream::connect(link.address())?;
        client.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
        let mut found = Vec::new();
        client.read_to_end(&mut found)?;
        assert!(found == body, "other bytes arrived");
        assert_eq!(serving.join().expect("no panic")?, b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(link.counters(), json!({"connections": 1, "requests": 1, "up": 18, "down": 1_000_000}));
        let control = link.serve_counters(([127, 0, 0, 1], 0).into())?;
        let mut asking = TcpStream::connect(control)?;
        asking.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
        let mut told = String::new();
        asking.read_to_string(&mut told)?;
        assert!(told.ends_with(&link.counters().to_string()), "{told}");
        Ok(())
    }
}
