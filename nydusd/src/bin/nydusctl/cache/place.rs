//! Which cache directories there are, where none was named.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{bail, ensure};
use serde_json::Value;

use crate::client::Client;
use crate::discover::{self, Found};

/// Those of the daemon that was named, or of all that run together with the default one.
///
/// # Errors
/// The named daemon does not answer, or there are none.
pub fn all(socket: Option<&Path>, timeout: Duration) -> anyhow::Result<Vec<PathBuf>> {
    if let Some(socket) = socket {
        return of_daemon(socket, timeout);
    }
    let mut dirs = used(&discover::running(), timeout);
    let default = nydusd::image::default_cache_dir()?;
    if let Ok(dir) = default.canonicalize()
        && !dirs.contains(&dir)
    {
        dirs.push(dir);
    }
    if dirs.is_empty() {
        bail!(
            "no daemon that runs here has a cache, and there is no {}, which is the default; --cache-dir names another",
            default.display()
        );
    }
    Ok(dirs)
}

/// Where something is removed: in the directory of the daemon that was named, and otherwise always in the default one.
///
/// # Errors
/// There is none, or the daemon has several; says which to choose from. Or somebody else's process would say where.
pub fn one(socket: Option<&Path>, timeout: Duration) -> anyhow::Result<PathBuf> {
    if let Some(socket) = socket {
        for daemon in discover::all(Some(socket))? {
            ensure!(
                discover::is_trusted(daemon.user),
                "what answers at {} is a process of user {}, which does not say what is removed here; --cache-dir does",
                socket.display(),
                daemon.user
            );
        }
        return match &of_daemon(socket, timeout)?[..] {
            [only] => Ok(only.clone()),
            several => bail!(
                "this daemon has {} cache directories; name one of them:{}",
                several.len(),
                flags(several)
            ),
        };
    }
    let dir = nydusd::image::default_cache_dir()?;
    if dir.exists() {
        return Ok(dir);
    }
    bail!(
        "there is no {}, which is the default cache directory; name another with --cache-dir{}",
        dir.display(),
        flags(&used(&discover::running(), timeout))
    )
}

/// The flags that name `dirs`, each on a line of its own.
fn flags(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|dir| format!("\n  --cache-dir {}", dir.display())).collect()
}

/// Those of the daemon at `socket`, at least one.
fn of_daemon(socket: &Path, timeout: Duration) -> anyhow::Result<Vec<PathBuf>> {
    let (mut dirs, mut told_any) = (Vec::new(), false);
    for daemon in discover::all(Some(socket))? {
        let told = told_by(&daemon, timeout)?;
        told_any |= !told.is_empty();
        add(&mut dirs, &daemon, told);
    }
    match (dirs.is_empty(), told_any) {
        (false, _) => Ok(dirs),
        (true, true) => bail!("its cache can not be reached from here"),
        (true, false) => {
            bail!("this daemon has no image mounted, and so no cache; --cache-dir names a directory")
        }
    }
}

/// The directories that daemons have their caches in, each once. What one does not tell is told to the user.
fn used(daemons: &[Found], timeout: Duration) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for (daemon, answer) in daemons.iter().zip(discover::each(daemons, |daemon| told_by(daemon, timeout))) {
        match answer {
            Ok(told) => add(&mut dirs, daemon, told),
            Err(e) => eprintln!("nydusctl: nydusd {} at {}: {e:#}", daemon.pid, daemon.socket.display()),
        }
    }
    dirs
}

/// Adds what is not in `dirs` yet. What is not here is told to the user.
fn add(dirs: &mut Vec<PathBuf>, daemon: &Found, told: Vec<PathBuf>) {
    for dir in told {
        match here(daemon, &dir) {
            Ok(dir) if dirs.contains(&dir) => {}
            Ok(dir) => dirs.push(dir),
            Err(e) => eprintln!("nydusctl: cache directory {} of nydusd {}: {e}", dir.display(), daemon.pid),
        }
    }
}

/// `dir` without links, if it is the same directory here as it is for the daemon.
fn here(daemon: &Found, dir: &Path) -> io::Result<PathBuf> {
    let own = PathBuf::from(format!("/proc/{}/root", daemon.pid)).join(dir.strip_prefix("/").unwrap_or(dir));
    let place = |path: &Path| path.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
    // Whether it is cannot be told for another user's.
    match (place(&own), place(dir)) {
        (Ok(own), here) if here.as_ref().ok() != Some(&own) => {
            Err(io::Error::other("is in a file system of its own; run nydusctl in its container"))
        }
        (_, here) => here.and_then(|_| dir.canonicalize()),
    }
}

/// The cache directories of a daemon's mounts, as it sees them.
fn told_by(daemon: &Found, timeout: Duration) -> anyhow::Result<Vec<PathBuf>> {
    let info: Value = Client::new(&daemon.socket, timeout)?.get("/api/v1/daemon")?;
    let mounts = info["backend_collection"].as_object().into_iter().flat_map(|mounts| mounts.values());
    let dirs = mounts.filter_map(|mount| mount["config"]["cache"]["filecache"]["work_dir"].as_str());
    // From its directory.
    let cwd = PathBuf::from(format!("/proc/{}/cwd", daemon.pid)).read_link().unwrap_or_default();
    Ok(dirs.map(|dir| cwd.join(dir)).collect())
}
