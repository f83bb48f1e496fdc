//! Storing manifests and small blobs in a registry (OCI distribution specification, "Push").

use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use reqwest::{Body, Method, StatusCode};

use super::client::{Call, RegistryClient};
use super::token::Access;
use crate::backend::ReadContext;
use crate::backend::retry::with_retries;
use crate::digest::{DigestAlgorithm, TaggedDigest};
use crate::{Error, ErrorKind, Result};

/// What a registry says of a manifest that it has stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredManifest {
    /// Digest of what was sent.
    pub digest: TaggedDigest,
    /// The registry knows that the manifest refers to a subject (`OCI-Subject`).
    pub subject: bool,
}

impl RegistryClient {
    /// Stores a manifest as `name`: a tag, or its digest.
    ///
    /// # Errors
    /// `Denied`, `Unavailable`, `TimedOut`, `Cancelled`; `Invalid`: the registry refuses it;
    /// `Corrupt`: it has stored something else.
    pub async fn put_manifest(
        &self,
        repository: &str,
        name: &str,
        media_type: &'static str,
        manifest: Bytes,
        context: &ReadContext,
    ) -> Result<StoredManifest> {
        let digest = sha256(&manifest);
        let path = format!("{repository}/manifests/{name}");
        let (stated, subject) = with_retries(self.retry(), context, || async {
            let mut call = Call::new(Method::PUT, self.url(&path)?, Access::push(repository));
            call.headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
            call.body = Some(Body::from(manifest.clone()));
            let answer = self.send(call, context).await?;
            match answer.status() {
                StatusCode::CREATED => {
                    let stated = answer.header("docker-content-digest").map(str::to_owned);
                    Ok((stated, answer.header("oci-subject").is_some()))
                }
                _ => Err(answer.into_failure(self.host(), context).await),
            }
        })
        .await?;
        match stated {
            Some(stated) if stated != digest.to_string() => {
                let why = format!("the registry stored manifest {stated}, {digest} was sent");
                Err(Error::new(ErrorKind::Corrupt, why))
            }
            _ => Ok(StoredManifest { digest, subject }),
        }
    }

    /// Stores a blob that fits into one request, unless the repository holds it.
    ///
    /// # Errors
    /// Those of [`RegistryClient::put_manifest`].
    pub async fn put_small_blob(
        &self,
        repository: &str,
        bytes: Bytes,
        context: &ReadContext,
    ) -> Result<TaggedDigest> {
        let digest = sha256(&bytes);
        if self.blob_size(repository, digest, context).await? == Some(bytes.len() as u64) {
            return Ok(digest);
        }
        let access = Access::push(repository);
        with_retries(self.retry(), context, || async {
            let url = self.url(&format!("{repository}/blobs/uploads/"))?;
            let mut call = Call::new(Method::POST, url, access.clone());
            call.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
            let answer = self.send(call, context).await?;
            if answer.status() != StatusCode::ACCEPTED {
                return Err(answer.into_failure(self.host(), context).await);
            }
            let mut session = Self::location(&answer)?;
            session.query_pairs_mut().append_pair("digest", &digest.to_string());
            let mut call = Call::new(Method::PUT, session, access.clone());
            call.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            call.headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
            call.body = Some(Body::from(bytes.clone()));
            let answer = self.send(call, context).await?;
            match answer.status() {
                StatusCode::CREATED | StatusCode::NO_CONTENT => Ok(()),
                _ => Err(answer.into_failure(self.host(), context).await),
            }
        })
        .await?;
        Ok(digest)
    }
}

fn sha256(bytes: &[u8]) -> TaggedDigest {
    TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest: DigestAlgorithm::Sha256.digest(bytes) }
}
