//! One disk: requests of virtio-blk (virtio 1.2, section 5.2), of which a disk that is only read has few.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rafs::disk::{Disks, Part, Piece};
use storage::backend::Priority;
use storage::read::ReadSlice;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::cli::BlkFront;
use crate::mount::Mount;
use crate::pending::{Abandon, PendingGuard};
use crate::transport::vhost::{Device, Request};

/// VIRTIO_BLK_F_SEG_MAX: `seg_max` says how many buffers a request may have.
const SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO: it is not written to.
const READ_ONLY: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE: `blk_size` says what it likes to be read in.
const BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_MQ: `num_queues` says how many there are.
const MQ: u64 = 1 << 12;

/// VIRTIO_BLK_T_IN: read.
const IN: u32 = 0;
/// VIRTIO_BLK_T_FLUSH: nothing was written.
const FLUSH: u32 = 4;
/// VIRTIO_BLK_T_GET_ID: what the disk is called.
const GET_ID: u32 = 8;

/// VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// What addresses count in.
const SECTOR: u64 = 512;
/// Bytes of what a disk is called.
const ID_LEN: usize = 20;
/// Most bytes that one request reads.
const MAX_READ: u64 = 4 << 20;
/// Buffers of a request: all that a ring has, but for the ones of head and status.
const MAX_SEGMENTS: u32 = 1022;

/// Head of a request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    kind: U32,
    reserved: U32,
    sector: U64,
}
const _: () = assert!(size_of::<Head>() == 16);

/// A disk.
pub struct BlkDevice {
    mount: Arc<Mount>,
    disks: Arc<Disks>,
    part: Part,
    queues: u16,
    in_order: bool,
}

/// What is to be done for a request.
enum Todo {
    /// Nothing more: this, and the status.
    Answer(Vec<u8>, u8),
    /// Chunks, and where they belong.
    Read(Vec<Piece>),
}

impl BlkDevice {
    pub(super) fn new(mount: &Arc<Mount>, disks: &Arc<Disks>, part: Part, front: &BlkFront) -> Self {
        Self {
            mount: Arc::clone(mount),
            disks: Arc::clone(disks),
            part,
            queues: front.request_queues,
            in_order: front.in_order,
        }
    }

    /// What it is called: enough of a digest to tell it from others.
    fn id(&self) -> [u8; ID_LEN] {
        let digest = self.mount.bootstrap_digest().to_string();
        let name = match self.part {
            Part::Flat | Part::Metadata => digest,
            Part::Blob(blob) => self.disks.rafs().bootstrap().blobs()[blob as usize].id.to_string(),
        };
        let mut id = [0; ID_LEN];
        id.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
        id
    }

    fn plan(&self, head: &Head, room: u64) -> io::Result<Todo> {
        match head.kind.get() {
            IN => {
                let sector = head.sector.get();
                let start = sector.checked_mul(SECTOR).ok_or_else(|| io::Error::other("a sector too far"))?;
                if room > MAX_READ || !room.is_multiple_of(SECTOR) {
                    return Err(io::Error::other(format!("a read of {room} bytes")));
                }
                let end = start.checked_add(room).ok_or_else(|| io::Error::other("a sector too far"))?;
                let mut pieces = Vec::new();
                self.disks.read(self.part, start..end, &mut pieces).map_err(io::Error::other)?;
                Ok(Todo::Read(pieces))
            }
            FLUSH => Ok(Todo::Answer(Vec::new(), OK)),
            GET_ID if room >= ID_LEN as u64 => Ok(Todo::Answer(self.id().to_vec(), OK)),
            _ => Ok(Todo::Answer(Vec::new(), UNSUPPORTED)),
        }
    }

    /// Reads what is there, or has it fetched.
    fn read(&self, pieces: Vec<Piece>, request: Request) {
        let chunks = |piece: &Piece| match piece {
            Piece::Chunk(slice) => Some(slice.clone()),
            Piece::Metadata(_) | Piece::Zeros(_) => None,
        };
        let slices: Vec<ReadSlice> = pieces.iter().filter_map(chunks).collect();
        if slices.is_empty() {
            return give(request, &assemble(&self.disks, &pieces, &[]), OK);
        }
        self.mount.tracer().touch(&slices);
        let len = slices.iter().map(|slice| slice.len as usize).sum();
        let mut data = vec![0; len];
        match self.mount.reader().try_read(&slices, &mut data) {
            Ok(true) => give(request, &assemble(&self.disks, &pieces, &data), OK),
            Ok(false) => {
                drop(data);
                let waiting = Arc::new(Waiting(Mutex::new(Some(request))));
                let guard = self.mount.pending().enter(Arc::<Waiting>::clone(&waiting));
                let read = PendingRead { waiting, disks: Arc::clone(&self.disks), pieces, _pending: guard };
                let completion = Box::new(move |result| read.finish(result));
                self.mount.reader().submit(slices, Priority::OnDemand, completion);
            }
            Err(e) => {
                tracing::error!("a read of the disk fails: {}", crate::logging::chain(&e));
                give(request, &[], IO_ERROR);
            }
        }
    }
}

/// A request that waits for its data. It is answered once, by who comes first.
struct Waiting(Mutex<Option<Request>>);

impl Waiting {
    fn give(&self, data: &[u8], status: u8) {
        if let Some(request) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            give(request, data, status);
        }
    }
}

impl Abandon for Waiting {
    fn abandon(&self) {
        self.give(&[], IO_ERROR);
    }
}

/// A read on its way. It fails if it is dropped.
struct PendingRead {
    waiting: Arc<Waiting>,
    disks: Arc<Disks>,
    pieces: Vec<Piece>,
    /// Goes behind the answer.
    _pending: PendingGuard,
}

impl PendingRead {
    fn finish(self, result: storage::Result<Vec<u8>>) {
        match result {
            Ok(data) => self.waiting.give(&assemble(&self.disks, &self.pieces, &data), OK),
            Err(e) => {
                tracing::error!("a read of the disk fails: {}", crate::logging::chain(&e));
                self.waiting.abandon();
            }
        }
    }
}

impl Drop for PendingRead {
    fn drop(&mut self) {
        self.waiting.abandon();
    }
}

/// The bytes of `pieces`, `data` being those of the chunks among them.
fn assemble(disks: &Disks, pieces: &[Piece], mut data: &[u8]) -> Vec<u8> {
    let len: u64 = pieces.iter().map(Piece::len).sum();
    // One request's.
    let mut bytes = Vec::with_capacity(len as usize);
    for piece in pieces {
        match piece {
            // Inside of it, as the plan has seen to.
            Piece::Metadata(range) => {
                bytes.extend_from_slice(&disks.metadata()[range.start as usize..range.end as usize]);
            }
            Piece::Chunk(slice) => {
                let (chunk, rest) = data.split_at((slice.len as usize).min(data.len()));
                bytes.extend_from_slice(chunk);
                data = rest;
            }
            Piece::Zeros(len) => bytes.resize(bytes.len() + *len as usize, 0),
        }
    }
    bytes
}

/// Answers. The status is behind all the room for data, however much of that is filled.
fn give(request: Request, data: &[u8], status: u8) {
    if let Err(e) = request.answer_around(data, &[status]) {
        tracing::warn!("the answer to a request for a disk is lost: {e}");
    }
}

impl Device for BlkDevice {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn queues(&self) -> usize {
        self.queues.into()
    }

    fn features(&self) -> u64 {
        SEG_MAX | READ_ONLY | BLK_SIZE | MQ
    }

    /// `virtio_blk_config`; what no feature speaks of is 0.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 256];
        let sectors = self.disks.size(self.part).div_ceil(SECTOR);
        config[..8].copy_from_slice(&sectors.to_le_bytes());
        config[12..16].copy_from_slice(&MAX_SEGMENTS.to_le_bytes());
        let block = self.disks.rafs().bootstrap().summary().block_size;
        config[20..24].copy_from_slice(&block.to_le_bytes());
        config[34..36].copy_from_slice(&self.queues.to_le_bytes());
        config
    }

    fn in_order(&self) -> bool {
        self.in_order
    }

    fn serve(&self, _: usize, request: Request) {
        let mut head = Vec::new();
        let copied = request.copy_to(&mut head, 64 << 10);
        // Somewhere the status goes.
        let Some(room) = request.writable().checked_sub(1) else { return };
        let todo = copied.and_then(|()| match Head::read_from_prefix(&head) {
            Ok((head, _)) => self.plan(&head, room),
            Err(_) => Err(io::Error::other(format!("a request of {} bytes", head.len()))),
        });
        match todo {
            Ok(Todo::Read(pieces)) => self.read(pieces, request),
            Ok(Todo::Answer(data, status)) => give(request, &data, status),
            Err(e) => {
                tracing::warn!("a request for a disk is refused: {e}");
                give(request, &[], IO_ERROR);
            }
        }
    }

    fn abandon(&self) {
        self.mount.abandon_reads();
    }

    fn reset(&self) {}
}
