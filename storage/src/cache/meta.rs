//! Keeps a blob's context beside its data, for tools that look for it there.
//!
//! Nobody waits for it: it is fetched once, at prefetch priority, after the first chunk
//! came through. Whoever reads the file validates it; here it is only moved.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use super::data_file::{Storage as _, hold_directory, open_own, replace};
use super::duty::Duty;
use super::{Inner, MetaSpec};
use crate::backend::retry::within;
use crate::backend::{Priority, ReadContext};
use crate::{Error, ErrorKind, Result, engine};

/// Stored bytes of a context: header and framing, and what one chunk adds at most.
const MAX_STORED: u64 = 64 << 10;
const MAX_STORED_CHUNK: u64 = 64;

/// A moment is quiet when no reader has waited for this long.
const QUIET: Duration = Duration::from_secs(2);

/// Fetches and writes the context file if that was asked for and has not been tried.
pub(super) fn keep(inner: &Arc<Inner>) {
    let Some(wish) = take(inner) else { return };
    let task = Arc::clone(inner);
    inner.engine.spawn(async move {
        if let Err(error) = fetch(&task, wish).await {
            debug!(blob = %task.id, %error, "the blob context is not kept");
        }
    });
}

/// The same, waited for.
pub(super) async fn keep_now(inner: &Inner) -> Result<()> {
    match take(inner) {
        Some(wish) => fetch(inner, wish).await,
        None => Ok(()),
    }
}

fn take(inner: &Inner) -> Option<(MetaSpec, PathBuf)> {
    inner.meta.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
}

async fn fetch(inner: &Inner, (spec, path): (MetaSpec, PathBuf)) -> Result<()> {
    if spec.range.len() > MAX_STORED + MAX_STORED_CHUNK * u64::from(inner.chunk_count) {
        let what = format!("blob {}: a context of {} bytes", inner.id, spec.range.len());
        return Err(Error::new(ErrorKind::OutOfRange, what));
    }
    if open_own(&path)?.is_some() {
        return Ok(());
    }
    let context = ReadContext {
        priority: Priority::Prefetch,
        deadline: None,
        cancel: inner.cancel.child_token(),
        ..ReadContext::on_demand(None)
    };
    // A start wants other bytes first.
    within(&context, "wait for a quiet moment", async {
        inner.engine.link().quiet(QUIET).await;
        Ok::<_, Error>(())
    })
    .await?;
    // Another process may have had a quiet moment first, or have it now.
    let duty = inner.files().and_then(|files| files.map.duties.try_take(Duty::Context).transpose());
    let Some(_duty) = duty.transpose().map_err(|e| Error::io("lock the chunk map", e))? else {
        // Should that one fail, the next chunk that comes tries again.
        *inner.meta.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((spec, path));
        return Ok(());
    };
    if open_own(&path)?.is_some() {
        return Ok(());
    }
    let stored = engine::fetch(&*inner.backend, spec.range, &context).await?;
    inner
        .engine
        .blocking(move || {
            let Some(bytes) = (spec.to_cache_file)(&stored) else {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            };
            let Some(directory) = path.parent() else { return Ok(()) };
            let _held = hold_directory(directory).map_err(io::Error::other)?;
            replace(&path, |file| file.write_at(&bytes, 0)).map(drop)
        })
        .await?
        .map_err(|e| Error::io(format!("blob {}: write the context file", inner.id), e))
}
