//! Ways to the kernel.

pub mod fusedev;
mod message;

#[cfg(test)]
mod tests;
