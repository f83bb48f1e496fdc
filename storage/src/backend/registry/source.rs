//! The blobs of one repository: how they are opened, and by which ways.

use std::path::PathBuf;
use std::sync::Arc;

use reqwest::Url;

use super::RegistryBlob;
use super::detour::{Detour, MirrorOptions, ProxyOptions, Way};
use crate::backend::retry::RetryPolicy;
use crate::backend::{Backend, BlobSource, Supplier};
use crate::digest::{Digest, DigestAlgorithm, TaggedDigest};
use crate::ids::BlobId;
use crate::metrics::OriginSnapshot;
use crate::oci::auth::Credentials;
use crate::oci::client::{RegistryClient, RegistryOptions};
use crate::oci::reference::{check_host, check_repository};
use crate::{Error, ErrorKind, Result};

/// How `Location`s of blobs are changed before use (`blob_url_scheme`, `blob_redirected_host`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// `HOST` or `HOST:PORT`.
    pub host: Option<String>,
}

impl Rewrite {
    /// Checks the configuration's values; empty ones mean none.
    ///
    /// # Errors
    /// `Invalid`: another scheme, or not a host.
    pub fn new(blob_url_scheme: &str, blob_redirected_host: &str) -> Result<Self> {
        if !matches!(blob_url_scheme, "" | "http" | "https") {
            let why = format!("blob_url_scheme {blob_url_scheme:?}: want http or https");
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        if !blob_redirected_host.is_empty() {
            check_host(blob_redirected_host).map_err(|e| e.context("blob_redirected_host"))?;
        }
        let set = |value: &str| (!value.is_empty()).then(|| value.to_owned());
        Ok(Self { scheme: set(blob_url_scheme), host: set(blob_redirected_host) })
    }

    pub(super) fn apply(&self, mut url: Url) -> Result<Url> {
        let refused = || Error::new(ErrorKind::Invalid, "a redirect that can not be rewritten as configured");
        if let Some(host) = &self.host {
            let (name, port) = match host.rsplit_once(':') {
                Some((name, port)) if !port.ends_with(']') => (name, port.parse().ok()),
                _ => (host.as_str(), None),
            };
            url.set_host(Some(name)).map_err(|_| refused())?;
            url.set_port(port).map_err(|()| refused())?;
        }
        if let Some(scheme) = &self.scheme {
            url.set_scheme(scheme).map_err(|()| refused())?;
        }
        Ok(url)
    }
}

/// Opens blobs of one repository.
#[derive(Debug)]
pub struct RegistrySource {
    client: RegistryClient,
    repository: String,
    rewrite: Rewrite,
    retry: RetryPolicy,
    spool_dir: PathBuf,
    supplier: Supplier,
    ways: Vec<Arc<Way>>,
}

impl RegistrySource {
    /// Blobs of `repository`; `retry` is for reads, usually [`RetryPolicy::READS`].
    ///
    /// # Errors
    /// `Invalid`: not a repository's name.
    pub fn new(
        client: RegistryClient,
        repository: &str,
        rewrite: Rewrite,
        retry: RetryPolicy,
    ) -> Result<Self> {
        check_repository(repository)?;
        Ok(Self {
            client,
            repository: repository.to_owned(),
            rewrite,
            retry,
            spool_dir: std::env::temp_dir(),
            supplier: Supplier::Origin,
            ways: Vec::new(),
        })
    }

    /// Asks `mirror` first, after those added before it. `options` are the registry's own.
    ///
    /// # Errors
    /// `Invalid`: its name or a header is none.
    pub fn with_mirror(mut self, mirror: &MirrorOptions, options: RegistryOptions) -> Result<Self> {
        self.ways.push(Arc::new(Way::mirror(mirror, options)?));
        Ok(self)
    }

    /// Goes through the proxy that `options` name, after the mirrors, and directly only if it
    /// fails. `options` are the registry's own otherwise.
    ///
    /// # Errors
    /// `Invalid`: not a proxy's URL.
    pub fn with_proxy(mut self, proxy: &ProxyOptions, options: RegistryOptions) -> Result<Self> {
        self.ways.push(Arc::new(Way::proxy(self.client.host(), proxy, options)?));
        Ok(self)
    }

    /// Says that the client's bytes are another's than the registry's own: a proxy's.
    #[must_use]
    pub fn with_supplier(self, supplier: Supplier) -> Self {
        Self { supplier, ..self }
    }

    /// Keeps blobs in `dir` whose server turns out to ignore `Range`; by default in the
    /// directory for temporary files, which may be memory.
    #[must_use]
    pub fn with_spool_dir(self, dir: PathBuf) -> Self {
        Self { spool_dir: dir, ..self }
    }

    /// The client, for a change of login.
    pub fn client(&self) -> &RegistryClient {
        &self.client
    }
}

impl BlobSource for RegistrySource {
    fn kind(&self) -> &'static str {
        "registry"
    }

    fn origins(&self) -> Vec<OriginSnapshot> {
        let clients = self.ways.iter().map(|way| &way.client).chain([&self.client]);
        clients.flat_map(RegistryClient::origins).collect()
    }

    fn set_credentials(&self, credentials: Credentials) -> bool {
        for way in self.ways.iter().filter(|way| way.login) {
            way.client.set_credentials(credentials.clone());
        }
        self.client.set_credentials(credentials);
        true
    }

    fn blob(&self, id: &BlobId) -> Result<Arc<dyn Backend>> {
        self.open(id, None)
    }

    fn blob_of_size(&self, id: &BlobId, stored_size: u64) -> Result<Arc<dyn Backend>> {
        self.open(id, Some(stored_size))
    }
}

impl RegistrySource {
    fn open(&self, id: &BlobId, stored_size: Option<u64>) -> Result<Arc<dyn Backend>> {
        let digest = Digest::from_hex(id.as_str())
            .map_err(|e| e.context("a registry holds only blobs named by SHA-256"))?;
        let digest = TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest };
        let blob = RegistryBlob::new(self.client.clone(), &self.repository, digest);
        let blob = blob.with_retry(self.retry).with_rewrite(self.rewrite.clone());
        let detour = |way| Arc::new(Detour::new(way, &self.repository, digest, stored_size, self.retry));
        let detours = (1..).zip(&self.ways).map(detour).collect();
        Ok(Arc::new(RegistryBlob {
            detours,
            supplier: self.supplier,
            stored_size,
            ..blob.with_spool_dir(&self.spool_dir)
        }))
    }
}
