//! Ways to the kernel.

pub mod fusedev;
mod init;
mod message;
mod mounted;
mod notify;
mod worker;

pub use init::Negotiated;

#[cfg(test)]
mod tests;
