//! The only unsafe code of this crate.

/// A `statvfs64` of zeros, which has no constructor of its own.
pub(crate) fn zeroed_statvfs() -> libc::statvfs64 {
    // SAFETY: `zeroed` wants a type for which all-zero bytes are a valid value: statvfs64 is a
    // C struct of integers and integer arrays only.
    unsafe { std::mem::zeroed() }
}
