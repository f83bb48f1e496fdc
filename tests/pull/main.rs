//! `parallel-pull`: the rival of the cold-start bench. It pulls an image whole over several
//! connections and unpacks it while the rest still comes.
//!
//! ```text
//!  connections ──ranges in layer order──▶ one reader a layer ──▶ gunzip ──▶ untar, layer by layer
//! ```
//!
//! As fast as we know how to make it: nothing is written but the tree, nothing is synced, no digest
//! is checked, and of the tree it leaves out what no start needs: xattrs, devices, directory times.

use std::collections::VecDeque;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use clap::Parser;
use flate2::read::MultiGzDecoder;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tests::{Context, Result, bail, ensure};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

/// Bytes that one request asks for.
const PIECE: u64 = 4 << 20;
/// Decoded bytes handed from the one thread to the other at once.
const BLOCK: usize = 256 << 10;

/// Pulls an image from a registry over plain http and unpacks it into a directory.
#[derive(Debug, Parser)]
struct Cli {
    /// The registry
    #[arg(long)]
    registry: SocketAddr,
    /// NAME:TAG
    #[arg(long)]
    image: String,
    /// An empty directory
    #[arg(long)]
    into: PathBuf,
    /// Connections
    #[arg(long, default_value_t = 6)]
    connections: usize,
}

/// A part of a layer that somebody is to fetch.
struct Job {
    path: String,
    first: u64,
    last: u64,
    done: oneshot::Sender<Bytes>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let (name, tag) = cli.image.rsplit_once(':').context("--image: want NAME:TAG")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut first = runtime.block_on(connect(cli.registry))?;
    let manifest = runtime.block_on(get(&mut first, &format!("/v2/{name}/manifests/{tag}"), None))?;
    let manifest: Value = serde_json::from_slice(&manifest).context("the manifest")?;

    let mut jobs = VecDeque::new();
    let mut layers = Vec::new();
    for layer in manifest["layers"].as_array().context("a manifest without layers")? {
        let digest = layer["digest"].as_str().context("a layer without a digest")?;
        let size = layer["size"].as_u64().context("a layer without a size")?;
        let mut pieces = VecDeque::new();
        for start in (0..size).step_by(usize::try_from(PIECE)?) {
            let (done, piece) = oneshot::channel();
            let last = (start + PIECE).min(size) - 1;
            jobs.push_back(Job { path: format!("/v2/{name}/blobs/{digest}"), first: start, last, done });
            pieces.push_back(piece);
        }
        layers.push(Layer { pieces, current: Bytes::new() });
    }
    let jobs = Arc::new(Mutex::new(jobs));
    let mut fetchers = Vec::new();
    let mut ready = Some(first);
    for _ in 0..cli.connections {
        fetchers.push(runtime.spawn(fetch(cli.registry, ready.take(), Arc::clone(&jobs))));
    }
    for layer in layers {
        unpack(layer, &cli.into)?;
    }
    for fetcher in fetchers {
        runtime.block_on(fetcher)??;
    }
    Ok(())
}

async fn connect(registry: SocketAddr) -> Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(registry).await.context("connect to the registry")?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn get(sender: &mut SendRequest<Empty<Bytes>>, path: &str, range: Option<(u64, u64)>) -> Result<Bytes> {
    let mut request = Request::get(path)
        .header(header::HOST, "registry")
        .header(header::ACCEPT, "application/vnd.oci.image.manifest.v1+json");
    if let Some((first, last)) = range {
        request = request.header(header::RANGE, format!("bytes={first}-{last}"));
    }
    sender.ready().await?;
    let answer = sender.send_request(request.body(Empty::new())?).await?;
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    ensure!(status.is_success(), "GET {path}: {status}");
    if let Some((first, last)) = range {
        ensure!(body.len() as u64 == last - first + 1, "GET {path}: {} bytes", body.len());
    }
    Ok(body)
}

/// Works off jobs, in order, until there are none.
async fn fetch(
    registry: SocketAddr,
    ready: Option<SendRequest<Empty<Bytes>>>,
    jobs: Arc<Mutex<VecDeque<Job>>>,
) -> Result<()> {
    let mut sender = match ready {
        Some(sender) => sender,
        None => connect(registry).await?,
    };
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(job) = job else { return Ok(()) };
        let body = get(&mut sender, &job.path, Some((job.first, job.last))).await?;
        // Nobody waits if unpacking has failed, which says why.
        let _ = job.done.send(body);
    }
}

/// The compressed bytes of a layer as they come.
struct Layer {
    pieces: VecDeque<oneshot::Receiver<Bytes>>,
    current: Bytes,
}

impl Read for Layer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            let Some(piece) = self.pieces.pop_front() else { return Ok(0) };
            self.current = piece.blocking_recv().map_err(|_| io::Error::other("a request failed"))?;
        }
        let count = buffer.len().min(self.current.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}

/// Decoded bytes that another thread makes.
struct Blocks {
    receiver: Receiver<io::Result<Vec<u8>>>,
    current: io::Cursor<Vec<u8>>,
}

impl Read for Blocks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.current.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            match self.receiver.recv() {
                Ok(block) => self.current = io::Cursor::new(block?),
                Err(_) => return Ok(0),
            }
        }
    }
}

fn gunzip(layer: Layer, blocks: &SyncSender<io::Result<Vec<u8>>>) {
    let mut decoder = MultiGzDecoder::new(layer);
    loop {
        let mut block = Vec::with_capacity(BLOCK);
        let result = decoder.by_ref().take(BLOCK as u64).read_to_end(&mut block);
        let end = matches!(result, Ok(0) | Err(_));
        if blocks.send(result.map(|_| block)).is_err() || end {
            return;
        }
    }
}

fn unpack(layer: Layer, root: &Path) -> Result<()> {
    let (sender, receiver) = sync_channel(16);
    thread::spawn(move || gunzip(layer, &sender));
    let mut archive = tar::Archive::new(Blocks { receiver, current: io::Cursor::default() });
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = root.join(entry.path()?.strip_prefix("/").unwrap_or(&entry.path()?));
        write(&mut entry, &path, root).with_context(|| format!("unpack {}", path.display()))?;
    }
    Ok(())
}

fn write(entry: &mut tar::Entry<'_, impl Read>, path: &Path, root: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().as_bytes();
    if name == b".wh..wh..opq" {
        let directory = path.parent().context("a whiteout of the root")?;
        for child in fs::read_dir(directory)? {
            remove(&child?.path())?;
        }
        return Ok(());
    }
    if let Some(hidden) = name.strip_prefix(b".wh.") {
        return remove(&path.with_file_name(std::ffi::OsStr::from_bytes(hidden)));
    }
    let kind = entry.header().entry_type();
    let is_directory = fs::symlink_metadata(path).map(|old| old.is_dir());
    match is_directory {
        Ok(true) if kind.is_dir() => {}
        Ok(_) => remove(path)?,
        Err(_) => {}
    }
    let target = || entry.link_name().ok().flatten().map(std::borrow::Cow::into_owned);
    if kind.is_dir() {
        if !matches!(is_directory, Ok(true)) {
            fs::create_dir_all(path)?;
        }
    } else if kind.is_symlink() {
        symlink(target().context("a symlink to nowhere")?, path)?;
    } else if kind.is_hard_link() {
        let target = target().context("a hard link to nowhere")?;
        fs::hard_link(root.join(target.strip_prefix("/").unwrap_or(&target)), path)?;
        return Ok(());
    } else if kind.is_file() {
        let mut file = File::create(path)?;
        io::copy(entry, &mut file)?;
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(entry.header().mtime()?))?;
    } else {
        return Ok(());
    }
    let id = |id: u64| u32::try_from(id).context("an owner beyond 32 bits");
    lchown(path, Some(id(entry.header().uid()?)?), Some(id(entry.header().gid()?)?))?;
    if !kind.is_symlink() {
        fs::set_permissions(path, Permissions::from_mode(entry.header().mode()?))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            bail!("remove {}: {error}", path.display())
        }
        _ => Ok(()),
    }
}
