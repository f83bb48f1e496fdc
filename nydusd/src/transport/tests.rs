//! A real mount over a source that answers when the test says so.

use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rafs::bootstrap::{Bootstrap, OpenOptions};
use rafs::fs::{Rafs, RafsOptions};
use storage::backend::Priority;
use storage::read::{Completion, ReadSlice, Reader};
use zerocopy::IntoBytes as _;

use super::fusedev::{FuseMount, Recovery};
use super::init::{self, Answer};
use super::message::{self, OutHeader};
use super::worker::BUFFER_SIZE;
use crate::adapter::Adapter;
use crate::mount::Mount;
use crate::sandbox::{Places, Privileged};
use crate::vfs::path::VfsPath;

/// Longest wait for what must happen at once.
const PROMPT: Duration = Duration::from_secs(20);

/// Page and chunk size of the golden image used.
const PAGE: usize = 4096;

/// Reads of one chunk are cached; all others wait in line.
#[derive(Default)]
struct Stalled {
    waiting: Mutex<Vec<(usize, Completion)>>,
    arrived: Condvar,
    cached_chunk: u32,
}

impl Reader for Stalled {
    fn try_read(&self, slices: &[ReadSlice], dst: &mut [u8]) -> storage::Result<bool> {
        dst.fill(b'c');
        Ok(slices.iter().all(|slice| slice.extent.index.0 == self.cached_chunk))
    }

    fn submit(&self, slices: Vec<ReadSlice>, _: Priority, completion: Completion) {
        let len = slices.iter().map(|slice| slice.len as usize).sum();
        self.waiting.lock().unwrap().push((len, completion));
        self.arrived.notify_all();
    }
}

impl Stalled {
    fn wait_for(&self, count: usize) {
        let waiting = self.waiting.lock().unwrap();
        let (waiting, timeout) =
            self.arrived.wait_timeout_while(waiting, PROMPT, |waiting| waiting.len() < count).unwrap();
        assert!(!timeout.timed_out(), "{} of {count} reads arrived", waiting.len());
    }
}

/// This process mounts by itself.
fn host(mountpoint: &Path) -> Arc<Privileged> {
    Arc::new(Privileged::direct(Places { mountpoint: Some(mountpoint.to_owned()), ..Places::default() }))
}

fn golden(variant: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(variant)
}

/// A file of the image by its path.
fn find(rafs: &Rafs, path: &str) -> rafs::bootstrap::Nid {
    let bootstrap = rafs.bootstrap();
    path.split('/')
        .fold(bootstrap.root(), |dir, name| bootstrap.lookup(dir, name.as_bytes()).unwrap().unwrap().nid)
}

/// Runs `what` and fails the test if it takes long.
fn promptly<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(what()));
    receiver.recv_timeout(PROMPT).expect("it takes too long")
}

/// A small image with its data in the cache, and one file of it: adapter and source.
fn scene() -> (Arc<Adapter>, Arc<Stalled>) {
    let bytes = std::fs::read(golden("none-4k/image.boot")).unwrap();
    let bootstrap: Arc<dyn Bootstrap> =
        Arc::from(rafs::bootstrap::from_bytes(bytes, &OpenOptions::default()).unwrap());
    let rafs = Arc::new(Rafs::new(bootstrap, Vec::new(), RafsOptions::default()).unwrap());
    let small = find(&rafs, "files/one_byte");
    let mut slices = Vec::new();
    assert_eq!(rafs.read(small, 0, 4096, &mut slices).unwrap(), 1);
    let source = Arc::new(Stalled { cached_chunk: slices[0].extent.index.0, ..Stalled::default() });
    let adapter = Arc::new(Adapter::default());
    let reader: Arc<dyn Reader> = Arc::<Stalled>::clone(&source);
    let root = VfsPath::parse("/").unwrap();
    adapter.table().attach(&root, |place| Mount::for_tests(place, rafs, reader)).unwrap();
    (adapter, source)
}

/// False, with a line that says so, where no mount is possible.
fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists() && nix::unistd::geteuid().is_root();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

/// With 64 reads of a source that does not answer on 4 threads, directories, attributes and
/// cached reads answer at once; then each reader gets its bytes, or EIO, and nobody waits on.
#[test]
fn stalled_reads_hold_nobody_up() {
    if !can_mount() {
        return;
    }
    let (adapter, source) = scene();
    let dir = tempfile::tempdir().unwrap();
    let fuse = FuseMount::new(&host(dir.path()), false).unwrap();
    let (ended, ends) = channel();
    let (threads, _) =
        fuse.serve(Arc::clone(&adapter), 4, None, move |result| ended.send(result).unwrap()).unwrap();

    let root = dir.path().to_owned();
    let big = root.join("files/exact_1m");
    let readers: Vec<_> = (0..64)
        .map(|number| {
            let file =
                std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&big).unwrap();
            std::thread::spawn(move || {
                // O_DIRECT: each read is a request of its own, whatever the page cache does.
                let mut buffer = vec![0u8; 2 * PAGE];
                let start = buffer.as_ptr().align_offset(PAGE);
                let page = &mut buffer[start..start + PAGE];
                file.read_exact_at(page, number * PAGE as u64).map(|()| page[0])
            })
        })
        .collect();
    source.wait_for(64);
    assert_eq!(adapter.inflight().entries().len(), 64);

    let place = root.clone();
    let (names, size, content) = promptly(move || {
        let names = std::fs::read_dir(place.join("names")).unwrap().count();
        let size = std::fs::metadata(place.join("files/exact_4k")).unwrap().len();
        (names, size, std::fs::read(place.join("files/one_byte")).unwrap())
    });
    assert!(names > 3);
    assert_eq!((size, content.as_slice()), (4096, b"c".as_slice()));

    let waiting = std::mem::take(&mut *source.waiting.lock().unwrap());
    for (number, (len, completion)) in waiting.into_iter().enumerate() {
        match number % 3 {
            0 => completion(Ok(vec![b'd'; len])),
            1 => completion(Err(storage::Error::new(storage::ErrorKind::TimedOut, "the source is silent"))),
            // Forgotten: the reader must not wait for ever.
            _ => drop(completion),
        }
    }
    let results: Vec<_> =
        readers.into_iter().map(|reader| promptly(move || reader.join().unwrap())).collect();
    let good = results.iter().filter(|result| matches!(result, Ok(b'd'))).count();
    let failed = results
        .iter()
        .filter(|result| matches!(result, Err(e) if e.raw_os_error() == Some(libc::EIO)))
        .count();
    assert_eq!((good, failed), (22, 42), "{results:?}");
    assert!(adapter.inflight().entries().is_empty());

    let shot = adapter.table().mounts()[0].metrics().snapshot("/");
    assert_eq!(shot.data_read, 22 * PAGE as u64 + 1);
    assert_eq!(shot.fop_hits[4], 23);

    fuse.unmount().unwrap();
    drop(fuse);
    for _ in 0..threads.len() {
        ends.recv_timeout(PROMPT).expect("a thread does not end").unwrap();
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

/// A daemon dies with a request that it has taken and not answered. Its successor gets the
/// descriptor and what was agreed, asks for the request again, and the reader notices nothing.
#[test]
fn a_successor_answers_what_its_predecessor_has_taken() {
    if !can_mount() {
        return;
    }
    let (adapter, _) = scene();
    let dir = tempfile::tempdir().unwrap();
    let predecessor = FuseMount::new(&host(dir.path()), false).unwrap();
    assert_eq!(predecessor.negotiated(), None);
    let held = predecessor.descriptor().try_clone_to_owned().unwrap();

    // The predecessor's life: FUSE_INIT, answered, then one request that it takes with it.
    let mut buffer = vec![0; BUFFER_SIZE];
    let mut take = || {
        let len = nix::unistd::read(&held, &mut buffer).unwrap();
        let (header, body) = message::parse(&buffer[..len]).unwrap();
        (header, body.to_vec())
    };
    let (header, body) = take();
    assert_eq!(header.opcode, message::OP_INIT);
    let Answer::Agreed(negotiated, out) =
        init::answer(&adapter, &body, init::Kernel::Host { rings: false }).unwrap()
    else {
        panic!("this kernel speaks another protocol")
    };
    if !negotiated.resends() {
        eprintln!("skipped: this kernel does not repeat requests");
        return;
    }
    let reply = OutHeader::data(header.unique, size_of_val(&out) as u32);
    nix::unistd::write(&held, &[reply.as_bytes(), out.as_bytes()].concat()).unwrap();
    let path = dir.path().join("files/one_byte");
    let reader = std::thread::spawn(move || std::fs::read(path).unwrap());
    let (lost, _) = take();
    assert_ne!(lost.opcode, message::OP_INIT);
    let number = predecessor.number().unwrap();
    predecessor.abandon();
    drop(predecessor);

    // What a supervisor keeps.
    let kept = serde_json::to_string(&negotiated).unwrap();
    let negotiated = serde_json::from_str(&kept).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap().into();
    assert!(FuseMount::inherit(&host(dir.path()), null, number, negotiated).is_err());
    let copy = held.try_clone().unwrap();
    assert!(FuseMount::inherit(&host(dir.path()), copy, number + 1, negotiated).is_err());
    let successor = FuseMount::inherit(&host(dir.path()), held, number, negotiated).unwrap();
    successor.recover(Recovery::Answer).unwrap();
    let (threads, ready) = successor.serve(adapter, 2, None, |result| result.unwrap()).unwrap();
    ready.recv_timeout(PROMPT).expect("an inherited mount has been initialized");
    assert_eq!(successor.negotiated(), Some(negotiated));
    assert_eq!(promptly(move || reader.join().unwrap()), b"c");

    successor.unmount().unwrap();
    drop(successor);
    for thread in threads {
        promptly(move || thread.join().unwrap());
    }
}
