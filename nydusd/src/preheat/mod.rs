//! Preheating: fetching what nobody reads yet.
//!
//! ```text
//!  configuration, --prefetch-files ──▶ after_mount ─┐
//!  POST /api/v1/prefetch, nydusctl ─────────────────┼─▶ jobs ──▶ order ──▶ Mount::prefetch
//!  nydusd prefetch ──▶ standalone ──────────────────┘     │
//!                                                         ▼
//!                                          GET /api/v1/prefetch, progress
//! ```
//!
//! A job is a few stages, worked off one after the other: each an order of chunks and a class.
//! Readers always go before all of them. Chunks that are there already cost nothing, so that
//! orders may name a chunk twice, and jobs may overlap.

pub mod jobs;
pub mod list;
pub mod order;
pub mod show;
pub mod standalone;

use std::collections::HashSet;
use std::num::NonZeroU64;
use std::sync::Arc;

use rafs::bootstrap::{Blob, Bootstrap, Nid};
use rafs::format::features::BlobFeatures;
use rafs::fs::Rafs;
use storage::prefetch::{Class, Order};

use crate::config::Config;
use crate::mount::Mount;
use crate::trace::{Document, Identity, Trace};

/// What is to be fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The whole image.
    Image,
    /// Files, and directories with all below them, by their absolute paths in the image. Links
    /// are followed inside the image.
    Files(Vec<Vec<u8>>),
    /// The image's prefetch table.
    Table,
    /// The blobs that `nydus-image optimize` has made of what starts of the image read.
    Optimized,
    /// What starts of the image read, in their order.
    Trace(Arc<Trace>),
}

/// A job to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// A word for it: `start`, `all`, `files`, `trace`.
    pub what: &'static str,
    /// What is fetched, one after the other.
    pub stages: Vec<(Class, Wish)>,
    /// Bytes a second at most, as stored; `None`: what the link gives.
    pub bandwidth: Option<NonZeroU64>,
}

/// The wish for what a trace document names, checked against the image of `mount`.
///
/// # Errors
/// It is of another image, or says what can not be.
pub fn trace(mount: &Mount, document: &Document) -> anyhow::Result<Wish> {
    let identity = Identity::new(mount.bootstrap_digest(), mount.rafs().bootstrap().blobs());
    Ok(Wish::Trace(Arc::new(document.trace(&identity)?)))
}

/// What the configuration wants to be fetched after the mount, if anything (contract 2.10).
pub fn after_mount(config: &Config, bootstrap: &dyn Bootstrap) -> Option<Request> {
    let prefetch = &config.prefetch;
    let first = match &config.prefetch_files {
        Some(files) => vec![Wish::Files(files.clone())],
        None => {
            let table = (!bootstrap.prefetch().is_empty()).then_some(Wish::Table);
            is_optimized(bootstrap).then_some(Wish::Optimized).into_iter().chain(table).collect()
        }
    };
    let mut stages: Vec<_> = first.into_iter().map(|wish| (Class::Predicted, wish)).collect();
    if prefetch.all {
        stages.push((Class::Background, Wish::Image));
    }
    let wanted = prefetch.enable && !stages.is_empty();
    wanted.then_some(Request { what: "start", stages, bandwidth: prefetch.bandwidth })
}

/// What the image itself hints at, to be fetched where no start of it is known: what was put together
/// for that, and its prefetch table, unless one asks for everything or the configuration speaks of
/// prefetch.
pub fn hints(config: &Config, bootstrap: &dyn Bootstrap) -> Option<Request> {
    let optimized = is_partly_optimized(bootstrap).then_some(Wish::Optimized);
    let table = names_files(bootstrap).then_some(Wish::Table);
    let stages: Vec<_> = optimized.into_iter().chain(table).map(|wish| (Class::Predicted, wish)).collect();
    let wanted = config.prefetch.hints && !config.prefetch.enable && !stages.is_empty();
    wanted.then_some(Request { what: "hints", stages, bandwidth: config.prefetch.bandwidth })
}

/// True if neither the image nor the configuration names files that a start reads, and nobody has
/// forbidden to look for them.
pub fn is_left_to_follow(config: &Config, bootstrap: &dyn Bootstrap) -> bool {
    let is_known = match &config.prefetch_files {
        Some(_) => config.prefetch.enable,
        None => is_partly_optimized(bootstrap) || names_files(bootstrap),
    };
    config.prefetch.hints && !is_known
}

/// True if the image's prefetch table names some files, and not all of them.
fn names_files(bootstrap: &dyn Bootstrap) -> bool {
    let table = bootstrap.prefetch();
    !table.is_empty() && !table.contains(&bootstrap.root())
}

fn is_optimized(bootstrap: &dyn Bootstrap) -> bool {
    bootstrap.blobs().iter().any(is_of_prefetch_files)
}

/// True if some blobs are marked, and not all that have data.
fn is_partly_optimized(bootstrap: &dyn Bootstrap) -> bool {
    let mut blobs = bootstrap.blobs().iter().filter(|blob| blob.chunk_count > 0);
    is_optimized(bootstrap) && !blobs.all(is_of_prefetch_files)
}

fn is_of_prefetch_files(blob: &Blob) -> bool {
    blob.features.contains(BlobFeatures::IS_SEPARATED_WITH_PREFETCH_FILES)
}

/// A wish as found in an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Chunks {
    /// These first.
    trace: Option<Arc<Trace>>,
    /// Then these blobs.
    blobs: Vec<u32>,
    /// Then these.
    nodes: Vec<Nid>,
    /// Then all of it.
    image: bool,
}

impl Chunks {
    /// Finds what is wished for; names of files that are not there go to `missing`. Gives up when `stop`
    /// says so.
    fn resolve(rafs: &Rafs, wish: &Wish, mut missing: impl FnMut(&[u8]), stop: impl Fn() -> bool) -> Self {
        let bootstrap = rafs.bootstrap();
        match wish {
            Wish::Image => Self { image: true, ..Self::default() },
            Wish::Trace(trace) => Self { trace: Some(Arc::clone(trace)), ..Self::default() },
            Wish::Optimized => {
                // Of several the last was made last.
                let blobs =
                    bootstrap.blobs().iter().enumerate().rev().map(|(place, blob)| (place as u32, blob));
                let blobs = blobs.filter(|(_, blob)| is_of_prefetch_files(blob)).map(|(place, _)| place);
                Self { blobs: blobs.collect(), ..Self::default() }
            }
            Wish::Table => Self::of(bootstrap.root(), bootstrap.prefetch().into_iter()),
            Wish::Files(paths) => {
                let found = paths.iter().take_while(|_| !stop()).filter_map(|path| {
                    let nid = list::find(&**bootstrap, path);
                    if nid.is_none() {
                        missing(path);
                    }
                    nid
                });
                Self::of(bootstrap.root(), found)
            }
        }
    }

    /// The root means everything, in the order it is stored. What stands behind it is in it.
    fn of(root: Nid, found: impl Iterator<Item = Nid>) -> Self {
        let mut seen = HashSet::new();
        let mut chunks = Self::default();
        for nid in found.filter(|nid| seen.insert(*nid)) {
            match nid == root {
                true => chunks.image = true,
                false if chunks.image => {}
                false => chunks.nodes.push(nid),
            }
        }
        chunks
    }

    fn order(&self, rafs: &Arc<Rafs>) -> Order {
        let trace = self.trace.iter().map(|trace| trace.order(rafs));
        let blobs = (!self.blobs.is_empty()).then(|| order::blobs(rafs, self.blobs.clone()));
        let nodes = (!self.nodes.is_empty()).then(|| order::nodes(rafs, self.nodes.clone()));
        let image = self.image.then(|| order::image(rafs));
        let parts: Vec<Order> = trace.chain(blobs).chain(nodes).chain(image).collect();
        Box::new(parts.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests;
