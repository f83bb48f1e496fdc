//! Where bytes come from: one read-only source for one blob.

pub mod breaker;
#[cfg(test)]
pub(crate) mod fault_server;
pub mod health;
mod hedge;
pub mod http;
pub mod http_proxy;
pub mod layout;
pub mod localdisk;
pub mod localfs;
mod multipart;
pub mod object;
pub mod origin;
mod ranged;
pub mod registry;
pub mod retry;
mod sequential;

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

pub use multipart::MAX_MANY_RANGES;

use crate::Result;
use crate::ids::{BlobId, ByteRange};
use crate::metrics::OriginSnapshot;
use crate::oci::auth::Credentials;

/// Who waits for the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Nobody: background reading that yields to on-demand reading.
    Prefetch,
    /// A reader.
    OnDemand,
}

/// What a backend may know about the request behind a read.
#[derive(Clone, Debug)]
pub struct ReadContext {
    /// Who waits.
    pub priority: Priority,
    /// When the answer is worthless, all retries included; `None` waits for ever.
    pub deadline: Option<Instant>,
    /// Fires when nobody wants the bytes any more.
    pub cancel: CancellationToken,
    /// Counts the requests that were sent again.
    pub retries: Arc<AtomicU64>,
}

impl ReadContext {
    /// An on-demand read with a deadline, cancelled by nobody, with a count of its own.
    pub fn on_demand(deadline: Option<Instant>) -> Self {
        Self {
            priority: Priority::OnDemand,
            deadline,
            cancel: CancellationToken::new(),
            retries: Arc::default(),
        }
    }
}

/// Who served bytes, as metrics and reports tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Supplier {
    /// A disk of this node: `localfs`, `localdisk`, an OCI layout.
    Local,
    /// The registry or object store that the configuration names, or where it redirects to.
    Origin,
    /// A mirror of it.
    Mirror,
    /// A proxy that keeps what it has seen.
    Proxy,
    /// Another node.
    Peer,
}

/// Who sent bytes: its kind, and which of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Its kind.
    pub supplier: Supplier,
    /// Its place among the ways to the blob that are tried before the source itself, from 1; 0 is the source.
    pub way: usize,
}

impl From<Supplier> for Sender {
    /// The source itself.
    fn from(supplier: Supplier) -> Self {
        Self { supplier, way: 0 }
    }
}

/// The bytes of a range, in order, in pieces of the transport's choosing.
///
/// A stream that ends early or yields more than the range is a fault of the backend;
/// the reader checks the count.
pub struct ByteStream {
    /// Short, never held across an await.
    sender: Arc<Mutex<Sender>>,
    stream: Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>,
}

impl ByteStream {
    /// The pieces that `supplier` sends.
    pub fn new(supplier: Supplier, stream: impl Stream<Item = Result<Bytes>> + Send + 'static) -> Self {
        Self::changing(Arc::new(Mutex::new(supplier.into())), stream)
    }

    /// The same, where another one may go on: `sender` says who sent the last piece.
    pub(crate) fn changing(
        sender: Arc<Mutex<Sender>>,
        stream: impl Stream<Item = Result<Bytes>> + Send + 'static,
    ) -> Self {
        Self { sender, stream: Box::pin(stream) }
    }

    /// Who sent the last piece, or sends the first.
    pub fn sender(&self) -> Sender {
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its kind.
    pub fn supplier(&self) -> Supplier {
        self.sender().supplier
    }
}

impl Stream for ByteStream {
    type Item = Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stream.as_mut().poll_next(context)
    }
}

impl fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByteStream").field("sender", &self.sender()).finish_non_exhaustive()
    }
}

/// A read-only source of one blob's bytes.
///
/// Bulk streams, hedging and peers fit behind these two calls. Implementations own
/// their retries: an error is final for this deadline.
pub trait Backend: Send + Sync + fmt::Debug + 'static {
    /// Length of the blob in bytes, as stored.
    fn size<'a>(&'a self, context: &'a ReadContext) -> BoxFuture<'a, Result<u64>>;

    /// Starts reading `range`, which is not empty.
    fn open<'a>(&'a self, range: ByteRange, context: &'a ReadContext) -> BoxFuture<'a, Result<ByteStream>>;

    /// Starts reading several ranges with one request: their bytes one behind the other, in
    /// the order of `ranges`, which do not overlap and are not empty. `None`: this source has
    /// no such request; the caller asks range by range. More than [`MAX_MANY_RANGES`] are asked
    /// for in several requests, one behind the other.
    fn open_many<'a>(
        &'a self,
        ranges: &'a [ByteRange],
        context: &'a ReadContext,
    ) -> BoxFuture<'a, Result<Option<ByteStream>>> {
        let _ = (ranges, context);
        Box::pin(async { Ok(None) })
    }

    /// Bytes of this blob that `sender` sent were wrong. True: from now on somebody else is asked for it.
    fn distrust(&self, sender: Sender) -> bool {
        let _ = sender;
        false
    }
}

/// Opens the blobs of one configured place (directory, repository, layout) by name.
pub trait BlobSource: Send + Sync + fmt::Debug + 'static {
    /// The word for it in configuration and metrics: `localfs`, `registry`, `oci-layout`, …
    fn kind(&self) -> &'static str;

    /// A backend for the blob `id`. Does no I/O: a missing blob shows at the first read.
    ///
    /// # Errors
    /// `Invalid`: the id is not one this place can hold.
    fn blob(&self, id: &BlobId) -> Result<Arc<dyn Backend>>;

    /// The same for a blob of which the first `stored_size` bytes are all that is read: its length, or what comes
    /// before the bootstrap in it. A source that is sent something else in place of the blob knows it by that.
    ///
    /// # Errors
    /// As [`BlobSource::blob`].
    fn blob_of_size(&self, id: &BlobId, stored_size: u64) -> Result<Arc<dyn Backend>> {
        let _ = stored_size;
        self.blob(id)
    }

    /// Logs in with `credentials` from the next request on. False: logins mean nothing here.
    fn set_credentials(&self, credentials: Credentials) -> bool {
        let _ = credentials;
        false
    }

    /// The servers that were spoken to, by name; none where there are no servers.
    fn origins(&self) -> Vec<OriginSnapshot> {
        Vec::new()
    }
}
