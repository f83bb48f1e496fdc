//! The pool: hashes chunks, and compresses those that are new.

use std::panic::{AssertUnwindSafe, catch_unwind};

use storage::codec::{Codec, Compressor};

use super::batch::{Batch, PieceState};
use super::hub::{Event, Hub, Job};
use super::pack::{pack, pack_in_place};
use super::{DataOptions, Placement};
use crate::{Result, turns};

/// Takes jobs until the build is over.
pub(super) fn run(hub: &Hub) {
    turns::step_back();
    let outcome = catch_unwind(AssertUnwindSafe(|| work(hub)));
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => hub.fail(error),
        Err(panic) => hub.fail_panicked("a build thread", &*panic),
    }
}

fn work(hub: &Hub) -> Result<()> {
    let codec = match hub.options.placement {
        Placement::Blob => hub.options.codec,
        // Nothing is stored.
        Placement::Source | Placement::DecodedSpace => Codec::None,
    };
    let mut compressor = Compressor::for_chunks(codec)?;
    while let Some(job) = hub.next_job() {
        match job {
            Job::Hash(mut batch) => {
                hash(&hub.options, &mut batch);
                hub.post(Event::Hashed(batch));
            }
            Job::Pack(mut batch) => {
                match hub.options.packs_in_place() {
                    true => pack_in_place(&mut compressor, &mut batch)?,
                    false => pack(&hub.options, &mut compressor, &mut batch)?,
                }
                hub.post(Event::Packed(batch));
            }
        }
    }
    Ok(())
}

fn hash(options: &DataOptions, batch: &mut Batch) {
    let buffer = &mut batch.buffer;
    for piece in &mut buffer.pieces {
        if piece.state == PieceState::Read {
            let bytes = &buffer.bytes[piece.offset as usize..][..piece.len as usize];
            piece.digest = options.digester.digest(bytes);
            piece.crc32 = crc32c::crc32c(bytes);
            piece.state = PieceState::Hashed;
        }
    }
}
