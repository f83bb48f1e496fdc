//! Traces in the registry: an artifact that refers to the image, so that the first start on one
//! node knows what a start on another node has read.
//!
//! Reading is part of a mount by image name and runs beside it: whatever goes wrong costs a
//! warning. Writing is opt-in, by `--push-trace` or `nydusctl trace push`, with the login that
//! fetched the image.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use storage::backend::{Priority, ReadContext};
use storage::oci::referrers::Subject;

use super::{Document, Identity, MAX_DOCUMENT, Trace};

/// Type of the artifact and of the document in it.
pub const ARTIFACT_TYPE: &str = "application/vnd.nydus.trace.v1+json";

/// One new chunk in so many is worth a push: starts differ a little, and many nodes would push each time.
const WORTH: usize = 50;

/// How long a registry may take: a start is over by then, or a command has waited enough.
const PATIENCE: Duration = Duration::from_secs(30);

/// How one image's trace is shared.
#[derive(Clone, Debug)]
pub struct Share {
    /// The image's manifest.
    pub subject: Subject,
    /// Push what was recorded.
    pub push: bool,
}

/// The trace that the registry has of the image, if there is one.
///
/// # Errors
/// The registry does not answer, or what it has is damaged or of another image.
pub(super) async fn pull(subject: &Subject, identity: &Identity) -> anyhow::Result<Option<Trace>> {
    let found = subject.fetch(ARTIFACT_TYPE, MAX_DOCUMENT, &context()).await?;
    found.map(|bytes| Document::parse(&bytes)?.trace(identity)).transpose()
}

/// Pushes `ours`, merged with what the registry has. Answers the artifact's digest; `None` if
/// the registry has about all of it.
///
/// # Errors
/// Those of the registry.
pub(super) async fn push(
    subject: &Subject,
    identity: &Identity,
    ours: &Trace,
    document: impl FnOnce(&Trace) -> Document,
) -> anyhow::Result<Option<String>> {
    let theirs = pull(subject, identity).await.unwrap_or_else(|e| {
        tracing::warn!("the trace in the registry is replaced: {e:#}");
        None
    });
    let known: HashSet<_> = theirs.iter().flat_map(|trace| &trace.entries).map(|entry| entry.chunk).collect();
    let new = ours.entries.iter().filter(|entry| !known.contains(&entry.chunk)).count();
    if !is_worth(new, known.len()) {
        return Ok(None);
    }
    let order: Vec<_> = ours.entries.iter().map(|entry| entry.chunk).collect();
    let merged = theirs.map_or_else(|| ours.clone(), |theirs| theirs.merged(&order));
    let bytes = document(&merged).to_json()?;
    let digest = subject.push(ARTIFACT_TYPE, bytes, &context()).await.context("push the trace")?;
    Ok(Some(digest.to_string()))
}

/// Are `new` chunks worth a push to who knows `known`?
fn is_worth(new: usize, known: usize) -> bool {
    new > 0 && new.saturating_mul(WORTH) >= known
}

fn context() -> ReadContext {
    ReadContext { priority: Priority::Prefetch, ..ReadContext::on_demand(Some(Instant::now() + PATIENCE)) }
}

#[cfg(test)]
mod tests {
    use super::is_worth;

    #[test]
    fn a_little_that_is_new_is_not_pushed() {
        for (new, known, worth) in
            [(0, 0, false), (1, 0, true), (1, 50, true), (1, 51, false), (9, 1000, false), (20, 1000, true)]
        {
            assert_eq!(is_worth(new, known), worth, "{new} new, {known} known");
        }
    }
}
