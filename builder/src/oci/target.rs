//! Where a finished image goes. Blobs may come from several threads; the image exists for
//! others only once [`Target::publish`] has succeeded.

use std::path::PathBuf;
use std::sync::Arc;

use storage::digest::Digest;

use super::layout_writer::{ArchiveWriter, LayoutWriter, NamedManifest};
use super::media;
use super::push::Pusher;
use super::registry::RegistryOptions;
use super::spool::SpooledBlob;
use super::transport::Transport;
use crate::progress::{Activity, Meter, Observer};
use crate::{Error, ErrorKind, Result};

/// A place that takes one image.
pub enum Target {
    /// An OCI layout directory.
    Layout(LayoutWriter),
    /// An OCI archive.
    Archive(ArchiveWriter),
    /// A registry.
    Registry(Box<Pusher>),
}

impl Target {
    /// Prepares a target. A registry hears nothing yet.
    ///
    /// # Errors
    /// `Invalid`: a transport that cannot be written, or a path with other things in it. `Io`.
    pub fn open(transport: &Transport, options: &RegistryOptions) -> Result<Self> {
        match transport {
            Transport::Layout { path, tag } => LayoutWriter::open(path, tag.as_deref()).map(Self::Layout),
            Transport::LayoutArchive { path, tag } => {
                ArchiveWriter::open(path, tag.as_deref()).map(Self::Archive)
            }
            Transport::Registry(reference) => Ok(Self::Registry(Box::new(Pusher::new(reference, options)?))),
            Transport::DockerArchive { .. } => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{transport}: docker-archive can be a source only, its format has no place for a Nydus image; \
                     write to oci-archive:PATH"
                ),
            )),
        }
    }

    /// Where blobs are to be spooled.
    pub fn spool_dir(&self) -> PathBuf {
        match self {
            Self::Layout(writer) => writer.spool_dir(),
            Self::Archive(writer) => writer.spool_dir(),
            Self::Registry(pusher) => pusher.spool_dir().to_owned(),
        }
    }

    /// Takes a finished blob called `name` in reports.
    ///
    /// # Errors
    /// Those of writing.
    pub fn put(&self, blob: SpooledBlob, name: &str, observer: &dyn Observer) -> Result<()> {
        let meter: Arc<dyn Meter> = Arc::from(observer.begin(Activity::Write, name, Some(blob.size())));
        let outcome = match self {
            Self::Layout(writer) => writer.put(blob)?,
            Self::Archive(writer) => writer.put(blob),
            Self::Registry(pusher) => pusher.put(&blob, &meter)?,
        };
        meter.finish(outcome);
        Ok(())
    }

    /// Takes the manifest and names the image. The last step.
    ///
    /// # Errors
    /// Those of writing; the target names what it named before.
    pub fn publish(self, manifest: &[u8]) -> Result<Digest> {
        let stored = |blob: &SpooledBlob| NamedManifest {
            media_type: media::OCI_MANIFEST,
            digest: blob.digest(),
            size: blob.size(),
        };
        match self {
            Self::Layout(writer) => {
                let blob = SpooledBlob::from_bytes(&writer.spool_dir(), manifest)?;
                let named = stored(&blob);
                writer.put(blob)?;
                writer.publish(&named)?;
                Ok(named.digest)
            }
            Self::Archive(writer) => {
                let blob = SpooledBlob::from_bytes(&writer.spool_dir(), manifest)?;
                let named = stored(&blob);
                writer.put(blob);
                writer.publish(&named)?;
                Ok(named.digest)
            }
            Self::Registry(pusher) => pusher.publish(manifest),
        }
    }
}
