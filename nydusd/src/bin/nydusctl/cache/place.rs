//! Which cache directories there are, where none was named.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;

use crate::client::Client;
use crate::discover::{self, Found};

/// Those of the daemon that was named, or of all that run together with the default one.
///
/// # Errors
/// The named daemon does not answer, or there are none.
pub fn all(socket: Option<&Path>, timeout: Duration) -> anyhow::Result<Vec<PathBuf>> {
    if socket.is_some() {
        let dirs = used(&discover::all(socket)?, timeout);
        match dirs.is_empty() {
            true => bail!("this daemon has no image mounted, and so no cache; --cache-dir names a directory"),
            false => return Ok(dirs),
        }
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

/// The default one.
///
/// # Errors
/// There is none; says which others are in use.
pub fn default(timeout: Duration) -> anyhow::Result<PathBuf> {
    let dir = nydusd::image::default_cache_dir()?;
    if dir.exists() {
        return Ok(dir);
    }
    let others: String = used(&discover::running(), timeout)
        .iter()
        .map(|dir| format!("\n  --cache-dir {}", dir.display()))
        .collect();
    bail!(
        "there is no {}, which is the default cache directory; name another with --cache-dir{others}",
        dir.display()
    )
}

/// The directories that daemons have their caches in, each once.
fn used(daemons: &[Found], timeout: Duration) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for daemon in daemons {
        let info = Client::new(&daemon.socket, timeout).and_then(|client| client.get("/api/v1/daemon"));
        let info = match info {
            Ok(info) => info,
            Err(e) => {
                eprintln!("nydusctl: nydusd {} at {}: {e:#}", daemon.pid, daemon.socket.display());
                continue;
            }
        };
        for mount in info["backend_collection"].as_object().into_iter().flat_map(|mounts| mounts.values()) {
            let Some(dir) = mount["config"]["cache"]["filecache"]["work_dir"].as_str() else { continue };
            // As the daemon sees it: from its directory.
            let cwd = PathBuf::from(format!("/proc/{}/cwd", daemon.pid));
            let dir = cwd.read_link().map_or_else(|_| PathBuf::from(dir), |cwd| cwd.join(dir));
            match dir.canonicalize() {
                Ok(dir) if dirs.contains(&dir) => {}
                Ok(dir) => dirs.push(dir),
                Err(e) => {
                    eprintln!("nydusctl: cache directory {} of nydusd {}: {e}", dir.display(), daemon.pid)
                }
            }
        }
    }
    dirs
}
