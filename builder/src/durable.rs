//! Names that outlive a power cut.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;

use crate::{Error, Result};

/// Makes the names in `dir` durable, as far as its file system can.
///
/// # Errors
/// `Io`.
pub fn sync_dir(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|d| d.sync_all());
    match synced {
        // A directory that may be written but not read, or one that knows no sync: its names are in place.
        Err(e) if [Errno::EACCES, Errno::EINVAL].iter().any(|&no| e.raw_os_error() == Some(no as i32)) => {
            tracing::debug!("directory {} can not be synced: {e}", dir.display());
            Ok(())
        }
        synced => synced.map_err(|e| Error::io(format!("sync directory {}", dir.display()), e)),
    }
}
