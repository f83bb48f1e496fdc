//! What a front end reads with: slices of chunks in, verified bytes out.

use std::time::{Duration, Instant};

use crate::Result;
use crate::backend::Priority;
use crate::extent::ChunkExtent;

/// A piece of one chunk of one blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadSlice {
    /// Place of the blob in the image's blob table.
    pub blob: u32,
    /// The chunk.
    pub extent: ChunkExtent,
    /// First byte wanted inside the chunk.
    pub offset: u32,
    /// Bytes wanted; `offset + len <= extent.len`.
    pub len: u32,
}

/// What to do about a source that does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutagePolicy {
    /// Fail the read this long after it was asked, all retries included.
    FailAfter(Duration),
    /// Wait for ever.
    Wait,
}

impl OutagePolicy {
    /// The default of the configuration's `read_timeout`.
    pub const DEFAULT: Self = Self::FailAfter(Duration::from_secs(60));

    /// The deadline of a read that starts now.
    pub fn deadline(self) -> Option<Instant> {
        match self {
            Self::FailAfter(after) => Instant::now().checked_add(after),
            Self::Wait => None,
        }
    }
}

/// Called exactly once with the bytes of all slices in order, on a thread of the engine, or,
/// if the engine is shut down, with an error on the thread that submits or shuts down.
pub type Completion = Box<dyn FnOnce(Result<Vec<u8>>) + Send>;

/// Verified reads over the blobs of one image.
pub trait Reader: Send + Sync {
    /// Fills `dst` from local, verified data and answers true; or answers false if any
    /// part is missing, leaving `dst` unspecified. Never waits for a source or a lock
    /// held during I/O.
    ///
    /// `dst.len()` is the sum of the slices' lengths.
    ///
    /// # Errors
    /// `OutOfRange`: a slice outside its chunk or blob. `Corrupt`: a chunk without a digest
    /// where only verified ones are served.
    fn try_read(&self, slices: &[ReadSlice], dst: &mut [u8]) -> Result<bool>;

    /// Reads slices, as far as they are local, from the disk into the page cache, in the background. Only a
    /// hint: whatever is wrong with it, the read that follows says so.
    fn will_need(&self, _slices: &[ReadSlice]) {}

    /// Fetches what is missing and hands all bytes to `completion`, on success, failure,
    /// panic and deadline alike. Returns at once.
    fn submit(&self, slices: Vec<ReadSlice>, priority: Priority, completion: Completion);

    /// Fills `dst`, waiting as long as the outage policy allows.
    ///
    /// # Errors
    /// Those of [`Reader::try_read`], and: `Corrupt`: a chunk does not match its digest;
    /// `TimedOut`, `NotFound`, `Denied`, `Unavailable`: the source's answer.
    fn read(&self, slices: &[ReadSlice], dst: &mut [u8]) -> Result<()> {
        if self.try_read(slices, dst)? {
            return Ok(());
        }
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.submit(
            slices.to_vec(),
            Priority::OnDemand,
            Box::new(move |result| {
                // The receiver lives until it has an answer; a failed send has nobody to tell.
                let _ = sender.send(result);
            }),
        );
        let bytes = receiver.recv().map_err(|_| {
            crate::Error::new(crate::ErrorKind::Cancelled, "read: the engine dropped the request")
        })??;
        dst.copy_from_slice(&bytes);
        Ok(())
    }
}
