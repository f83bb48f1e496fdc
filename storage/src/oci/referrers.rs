//! Small documents that refer to an image: found, fetched and pushed.
//!
//! ```text
//! GET REPO/referrers/DIGEST?artifactType=…  ─ 404 ─▶  GET REPO/manifests/sha256-HEX   (tag schema)
//!        └──────────────── index ◀─────────────────────────────┘
//!                            └─▶ the newest manifest of the type ─▶ its one layer
//! ```
//!
//! An artifact is an image manifest with an empty config, an `artifactType`, a `subject` and one
//! layer (OCI image specification 1.1). A registry that does not know the referrers API gets the
//! index under the subject's tag from us, with the descriptors of other tools kept.
//!
//! Whoever may push to the repository may put anything here: sizes are bounded, digests compared, a time to come
//! makes nothing newer, and what the document says is for its reader to check.

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use reqwest::header::LINK;
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Call, RegistryClient};
use super::manifest::{Document, OCI_INDEX, OCI_MANIFEST};
use super::reference::Reference;
use super::stream::{read_all, verified};
use super::token::Access;
use crate::backend::registry::RegistryBlob;
use crate::backend::retry::with_retries;
use crate::backend::{Backend as _, ReadContext};
use crate::digest::TaggedDigest;
use crate::ids::ByteRange;
use crate::{Error, ErrorKind, Result};

/// Config of an artifact that has none (OCI image specification, "empty descriptor").
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
const EMPTY: &[u8] = b"{}";
/// When an artifact was made, RFC 3339 in UTC.
const CREATED: &str = "org.opencontainers.image.created";
/// Clocks differ by less. What claims to be from later than that is older than all else.
const CLOCKS: TimeDelta = TimeDelta::minutes(10);
/// A list of referrers in bytes, or a page of it; and an artifact's manifest. The parsed form is several times larger.
const MAX_INDEX_SIZE: u64 = 256 << 10;
const MAX_ARTIFACT_SIZE: u64 = 64 << 10;
/// Pages of such a list that are read.
const MAX_PAGES: usize = 8;
/// Artifacts that are deleted when they are superseded.
const MAX_DELETED: usize = 8;

/// An image manifest in a registry, for others to refer to. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Subject {
    client: RegistryClient,
    reference: Reference,
    digest: TaggedDigest,
    /// Length of the manifest in bytes and its media type.
    size: u64,
    media_type: String,
}

/// A descriptor as far as it matters here; the rest of an index is passed through as it is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    digest: String,
    artifact_type: Option<String>,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Artifact {
    artifact_type: Option<String>,
    subject: Option<Listed>,
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
struct Layer {
    digest: String,
    size: u64,
}

impl Subject {
    /// The manifest `document`, which lies in the repository of `reference`.
    pub(super) fn new(client: RegistryClient, reference: &Reference, document: &Document) -> Self {
        let media_type = match document.media_type.as_str() {
            "" => OCI_MANIFEST,
            media_type => media_type,
        };
        Self {
            client,
            reference: reference.at_digest(document.digest),
            digest: document.digest,
            size: document.bytes.len() as u64,
            media_type: media_type.to_owned(),
        }
    }

    /// Digest of the manifest.
    pub fn digest(&self) -> TaggedDigest {
        self.digest
    }

    /// The newest document of `artifact_type` that refers to this image, if there is one of at
    /// most `cap` bytes.
    ///
    /// # Errors
    /// `Corrupt`: a digest differs, or something is not of its shape; `Invalid`: larger;
    /// `Denied`, `Unavailable`, `TimedOut`, `Cancelled`.
    pub async fn fetch(
        &self,
        artifact_type: &str,
        cap: u64,
        context: &ReadContext,
    ) -> Result<Option<Vec<u8>>> {
        let now = Utc::now();
        let ours = self.listed(artifact_type, context).await?;
        let Some(newest) = ours.iter().max_by_key(|listed| listed.age(now)) else { return Ok(None) };
        self.document(newest, artifact_type, cap, context).await.map(Some)
    }

    /// What is listed of `artifact_type`.
    async fn listed(&self, artifact_type: &str, context: &ReadContext) -> Result<Vec<Listed>> {
        let ours = |index: Index| {
            let listed = index.manifests.iter().filter_map(|value| Listed::deserialize(value).ok());
            listed.filter(|listed| listed.artifact_type.as_deref() == Some(artifact_type)).collect::<Vec<_>>()
        };
        let path = format!("{}/referrers/{}", self.reference.repository(), self.digest);
        let mut url = self.client.url(&path)?;
        url.query_pairs_mut().append_pair("artifactType", artifact_type);
        let mut all = Vec::new();
        for page in 0..MAX_PAGES {
            let found = self.page(url, context).await;
            match found.map_err(|e| e.context(format_args!("referrers of {}", self.reference)))? {
                Some((index, next)) => {
                    all.extend(ours(index));
                    match next {
                        Some(next) => url = next,
                        None => break,
                    }
                }
                None if page == 0 => {
                    return Ok(self.tagged(context).await?.map(ours).unwrap_or_default());
                }
                None => break,
            }
        }
        Ok(all)
    }

    /// Asks the referrers API for a page and the place of the next; `None` if the registry does not have it.
    async fn page(&self, url: Url, context: &ReadContext) -> Result<Option<(Index, Option<Url>)>> {
        let access = Access::pull(self.reference.repository());
        with_retries(self.client.retry(), context, || async {
            let call = Call::new(Method::GET, url.clone(), access.clone());
            let answer = self.client.send(call, context).await?;
            match answer.status() {
                StatusCode::OK => {
                    let next = answer.header(LINK).and_then(next_link).and_then(|next| url.join(next).ok());
                    let next = next.filter(|next| self.client.is_own(next));
                    let bytes = answer.bytes(MAX_INDEX_SIZE, context).await?;
                    Ok(Some((parse(&bytes, MAX_INDEX_SIZE, "list of referrers")?, next)))
                }
                // What registries without the API answer to a path they do not know.
                StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST => Ok(None),
                _ => Err(answer.into_failure(self.client.host(), context).await),
            }
        })
        .await
    }

    /// The index under the subject's tag, where registries without the API keep it.
    async fn tagged(&self, context: &ReadContext) -> Result<Option<Index>> {
        let reference = self.reference.at_tag(&self.tag())?;
        match self.client.get_manifest(&reference, context).await {
            Ok(document) => parse(&document.bytes, MAX_INDEX_SIZE, "index of referrers").map(Some),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn tag(&self) -> String {
        format!("{}-{}", self.digest.algorithm, self.digest.digest)
    }

    async fn document(
        &self,
        listed: &Listed,
        artifact_type: &str,
        cap: u64,
        context: &ReadContext,
    ) -> Result<Vec<u8>> {
        let reference = self.reference.at_digest(listed.digest.parse()?);
        let manifest = self.client.get_manifest(&reference, context).await?;
        let artifact: Artifact = parse(&manifest.bytes, MAX_ARTIFACT_SIZE, "artifact")?;
        let what = |kind, why: String| Error::new(kind, format!("artifact {}: {why}", manifest.digest));
        let subject = artifact.subject.map(|subject| subject.digest).unwrap_or_default();
        if artifact.artifact_type.as_deref() != Some(artifact_type) || subject != self.digest.to_string() {
            return Err(what(ErrorKind::Corrupt, format!("its subject is {subject:?}, not {}", self.digest)));
        }
        let [layer] = artifact.layers.as_slice() else {
            return Err(what(ErrorKind::Corrupt, format!("{} layers: want one", artifact.layers.len())));
        };
        if layer.size == 0 || layer.size > cap {
            return Err(what(ErrorKind::Invalid, format!("{} bytes: want 1 to {cap}", layer.size)));
        }
        let digest: TaggedDigest = layer.digest.parse()?;
        let blob = RegistryBlob::new(self.client.clone(), self.reference.repository(), digest);
        let blob = blob.of_size(layer.size);
        let stream = blob.open(ByteRange::new(0, layer.size)?, context).await?;
        read_all(verified(stream, digest, layer.size), cap).await
    }

    /// Pushes a document of `artifact_type` that refers to this image, as the newest one. Those that were there before
    /// are deleted where the registry does that. Answers the digest of the artifact's manifest.
    ///
    /// # Errors
    /// Those of [`RegistryClient::put_manifest`].
    pub async fn push(
        &self,
        artifact_type: &str,
        document: Vec<u8>,
        context: &ReadContext,
    ) -> Result<TaggedDigest> {
        let earlier = self.listed(artifact_type, context).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "what is there already is not known");
            Vec::new()
        });
        let now = Utc::now();
        // Another node's clock may be ahead of ours.
        let theirs = earlier.iter().filter_map(|listed| listed.age(now).0).max();
        let created = theirs.map_or(now, |theirs| now.max(theirs + TimeDelta::milliseconds(1)));
        let created = created.to_rfc3339_opts(SecondsFormat::Millis, true);
        let repository = self.reference.repository();
        let context_of = |e: Error| e.context(format_args!("push to {}", self.reference));
        let size = document.len();
        let client = &self.client;
        let blob = client.put_small_blob(repository, document.into(), context).await.map_err(context_of)?;
        let config = client
            .put_small_blob(repository, Bytes::from_static(EMPTY), context)
            .await
            .map_err(context_of)?;
        let annotations = json!({ CREATED: created });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": artifact_type,
            "config": { "mediaType": EMPTY_TYPE, "digest": config.to_string(), "size": EMPTY.len() },
            "layers": [{ "mediaType": artifact_type, "digest": blob.to_string(), "size": size }],
            "subject": {
                "mediaType": self.media_type,
                "digest": self.digest.to_string(),
                "size": self.size,
            },
            "annotations": annotations,
        });
        let manifest = Bytes::from(manifest.to_string());
        let len = manifest.len();
        let name = Document::new(manifest.clone(), OCI_MANIFEST, None)?.digest.to_string();
        let stored = client
            .put_manifest(repository, &name, OCI_MANIFEST, manifest, context)
            .await
            .map_err(context_of)?;
        if !stored.subject {
            let descriptor = json!({
                "mediaType": OCI_MANIFEST,
                "artifactType": artifact_type,
                "digest": name,
                "size": len,
                "annotations": annotations,
            });
            self.list(artifact_type, descriptor, context).await.map_err(context_of)?;
        }
        let superseded = earlier.iter().filter(|listed| listed.digest != name).take(MAX_DELETED);
        for listed in superseded {
            if let Err(error) = self.delete(listed, context).await {
                tracing::debug!(%error, "what was superseded is not deleted");
                break;
            }
        }
        Ok(stored.digest)
    }

    /// Deletes a manifest that nobody needs any more.
    async fn delete(&self, listed: &Listed, context: &ReadContext) -> Result<()> {
        let digest: TaggedDigest = listed.digest.parse()?;
        let repository = self.reference.repository();
        let url = self.client.url(&format!("{repository}/manifests/{digest}"))?;
        let call = Call::new(Method::DELETE, url, Access::delete(repository));
        let answer = self.client.send(call, context).await.map_err(|failure| failure.error)?;
        match answer.status() {
            status if status.is_success() || status == StatusCode::NOT_FOUND => Ok(()),
            _ => Err(answer.into_failure(self.client.host(), context).await.error),
        }
    }

    /// Puts `descriptor` into the index under the subject's tag, in place of older ones of its
    /// type. Of two that do so at once the last one stays.
    async fn list(&self, artifact_type: &str, descriptor: Value, context: &ReadContext) -> Result<()> {
        let mut manifests = self.tagged(context).await?.map(|index| index.manifests).unwrap_or_default();
        manifests.retain(|old| old.get("artifactType").and_then(Value::as_str) != Some(artifact_type));
        manifests.push(descriptor);
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
        let index = Bytes::from(index.to_string());
        if index.len() as u64 > MAX_INDEX_SIZE {
            let why = format!("the index of referrers would have more than {MAX_INDEX_SIZE} bytes");
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        self.client
            .put_manifest(self.reference.repository(), &self.tag(), OCI_INDEX, index, context)
            .await
            .map(drop)
    }
}

impl Listed {
    /// Orders by time; without one that has come by `now` a document is older than all others.
    fn age(&self, now: DateTime<Utc>) -> (Option<DateTime<Utc>>, &str) {
        let created = self.annotations.as_ref().and_then(|all| all.get(CREATED));
        let created = created.and_then(|text| DateTime::parse_from_rfc3339(text).ok());
        let created = created.map(|at| at.with_timezone(&Utc)).filter(|at| *at <= now + CLOCKS);
        (created, &self.digest)
    }
}

/// The address in `<ADDRESS>; rel="next"` (RFC 8288, as far as registries write it).
fn next_link(link: &str) -> Option<&str> {
    link.split(',').find_map(|link| {
        let (address, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let mut parameters = parameters.split(';').map(str::trim);
        parameters.any(|parameter| matches!(parameter, "rel=next" | "rel=\"next\"")).then_some(address)
    })
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], cap: u64, what: &str) -> Result<T> {
    if bytes.len() as u64 > cap {
        return Err(Error::new(ErrorKind::Invalid, format!("{what}: more than {cap} bytes")));
    }
    serde_json::from_slice(bytes)
        .map_err(|e| Error::new(ErrorKind::Corrupt, format!("{what}: not of its shape")).with_source(e))
}

#[cfg(test)]
mod tests;
