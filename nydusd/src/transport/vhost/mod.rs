//! Devices of virtual machines: a monitor (VMM) connects to a unix socket, shares the guest's memory and says where in
//! it the rings are; the guest puts requests there.
//!
//! ```text
//!  listener.rs  one monitor after the other
//!  backend.rs   what vhost-user-backend asks of a device
//!  ring.rs      requests taken and given back, by whatever thread, in whatever order
//!  request.rs   one of them: bytes to read and room to write, in the guest's memory
//! ```
//!
//! Nothing that a guest writes is believed: what is looked at is copied first, every address is checked, and a ring that
//! makes no sense is left alone until the guest sets it up anew.

mod backend;
mod listener;
mod request;
mod ring;

pub(super) use self::backend::Device;
pub(super) use self::listener::listen;
pub(super) use self::request::Request;

/// The guest's memory, as it is now.
type Memory = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap>;
