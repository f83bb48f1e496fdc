//! One image, wherever it lies.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageManifest};

use super::client::{RegistryClient, RegistryOptions};
use super::layout::OciLayout;
use super::manifest::{Document, Flavor, MAX_INDEX_DEPTH, Manifest, Platform, descriptor_digest, select};
use super::reference::Reference;
use super::referrers::Subject;
use super::stream::{read_all, verified};
use crate::backend::layout::OciLayoutSource;
use crate::backend::localfs::blocking;
use crate::backend::registry::{RegistryBlob, RegistrySource, Rewrite};
use crate::backend::retry::RetryPolicy;
use crate::backend::{Backend as _, BlobSource, ByteStream, ReadContext, Supplier};
use crate::ids::{BlobId, ByteRange};
use crate::{Error, ErrorKind, Result};

/// Where an image is to be found, as people write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageName {
    /// `docker://HOST/REPOSITORY[:TAG][@DIGEST]`, or the same without `docker://`.
    Registry(Reference),
    /// `oci:PATH[:TAG]`; as with skopeo the path ends at the first colon.
    Layout {
        /// The layout's directory.
        path: PathBuf,
        /// The image in it; not needed if there is only one.
        tag: Option<String>,
    },
}

impl FromStr for ImageName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = |why: &str| Error::new(ErrorKind::Invalid, format!("image {s:?}: {why}"));
        if let Some(rest) = s.strip_prefix("oci:") {
            let (path, tag) = match rest.split_once(':') {
                Some((path, tag)) => (path, Some(tag)),
                None => (rest, None),
            };
            if path.is_empty() || tag == Some("") {
                return Err(bad("want oci:PATH[:TAG]"));
            }
            return Ok(Self::Layout { path: path.into(), tag: tag.map(str::to_owned) });
        }
        match s.strip_prefix("docker://") {
            Some(reference) => reference.parse().map(Self::Registry),
            None if s.contains("://") => Err(bad("want docker://HOST/REPOSITORY[:TAG] or oci:PATH[:TAG]")),
            None if s.starts_with(['/', '.']) => Err(bad("want oci:PATH[:TAG] for a layout on disk")),
            None => s.parse().map(Self::Registry),
        }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => write!(f, "docker://{reference}"),
            Self::Layout { path, tag } => {
                write!(f, "oci:{}", path.display())?;
                tag.iter().try_for_each(|tag| write!(f, ":{tag}"))
            }
        }
    }
}

/// An image that can be read. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Image {
    name: ImageName,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Registry(RegistryClient, Reference),
    Layout(Arc<OciLayout>, Option<String>),
}

impl Image {
    /// Opens `name`: a layout's index is read, a registry is not yet asked.
    ///
    /// # Errors
    /// Those of [`OciLayout::open`] and [`RegistryClient::new`].
    pub fn open(name: ImageName, options: RegistryOptions) -> Result<Self> {
        let place = match &name {
            ImageName::Registry(reference) => {
                Place::Registry(RegistryClient::new(reference.host(), options)?, reference.clone())
            }
            ImageName::Layout { path, tag } => Place::Layout(Arc::new(OciLayout::open(path)?), tag.clone()),
        };
        Ok(Self { name, place })
    }

    /// What was opened.
    pub fn name(&self) -> &ImageName {
        &self.name
    }

    /// The client, if the image lies in a registry.
    pub fn client(&self) -> Option<&RegistryClient> {
        match &self.place {
            Place::Registry(client, _) => Some(client),
            Place::Layout(..) => None,
        }
    }

    /// `manifest`, which this image has, for others to refer to; `None` in a layout.
    pub fn subject(&self, manifest: &Document) -> Option<Subject> {
        match &self.place {
            Place::Registry(client, reference) => Some(Subject::new(client.clone(), reference, manifest)),
            Place::Layout(..) => None,
        }
    }

    /// The manifest or index that the name stands for.
    ///
    /// # Errors
    /// Those of [`RegistryClient::get_manifest`] and [`OciLayout::find`].
    pub async fn top(&self, context: &ReadContext) -> Result<Document> {
        match &self.place {
            Place::Registry(client, reference) => client.get_manifest(reference, context).await,
            Place::Layout(layout, tag) => {
                let (layout, tag) = (layout.clone(), tag.clone());
                blocking(context, "read a layout", move || layout.document(layout.find(tag.as_deref())?))
                    .await
            }
        }
    }

    /// A manifest or index named by another one.
    ///
    /// # Errors
    /// Those of [`Image::top`]; `Corrupt`: another digest or size.
    pub async fn document(&self, descriptor: &Descriptor, context: &ReadContext) -> Result<Document> {
        let document = match &self.place {
            Place::Registry(client, reference) => {
                let reference = reference.at_digest(descriptor_digest(descriptor)?);
                client.get_manifest(&reference, context).await?
            }
            Place::Layout(layout, _) => {
                let (layout, descriptor) = (layout.clone(), descriptor.clone());
                blocking(context, "read a layout", move || layout.document(&descriptor)).await?
            }
        };
        let (found, said) = (document.bytes.len() as u64, descriptor.size());
        if found != said {
            let why = format!("manifest {}: {found} bytes, its descriptor says {said}", document.digest);
            return Err(Error::new(ErrorKind::Corrupt, why));
        }
        // The type by which an index chose it; a registry may say less.
        Ok(Document { media_type: descriptor.media_type().to_string(), ..document })
    }

    /// The image manifest for `platform`, through indexes if there are any.
    ///
    /// # Errors
    /// Those of [`Image::document`], [`Document::parse`] and [`select`]; `Invalid`: indexes
    /// nested too deep.
    pub async fn manifest(
        &self,
        platform: &Platform,
        flavor: Flavor,
        context: &ReadContext,
    ) -> Result<(Document, ImageManifest)> {
        let mut document = self.top(context).await?;
        for _ in 0..MAX_INDEX_DEPTH {
            match document.parse()? {
                Manifest::Image(manifest) => return Ok((document, *manifest)),
                Manifest::Index(index) => {
                    let chosen = select(&index, platform, flavor)?;
                    document = self.document(chosen, context).await?;
                }
            }
        }
        Err(Error::new(ErrorKind::Invalid, format!("indexes nested deeper than {MAX_INDEX_DEPTH}")))
    }

    /// Streams a blob; the stream ends with an error unless size and digest are right.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Unavailable`, `TimedOut`, `Cancelled`, `Io`; `Unsupported`: a
    /// digest of another algorithm.
    pub async fn open_blob(&self, descriptor: &Descriptor, context: &ReadContext) -> Result<ByteStream> {
        let digest = descriptor_digest(descriptor)?;
        let range = ByteRange::new(0, descriptor.size())?;
        let stream: ByteStream = if range.is_empty() {
            ByteStream::new(Supplier::Local, futures_util::stream::empty())
        } else {
            match &self.place {
                Place::Registry(client, reference) => {
                    RegistryBlob::new(client.clone(), reference.repository(), digest)
                        .of_size(descriptor.size())
                        .open(range, context)
                        .await?
                }
                Place::Layout(layout, _) => {
                    let source = OciLayoutSource::new(layout.root());
                    source.blob(&BlobId::new(&digest.digest.to_string())?)?.open(range, context).await?
                }
            }
        };
        Ok(verified(stream, digest, descriptor.size()))
    }

    /// Reads and verifies a whole blob of at most `cap` bytes.
    ///
    /// # Errors
    /// Those of [`Image::open_blob`]; `Invalid`: larger; `Corrupt`: another size or digest.
    pub async fn read_blob(
        &self,
        descriptor: &Descriptor,
        cap: u64,
        context: &ReadContext,
    ) -> Result<Vec<u8>> {
        if descriptor.size() > cap {
            let why = format!(
                "blob {}: {} bytes, at most {cap} are accepted",
                descriptor.digest(),
                descriptor.size()
            );
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        read_all(self.open_blob(descriptor, context).await?, cap).await
    }

    /// A source of the image's data blobs, for reading by range. A blob of a server that ignores ranges is kept in a file
    /// without a name in `spool_dir`.
    ///
    /// # Errors
    /// None for an image that could be opened; a repository's name is checked again.
    pub fn blob_source(&self, rewrite: Rewrite, spool_dir: PathBuf) -> Result<Arc<dyn BlobSource>> {
        Ok(match &self.place {
            Place::Registry(client, reference) => {
                let repository = reference.repository();
                let source = RegistrySource::new(client.clone(), repository, rewrite, RetryPolicy::READS)?;
                Arc::new(source.with_spool_dir(spool_dir))
            }
            Place::Layout(layout, _) => Arc::new(OciLayoutSource::new(layout.root())),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        let parse = |s: &str| s.parse::<ImageName>();
        for text in ["docker://docker.io/library/debian", "oci:/a/b:t", "oci:dir"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(parse("localhost:5000/a:b").unwrap().to_string(), "docker://localhost:5000/a:b");
        for bad in ["", "oci:", "oci::t", "oci:x:", "docker://", "https://a.b/c", "docker-archive://x"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
