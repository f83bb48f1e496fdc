//! What root keeps: the rights that a cache of any owner needs, and those that making files in a directory of the host
//! does, if that is wanted.

use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, capabilities_secure_bits,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs,
};

use crate::cli::{Front, ServeArgs};

/// To read and write files whoever owns them.
const FILES: CapabilitySet =
    CapabilitySet::CHOWN.union(CapabilitySet::DAC_OVERRIDE).union(CapabilitySet::FOWNER);
/// To make files as whoever asks, of any kind.
const MAKING: CapabilitySet = CapabilitySet::FSETID
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::MKNOD);

/// Ports below this one are root's.
const FIRST_FREE_PORT: u16 = 1024;

/// Gives all others up, for good: nothing that is executed gets them back. False if that is not wanted.
///
/// # Errors
/// The system refuses.
pub(super) fn drop(front: &Front, args: &ServeArgs) -> anyhow::Result<bool> {
    if args.sandbox.keep_capabilities {
        return Ok(false);
    }
    let mut kept = FILES;
    if front.is_writable() {
        kept |= MAKING;
    }
    if args.global.metrics_addr.is_some_and(|address| address.port() < FIRST_FREE_PORT) {
        kept |= CapabilitySet::NET_BIND_SERVICE;
    }
    // Files are made as somebody else later, when this can not be said any more: see `crate::passthrough`.
    let bits = capabilities_secure_bits()? | CapabilitiesSecureBits::NO_SETUID_FIXUP;
    set_capabilities_secure_bits(bits)?;
    for capability in CapabilitySet::from_bits_retain(u64::MAX).difference(kept).iter_names() {
        // Kernels do not know all of them.
        let _ = remove_capability_from_bounding_set(capability.1);
    }
    clear_ambient_capability_set()?;
    let has = capabilities(None)?.permitted & kept;
    set_capabilities(
        None,
        CapabilitySets { effective: has, permitted: has, inheritable: CapabilitySet::empty() },
    )?;
    set_no_new_privs(true)?;
    Ok(true)
}
