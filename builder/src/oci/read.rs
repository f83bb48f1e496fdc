//! All layers of an image through one build session, several at a time.
//!
//! Threads take layers lowest first, so the layer that is to be decided next is always being
//! read; the session bounds how far the others get ahead. A layer counts only once its stream
//! has matched both of its digests.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use rafs::bootstrap::Summary;
use storage::codec::Codec;
use tokio_util::sync::CancellationToken;

use super::source::ImageSource;
use crate::chunks::BuiltContent;
use crate::overlay::{self, WhiteoutSpec};
use crate::pipeline::{DataOptions, Finisher, Layer, LayerData, Placement, Session};
use crate::progress::{Activity, Meter, Observer, Watched};
use crate::sink::BlobSink;
use crate::source::tar::{self, TarOptions};
use crate::tree::Tree;
use crate::{Error, ErrorKind, Result};

/// How an image is read.
pub struct ReadOptions<'a> {
    /// Chunking, compression and threads.
    pub data: DataOptions,
    /// Layers read at a time, at least 1.
    pub jobs: usize,
    /// Hears of progress.
    pub observer: &'a dyn Observer,
    /// Ends the work.
    pub cancel: &'a CancellationToken,
}

/// Takes the layers whose data is all stored, lowest first, as a [`Finisher`] does, each with its tree,
/// whiteout entries included.
pub type LayerTaker = Box<dyn FnMut(&BuiltContent, LayerData, Tree) -> Result<()> + Send>;

/// Reads every layer of `source`; the data of layer `n` goes to the sink `sinks(n)`, and then to `taker`, while
/// others are read. A layer that `taker` gets has matched its digests.
///
/// # Errors
/// `Mismatch`, `Corrupt`: a layer is not what the image's metadata says, or not a tar.
/// `Cancelled`. Otherwise those of the source and of writing.
pub fn read_layers(
    source: &ImageSource,
    options: &ReadOptions<'_>,
    mut sinks: impl FnMut(usize) -> Result<BlobSink>,
    mut taker: LayerTaker,
) -> Result<BuiltContent> {
    let count = source.layers().len();
    let trees: Arc<Mutex<Vec<Option<Tree>>>> = Arc::new(Mutex::new((0..count).map(|_| None).collect()));
    let known = Arc::clone(&trees);
    let finisher: Finisher = Box::new(move |content, layer| {
        let tree = lock(&known).get_mut(usize::from(layer.layer.0)).and_then(Option::take);
        let tree = tree.ok_or_else(|| Error::new(ErrorKind::Cancelled, "a layer was given up"))?;
        taker(content, layer, tree)
    });
    let session = Session::finishing(options.data, finisher)?;
    let mut queue = VecDeque::with_capacity(count);
    for index in 0..count {
        queue.push_back((index, session.layer(sinks(index)?)?));
    }
    let queue = Mutex::new(queue);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let work = || {
        loop {
            let next = lock(&queue).pop_front();
            let Some((index, layer)) = next else { break };
            let keep = |tree| lock(&trees)[index] = Some(tree);
            if let Err(error) = read_layer(source, index, options, layer, keep) {
                lock(&failure).get_or_insert(error);
                // Layers left over belong to a build that has failed.
                lock(&queue).clear();
                break;
            }
        }
    };
    std::thread::scope(|scope| {
        for worker in 1..options.jobs.clamp(1, count.max(1)) {
            let started =
                std::thread::Builder::new().name(format!("layer-{worker}")).spawn_scoped(scope, work);
            // This thread reads as well, so a missing helper only costs time.
            if let Err(error) = started {
                tracing::warn!(%error, "a layer thread cannot be started");
            }
        }
        work();
    });
    if let Some(error) = lock(&failure).take() {
        return Err(error);
    }
    Ok(session.finish()?.content)
}

/// The merged tree of `source`, its data cut and hashed as the image that `summary` describes has
/// it, but not stored: what that image is compared with.
///
/// # Errors
/// As [`read_layers`].
pub fn read_tree(
    source: &ImageSource,
    summary: &Summary,
    jobs: usize,
    observer: &dyn Observer,
    cancel: &CancellationToken,
) -> Result<(Tree, BuiltContent)> {
    let data = DataOptions {
        codec: Codec::None,
        digester: summary.digester,
        chunk_size: summary.chunk_size,
        threads: 0,
        placement: Placement::Blob,
        batch_size: 0,
        cipher: None,
    };
    let options = ReadOptions { data, jobs, observer, cancel };
    let merged = Arc::new(Mutex::new(Tree::new()));
    let all = Arc::clone(&merged);
    let taker: LayerTaker =
        Box::new(move |_, _, tree| overlay::apply(&mut lock(&all), tree, WhiteoutSpec::Oci));
    let content = read_layers(source, &options, |_| Ok(BlobSink::new("nowhere", std::io::sink())), taker)?;
    let merged = std::mem::take(&mut *lock(&merged));
    Ok((merged, content))
}

fn read_layer(
    source: &ImageSource,
    index: usize,
    options: &ReadOptions<'_>,
    mut layer: Layer,
    keep: impl FnOnce(Tree),
) -> Result<()> {
    let promise = &source.layers()[index];
    let total = promise.stored.map(|(_, size)| size);
    let meter: Arc<dyn Meter> = Arc::from(options.observer.begin(Activity::Read, &promise.name, total));
    match stream_layer(source, index, &meter, options.cancel, &mut layer) {
        Ok(tree) => {
            // It is looked for as soon as the layer is finished.
            keep(tree);
            layer.finish()?;
            meter.finish("");
            Ok(())
        }
        Err(error) => Err(layer.abort(error)),
    }
}

fn stream_layer(
    source: &ImageSource,
    index: usize,
    meter: &Arc<dyn Meter>,
    cancel: &CancellationToken,
    layer: &mut Layer,
) -> Result<Tree> {
    let mut reader = source
        .open_layer(index, |stored| Box::new(Watched::new(stored, Arc::clone(meter), cancel.clone())))?;
    // The digests vouch for the stream's end, so the tar need not.
    let tar = TarOptions { require_end: false, links_below: index > 0, ..TarOptions::default() };
    let name = format!("{}: {}", source.name(), source.layers()[index].name);
    let tree = tar::read_layer(&name, &mut reader, layer, tar)?;
    // A tar may end before its file; only the whole of it has a digest.
    reader.finish()?;
    Ok(tree)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
