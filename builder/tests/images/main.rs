//! Built images before their judges: the golden set, the kernel, and clients of the command.

mod chunkdict;
mod cli;
mod common;
mod compact;
mod damaged;
mod export;
mod golden;
mod kernel;
mod layers;
mod optimize;
mod random;
mod reference;
mod stat;
mod unpack;
mod v5;
