//! Registries as sources and targets: one small runtime behind blocking calls.

use std::path::PathBuf;
use std::sync::Arc;

use storage::backend::registry::RegistryBlob;
use storage::backend::{Backend as _, Priority, ReadContext};
use storage::digest::{Digest, DigestAlgorithm, TaggedDigest};
use storage::ids::ByteRange;
use storage::oci::client::{RegistryClient, RegistryOptions as ClientOptions, Scheme};
use storage::oci::manifest::Platform;
use storage::oci::reference::{Reference, is_loopback};
use storage::oci::stream::{self, BlockingReader};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::manifest;
use super::objects::Object;
use super::source::{BlobStore, ImageSource, asked_of_config};
use crate::{Error, ErrorKind, Result};

/// Threads of the runtime: requests are few and large, the CPU work is done elsewhere.
const RUNTIME_THREADS: usize = 2;

/// How registries are reached.
#[derive(Clone, Debug, Default)]
pub struct RegistryOptions {
    /// Speak http to every registry; without it only loopback addresses are spoken to so.
    pub plain_http: bool,
    /// PEM files with CAs to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Ends all requests.
    pub cancel: CancellationToken,
}

/// How to speak to the registry `host`.
pub fn client_options(host: &str, options: &RegistryOptions) -> ClientOptions {
    let mut client = ClientOptions::default();
    // As Go's tools do: this machine is never reached through a proxy.
    client.http.proxy_from_environment = !is_loopback(host);
    client.http.ca_files.clone_from(&options.ca_files);
    if options.plain_http {
        client.scheme = Scheme::Http;
    }
    client
}

/// A repository of a registry, for blocking callers.
#[derive(Clone)]
pub struct Repository {
    pub(super) runtime: Arc<Runtime>,
    pub(super) client: RegistryClient,
    pub(super) reference: Reference,
    pub(super) context: ReadContext,
}

impl Repository {
    /// The repository that `reference` (`HOST/REPO[:TAG|@DIGEST]`) names. `tune` may change how
    /// it is spoken to. Sends nothing.
    ///
    /// # Errors
    /// `Storage`: a malformed reference or CA file. `Io`: no threads.
    pub fn new(
        reference: &str,
        options: &RegistryOptions,
        tune: impl FnOnce(&mut ClientOptions),
    ) -> Result<Self> {
        let reference: Reference = reference.parse()?;
        let mut client = client_options(reference.host(), options);
        tune(&mut client);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("registry")
            .enable_all()
            .build()
            .map_err(|e| Error::io("start the registry threads", e))?;
        let context = ReadContext {
            priority: Priority::OnDemand,
            deadline: None,
            cancel: options.cancel.clone(),
            ..ReadContext::on_demand(None)
        };
        let client = RegistryClient::new(reference.host(), client)?;
        Ok(Self { runtime: Arc::new(runtime), client, reference, context })
    }

    /// The image as an [`ImageSource`] called `name`.
    ///
    /// # Errors
    /// Those of the registry; otherwise as [`ImageSource::from_store`].
    pub fn into_source(self, name: String, platform: Option<&Platform>) -> Result<ImageSource> {
        let get = |reference: &Reference| -> Result<(Vec<u8>, String)> {
            let document = self.runtime.block_on(self.client.get_manifest(reference, &self.context))?;
            Ok((document.bytes.to_vec(), document.media_type))
        };
        let (bytes, media_type) = get(&self.reference).map_err(|e| e.context(&name))?;
        let document = manifest::parse(&name, &media_type, bytes)?;
        let asked = asked_of_config(&document, platform);
        let chosen = manifest::resolve(&name, document, platform, &|descriptor| {
            let (digest, _) = manifest::digest_of(&name, descriptor)?;
            Ok(get(&self.reference.at_digest(tagged(digest)))?.0)
        })?;
        ImageSource::from_store(name, &chosen, asked, Box::new(self))
    }
}

/// `digest` with its algorithm, SHA-256 as everywhere in OCI.
pub(super) fn tagged(digest: Digest) -> TaggedDigest {
    TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest }
}

impl BlobStore for Repository {
    fn read(&self, digest: &Digest, cap: u64) -> Result<Vec<u8>> {
        let digest = tagged(*digest);
        let blob = RegistryBlob::new(self.client.clone(), self.reference.repository(), digest);
        let read = async {
            let size = blob.size(&self.context).await?;
            if size > cap {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("blob {digest}: {size} bytes, at most {cap} are read of such a blob"),
                ));
            }
            if size == 0 {
                return Ok(Vec::new());
            }
            let bytes = blob.open(ByteRange::new(0, size)?, &self.context).await?;
            Ok(stream::read_all(stream::verified(bytes, digest, size), cap).await?)
        };
        self.runtime.block_on(read)
    }

    fn open(&self, digest: &Digest, size: u64) -> Result<Object> {
        if size == 0 {
            return Ok((Box::new(std::io::empty()), 0));
        }
        let blob = RegistryBlob::new(self.client.clone(), self.reference.repository(), tagged(*digest));
        let bytes = self.runtime.block_on(blob.open(ByteRange::new(0, size)?, &self.context))?;
        let reader = RegistryReader { reader: BlockingReader::new(self.runtime.handle().clone(), bytes) };
        Ok((Box::new(reader), size))
    }
}

/// Turns storage's errors inside I/O errors into this crate's.
struct RegistryReader {
    reader: BlockingReader,
}

impl std::io::Read for RegistryReader {
    fn read(&mut self, dst: &mut [u8]) -> std::io::Result<usize> {
        self.reader.read(dst).map_err(|e| match e.downcast::<storage::Error>() {
            Ok(inner) => Error::from(inner).into_io(),
            Err(e) => e,
        })
    }
}
