//! Manifests and indexes: parsed once their digest is known, and the choice of a platform.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};

use crate::digest::{DigestAlgorithm, TaggedDigest};
use crate::{Error, ErrorKind, Result};

/// Largest manifest or index accepted: what registries accept (distribution
/// specification, "Pushing manifests").
pub const MAX_MANIFEST_SIZE: u64 = 4 << 20;
/// Largest image configuration accepted.
pub const MAX_CONFIG_SIZE: u64 = 8 << 20;
/// Indexes within indexes are followed this deep.
pub const MAX_INDEX_DEPTH: usize = 4;

/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker's index, "manifest list".
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's image manifest, version 2 schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// What a client accepts, for the `Accept` header.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// Type of a Nydus image in an index (rafs-v6 section 10.1).
pub const NYDUS_ARTIFACT_TYPE: &str = "application/vnd.nydus.image.manifest.v1+json";
/// The older mark of a Nydus image in an index, in `platform.os.features`.
pub const NYDUS_OS_FEATURE: &str = "nydus.remoteimage.v1";

/// The bytes of a manifest or index, verified.
#[derive(Clone, Debug)]
pub struct Document {
    /// As stored; re-encoding would change the digest.
    pub bytes: Bytes,
    /// Computed over `bytes`.
    pub digest: TaggedDigest,
    /// As the server or descriptor says; empty if it does not.
    pub media_type: String,
}

impl Document {
    /// Computes the digest of `bytes` and compares it with what is expected.
    ///
    /// # Errors
    /// `Corrupt`: it differs. `Invalid`: larger than [`MAX_MANIFEST_SIZE`].
    pub fn new(bytes: Bytes, media_type: &str, expected: Option<TaggedDigest>) -> Result<Self> {
        if bytes.len() as u64 > MAX_MANIFEST_SIZE {
            let why =
                format!("a manifest of {} bytes: at most {MAX_MANIFEST_SIZE} are accepted", bytes.len());
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        let algorithm = expected.map_or(DigestAlgorithm::Sha256, |digest| digest.algorithm);
        let digest = TaggedDigest { algorithm, digest: algorithm.digest(&bytes) };
        if let Some(expected) = expected
            && expected != digest
        {
            let why = format!("manifest has digest {digest}, {expected} was expected; nothing of it is used");
            return Err(Error::new(ErrorKind::Corrupt, why));
        }
        // "type; parameter" is legal in Content-Type.
        let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
        Ok(Self { bytes, digest, media_type })
    }

    /// What it is.
    ///
    /// # Errors
    /// `Corrupt`: not JSON of its type, or a mixture of types. `Unsupported`: another type.
    pub fn parse(&self) -> Result<Manifest> {
        let what = |kind, why: &str| Error::new(kind, format!("manifest {}: {why}", self.digest));
        let corrupt =
            |e: serde_json::Error| what(ErrorKind::Corrupt, "not valid JSON of its type").with_source(e);
        let peek: Peek = serde_json::from_slice(&self.bytes).map_err(corrupt)?;
        // One document that is read as an index by some and as an image by others would
        // give them different contents under one digest.
        if peek.manifests.is_some() && (peek.layers.is_some() || peek.config.is_some()) {
            return Err(what(ErrorKind::Corrupt, "both an index and an image"));
        }
        let said = |media_type: &str| match media_type {
            OCI_INDEX | DOCKER_INDEX => Some(true),
            OCI_MANIFEST | DOCKER_MANIFEST => Some(false),
            _ => None,
        };
        let (outer, inner) = (said(&self.media_type), peek.media_type.as_deref().and_then(said));
        if outer.is_some() && inner.is_some() && outer != inner {
            return Err(what(ErrorKind::Corrupt, "its media type differs from the one inside it"));
        }
        if peek.schema_version != Some(2) {
            return Err(what(
                ErrorKind::Unsupported,
                "want schema version 2; push the image again with a current tool",
            ));
        }
        match inner.or(outer).unwrap_or(peek.manifests.is_some()) {
            true => Ok(Manifest::Index(Box::new(parse_index(&self.bytes).map_err(corrupt)?))),
            false if peek.layers.is_some() => {
                Ok(Manifest::Image(Box::new(serde_json::from_slice(&self.bytes).map_err(corrupt)?)))
            }
            false => Err(what(ErrorKind::Unsupported, "not an image: it has no layers")),
        }
    }
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Peek {
    schema_version: Option<u32>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

/// Parses an index. `os.features`, which oci-spec reads under another name, is filled in.
fn parse_index(bytes: &[u8]) -> serde_json::Result<ImageIndex> {
    #[derive(serde::Deserialize)]
    struct Index {
        manifests: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        platform: Option<Features>,
    }
    #[derive(serde::Deserialize)]
    struct Features {
        #[serde(rename = "os.features")]
        os_features: Option<Vec<String>>,
    }
    let mut index: ImageIndex = serde_json::from_slice(bytes)?;
    let features: Index = serde_json::from_slice(bytes)?;
    let mut manifests = index.manifests().clone();
    for (descriptor, entry) in manifests.iter_mut().zip(features.manifests) {
        if let (Some(mut platform), Some(Features { os_features: Some(features) })) =
            (descriptor.platform().clone(), entry.platform)
        {
            platform.set_os_features(Some(features));
            descriptor.set_platform(Some(platform));
        }
    }
    index.set_manifests(manifests);
    Ok(index)
}

/// A parsed [`Document`].
#[derive(Clone, Debug)]
pub enum Manifest {
    /// Images of several platforms.
    Index(Box<ImageIndex>),
    /// One image.
    Image(Box<ImageManifest>),
}

/// The digest of a descriptor, of an algorithm this build can compute.
///
/// # Errors
/// `Unsupported`: another algorithm than sha256.
pub fn descriptor_digest(descriptor: &Descriptor) -> Result<TaggedDigest> {
    let text = descriptor.digest().to_string();
    text.parse().map_err(|_| Error::new(ErrorKind::Unsupported, format!("digest {text}: want sha256")))
}

/// An annotation of a descriptor.
pub fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    descriptor.annotations().as_ref()?.get(key).map(String::as_str)
}

/// `OS/ARCHITECTURE[/VARIANT]`, as in `--platform`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl Platform {
    /// This machine's, with the system of images: Linux.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: variant.map(str::to_owned) }
    }

    fn of(descriptor: &Descriptor) -> Option<Self> {
        let platform = descriptor.platform().as_ref()?;
        let (os, architecture) = (platform.os().to_string(), platform.architecture().to_string());
        Some(Self { os, architecture, variant: platform.variant().clone() })
    }

    /// True if an image for `other` is meant by this one. An unstated variant fits any, and
    /// arm64 means v8.
    pub fn accepts(&self, other: &Self) -> bool {
        let variant = |p: &Self| match (&p.variant, p.architecture.as_str()) {
            (None, "arm64") => Some("v8".to_owned()),
            (variant, _) => variant.clone(),
        };
        self.os == other.os
            && self.architecture == other.architecture
            && match (variant(self), variant(other)) {
                (Some(a), Some(b)) => a == b,
                _ => true,
            }
    }
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let parts: Vec<_> = s.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some((*variant).to_owned())),
            _ => (&"", &"", None),
        };
        if os.is_empty() || architecture.is_empty() || variant.as_deref() == Some("") {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("platform {s:?}: want OS/ARCHITECTURE[/VARIANT]"),
            ));
        }
        Ok(Self { os: (*os).to_owned(), architecture: (*architecture).to_owned(), variant })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// Which image of a platform is wanted, where an index has both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// The Nydus image, the plain one if there is none.
    Nydus,
    /// The plain image; a Nydus image only if there is nothing else.
    Plain,
}

/// True if the index marks this image as a Nydus image.
pub fn is_marked_nydus(descriptor: &Descriptor) -> bool {
    let artifact = descriptor.artifact_type().as_ref().is_some_and(|t| t.to_string() == NYDUS_ARTIFACT_TYPE);
    let features = descriptor.platform().as_ref().and_then(|p| p.os_features().as_ref());
    artifact || features.is_some_and(|features| features.iter().any(|f| f == NYDUS_OS_FEATURE))
}

/// Picks the image for `platform` out of an index.
///
/// # Errors
/// `NotFound`: there is none; the message lists what there is.
pub fn select<'a>(index: &'a ImageIndex, platform: &Platform, flavor: Flavor) -> Result<&'a Descriptor> {
    let attestation = |d: &Descriptor| annotation(d, "vnd.docker.reference.type").is_some();
    let candidates: Vec<_> = index.manifests().iter().filter(|d| !attestation(d)).collect();
    let mut fitting: Vec<_> = candidates
        .iter()
        .copied()
        .filter(|d| Platform::of(d).is_some_and(|offered| platform.accepts(&offered)))
        .collect();
    // An index without any platform says nothing; its only image is meant.
    if fitting.is_empty() && candidates.iter().all(|d| d.platform().is_none()) {
        fitting.clone_from(&candidates);
    }
    let wanted = |d: &&&Descriptor| is_marked_nydus(d) == (flavor == Flavor::Nydus);
    if let Some(best) = fitting.iter().find(wanted).or_else(|| fitting.first()) {
        return Ok(best);
    }
    let offered: Vec<_> = candidates.iter().filter_map(|d| Platform::of(d)).map(|p| p.to_string()).collect();
    let why = format!("no image for platform {platform}; there is: {}", offered.join(", "));
    Err(Error::new(ErrorKind::NotFound, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str, media_type: &str) -> Document {
        Document::new(Bytes::from(text.to_owned()), media_type, None).unwrap()
    }

    fn entry(n: u8, platform: &str, extra: &str) -> String {
        format!(
            r#"{{"mediaType":"{OCI_MANIFEST}","digest":"sha256:{}","size":{n}{platform}{extra}}}"#,
            format!("{n:02x}").repeat(32)
        )
    }

    fn index(entries: &[String]) -> ImageIndex {
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        match document(&text, OCI_INDEX).parse().unwrap() {
            Manifest::Index(index) => *index,
            Manifest::Image(_) => panic!("an index was expected"),
        }
    }

    #[test]
    fn digests_are_compared() {
        let bytes = Bytes::from_static(b"{}");
        let right = document("{}", "").digest;
        assert!(Document::new(bytes.clone(), "", Some(right)).is_ok());
        let wrong = format!("sha256:{}", "00".repeat(32)).parse().unwrap();
        assert_eq!(Document::new(bytes, "", Some(wrong)).unwrap_err().kind(), ErrorKind::Corrupt);
        let big = Bytes::from(vec![b' '; MAX_MANIFEST_SIZE as usize + 1]);
        assert_eq!(Document::new(big, "", None).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn ambiguous_and_foreign_documents_are_refused() {
        let cases = [
            (r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, OCI_INDEX, ErrorKind::Corrupt),
            (r#"{"schemaVersion":2,"manifests":[],"config":{}}"#, "", ErrorKind::Corrupt),
            (
                r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#,
                OCI_MANIFEST,
                ErrorKind::Corrupt,
            ),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, "", ErrorKind::Unsupported),
            (r#"{"schemaVersion":2,"layers":7,"config":{}}"#, "", ErrorKind::Corrupt),
            (r#"{"schemaVersion":2}"#, "", ErrorKind::Unsupported),
            ("[]", "", ErrorKind::Corrupt),
            ("", "", ErrorKind::Corrupt),
        ];
        for (text, media_type, kind) in cases {
            assert_eq!(document(text, media_type).parse().unwrap_err().kind(), kind, "{text}");
        }
        let docker = r#"{"schemaVersion":2,"manifests":[]}"#;
        assert!(matches!(
            document(docker, &format!("{DOCKER_INDEX}; charset=utf-8")).parse(),
            Ok(Manifest::Index(_))
        ));
    }

    #[test]
    fn platform_and_flavor_decide() {
        let amd64 = r#","platform":{"os":"linux","architecture":"amd64"}"#;
        let arm64 = r#","platform":{"os":"linux","architecture":"arm64","variant":"v8"}"#;
        let armv6 = r#","platform":{"os":"linux","architecture":"arm","variant":"v6"}"#;
        let marked = format!(r#","artifactType":"{NYDUS_ARTIFACT_TYPE}""#);
        let old = format!(
            r#","platform":{{"os":"linux","architecture":"arm64","os.features":["{NYDUS_OS_FEATURE}"]}}"#
        );
        let attest = r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#;
        let index = index(&[
            entry(1, amd64, attest),
            entry(2, amd64, ""),
            entry(3, amd64, &marked),
            entry(4, arm64, ""),
            entry(5, &old, ""),
            entry(6, armv6, ""),
        ]);
        let pick =
            |platform: &str, flavor| select(&index, &platform.parse().unwrap(), flavor).map(Descriptor::size);
        assert_eq!(pick("linux/amd64", Flavor::Plain).unwrap(), 2);
        assert_eq!(pick("linux/amd64", Flavor::Nydus).unwrap(), 3);
        assert_eq!(pick("linux/arm64", Flavor::Plain).unwrap(), 4);
        assert_eq!(pick("linux/arm64", Flavor::Nydus).unwrap(), 5);
        assert_eq!(pick("linux/arm/v6", Flavor::Nydus).unwrap(), 6);
        let err = pick("linux/arm/v7", Flavor::Plain).unwrap_err();
        assert!(err.kind() == ErrorKind::NotFound && err.to_string().contains("linux/arm/v6"), "{err}");
        for bad in ["", "linux", "linux/", "a/b/c/d", "a/b/"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_index_without_platforms_has_one_image() {
        let index = index(&[entry(7, "", "")]);
        assert_eq!(select(&index, &Platform::host(), Flavor::Plain).unwrap().size(), 7);
    }
}
