//! What daemons have on their command lines.

use std::path::{Path, PathBuf};

use clap::Args;

use super::values::{FailoverPolicy, parse_seconds};
use super::{GlobalArgs, ImageArgs};
use crate::trace;

/// Flags of `fuse`.
#[derive(Args, Clone, Debug)]
pub struct FuseArgs {
    /// The mount.
    #[command(flatten)]
    pub front: FuseFront,

    /// What is served.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// A mount of this host.
#[derive(Args, Clone, Debug)]
pub struct FuseFront {
    /// Directory to mount on
    #[arg(short = 'M', long, value_name = "DIR")]
    pub mountpoint: PathBuf,

    /// Threads that serve the kernel's requests
    #[arg(
        long,
        alias = "thread-num",
        value_name = "N",
        default_value_t = 4,
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub fuse_threads: u16,

    /// Take requests through io_uring where the kernel offers that; experimental, and without failover
    #[arg(long)]
    pub fuse_io_uring: bool,

    /// What to do with unanswered requests after a takeover
    #[arg(long, value_name = "POLICY", default_value = "resend")]
    pub failover_policy: FailoverPolicy,

    /// Let host directories be written to, and an image that is configured with an `overlay`
    #[arg(long)]
    pub writable: bool,
}

/// Flags of `virtiofs`.
#[derive(Args, Clone, Debug)]
pub struct VirtiofsArgs {
    /// The device.
    #[command(flatten)]
    pub front: VirtiofsFront,

    /// What is served.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// A file system device of virtual machines.
#[derive(Args, Clone, Debug)]
pub struct VirtiofsFront {
    /// Unix socket to listen on, for a virtual machine monitor to connect to
    #[arg(long, value_name = "PATH")]
    pub sock: PathBuf,

    /// Images and host directories in one tree, which is always so; sent by some clients
    #[arg(long, hide = true)]
    pub hybrid_mode: bool,

    /// Threads for what may wait: requests for files of the host
    #[arg(
        long,
        alias = "thread-num",
        value_name = "N",
        default_value_t = 4,
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub threads: u16,

    /// Queues that the guest may use at once, each served by a thread of its own
    #[arg(
        long,
        value_name = "N",
        default_value_t = 4,
        value_parser = clap::value_parser!(u16).range(1..=64)
    )]
    pub request_queues: u16,

    /// Answer in the order of the requests, for a monitor that reconnects after a crash of the daemon: none is
    /// lost then, but each waits for those before it
    #[arg(long)]
    pub in_order: bool,

    /// Let host directories be read only
    #[arg(long)]
    pub read_only: bool,
}

/// Flags of `blk`.
#[derive(Args, Clone, Debug)]
pub struct BlkArgs {
    /// The device.
    #[command(flatten)]
    pub front: BlkFront,

    /// What is served.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// An image as a disk of virtual machines.
#[derive(Args, Clone, Debug)]
pub struct BlkFront {
    /// Unix socket to listen on, for a virtual machine monitor to connect to
    #[arg(long, value_name = "PATH")]
    pub sock: PathBuf,

    /// A disk for the metadata, and one for each blob on a socket beside it (PATH.1, PATH.2 and so on), for guests
    /// with a kernel before 6.4: `mount -t erofs -o device=/dev/vdb,device=/dev/vdc /dev/vda`
    #[arg(long)]
    pub split: bool,

    /// Queues that the guest may use at once, each served by a thread of its own
    #[arg(
        long,
        value_name = "N",
        default_value_t = 4,
        value_parser = clap::value_parser!(u16).range(1..=64)
    )]
    pub request_queues: u16,

    /// Answer in the order of the requests, for a monitor that reconnects after a crash of the daemon: none is
    /// lost then, but each waits for those before it
    #[arg(long)]
    pub in_order: bool,
}

/// How a daemon is reached.
#[derive(Clone, Debug)]
pub enum Front {
    /// Through a mount of this host.
    Fuse(FuseFront),
    /// Through a file system device of a virtual machine.
    Virtiofs(VirtiofsFront),
    /// Through disks of a virtual machine.
    Blk(BlkFront),
}

impl Front {
    /// True if host directories may be written to.
    pub fn is_writable(&self) -> bool {
        match self {
            Self::Fuse(fuse) => fuse.writable,
            Self::Virtiofs(virtiofs) => !virtiofs.read_only,
            Self::Blk(_) => false,
        }
    }

    /// Where it is mounted, if it is.
    pub fn mountpoint(&self) -> Option<&Path> {
        match self {
            Self::Fuse(fuse) => Some(&fuse.mountpoint),
            Self::Virtiofs(_) | Self::Blk(_) => None,
        }
    }

    /// The socket of its device, if it has one.
    pub fn device(&self) -> Option<&Path> {
        match self {
            Self::Fuse(_) => None,
            Self::Virtiofs(virtiofs) => Some(&virtiofs.sock),
            Self::Blk(blk) => Some(&blk.sock),
        }
    }

    /// For messages: the path that others reach it by.
    pub fn place(&self) -> &Path {
        match self {
            Self::Fuse(fuse) => &fuse.mountpoint,
            Self::Virtiofs(virtiofs) => &virtiofs.sock,
            Self::Blk(blk) => &blk.sock,
        }
    }
}

/// What a daemon serves, however it is reached.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// The image.
    #[command(flatten)]
    pub image: ImageArgs,

    /// Record what starts read, and fetch it ahead of later ones [default: on]
    #[arg(long, value_name = "WHAT")]
    pub trace: Option<trace::Mode>,

    /// Longest recording of a start [default: 60]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub trace_seconds: Option<std::time::Duration>,

    /// Push what starts of --image read to its repository, for other nodes
    #[arg(long, requires = "image")]
    pub push_trace: bool,

    /// Host directory to show; what is written goes there, where the service may write
    #[arg(short = 's', long, value_name = "DIR", conflicts_with_all = ["bootstrap", "image"])]
    pub shared_dir: Option<PathBuf>,

    /// File with one absolute path a line: fetched after the mount, directories with all below them
    #[arg(long, value_name = "FILE")]
    pub prefetch_files: Option<PathBuf>,

    /// Where the image or directory appears inside the mount
    #[arg(short = 'm', long, value_name = "PATH", default_value = "/")]
    pub virtual_mountpoint: String,

    /// SQLite file, made if absent, that tells which cache of this machine has which chunk: what is in
    /// another image's cache is copied, not fetched. Daemons with caches of their own share one
    #[arg(long, value_name = "FILE")]
    pub dedup_db: Option<PathBuf>,

    /// Let the sandboxed daemon have this directory or block device, whatever it is. May be repeated
    #[arg(long, value_name = "PATH")]
    pub admit: Vec<PathBuf>,

    /// Sent by some clients; no effect
    #[arg(long, value_name = "URL", hide = true)]
    pub backend_source: Option<String>,

    /// What of the sandbox is left out.
    #[command(flatten)]
    pub sandbox: SandboxArgs,

    /// Flags of every service.
    #[command(flatten)]
    pub global: GlobalArgs,
}

/// What of the sandbox is left out. All of it is on by default for root.
#[derive(Args, Clone, Copy, Debug)]
pub struct SandboxArgs {
    /// Run without broker and sandbox, and let core dumps be
    #[arg(long)]
    pub no_sandbox: bool,

    /// Do not hide the host's files from the daemon
    #[arg(long)]
    pub no_jail: bool,

    /// Keep all capabilities
    #[arg(long)]
    pub keep_capabilities: bool,

    /// Do not use Landlock
    #[arg(long)]
    pub no_landlock: bool,

    /// Do not filter system calls
    #[arg(long)]
    pub no_seccomp: bool,

    /// Let the memory of a daemon that crashes be written to a file; it holds logins
    #[arg(long)]
    pub core_dumps: bool,
}
