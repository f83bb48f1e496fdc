//! What is read of a registry beside blobs: manifests, and what is there.

use reqwest::header::{ACCEPT, CONTENT_LENGTH, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode, Url};

use super::{Call, MAX_REDIRECTS, RegistryClient, is_redirect, too_many_redirects};
use crate::backend::ReadContext;
use crate::backend::http::Answer;
use crate::backend::retry::{Failure, with_retries};
use crate::digest::TaggedDigest;
use crate::oci::manifest::{self, Document, MAX_MANIFEST_SIZE};
use crate::oci::reference::Reference;
use crate::oci::token::Access;
use crate::{Error, ErrorKind, Result};

impl RegistryClient {
    /// Sends GET or HEAD and follows redirects; any other status is an answer.
    async fn follow(
        &self,
        method: Method,
        url: Url,
        access: &Access,
        headers: &HeaderMap,
        context: &ReadContext,
    ) -> std::result::Result<Answer, Failure> {
        let mut url = url;
        for _ in 0..=MAX_REDIRECTS {
            let mut call = Call::new(method.clone(), url, access.clone());
            call.headers.clone_from(headers);
            let answer = self.send(call, context).await?;
            if !is_redirect(answer.status()) {
                return Ok(answer);
            }
            url = Self::location(&answer)?;
        }
        Err(too_many_redirects(&method, &url).into())
    }

    /// The manifest or index that `reference` names, verified: against the digest of the
    /// reference if it has one, against the one the registry states otherwise.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Unavailable`, `TimedOut`, `Cancelled`; `Corrupt`: another digest.
    pub async fn get_manifest(&self, reference: &Reference, context: &ReadContext) -> Result<Document> {
        let path = format!("{}/manifests/{}", reference.repository(), reference.manifest_name());
        let access = Access::pull(reference.repository());
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(manifest::ACCEPT))]);
        with_retries(self.inner.retry, context, || async {
            let answer = self.follow(Method::GET, self.url(&path)?, &access, &headers, context).await?;
            if answer.status() != StatusCode::OK {
                return Err(answer.into_failure(self.host(), context).await);
            }
            let stated = answer.header("docker-content-digest").and_then(|v| v.parse().ok());
            let media_type = answer.header("content-type").unwrap_or_default().to_owned();
            let bytes = answer.bytes(MAX_MANIFEST_SIZE, context).await?;
            Ok(Document::new(bytes.into(), &media_type, reference.digest().or(stated))?)
        })
        .await
        .map_err(|e| e.context(format_args!("manifest of {reference}")))
    }

    /// Digest of the manifest at `reference`, or `None` if there is none; fetches no body.
    ///
    /// # Errors
    /// `Denied`, `Unavailable`, `TimedOut`, `Cancelled`; `Invalid`: the registry states no digest.
    pub async fn manifest_digest(
        &self,
        reference: &Reference,
        context: &ReadContext,
    ) -> Result<Option<TaggedDigest>> {
        let path = format!("{}/manifests/{}", reference.repository(), reference.manifest_name());
        let access = Access::pull(reference.repository());
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(manifest::ACCEPT))]);
        with_retries(self.inner.retry, context, || async {
            let answer = self.follow(Method::HEAD, self.url(&path)?, &access, &headers, context).await?;
            match answer.status() {
                StatusCode::OK => match answer.header("docker-content-digest").and_then(|v| v.parse().ok()) {
                    Some(digest) => Ok(Some(digest)),
                    None => {
                        let why = format!("{}: no digest in the answer", answer.what());
                        Err(Error::new(ErrorKind::Invalid, why).into())
                    }
                },
                StatusCode::NOT_FOUND => Ok(None),
                _ => Err(answer.into_failure(self.host(), context).await),
            }
        })
        .await
        .map_err(|e| e.context(format_args!("manifest of {reference}")))
    }

    /// Size of a blob, or `None` if the repository does not hold it.
    ///
    /// # Errors
    /// `Denied`, `Unavailable`, `TimedOut`, `Cancelled`; `Unsupported`: the registry states no size.
    pub async fn blob_size(
        &self,
        repository: &str,
        digest: TaggedDigest,
        context: &ReadContext,
    ) -> Result<Option<u64>> {
        let path = format!("{repository}/blobs/{digest}");
        let access = Access::pull(repository);
        with_retries(self.inner.retry, context, || async {
            let answer =
                self.follow(Method::HEAD, self.url(&path)?, &access, &HeaderMap::new(), context).await?;
            match answer.status() {
                StatusCode::OK => match answer.header(CONTENT_LENGTH).and_then(|v| v.parse().ok()) {
                    Some(size) => Ok(Some(size)),
                    None => {
                        let why = format!("{}: no Content-Length in the answer", answer.what());
                        Err(Error::new(ErrorKind::Unsupported, why).into())
                    }
                },
                StatusCode::NOT_FOUND => Ok(None),
                _ => Err(answer.into_failure(self.host(), context).await),
            }
        })
        .await
    }
}
