//! The one thread that decides what is stored and writes it.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::batch::{Batch, Packed, PieceState, Stored, Unit};
use super::hub::{Event, Hub, Job};
use super::pack::{ends_unit, pack_unit};
use super::{Finisher, LayerData, Placement};
use storage::codec::Compressor;

use crate::chunks::{BuiltContent, ChunkStore, FileChunks, LayerFiles};
use crate::dedup::DedupIndex;
use crate::sink::BlobSink;
use crate::tree::LayerIndex;
use crate::{Error, ErrorKind, Result};

/// Chunk references of one layer: the bootstrap takes 8 bytes for each and is at most 2 GiB.
const MAX_LAYER_REFS: usize = 1 << 28;

/// A layer as the committer sees it.
struct Progress {
    /// None when the layer is complete.
    sink: Option<BlobSink>,
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
    /// Small chunks that wait for others to share a unit with.
    unit: Unit,
}

struct Committer<'a> {
    hub: &'a Hub,
    layers: Vec<Progress>,
    /// The layer whose batches are decided now.
    front: usize,
    /// Layers that are complete, the lowest ones.
    complete: usize,
    finisher: Finisher,
    content: BuiltContent,
    index: DedupIndex,
    finish: bool,
}

/// Runs the committer; `None` if the build failed, for a reason that the hub knows.
pub(super) fn run(hub: &Hub, finisher: Finisher) -> Option<BuiltContent> {
    let mut chunks = ChunkStore::default();
    if hub.options.cipher.is_some() {
        chunks.encrypted();
    }
    chunks.number_from(hub.below.as_ref().map_or(0, |below| below.chunk_count()));
    let committer = Committer {
        hub,
        layers: Vec::new(),
        front: 0,
        complete: 0,
        finisher,
        content: BuiltContent { chunks, files: FileChunks::default() },
        index: DedupIndex::default(),
        finish: false,
    };
    match catch_unwind(AssertUnwindSafe(|| committer.run())) {
        Ok(Ok(content)) => content,
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
    fn run(mut self) -> Result<Option<BuiltContent>> {
        while let Some(event) = self.hub.next_event() {
            self.handle(event)?;
            self.complete()?;
            if self.finish && self.complete == self.layers.len() {
                return Ok(Some(self.content));
            }
        }
        Ok(None)
    }

    /// Hands on the layers whose data is all written, in order.
    fn complete(&mut self) -> Result<()> {
        while let Some(progress) = self.layers.get_mut(self.complete)
            && progress.batches == Some(progress.write)
            && let Some(sink) = progress.sink.take()
        {
            // The hub admits at most MAX_LAYERS.
            let layer = LayerIndex(self.complete as u16);
            (self.finisher)(&self.content, LayerData { layer, sink })?;
            self.complete += 1;
        }
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Opened(sink) => {
                let start = sink.start();
                self.content.files.layers.push(LayerFiles::default());
                self.layers.push(Progress {
                    sink: Some(sink),
                    hashed: BTreeMap::new(),
                    decide: 0,
                    packed: BTreeMap::new(),
                    write: 0,
                    batches: None,
                    unit: Unit::default(),
                });
                if self.layers.len() == 1 {
                    self.content.chunks.open_layer(start);
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
                self.content.files.layers[usize::from(layer.0)].files = files;
                self.decide()?;
                self.flush_unit(layer)
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
                if let Some(next) = self.layers.get(self.front) {
                    let start = next.sink.as_ref().map_or(0, BlobSink::start);
                    self.content.chunks.open_layer(start);
                }
                self.hub.set_front(self.front);
            } else {
                break;
            }
        }
        Ok(())
    }

    fn decide_batch(&mut self, mut batch: Batch) -> Result<()> {
        let BuiltContent { chunks, files } = &mut self.content;
        let refs = &mut files.layers[self.front].refs;
        let placement = self.hub.options.placement;
        let mut any_new = false;
        for piece in &mut batch.buffer.pieces {
            if placement == Placement::DecodedSpace {
                refs.push(chunks.push_at(piece.digest, piece.crc32, piece.len, piece.origin)?);
                continue;
            }
            if let Some(id) = self.hub.below.as_ref().and_then(|b| b.find(&piece.digest, piece.len)) {
                piece.state = PieceState::Known;
                refs.push(id);
                continue;
            }
            let id = match self.index.find(chunks, &piece.digest, piece.len) {
                Some(id) => {
                    piece.state = PieceState::Known;
                    id
                }
                None => {
                    let id = chunks.push(piece.digest, piece.crc32, piece.len)?;
                    self.index.insert(chunks, id);
                    if placement == Placement::Source {
                        chunks.set_origin(id, piece.origin);
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
            if self.hub.options.batch_size > 0 {
                self.carry(&mut batch);
            }
            self.hub.submit(Job::Pack(batch));
            Ok(())
        } else {
            batch.buffer.filled = 0;
            self.write(batch)
        }
    }

    /// Gives a batch the small chunks that wait, if a unit ends in it, and takes those that wait
    /// for a later one.
    fn carry(&mut self, batch: &mut Batch) {
        let options = &self.hub.options;
        let waiting = &mut self.layers[self.front].unit;
        let buffer = &mut batch.buffer;
        let is_new = |state: &PieceState| matches!(state, PieceState::New(_));
        let (mut len, mut last_end) = (waiting.bytes.len(), None);
        for (place, piece) in buffer.pieces.iter().enumerate().filter(|(_, p)| is_new(&p.state)) {
            if ends_unit(options, len, piece.shares, piece.len as usize) {
                (len, last_end) = (0, Some(place));
            }
            len += if piece.shares { piece.len as usize } else { 0 };
        }
        if last_end.is_some() {
            batch.carried = std::mem::take(waiting);
        }
        for piece in &mut buffer.pieces[last_end.unwrap_or(0)..] {
            let PieceState::New(id) = piece.state else { continue };
            if piece.shares {
                waiting.push(id, &buffer.bytes[piece.offset as usize..][..piece.len as usize]);
                piece.state = PieceState::Known;
            }
        }
    }

    /// Stores what waits in a layer whose batches are all written.
    fn flush_unit(&mut self, layer: LayerIndex) -> Result<()> {
        let progress = &mut self.layers[usize::from(layer.0)];
        if progress.batches != Some(progress.write) || progress.unit.members.is_empty() {
            return Ok(());
        }
        let mut unit = std::mem::take(&mut progress.unit);
        let mut packed = Packed::default();
        let mut compressor = Compressor::for_chunks(self.hub.options.codec)?;
        pack_unit(&self.hub.options, &mut compressor, &mut unit, &mut packed)?;
        self.store_packed(layer, packed)
    }

    fn store_packed(&mut self, layer: LayerIndex, packed: Packed) -> Result<()> {
        self.append(layer, &packed.bytes)?;
        for stored in packed.stored {
            match stored {
                Stored::Chunk(id, size) => self.content.chunks.set_stored(layer, id, size)?,
                Stored::Unit { stored, decoded, members } => {
                    self.content.chunks.set_unit(layer, stored, decoded, &members)?;
                }
            }
        }
        Ok(())
    }

    /// Writes `batch` and those after it, as far as they have arrived.
    fn write(&mut self, batch: Batch) -> Result<()> {
        let layer = batch.layer;
        let number = usize::from(layer.0);
        self.layers[number].packed.insert(batch.number, batch);
        loop {
            let progress = &mut self.layers[number];
            let Some(batch) = progress.packed.remove(&progress.write) else { break };
            if let Some(packed) = batch.packed {
                self.store_packed(layer, packed)?;
            }
            let buffer = batch.buffer;
            self.append(layer, &buffer.bytes[..buffer.filled])?;
            for piece in &buffer.pieces {
                if let PieceState::Packed(id, size) = piece.state {
                    self.content.chunks.set_stored(layer, id, size)?;
                }
            }
            self.layers[number].write += 1;
            self.hub.release(layer, buffer);
        }
        self.flush_unit(layer)
    }

    fn append(&mut self, layer: LayerIndex, bytes: &[u8]) -> Result<()> {
        match &mut self.layers[usize::from(layer.0)].sink {
            Some(sink) if !bytes.is_empty() => sink.append(bytes),
            _ => Ok(()),
        }
    }
}
