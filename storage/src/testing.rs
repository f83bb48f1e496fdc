//! Backends that lie on plan and count, for tests of whatever stands on a [`Backend`].

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use tokio::sync::watch;

use crate::backend::{Backend, ByteStream, ReadContext, Supplier};
use crate::ids::ByteRange;
use crate::{Error, ErrorKind, Result};

/// What goes wrong with a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The stream ends this many bytes early.
    Shorten(u64),
    /// This many bytes too many arrive.
    Lengthen(usize),
    /// The byte at this offset of the blob is flipped.
    Corrupt(u64),
    /// The request fails.
    Fail(ErrorKind),
    /// Nothing arrives until the gate is opened.
    Stall(Gate),
    /// The first bytes arrive, the others when the gate is opened.
    StallWithin(Gate),
    /// The request fails once the gate is opened.
    FailLate(Gate, ErrorKind),
    /// The backend panics.
    Panic,
}

/// A gate that requests wait at and a test opens.
#[derive(Clone, Debug)]
pub struct Gate {
    open: watch::Sender<bool>,
    arrived: watch::Sender<usize>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { open: watch::Sender::new(false), arrived: watch::Sender::new(0) }
    }
}

impl Gate {
    /// Lets everybody through, now and later.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Waits until `count` requests have come to the gate.
    pub async fn arrivals(&self, count: usize) {
        // The sender lives in `self`.
        let _ = self.arrived.subscribe().wait_for(|arrived| *arrived >= count).await;
    }

    /// Waits until the gate is open.
    pub async fn passed(&self) {
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }

    async fn pass(&self) {
        self.arrived.send_modify(|arrived| *arrived += 1);
        self.passed().await;
    }
}

/// A blob in memory whose requests go wrong on plan.
#[derive(Debug, Default)]
pub struct FaultyBackend {
    blob: Bytes,
    plan: Mutex<Vec<(ByteRange, Fault, usize)>>,
}

impl FaultyBackend {
    /// A backend of `blob` without faults so far.
    pub fn new(blob: impl Into<Bytes>) -> Self {
        Self { blob: blob.into(), plan: Mutex::default() }
    }

    /// The next `times` requests that touch `range` meet `fault`.
    pub fn fault(&self, range: ByteRange, fault: Fault, times: usize) {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).push((range, fault, times));
    }

    fn next_fault(&self, range: ByteRange) -> Option<Fault> {
        let mut plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        let touches = |r: ByteRange| r.start() < range.end() && range.start() < r.end();
        let (_, fault, times) = plan.iter_mut().find(|(r, _, times)| *times > 0 && touches(*r))?;
        *times -= 1;
        Some(fault.clone())
    }
}

impl Backend for FaultyBackend {
    fn size<'a>(&'a self, _: &'a ReadContext) -> BoxFuture<'a, Result<u64>> {
        async { Ok(self.blob.len() as u64) }.boxed()
    }

    fn open<'a>(&'a self, range: ByteRange, _: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>> {
        async move {
            let outside = || Error::new(ErrorKind::OutOfRange, format!("bytes {range} of a test blob"));
            let (start, end) = (range.start() as usize, range.end() as usize);
            let mut within = None;
            let mut bytes = self.blob.get(start..end).ok_or_else(outside)?.to_vec();
            match self.next_fault(range) {
                None => {}
                Some(Fault::Shorten(by)) => bytes.truncate(bytes.len().saturating_sub(by as usize)),
                Some(Fault::Lengthen(by)) => bytes.resize(bytes.len() + by, 0),
                Some(Fault::Corrupt(at)) => {
                    if let Some(byte) =
                        at.checked_sub(range.start()).and_then(|at| bytes.get_mut(at as usize))
                    {
                        *byte ^= 1;
                    }
                }
                Some(Fault::Fail(kind)) => return Err(Error::new(kind, "a fault on plan")),
                Some(Fault::FailLate(gate, kind)) => {
                    gate.pass().await;
                    return Err(Error::new(kind, "a late fault on plan"));
                }
                Some(Fault::Stall(gate)) => gate.pass().await,
                Some(Fault::StallWithin(gate)) => within = Some(gate),
                Some(Fault::Panic) => panic!("a panic on plan"),
            }
            // Pieces that fit no boundary.
            let pieces: Vec<_> = bytes.chunks(1009).map(|p| Ok(Bytes::copy_from_slice(p))).collect();
            let pieces = stream::iter(pieces.into_iter().enumerate()).then(move |(number, piece)| {
                let gate = within.clone().filter(|_| number == 1);
                async move {
                    if let Some(gate) = gate {
                        gate.pass().await;
                    }
                    piece
                }
            });
            Ok(ByteStream::new(Supplier::Local, pieces))
        }
        .boxed()
    }
}

/// Notes every request to the backend inside.
pub struct CountingBackend<B> {
    inner: B,
    requests: Mutex<Vec<ByteRange>>,
}

impl<B: Backend> CountingBackend<B> {
    /// Wraps `inner`.
    pub fn new(inner: B) -> Arc<Self> {
        Arc::new(Self { inner, requests: Mutex::default() })
    }

    /// The backend inside.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// All ranges asked for, in order.
    pub fn requests(&self) -> Vec<ByteRange> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// True if no range was asked for twice.
    pub fn each_once(&self) -> bool {
        let requests = self.requests();
        requests.iter().collect::<HashSet<_>>().len() == requests.len()
    }
}

impl<B: fmt::Debug> fmt::Debug for CountingBackend<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CountingBackend").field(&self.inner).finish()
    }
}

impl<B: Backend> Backend for CountingBackend<B> {
    fn size<'a>(&'a self, context: &'a ReadContext) -> BoxFuture<'a, Result<u64>> {
        self.inner.size(context)
    }

    fn open<'a>(&'a self, range: ByteRange, context: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push(range);
        self.inner.open(range, context)
    }
}
