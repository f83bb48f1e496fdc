//! Ways to the kernel.

pub mod fusedev;
mod message;
mod mounted;

#[cfg(test)]
mod tests;
