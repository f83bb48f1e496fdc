//! Files are made as whoever asked for them: their owner, their group (or that of the directory, where it
//! is set so), and their umask, which a default ACL of the directory overrides.

use std::cell::Cell;
use std::io;

use fuse_backend_rs::api::filesystem::Context;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, geteuid, setfsgid, setfsuid};
use rustix::thread::{CapabilitiesSecureBits, capabilities_secure_bits, set_capabilities_secure_bits};

thread_local! {
    /// This thread has an umask of its own, and keeps its capabilities with another owner for new files.
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Has this thread's umask and file system ids concern nobody else.
fn prepare() -> io::Result<()> {
    if PREPARED.get() {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_FS)?;
    if geteuid().is_root() {
        // The kernel has checked what the caller may do; the host must not check again without
        // knowing all of the caller's groups. A sandboxed daemon has that from its start.
        let bits = capabilities_secure_bits()?;
        if !bits.contains(CapabilitiesSecureBits::NO_SETUID_FIXUP) {
            set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
        }
    }
    PREPARED.set(true);
    Ok(())
}

/// Runs `make`, which makes a file, as the caller.
pub(super) fn acting_as<T>(
    context: &Context,
    mask: u32,
    make: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    prepare()?;
    let _guard = Acting::new(context, mask)?;
    make()
}

/// Gives the thread back what it had, also if what it does panics.
struct Acting {
    uid: Uid,
    gid: Gid,
    mask: Mode,
}

impl Acting {
    /// EPERM: this daemon may not act as the caller.
    fn new(context: &Context, mask: u32) -> io::Result<Self> {
        let (uid, gid) = (Uid::from_raw(context.uid), Gid::from_raw(context.gid));
        let acting =
            Self { gid: setfsgid(gid), uid: setfsuid(uid), mask: umask(Mode::from_bits_truncate(mask)) };
        // The kernel refuses silently. Nobody has the last id, and asking for it tells the present one.
        let present = (setfsuid(Uid::from_raw(u32::MAX)), setfsgid(Gid::from_raw(u32::MAX)));
        if present != (uid, gid) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        setfsuid(self.uid);
        setfsgid(self.gid);
        umask(self.mask);
    }
}
