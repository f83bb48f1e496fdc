//! Virtual machines and what stands for them.
//!
//! ```text
//!  machine.rs   QEMU with a real kernel that runs a script
//!  monitor.rs   only the front end of a device, for what no QEMU and no kernel does
//!  fuse.rs      requests through it
//!  device.rs    the daemon behind both
//! ```

pub mod device;
pub mod fuse;
pub mod machine;
pub mod monitor;
