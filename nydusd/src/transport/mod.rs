//! Ways to the kernel.

pub mod fusedev;
mod init;
mod message;
pub(crate) mod mounted;
mod notify;
mod streams;
mod worker;

pub use init::Negotiated;

#[cfg(test)]
mod tests;
