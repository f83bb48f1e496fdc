//! The document behind `nydusctl why`. Times are microseconds, `at` since the mount; sizes
//! are bytes.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// Everything that is known of one mount's start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Mountpoint inside the daemon.
    pub mountpoint: String,
    /// Time since the mount.
    pub age_us: u64,
    /// The image.
    pub image: Image,
    /// Is it lazy?
    pub verdict: Verdict,
    /// Sums.
    pub totals: Totals,
    /// What all waits were for, summed over reads.
    pub waits: Waits,
    /// Where chunks came from.
    pub supplied: Vec<Supplied>,
    /// Names of blobs; others refer to them by place.
    pub blobs: Vec<String>,
    /// Processes that waited; others refer to them by place.
    pub processes: Vec<Process>,
    /// Files that were read, longest wait first; others refer to them by place.
    pub files: Vec<File>,
    /// Reads that waited, longest first.
    pub reads: Vec<Read>,
    /// Fetched chunks in the order they were wanted.
    pub fetches: Vec<Fetch>,
    /// Waits that were forgotten to save memory.
    pub dropped_reads: u64,
    /// Fetches that were forgotten to save memory.
    pub dropped_fetches: u64,
}

/// Size of the image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Stored bytes of all its blobs.
    pub bytes: u64,
    /// Its chunks.
    pub chunks: u64,
    /// Chunks that were in the cache when it was mounted.
    pub cached_chunks: u64,
    /// Chunks that are in the cache now.
    pub ready_chunks: u64,
}

/// Is the mount lazy, and if not, why?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// False if lazy loading gained nothing here.
    pub lazy: bool,
    /// One sentence.
    pub text: String,
}

/// Sums over the life of the mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Reads that have ended.
    pub reads: u64,
    /// Of these, reads that waited.
    pub waited: u64,
    /// Of these, reads that failed.
    pub failed: u64,
    /// Bytes given to readers.
    pub read_bytes: u64,
    /// Time that reads waited, summed.
    pub waited_us: u64,
    /// Time in which at least one read waited: what fetching ahead could have saved at most.
    pub blocked_us: u64,
    /// When the first read came.
    pub first_read_us: Option<u64>,
    /// Requests to the source.
    pub requests: u64,
    /// Bytes received.
    pub fetched_bytes: u64,
    /// Stored bytes of fetched chunks that readers asked for, sooner or later.
    pub asked_bytes: u64,
    /// Stored bytes of chunks that came before the first read.
    pub before_first_read_bytes: u64,
}

/// Where the time of a wait went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waits {
    /// Waiting for the request to go out.
    pub queue_us: u64,
    /// From the request to the last byte.
    pub network_us: u64,
    /// Decoding and verifying, and waiting for a core to do it.
    pub decode_us: u64,
    /// The disk of the cache.
    pub disk_us: u64,
    /// Not known: mostly waiting for another process that fetched the chunk.
    pub other_us: u64,
}

impl Waits {
    /// Names and times, in the order things happen.
    pub fn parts(&self) -> [(&'static str, u64); 5] {
        [
            ("queue", self.queue_us),
            ("network", self.network_us),
            ("decode", self.decode_us),
            ("disk", self.disk_us),
            ("other", self.other_us),
        ]
    }

    /// Adds `other`.
    pub fn add(&mut self, other: &Self) {
        self.queue_us += other.queue_us;
        self.network_us += other.network_us;
        self.decode_us += other.decode_us;
        self.disk_us += other.disk_us;
        self.other_us += other.other_us;
    }
}

/// Chunks of one supplier for one purpose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supplied {
    /// `local`, `origin`, `mirror`, `proxy` or `peer`.
    pub source: Cow<'static, str>,
    /// `demand`, or `prefetch` if nobody had asked when it came.
    pub purpose: Cow<'static, str>,
    /// Chunks.
    pub chunks: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

/// A process that waited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number where the daemon runs; 0 if unknown there.
    pub pid: u32,
    /// Name of the thread that read; empty if it was gone.
    pub name: String,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its path in the image, with escapes where it is no text.
    pub path: String,
    /// Reads of it, and bytes they got; the kernel's own cache answers others.
    pub reads: u64,
    /// Bytes they got.
    pub bytes: u64,
    /// Reads that waited.
    pub waited: u64,
    /// Time they waited, summed.
    pub waited_us: u64,
    /// Time in which at least one of them waited: what fetching it ahead could have saved.
    pub blocked_us: u64,
}

/// What became of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Its bytes came.
    Done,
    /// It failed.
    Failed,
    /// It waits still.
    Waiting,
}

/// A read that waited.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Read {
    /// Place of its process.
    pub process: usize,
    /// Place of its file.
    pub file: usize,
    /// First byte asked for.
    pub offset: u64,
    /// Bytes asked for.
    pub len: u32,
    /// When it came.
    pub at_us: u64,
    /// How long it waited.
    pub took_us: u64,
    /// For what.
    #[serde(flatten)]
    pub waits: Waits,
    /// Who supplied the chunk it waited for longest: as [`Supplied::source`], or `cache`.
    pub source: Option<Cow<'static, str>>,
    /// That chunk.
    pub chunk: Option<Chunk>,
    /// How it ended.
    pub outcome: Outcome,
}

/// A chunk by blob and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Chunk {
    /// Place of its blob.
    pub blob: u32,
    /// Its number there.
    pub index: u32,
}

/// A fetched chunk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fetch {
    /// Which.
    pub chunk: Chunk,
    /// Its stored bytes.
    pub bytes: u64,
    /// When somebody wanted it.
    pub at_us: u64,
    /// Until its request went out.
    pub queue_us: u64,
    /// From there to the first byte of the answer.
    pub answer_us: u64,
    /// From there to its last byte.
    pub transfer_us: u64,
    /// From there to verified bytes.
    pub decode_us: u64,
    /// Who supplied it.
    pub source: Option<Cow<'static, str>>,
    /// Place of a file whose read waited for it.
    pub file: Option<usize>,
    /// A reader waited for it.
    pub demanded: bool,
    /// It did not come.
    pub failed: bool,
}
