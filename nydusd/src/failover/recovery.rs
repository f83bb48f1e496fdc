//! Requests that a daemon took and did not answer before it was gone.

use std::io::Write as _;

use crate::cli::FailoverPolicy;
use crate::transport::fusedev::{FuseMount, Recovery};
use crate::transport::seat::ConnectionFile;

/// Does with them as `policy` says, as far as the kernel can; what it can not is logged. Call it
/// before the mount is served.
pub(super) fn recover(fuse: &FuseMount, policy: FailoverPolicy) {
    let (recovery, file) = match policy {
        FailoverPolicy::None => return,
        FailoverPolicy::Resend => (Recovery::Answer, ConnectionFile::Resend),
        FailoverPolicy::Flush => (Recovery::Refuse, ConnectionFile::Flush),
    };
    let Err(refused) = fuse.recover(recovery) else { return };
    // Some kernels before 6.9 have a file for it.
    if fuse.connection_file(file).and_then(|mut file| file.write_all(b"1")).is_err() {
        tracing::warn!(
            "the kernel does not give out again what the daemon before this one took ({refused}); whoever \
             waits for that waits until killed"
        );
    }
}
