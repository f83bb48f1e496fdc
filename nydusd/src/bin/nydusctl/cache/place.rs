//! Which cache directories there are, where none was named.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::bail;
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
/// There is none, or the daemon has several; says which to choose from.
pub fn one(socket: Option<&Path>, timeout: Duration) -> anyhow::Result<PathBuf> {
    if let Some(socket) = socket {
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
    let mut dirs = Vec::new();
    for daemon in discover::all(Some(socket))? {
        add(&mut dirs, told_by(&daemon, timeout)?);
    }
    if dirs.is_empty() {
        bail!("this daemon has no image mounted, and so no cache; --cache-dir names a directory");
    }
    Ok(dirs)
}

/// The directories that daemons have their caches in, each once. What one does not tell is told to the user.
fn used(daemons: &[Found], timeout: Duration) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    // At once: those that hang are waited for once, not one after the other.
    thread::scope(|scope| {
        let asked: Vec<_> =
            daemons.iter().map(|daemon| (daemon, scope.spawn(|| told_by(daemon, timeout)))).collect();
        for (daemon, answer) in asked {
            match answer.join().unwrap_or_else(|panic| resume_unwind(panic)) {
                Ok(told) => add(&mut dirs, told),
                Err(e) => eprintln!("nydusctl: nydusd {} at {}: {e:#}", daemon.pid, daemon.socket.display()),
            }
        }
    });
    dirs
}

/// What is not in `dirs` yet; what is not there at all is told to the user.
fn add(dirs: &mut Vec<PathBuf>, told: Vec<PathBuf>) {
    for dir in told {
        match dir.canonicalize() {
            Ok(dir) if dirs.contains(&dir) => {}
            Ok(dir) => dirs.push(dir),
            Err(e) => eprintln!("nydusctl: cache directory {}: {e}", dir.display()),
        }
    }
}

/// The cache directories of a daemon's mounts, as they are reached from here.
fn told_by(daemon: &Found, timeout: Duration) -> anyhow::Result<Vec<PathBuf>> {
    let info: Value = Client::new(&daemon.socket, timeout)?.get("/api/v1/daemon")?;
    let mounts = info["backend_collection"].as_object().into_iter().flat_map(|mounts| mounts.values());
    let dirs = mounts.filter_map(|mount| mount["config"]["cache"]["filecache"]["work_dir"].as_str());
    // As the daemon sees it: from its directory.
    let cwd = PathBuf::from(format!("/proc/{}/cwd", daemon.pid)).read_link().unwrap_or_default();
    Ok(dirs.map(|dir| cwd.join(dir)).collect())
}
