//! `fs-raw`: the fastest FUSE server that this machine allows, to compare nydusd with.
//!
//! It serves a directory as it is, from one table, without counters, checks, images or chunks, in the ways
//! that the kernel offers a server. It does not survive its end, and is no way to serve anything.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use nix::mount::{MsFlags, mount};
use tests::{Context, Result};

mod serve;
#[expect(unsafe_code, reason = "ioctls of /dev/fuse")]
mod sys;
mod tree;
mod wire;

use serve::{Server, Worker};
use tree::Tree;

/// Serves the directory TREE on MOUNTPOINT until that is unmounted.
#[derive(Debug, Parser)]
struct Cli {
    /// Serving threads
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// A cloned descriptor for each thread
    #[arg(long)]
    clone: bool,
    /// How file data gets to the kernel
    #[arg(long, value_enum, default_value = "copy")]
    data: Data,
    /// Kernel readahead of the mount; the kernel's default if absent
    #[arg(long)]
    read_ahead_kb: Option<u32>,
    /// The directory
    tree: PathBuf,
    /// Where to mount
    mountpoint: PathBuf,
}

/// How file data gets to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Data {
    /// pread(2) and writev(2)
    Copy,
    /// splice(2) through a pipe, copied once by the kernel
    Splice,
    /// splice(2) through a pipe, pages moved where possible
    Move,
    /// The kernel reads the file itself; costs an open request a file
    Passthrough,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let tree = Tree::read(&cli.tree)?;
    let mountpoint = cli.mountpoint.canonicalize().context("the mountpoint")?;
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").context("/dev/fuse")?;
    let device = OwnedFd::from(device);
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=1052672",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    mount(Some("raw"), &mountpoint, Some("fuse.raw"), flags, Some(options.as_str())).context("mount")?;
    if let Some(kilobytes) = cli.read_ahead_kb {
        read_ahead(&mountpoint, kilobytes)?;
    }
    let server = Arc::new(Server { tree, data: cli.data });
    let threads: Vec<_> = (0..cli.threads)
        .map(|number| {
            let own = if cli.clone && number > 0 { sys::clone(&device)? } else { device.try_clone()? };
            let mut worker = Worker::new(Arc::clone(&server), own)?;
            Ok(std::thread::spawn(move || worker.run()))
        })
        .collect::<Result<_>>()?;
    drop(device);
    for thread in threads {
        thread.join().ok().context("a thread panicked")??;
    }
    Ok(())
}

/// Sets the readahead of the mount without asking anything of it.
fn read_ahead(mountpoint: &Path, kilobytes: u32) -> Result<()> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let device = table
        .lines()
        .rev()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|words| words.get(4).is_some_and(|path| Path::new(path) == mountpoint))
        .and_then(|words| words.get(2).map(|&device| device.to_owned()))
        .context("the mount is not in the mount table")?;
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    std::fs::write(&path, kilobytes.to_string()).context(path)
}
