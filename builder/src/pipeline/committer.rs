//! The one thread that decides what is stored and writes it.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::batch::{Batch, PieceState};
use super::hub::{Event, Hub, Job};
use super::{LayerData, Output, Placement};
use crate::chunks::{BuiltContent, ChunkStore, FileChunks, LayerFiles};
use crate::dedup::DedupIndex;
use crate::sink::BlobSink;
use crate::tree::LayerIndex;
use crate::{Error, ErrorKind, Result};

/// Chunk references of one layer: the bootstrap takes 8 bytes for each and is at most 2 GiB.
const MAX_LAYER_REFS: usize = 1 << 28;

/// A layer as the committer sees it.
struct Progress {
    sink: BlobSink,
    /// Hashed batches that wait for their turn, by number.
    hashed: BTreeMap<u64, Batch>,
    /// Next batch to be decided.
    decide: u64,
    /// Decided and packed batches that wait for their turn, by number.
    packed: BTreeMap<u64, Batch>,
    /// Next batch to be written.
    write: u64,
    /// Number of batches, once the layer's reader is through.
    batches: Option<u64>,
    files: LayerFiles,
}

struct Committer<'a> {
    hub: &'a Hub,
    layers: Vec<Progress>,
    /// The layer whose batches are decided now.
    front: usize,
    store: ChunkStore,
    index: DedupIndex,
    finish: bool,
}

/// Runs the committer; `None` if the build failed, for a reason that the hub knows.
pub(super) fn run(hub: &Hub) -> Option<Output> {
    let committer = Committer {
        hub,
        layers: Vec::new(),
        front: 0,
        store: ChunkStore::default(),
        index: DedupIndex::default(),
        finish: false,
    };
    match catch_unwind(AssertUnwindSafe(|| committer.run())) {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            hub.fail(error);
            None
        }
        Err(panic) => {
            hub.fail_panicked("the commit thread", &*panic);
            None
        }
    }
}

impl Committer<'_> {
    fn run(mut self) -> Result<Option<Output>> {
        while let Some(event) = self.hub.next_event() {
            self.handle(event)?;
            if self.finish && self.layers.iter().all(|l| l.batches == Some(l.write)) {
                return Ok(Some(self.output()));
            }
        }
        Ok(None)
    }

    fn handle(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Opened(sink) => {
                self.layers.push(Progress {
                    sink,
                    hashed: BTreeMap::new(),
                    decide: 0,
                    packed: BTreeMap::new(),
                    write: 0,
                    batches: None,
                    files: LayerFiles::default(),
                });
                if self.layers.len() == 1 {
                    self.store.open_layer();
                }
                self.decide()
            }
            Event::Hashed(batch) => {
                self.layers[usize::from(batch.layer.0)].hashed.insert(batch.number, batch);
                self.decide()
            }
            Event::Packed(batch) => self.write(batch),
            Event::Closed { layer, batches, files } => {
                let progress = &mut self.layers[usize::from(layer.0)];
                progress.batches = Some(batches);
                progress.files.files = files;
                self.decide()
            }
            Event::Finish => match self.layers.iter().position(|l| l.batches.is_none()) {
                Some(open) => Err(Error::new(
                    ErrorKind::Invalid,
                    format!("the build was ended while layer {open} was still open"),
                )),
                None => {
                    self.finish = true;
                    Ok(())
                }
            },
        }
    }

    /// Decides every batch whose turn has come, and moves to the next layer when one is through.
    fn decide(&mut self) -> Result<()> {
        while let Some(layer) = self.layers.get_mut(self.front) {
            if let Some(batch) = layer.hashed.remove(&layer.decide) {
                layer.decide += 1;
                self.decide_batch(batch)?;
            } else if layer.batches == Some(layer.decide) {
                self.front += 1;
                if self.front < self.layers.len() {
                    self.store.open_layer();
                }
                self.hub.set_front(self.front);
            } else {
                break;
            }
        }
        Ok(())
    }

    fn decide_batch(&mut self, mut batch: Batch) -> Result<()> {
        let refs = &mut self.layers[self.front].files.refs;
        let placement = self.hub.options.placement;
        let mut any_new = false;
        for piece in &mut batch.buffer.pieces {
            if placement == Placement::DecodedSpace {
                refs.push(self.store.push_at(piece.digest, piece.crc32, piece.len, piece.origin)?);
                continue;
            }
            let id = match self.index.find(&self.store, &piece.digest, piece.len) {
                Some(id) => {
                    piece.state = PieceState::Known;
                    id
                }
                None => {
                    let id = self.store.push(piece.digest, piece.crc32, piece.len)?;
                    self.index.insert(&self.store, id);
                    if placement == Placement::Source {
                        self.store.set_origin(id, piece.origin);
                    } else {
                        piece.state = PieceState::New(id);
                        any_new = true;
                    }
                    id
                }
            };
            refs.push(id);
        }
        if refs.len() > MAX_LAYER_REFS {
            return Err(Error::new(
                ErrorKind::Limit,
                "files of more than 2^28 chunks in one layer; use a larger chunk size",
            ));
        }
        if any_new {
            self.hub.submit(Job::Pack(batch));
            Ok(())
        } else {
            batch.buffer.filled = 0;
            self.write(batch)
        }
    }

    /// Writes `batch` and those after it, as far as they have arrived.
    fn write(&mut self, batch: Batch) -> Result<()> {
        let layer = batch.layer;
        let progress = &mut self.layers[usize::from(layer.0)];
        progress.packed.insert(batch.number, batch);
        while let Some(batch) = progress.packed.remove(&progress.write) {
            let buffer = batch.buffer;
            if buffer.filled > 0 {
                progress.sink.append(&buffer.bytes[..buffer.filled])?;
            }
            for piece in &buffer.pieces {
                if let PieceState::Packed(id, size) = piece.state {
                    self.store.set_stored(layer, id, size)?;
                }
            }
            progress.write += 1;
            self.hub.release(layer, buffer);
        }
        Ok(())
    }

    fn output(self) -> Output {
        let mut files = FileChunks::default();
        let mut layers = Vec::new();
        for (number, progress) in self.layers.into_iter().enumerate() {
            // The hub admits at most MAX_LAYERS.
            layers.push(LayerData { layer: LayerIndex(number as u16), sink: progress.sink });
            files.layers.push(progress.files);
        }
        Output { content: BuiltContent { chunks: self.store, files }, layers }
    }
}
