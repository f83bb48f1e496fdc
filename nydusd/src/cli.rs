//! What was typed. What it means is decided in [`crate::config`] and [`crate::daemon`].
//!
//! The grammar is a contract with the programs that start `nydusd`: the sub-command, if
//! any, is the first argument; every flag comes after it; no sub-command means `fuse`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use storage::digest::{Digest, TaggedDigest};
use storage::prefetch::Prefer;

use crate::config::{OnOutage, parse_prefer};
use crate::writable::OverlayArgs;

mod missing;
mod serve;
mod values;
mod what;

pub use missing::no_service;
pub use serve::{
    BlkArgs, BlkFront, Front, FuseArgs, FuseFront, SandboxArgs, ServeArgs, VirtiofsArgs, VirtiofsFront,
};
pub(crate) use values::parse_sha256;
pub use values::{FailoverPolicy, LogFormat, LogLevel};
use values::{parse_seconds, parse_tagged};
pub use what::{Part, PartArgs, WhatArgs};

/// Command line of `nydusd`.
#[derive(Debug, Parser)]
#[command(
    name = "nydusd",
    about = "Serves container images lazily, each chunk verified before anyone sees it",
    version = crate::version::BLOCK,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = "Without a sub-command the arguments are those of `fuse`."
)]
pub struct Cli {
    /// The service to run.
    #[command(subcommand)]
    pub command: Command,
}

/// Services.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount an image on a directory of this host through FUSE
    Fuse(Box<FuseArgs>),
    /// Serve images and host directories to a virtual machine, as a vhost-user-fs device
    Virtiofs(Box<VirtiofsArgs>),
    /// Serve an image to a virtual machine as a disk, which its kernel mounts as EROFS (vhost-user-blk)
    Blk(Box<BlkArgs>),
    /// Fetch an image, or parts of it, into the cache directory and end
    Prefetch(Box<PrefetchArgs>),
    /// Write man pages and shell completions, as they are installed below share/
    #[command(hide = true)]
    Pages {
        /// Directory to write to
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Cover a mount of this program with an overlay and end
    #[command(hide = true)]
    Overlay(OverlayArgs),
    /// Run `fuse` in a child, and go on with the same mount in another one should it die
    Supervise(SuperviseArgs),
}

/// Flags of every service.
#[derive(Args, Clone, Debug)]
pub struct GlobalArgs {
    /// Unix socket of the HTTP API
    #[arg(short = 'A', long, value_name = "PATH")]
    pub apisock: Option<PathBuf>,

    /// Serve the counters at http://ADDRESS/metrics, and nothing else there [default: off]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_addr: Option<std::net::SocketAddr>,

    /// Configuration: v1 JSON, or v2 TOML or JSON
    #[arg(short = 'C', long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Daemon id, together with --supervisor
    #[arg(long, value_name = "ID", requires = "supervisor")]
    pub id: Option<String>,

    /// Supervisor socket: holds the mount and its state for a successor
    #[arg(long, value_name = "PATH", requires = "id")]
    pub supervisor: Option<PathBuf>,

    /// Least severe message that is logged
    #[arg(short = 'l', long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LogLevel,

    /// How a message is written: a line of text, or an object of JSON on a line
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// Log file instead of standard error; `.log` is appended to a name without extension
    #[arg(short = 'L', long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,

    /// Start a new log file after this many MiB, keeping 10 compressed ones; 0 = never
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub log_rotation_size: u64,

    /// Limit of open files to ask for; 0 = leave it
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    pub rlimit_nofile: u64,

    /// Wait for a takeover from the supervisor instead of mounting
    #[arg(long)]
    pub upgrade: bool,

    /// What `supervise` gives its child: its socket
    #[arg(long, value_name = "PATH", hide = true)]
    pub holder: Option<PathBuf>,
}

/// Which image, and how its data is come by.
#[derive(Args, Clone, Debug)]
pub struct ImageArgs {
    /// The image: docker://HOST/REPO[:TAG|@DIGEST] or oci:PATH[:TAG]
    #[arg(long, value_name = "REF", conflicts_with_all = ["bootstrap", "config", "localfs_dir"])]
    pub image: Option<String>,

    /// Cache directory of --image [default: /var/lib/nydus/cache for root, else $XDG_CACHE_HOME/nydus]
    #[arg(long, value_name = "DIR", requires = "image")]
    pub cache_dir: Option<PathBuf>,

    /// Trust the roots in this PEM file, too, when fetching --image
    #[arg(long, value_name = "FILE", requires = "image")]
    pub ca_cert: Vec<PathBuf>,

    /// Speak plain http to the registry of --image [default: on loopback, unless it speaks https]
    #[arg(long, requires = "image")]
    pub plain_http: bool,

    /// Fetch --image through the proxies of HTTPS_PROXY, HTTP_PROXY and NO_PROXY [default: ignore them]
    #[arg(long, requires = "image")]
    pub proxy_from_environment: bool,

    /// Bootstrap (metadata file) of the image
    #[arg(short = 'B', long, value_name = "FILE")]
    pub bootstrap: Option<PathBuf>,

    /// Directory of blobs that is also the cache directory; replaces --config
    #[arg(short = 'D', long, value_name = "DIR", conflicts_with = "config")]
    pub localfs_dir: Option<PathBuf>,

    /// Refuse the image unless its root digest is this (`alg:hex`)
    #[arg(long, value_name = "DIGEST", value_parser = parse_tagged)]
    pub expect_root: Option<TaggedDigest>,

    /// Refuse the image unless its bootstrap has this digest (`sha256:hex`)
    #[arg(long, value_name = "DIGEST", value_parser = parse_sha256)]
    pub expect_bootstrap: Option<Digest>,

    /// Serve an image without chunk digests, unverified
    #[arg(long)]
    pub allow_unverified: bool,

    /// Seconds after which a read that misses the cache fails with EIO [default: 60]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub read_timeout: Option<std::time::Duration>,

    /// What a read does when its source does not answer [default: fail]
    #[arg(long, value_name = "WHAT")]
    pub on_outage: Option<OnOutage>,

    /// What counts more: an early answer (time) or little that nobody asked for (bytes) [default: time]
    #[arg(long, value_name = "WHAT", value_parser = parse_prefer)]
    pub prefer: Option<Prefer>,
}

/// Flags of `prefetch`.
#[derive(Args, Clone, Debug)]
pub struct PrefetchArgs {
    /// The image.
    #[command(flatten)]
    pub image: ImageArgs,

    /// What to fetch.
    #[command(flatten)]
    pub what: WhatArgs,

    /// Flags of every service.
    #[command(flatten)]
    pub global: GlobalArgs,
}

/// Flags of `supervise`.
#[derive(Args, Clone, Debug)]
pub struct SuperviseArgs {
    /// The arguments of `nydusd fuse`
    #[arg(last = true, required = true, value_name = "ARGUMENT")]
    pub arguments: Vec<OsString>,
}

impl Cli {
    /// Parses `arguments` (the program's name first), or says how to end: help and
    /// version with exit code 0, a usage error with 2.
    ///
    /// # Errors
    /// What clap would print and exit with.
    pub fn parse_arguments(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut arguments: Vec<OsString> = arguments.into_iter().collect();
        let first = arguments.get(1).and_then(|a| a.to_str()).unwrap_or_default();
        let top_level = [
            "fuse",
            "virtiofs",
            "blk",
            "prefetch",
            "supervise",
            "overlay",
            "pages",
            "-h",
            "--help",
            "-V",
            "--version",
        ];
        if arguments.len() > 1 && !top_level.contains(&first) {
            arguments.insert(1, "fuse".into());
        }
        let cli = Self::try_parse_from(arguments)?;
        match &cli.command {
            Command::Prefetch(prefetch) => prefetch.global.refuse_what_daemons_have()?,
            Command::Fuse(fuse) => fuse.refuse_lost_requests()?,
            Command::Virtiofs(virtiofs) => virtiofs.serve.global.refuse_what_mounts_have()?,
            Command::Blk(blk) => {
                blk.serve.global.refuse_what_mounts_have()?;
                blk.serve.refuse_what_trees_have()?;
            }
            Command::Overlay(_) | Command::Pages { .. } | Command::Supervise(_) => {}
        }
        Ok(cli)
    }
}

impl FuseArgs {
    /// A supervisor is there so that no reader notices the daemon's end, and with rings all who wait do.
    fn refuse_lost_requests(&self) -> Result<(), clap::Error> {
        let global = &self.serve.global;
        let held = global.supervisor.is_some() || global.holder.is_some() || global.upgrade;
        if self.front.fuse_io_uring && held {
            return Err(conflict(LOST_REQUESTS));
        }
        Ok(())
    }
}

/// Why rings and supervisors exclude one another.
const LOST_REQUESTS: &str = "--fuse-io-uring can not be used with a supervisor: requests that are in a ring when the daemon \
     dies fail, and no successor gets them; leave one of the two out";

fn conflict(why: &str) -> clap::Error {
    clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, format!("{why}\n"))
}

impl SuperviseArgs {
    /// What the child will be told.
    ///
    /// # Errors
    /// As [`Cli::parse_arguments`]; another service than `fuse`, or what only a supervisor says.
    pub fn child(&self) -> Result<Box<FuseArgs>, clap::Error> {
        let name = OsString::from("nydusd");
        match Cli::parse_arguments(std::iter::once(name).chain(self.arguments.iter().cloned()))?.command {
            Command::Fuse(args) if args.serve.global.upgrade || args.serve.global.holder.is_some() => {
                Err(conflict("`supervise` itself decides when a daemon takes over; leave --upgrade out"))
            }
            Command::Fuse(args) if args.front.fuse_io_uring => Err(conflict(LOST_REQUESTS)),
            Command::Fuse(args) => Ok(args),
            _ => Err(conflict("`supervise` runs the service `fuse` and no other")),
        }
    }
}

impl ServeArgs {
    /// A disk has one image, and nothing else.
    fn refuse_what_trees_have(&self) -> Result<(), clap::Error> {
        if self.shared_dir.is_some() || self.virtual_mountpoint != "/" {
            return Err(conflict(
                "a disk has no directories; leave --shared-dir and --virtual-mountpoint out",
            ));
        }
        match self.image.image.is_some() || self.image.bootstrap.is_some() {
            true => Ok(()),
            false => Err(clap::Error::raw(
                clap::error::ErrorKind::MissingRequiredArgument,
                "a disk is of an image; give --image, or --bootstrap\n",
            )),
        }
    }
}

impl GlobalArgs {
    fn refuse_what_mounts_have(&self) -> Result<(), clap::Error> {
        match self.upgrade || self.supervisor.is_some() || self.holder.is_some() {
            true => Err(conflict(
                "a virtual machine's device is not taken over by another daemon; leave --supervisor, --id and --upgrade out",
            )),
            false => Ok(()),
        }
    }

    fn refuse_what_daemons_have(&self) -> Result<(), clap::Error> {
        let given =
            [("--apisock", self.apisock.is_some()), ("--id", self.id.is_some()), ("--upgrade", self.upgrade)];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(conflict(&format!("{flag} is for daemons; `prefetch` ends by itself"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<FuseArgs, clap::Error> {
        let all = std::iter::once("nydusd").chain(arguments.iter().copied());
        Cli::parse_arguments(all.map(OsString::from)).map(|cli| {
            let Command::Fuse(fuse) = cli.command else { panic!("not `fuse`") };
            *fuse
        })
    }

    #[test]
    fn the_grammar_holds() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn clients_command_lines_are_understood() {
        // What nydus-snapshotter composes for a dedicated daemon.
        let line = "fuse --thread-num 8 --config /c/config.json --bootstrap /s/image.boot --mountpoint /m \
                    --apisock /a/api.sock --log-level info --log-rotation-size 100 --log-file /l/nydusd.log \
                    --failover-policy resend";
        let args = parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap();
        assert_eq!((args.front.fuse_threads, args.serve.global.log_rotation_size), (8, 100));
        assert_eq!(args.serve.global.apisock.as_deref(), Some(std::path::Path::new("/a/api.sock")));
        // nydusify and the smoke suite never write the sub-command.
        let args = parse(&["--mountpoint", "/m", "--config", "/c", "--apisock", "/a", "--log-level", "warn"])
            .unwrap();
        assert_eq!((args.front.mountpoint.to_str(), args.front.fuse_threads), (Some("/m"), 4));
        let args = parse(&["-M", "/m", "-D", "/d", "-B", "/b", "--backend-source", "http://x"]).unwrap();
        assert_eq!(args.serve.image.localfs_dir.as_deref(), Some(std::path::Path::new("/d")));
    }

    #[test]
    fn what_clients_send_without_effect_is_accepted() {
        let args = parse(&["--mountpoint", "/m", "--dedup-db", "/d", "--backend-source", "u"]).unwrap();
        assert_eq!(args.serve.dedup_db.as_deref(), Some(std::path::Path::new("/d")));
        let args = parse(&["--mountpoint", "/m", "-s", "/d", "--writable"]).unwrap();
        assert!(args.front.writable && args.serve.shared_dir.is_some());
    }

    #[test]
    fn mistakes_end_with_2_and_say_what() {
        for (line, text) in [
            ("fuse", "--mountpoint"),
            ("--mountpoint /m --fuse-threads 0", "0"),
            ("--mountpoint /m --fuse-threads 1025", "1025"),
            ("--mountpoint /m --no-such-flag", "--no-such-flag"),
            ("--mountpoint /m --id x", "--supervisor"),
            ("--mountpoint /m --supervisor /s", "--id"),
            ("--mountpoint /m --fuse-io-uring --supervisor /s --id x", "supervisor"),
            ("--mountpoint /m --fuse-io-uring --upgrade", "supervisor"),
            ("supervise", "<ARGUMENT>"),
            ("supervise --mountpoint /m", "--mountpoint"),
            ("--mountpoint /m -B /b -s /d", "--shared-dir"),
            ("--mountpoint /m -C /b -D /d", "--localfs-dir"),
            ("--mountpoint /m --log-level loud", "loud"),
            ("--mountpoint /m --expect-root sha256:12", "sha256:12"),
            ("--mountpoint /m --read-timeout 0", "--read-timeout"),
            ("--mountpoint /m --prefer luck", "luck"),
            ("prefetch --image oci:/x", "--all"),
            ("prefetch --image oci:/x --all --files /l", "--files"),
            ("prefetch --image oci:/x --all --bandwidth 0", "10MiB"),
            ("prefetch --image oci:/x --all --bandwidth much", "10MiB"),
        ] {
            let error = parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(text), "{line}: {error}");
        }
    }

    #[test]
    fn version_names_the_commit_on_its_own_line() {
        let error = parse(&["--version"]).unwrap_err();
        assert_eq!(error.exit_code(), 0);
        let text = error.to_string();
        assert!(text.starts_with("nydusd \rVersion: \t"), "{text:?}");
        let commit = text.lines().find_map(|line| line.strip_prefix("Git Commit: \t")).unwrap();
        assert_eq!(commit, crate::version::GIT_COMMIT);
        assert!(!commit.is_empty());
        for label in ["Build Time: \t", "Profile: \t", "Rustc: \t"] {
            assert!(text.lines().any(|line| line.starts_with(label)), "{label}");
        }
    }
}
