//! Blobs of servers that ignore `Range`: read once from front to end, kept in a file without
//! a name, and read from there.
//!
//! ```text
//!   server ──one stream──▶ filler ──▶ file ──▶ readers: each waits until its range is there
//!                             └─ how far, or why not ─▶┘
//! ```
//!
//! Such servers and proxies send the whole blob for every range; to skip to each range would
//! transfer the blob many times. Invariants: at most one stream of a blob runs at a time; what
//! it brought is kept while the blob is open, also when the stream breaks, unless it was wrong. The
//! file has no name, so that nothing is left behind; its bytes are checked as those of any source.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::ranged::Part;
use super::retry::{Failure, within};
use super::{ByteStream, ReadContext};
use crate::ids::ByteRange;
use crate::{Error, ErrorKind, Result};

/// Bytes a reader takes from the file at once.
const READ_SIZE: u64 = 256 << 10;
/// Pieces of a stream written at once: as many as are there, at most about a megabyte.
const WRITE_PIECES: usize = 32;
/// So long nothing is asked for where nothing can be kept: all that was kept already would come again first.
const LOCAL_PAUSE: Duration = Duration::from_secs(60);
/// A blob whose bytes were wrong is read once more. Should they be wrong again, it is not for so long: they are
/// probably wrong at its source, and it may be large.
const RENEW_PAUSE: Duration = Duration::from_secs(600);

/// How far a stream has come.
#[derive(Clone, Debug, Default)]
struct Progress {
    reached: u64,
    /// It has ended before the end of the blob.
    failed: Option<Failed>,
}

/// Why a stream is over.
#[derive(Clone, Debug)]
struct Failed {
    error: Error,
    /// Another may come further.
    passing: bool,
    /// Nothing can be kept here, as of then.
    local: Option<Instant>,
}

impl Failed {
    fn local(error: Error) -> Self {
        Self { error, passing: false, local: Some(Instant::now()) }
    }

    /// The error, while another attempt would end like this one.
    fn stands(&self) -> Option<&Error> {
        self.local.filter(|at| at.elapsed() < LOCAL_PAUSE).map(|_| &self.error)
    }
}

/// One stream of the blob, running or ended, and the file it fills.
#[derive(Debug)]
struct Filling {
    file: Arc<File>,
    /// Of the whole blob.
    size: u64,
    progress: watch::Receiver<Progress>,
    /// Ends the stream with the last reader and the blob.
    _stop: DropGuard,
}

/// The file behind one blob.
#[derive(Debug)]
pub(super) struct Spool {
    dir: PathBuf,
    /// Held while nobody knows whether the blob has to be read in sequence.
    pub(super) first: tokio::sync::Mutex<()>,
    /// Short, never held across an await.
    state: Mutex<State>,
    /// Makes the file.
    pub(super) make: fn(&Path) -> std::io::Result<File>,
}

#[derive(Debug, Default)]
struct State {
    filling: Option<Arc<Filling>>,
    /// There was no file to fill.
    blocked: Option<Failed>,
    /// When what was kept was last thrown away.
    renewed: Option<Instant>,
}

impl Spool {
    /// Keeps its file in `dir`.
    pub(super) fn new(dir: PathBuf) -> Self {
        let make = |dir: &Path| tempfile::tempfile_in(dir);
        Self { dir, first: tokio::sync::Mutex::default(), state: Mutex::default(), make }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while holding it; were it so, every field is still valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True once a stream was begun.
    pub(super) fn is_begun(&self) -> bool {
        self.state().filling.is_some()
    }

    /// Bytes of it were wrong: the file is dropped, and the next reader begins another one. Not twice in
    /// [`RENEW_PAUSE`].
    pub(super) fn distrust(&self) {
        let mut state = self.state();
        if state.filling.is_some() && state.renewed.is_none_or(|at| at.elapsed() >= RENEW_PAUSE) {
            state.filling = None;
            state.renewed = Some(Instant::now());
        }
    }

    /// Reads `range` from the file while a stream fills it. `None`: no stream was begun, or
    /// it has failed before the range was complete: [`Spool::begin`] one.
    ///
    /// # Errors
    /// `OutOfRange`: the blob ends before the range. Why nothing can be kept here, for a while.
    pub(super) fn read(&self, range: ByteRange) -> Result<Option<SpoolReader>> {
        let filling = {
            let state = self.state();
            if let Some(error) = state.blocked.as_ref().and_then(Failed::stands) {
                return Err(error.clone());
            }
            state.filling.clone()
        };
        let Some(filling) = filling else { return Ok(None) };
        if range.end() > filling.size {
            let why = format!("the blob has {} bytes, {range} was asked for", filling.size);
            return Err(Error::new(ErrorKind::OutOfRange, why));
        }
        let stopped = {
            let progress = filling.progress.borrow();
            let failed = progress.failed.as_ref().filter(|_| progress.reached < range.end());
            if let Some(error) = failed.and_then(Failed::stands) {
                return Err(error.clone());
            }
            failed.is_some()
        };
        Ok((!stopped).then(|| SpoolReader { filling, rest: range }))
    }

    /// Bytes that are kept already: a stream that is to be begun starts there.
    pub(super) fn reached(&self) -> u64 {
        self.state().filling.as_ref().map_or(0, |filling| filling.progress.borrow().reached)
    }

    /// Reads `range` while `stream` brings `rest`, which reaches to the end of the blob. The
    /// stream is dropped if another one runs already.
    ///
    /// # Errors
    /// `Io`, `Denied`, `NotFound`: no file can be made.
    pub(super) fn begin(
        &self,
        range: ByteRange,
        rest: ByteRange,
        context: &ReadContext,
        stream: ByteStream,
    ) -> Result<SpoolReader> {
        let mut state = self.state();
        let running = state.filling.as_ref().filter(|filling| filling.progress.borrow().failed.is_none());
        if let Some(filling) = running {
            return Ok(SpoolReader { filling: Arc::clone(filling), rest: range });
        }
        let (file, reached) = match &state.filling {
            Some(ended) => (Arc::clone(&ended.file), ended.progress.borrow().reached),
            None => {
                let made = self.file();
                state.blocked = made.as_ref().err().map(|error| Failed::local(error.clone()));
                (Arc::new(made?), 0)
            }
        };
        let from = rest.start();
        if from > reached {
            return Err(Error::new(ErrorKind::Unavailable, "a stream that leaves a gap"));
        }
        let (sender, progress) = watch::channel(Progress { reached, failed: None });
        let _stop = context.cancel.clone().drop_guard();
        let filling = Arc::new(Filling { file: Arc::clone(&file), size: rest.end(), progress, _stop });
        state.filling = Some(Arc::clone(&filling));
        let cancel = context.cancel.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = fill(file, from, stream, sender) => {}
            }
        });
        Ok(SpoolReader { filling, rest: range })
    }

    fn file(&self) -> Result<File> {
        (self.make)(&self.dir).map_err(|e| Error::io(format!("{} in {}", unkept(), self.dir.display()), e))
    }

    /// A context for a stream that nobody in particular waits for: it ends with the blob.
    pub(super) fn context() -> ReadContext {
        ReadContext { cancel: CancellationToken::new(), ..ReadContext::on_demand(None) }
    }
}

/// What failed where nothing can be kept, and what helps.
fn unkept() -> &'static str {
    "keep a blob whose server ignores Range (make room, or use a server that supports ranges)"
}

/// Writes `stream` to `file` from `position` on.
async fn fill(file: Arc<File>, mut position: u64, stream: ByteStream, progress: watch::Sender<Progress>) {
    let fail = |failed: Failed| {
        tracing::warn!(error = %failed.error, "a blob is read in sequence, and its stream ended early");
        progress.send_modify(|p| p.failed = Some(failed));
    };
    let mut pieces = stream.ready_chunks(WRITE_PIECES);
    while let Some(ready) = pieces.next().await {
        let mut batch = Vec::with_capacity(ready.len());
        let mut failed = None;
        for piece in ready {
            match piece {
                Ok(piece) => batch.push(piece),
                Err(error) => failed = Some(error),
            }
        }
        let target = Arc::clone(&file);
        let written = tokio::task::spawn_blocking(move || {
            for piece in batch {
                target.write_all_at(&piece, position)?;
                position += piece.len() as u64;
            }
            Ok::<_, std::io::Error>(position)
        })
        .await;
        match written {
            Ok(Ok(reached)) => position = reached,
            Ok(Err(e)) => return fail(Failed::local(Error::io(unkept(), e))),
            // The runtime ends, and all readers with it.
            Err(_) => return,
        }
        progress.send_modify(|p| p.reached = p.reached.max(position));
        if let Some(error) = failed {
            let passing = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut);
            return fail(Failed { error, passing, local: None });
        }
    }
}

/// A range of the file, as it fills.
#[derive(Debug)]
pub(super) struct SpoolReader {
    filling: Arc<Filling>,
    rest: ByteRange,
}

impl Part for SpoolReader {
    async fn next(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let start = self.rest.start();
        let mut progress = self.filling.progress.clone();
        let seen = within(context, "wait for a blob that is read in sequence", async {
            let seen = progress.wait_for(|p| p.reached > start || p.failed.is_some()).await;
            seen.map(|seen| seen.clone()).map_err(|_| Error::new(ErrorKind::Cancelled, "the blob is closed"))
        })
        .await?;
        if seen.reached <= start {
            let (error, passing) = match seen.failed {
                Some(Failed { error, passing, .. }) => (error, passing),
                None => (Error::new(ErrorKind::Unavailable, "no progress"), true),
            };
            return Err(Failure { error, passing, retry_after: None });
        }
        let len = (seen.reached - start).min(self.rest.len()).min(READ_SIZE);
        let file = Arc::clone(&self.filling.file);
        let read = tokio::task::spawn_blocking(move || {
            // At most READ_SIZE.
            let mut bytes = BytesMut::zeroed(len as usize);
            file.read_exact_at(&mut bytes, start)?;
            Ok::<_, std::io::Error>(bytes.freeze())
        });
        let bytes = read
            .await
            .map_err(|e| Error::new(ErrorKind::Cancelled, "the engine ends").with_source(e))?
            .map_err(|e| Error::io("read a blob that was kept", e))?;
        self.rest = ByteRange::new(start + len, self.rest.len() - len)?;
        Ok(Some(bytes))
    }
}
