//! Ways to the kernel.

mod control;
pub mod fusedev;
mod init;
mod message;
pub(crate) mod mounted;
mod notify;
mod reads;
pub(crate) mod seat;
mod streams;
pub mod uring;
mod worker;

pub use init::Negotiated;

#[cfg(test)]
mod tests;
