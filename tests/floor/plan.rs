//! What has to be done with the bytes of each layer, found out ahead.

use std::collections::HashSet;
use std::io::Read;
use std::ops::Range;

use flate2::bufread::MultiGzDecoder;
use storage::digest::{Digest, DigestAlgorithm};
use tests::Result;

/// Decoded bytes that are handed over at once, at least.
const STEP: usize = 1 << 20;

/// How files are cut.
#[derive(Clone, Copy)]
pub(crate) struct Units {
    pub chunk_size: u32,
    /// 0 for none.
    pub batch_size: u32,
}

/// A layer in the steps that it is inflated in.
pub(crate) struct Layer {
    pub decoded_size: usize,
    pub steps: Vec<Step>,
}

/// A stretch of the tar that ends where a unit does.
pub(crate) struct Step {
    pub len: usize,
    /// Chunks, in the stretch.
    pub chunks: Vec<Range<usize>>,
    /// What is stored: chunks that are compressed together.
    pub units: Vec<Vec<Range<usize>>>,
}

/// Plans for layers of gzip, lowest first; a chunk that was there before is not stored.
pub(crate) fn of_layers(files: &[Vec<u8>], cut: Units) -> Result<Vec<Layer>> {
    let mut known = HashSet::new();
    files
        .iter()
        .map(|stored| {
            let mut tar = Vec::new();
            MultiGzDecoder::new(&stored[..]).read_to_end(&mut tar)?;
            of_layer(&tar, cut, &mut known)
        })
        .collect()
}

fn of_layer(tar: &[u8], cut: Units, known: &mut HashSet<(Digest, usize)>) -> Result<Layer> {
    let mut chunks = Vec::new();
    let mut units: Vec<Vec<Range<usize>>> = Vec::new();
    let (mut open, chunk_size, batch_size) = (0, cut.chunk_size as usize, cut.batch_size as usize);
    for entry in tar::Archive::new(tar).entries()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let (start, size) = (usize::try_from(entry.raw_file_position())?, usize::try_from(entry.size())?);
        for from in (start..start + size).step_by(chunk_size) {
            let chunk = from..(start + size).min(from + chunk_size);
            chunks.push(chunk.clone());
            if !known.insert((DigestAlgorithm::Sha256.digest(&tar[chunk.clone()]), chunk.len())) {
                continue;
            }
            let shares = size < batch_size / 2;
            match units.last_mut() {
                Some(unit) if shares && open > 0 && open + size < batch_size => {
                    open += size;
                    unit.push(chunk);
                }
                _ => {
                    open = if shares { size } else { 0 };
                    units.push(vec![chunk]);
                }
            }
        }
    }
    Ok(Layer { decoded_size: tar.len(), steps: steps(tar.len(), &chunks, units) })
}

fn steps(len: usize, chunks: &[Range<usize>], units: Vec<Vec<Range<usize>>>) -> Vec<Step> {
    let mut steps = Vec::new();
    let (mut start, mut of_step) = (0, Vec::new());
    let mut chunks = chunks.iter().peekable();
    let mut push = |start: usize, end: usize, units: Vec<Vec<Range<usize>>>| {
        let inside = |range: &Range<usize>| range.start - start..range.end - start;
        let mut own = Vec::new();
        while let Some(chunk) = chunks.next_if(|chunk| chunk.end <= end) {
            own.push(inside(chunk));
        }
        let units = units.iter().map(|unit: &Vec<_>| unit.iter().map(inside).collect()).collect();
        steps.push(Step { len: end - start, chunks: own, units });
    };
    for unit in units {
        let end = unit.last().map_or(start, |last| last.end);
        of_step.push(unit);
        if end - start >= STEP {
            push(start, end, std::mem::take(&mut of_step));
            start = end;
        }
    }
    push(start, len, of_step);
    steps
}
