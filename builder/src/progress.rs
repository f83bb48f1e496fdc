//! Telling a front end how far long work is, and hearing from it that nobody wants it any more.
//!
//! Libraries never print: they report to an [`Observer`], which draws bars or writes lines.

use std::io::{self, Read};

use tokio_util::sync::CancellationToken;

use crate::{Error, ErrorKind, Result};

/// What is being done to one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// A source layer is read, decompressed, cut and stored.
    Read,
    /// A finished object goes to the target.
    Write,
}

/// Hears about the parts of a piece of work.
pub trait Observer: Send + Sync {
    /// A part of `total` bytes (if known) begins.
    fn begin(&self, activity: Activity, name: &str, total: Option<u64>) -> Box<dyn Meter>;

    /// A step that has no length is done or a fault was coped with.
    fn note(&self, message: &str);
}

/// Counts the bytes of one part. Dropped unfinished, the part failed.
pub trait Meter: Send + Sync {
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);

    /// The part starts over: so many bytes are done.
    fn set(&self, bytes: u64);

    /// All is done; `outcome` says how, if it is worth a word (`exists already`).
    fn finish(&self, outcome: &str);
}

/// Nobody listens.
#[derive(Debug)]
pub struct Silent;

impl Observer for Silent {
    fn begin(&self, _: Activity, _: &str, _: Option<u64>) -> Box<dyn Meter> {
        Box::new(Self)
    }

    fn note(&self, _: &str) {}
}

impl Meter for Silent {
    fn advance(&self, _: u64) {}
    fn set(&self, _: u64) {}
    fn finish(&self, _: &str) {}
}

/// The error that ends work nobody wants any more.
///
/// # Errors
/// `Cancelled` once `token` has fired.
pub fn check(token: &CancellationToken) -> Result<()> {
    if token.is_cancelled() { Err(Error::new(ErrorKind::Cancelled, "interrupted")) } else { Ok(()) }
}

/// A reader that counts what passes and ends with an error once it is cancelled.
pub struct Watched<R> {
    inner: R,
    meter: std::sync::Arc<dyn Meter>,
    cancel: CancellationToken,
}

impl<R: Read> Watched<R> {
    /// Puts a meter and a cancellation around `inner`.
    pub fn new(inner: R, meter: std::sync::Arc<dyn Meter>, cancel: CancellationToken) -> Self {
        Self { inner, meter, cancel }
    }
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        check(&self.cancel).map_err(Error::into_io)?;
        let got = self.inner.read(buf)?;
        self.meter.advance(got as u64);
        Ok(got)
    }
}
