//! Requests that a daemon took and did not answer before it was gone.

use std::io;
use std::path::Path;

use crate::cli::FailoverPolicy;
use crate::transport::fusedev::{FuseMount, Recovery};

/// Where kernels have the requests of a connection in files.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// Does with them as `policy` says, as far as the kernel can; what it can not is logged. Call it
/// before the mount is served.
pub(super) fn recover(fuse: &FuseMount, policy: FailoverPolicy) {
    let (recovery, file) = match policy {
        FailoverPolicy::None => return,
        FailoverPolicy::Resend => (Recovery::Answer, "resend"),
        FailoverPolicy::Flush => (Recovery::Refuse, "flush"),
    };
    let Err(refused) = fuse.recover(recovery) else { return };
    // Some kernels before 6.9 have a file for it.
    let wrote = fuse.number().map_err(io::Error::other).and_then(|number| {
        let path = Path::new(CONNECTIONS).join(number.to_string()).join(file);
        std::fs::OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|mut file| io::Write::write_all(&mut file, b"1"))
    });
    if wrote.is_err() {
        tracing::warn!(
            "the kernel does not give out again what the daemon before this one took ({refused}); whoever \
             waits for that waits until killed"
        );
    }
}
