//! FIFOs whose other end dies: an error, no hang, nothing under a final name.

use std::fs::File;
use std::io::{Read, Write};

use tests::image::tar_bytes;
use tests::{Result, ensure};

use super::client::{Input, Place, ended, lower};

/// How far the other end comes.
#[derive(Clone, Copy, Debug)]
enum Lives {
    /// It opens the FIFO and goes.
    NotAtAll,
    /// One block of a tar.
    ABlock,
    /// Most of the stream.
    Long,
}

const LIVES: [Lives; 3] = [Lives::NotAtAll, Lives::ABlock, Lives::Long];

impl Lives {
    fn bytes(self, of: usize) -> usize {
        match self {
            Self::NotAtAll => 0,
            Self::ABlock => 512,
            Self::Long => of * 3 / 4,
        }
    }
}

/// Who writes the source dies.
#[test]
fn a_source_that_ends_too_early_makes_nothing() -> Result<()> {
    let tar = tar_bytes(&lower())?;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&tar)?;
    let gzip = encoder.finish()?;
    for (kind, source) in [("tar-rafs", &tar), ("tar-rafs", &gzip), ("targz-ref", &gzip), ("tar-tarfs", &tar)]
    {
        for lives in LIVES {
            let place = Place::empty()?;
            let fifo = place.fifo("in")?;
            let child = place.start(&format!("create -l warn --type {kind} -B boot -D blobs -J json in"))?;
            let mut writer = File::options().write(true).open(fifo)?;
            writer.write_all(&source[..lives.bytes(source.len())])?;
            drop(writer);
            let finished = ended(child)?;
            ensure!(finished.code == Some(1), "{kind} {lives:?}: {finished:?}");
            ensure!(finished.stderr.starts_with("Error: "), "{kind} {lives:?}: {finished:?}");
            ensure!(place.names("")? == ["blobs", "in"], "{kind} {lives:?}: {:?}", place.names("")?);
            ensure!(place.names("blobs")?.is_empty(), "{kind} {lives:?}: {:?}", place.names("blobs")?);
        }
    }
    Ok(())
}

/// Who reads the blob dies.
#[test]
fn a_blob_that_nobody_reads_to_its_end_is_an_error() -> Result<()> {
    let place = Place::new()?;
    place.quiet(
        "create -l warn --type tar-rafs --compressor none -B whole -b whole.blob layer.tar",
        Input::Closed,
    )?;
    let size = place.read("whole.blob")?.len();
    let kept = place.names("")?;
    for lives in LIVES {
        let fifo = place.fifo("out")?;
        let child = place
            .start("create -l warn --compressor none --type tar-rafs -B boot -b out -J json layer.tar")?;
        let mut reader = File::open(&fifo)?;
        reader.read_exact(&mut vec![0; lives.bytes(size)])?;
        drop(reader);
        let finished = ended(child)?;
        ensure!(finished.code == Some(1), "{lives:?}: {finished:?}");
        ensure!(finished.stderr.starts_with("Error: ") && finished.stderr.contains("out"), "{finished:?}");
        std::fs::remove_file(fifo)?;
        ensure!(place.names("")? == kept, "{lives:?}: {:?}", place.names("")?);
    }
    Ok(())
}

/// Who reads the archive dies.
#[test]
fn an_archive_that_nobody_reads_to_its_end_is_an_error() -> Result<()> {
    let place = Place::new()?;
    place.quiet("create -l warn -B boot -b blob layer.tar --type tar-rafs", Input::Closed)?;
    let size = tar_bytes(&lower())?.len();
    for lives in LIVES {
        let fifo = place.fifo("out")?;
        let child = place.start("unpack -l warn -B boot --blob blob --output out")?;
        let mut reader = File::open(&fifo)?;
        reader.read_exact(&mut vec![0; lives.bytes(size)])?;
        drop(reader);
        let finished = ended(child)?;
        ensure!(
            finished.code == Some(1) && finished.stderr.starts_with("Error: "),
            "{lives:?}: {finished:?}"
        );
        std::fs::remove_file(fifo)?;
    }
    Ok(())
}
