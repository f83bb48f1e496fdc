//! `nydus-image` as programs drive it: command lines word for word, FIFOs on both sides, streams
//! and files read by nothing of ours.
//!
//! [`statements`] is a table with a row for each thing that clients rely on; [`converter`] replays
//! the image converter of containerd, [`snapshotter`] the tarfs chain of nydus-snapshotter, and
//! [`partners`] what happens when the other end of a FIFO dies. [`checking`] has `check` find every fault,
//! wherever the data is.

mod checking;
mod client;
mod converter;
mod partners;
mod snapshotter;
mod statements;
mod stream;
