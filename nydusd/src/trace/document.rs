//! A trace as JSON: on the node's disk, in the API, in a registry.
//!
//! ```json
//! {"version": 1, "bootstrap": "sha256:…", "root": "sha256:…", "starts": 2, "complete": true,
//!  "blobs": ["<id>", "<id>"],
//!  "order": [[0, 17, 4, 3], [1, 0, 12, 1]]}
//! ```
//!
//! `order` holds runs `[blob, first chunk, chunks, history]`, most wanted first: `blob` counts
//! in `blobs`, `history` has one bit for each of the last eight starts, set if it touched the
//! chunks (bit 0: the last start).
//!
//! A document may come from anyone. [`Document::trace`] checks it against the image: nothing
//! that it says can ask for more than each chunk of that image once.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use anyhow::{Context as _, bail, ensure};
use rafs::bootstrap::Blob;
use rafs::format::limits::MAX_BLOBS;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use storage::digest::{Digest, TaggedDigest};
use storage::ids::BlobId;

use super::{Chunk, Entry, MAX_CHUNKS, STARTS, Trace};

/// Largest document in bytes: [`MAX_CHUNKS`] runs of one chunk take less.
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// What a trace must fit: one image.
#[derive(Clone, Debug)]
pub struct Identity {
    bootstrap: Digest,
    blobs: Vec<(BlobId, u32)>,
}

impl Identity {
    /// The image with this bootstrap and these blobs.
    pub fn new(bootstrap: Digest, blobs: &[Blob]) -> Self {
        Self { bootstrap, blobs: blobs.iter().map(|blob| (blob.id.clone(), blob.chunk_count)).collect() }
    }

    /// Number of chunks of each blob.
    pub fn chunk_counts(&self) -> impl Iterator<Item = u32> {
        self.blobs.iter().map(|(_, count)| *count)
    }
}

/// The JSON form of a trace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Document {
    version: u32,
    bootstrap: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    root: Option<String>,
    starts: u8,
    complete: bool,
    #[serde(deserialize_with = "bounded::<MAX_BLOBS, _, _>")]
    blobs: Vec<String>,
    #[serde(deserialize_with = "bounded::<MAX_CHUNKS, _, _>")]
    order: Vec<(u32, u32, u32, u8)>,
}

impl Document {
    /// The version that is written, and the only one that is read.
    const VERSION: u32 = 1;

    /// The document of `trace`, which belongs to `identity`.
    pub(super) fn new(
        identity: &Identity,
        root: Option<TaggedDigest>,
        trace: &Trace,
        complete: bool,
    ) -> Self {
        let mut order: Vec<(u32, u32, u32, u8)> = Vec::new();
        for Entry { chunk, history } in &trace.entries {
            match order.last_mut() {
                Some((blob, first, count, of))
                    if *blob == chunk.blob && *of == *history && *first + *count == chunk.index =>
                {
                    *count += 1;
                }
                _ => order.push((chunk.blob, chunk.index, 1, *history)),
            }
        }
        Self {
            version: Self::VERSION,
            bootstrap: format!("sha256:{}", identity.bootstrap),
            root: root.map(|root| root.to_string()),
            starts: trace.starts,
            complete,
            blobs: identity.blobs.iter().map(|(id, _)| id.to_string()).collect(),
            order,
        }
    }

    /// Reads a document of at most [`MAX_DOCUMENT`] bytes.
    ///
    /// # Errors
    /// It is larger, no JSON, or not of a known version.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        ensure!(bytes.len() as u64 <= MAX_DOCUMENT, "more than {MAX_DOCUMENT} bytes");
        let document: Self = serde_json::from_slice(bytes).context("not a trace")?;
        document.check_version()?;
        Ok(document)
    }

    fn check_version(&self) -> anyhow::Result<()> {
        let (version, ours) = (self.version, Self::VERSION);
        ensure!(version == ours, "a trace of version {version}; this build reads {ours}");
        Ok(())
    }

    /// The trace, checked against the image.
    ///
    /// # Errors
    /// It is of another version, belongs to another image, names a blob or chunk that the image does not have or one
    /// chunk twice, or more chunks than a trace may have.
    pub fn trace(&self, identity: &Identity) -> anyhow::Result<Trace> {
        self.check_version()?;
        let bootstrap = format!("sha256:{}", identity.bootstrap);
        if self.bootstrap != bootstrap {
            bail!("the trace is of another image: its bootstrap is {:?}, ours {bootstrap}", self.bootstrap);
        }
        ensure!((1..=STARTS).contains(&self.starts), "{} starts: want 1 to {STARTS}", self.starts);
        let blobs = self
            .blobs
            .iter()
            .map(|id| identity.blobs.iter().position(|(ours, _)| ours.as_str() == id))
            .collect::<Option<Vec<_>>>()
            .context("the trace names a blob that the image does not have")?;
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        for &(blob, first, count, history) in &self.order {
            let blob = *blobs.get(blob as usize).with_context(|| format!("run of blob {blob}"))?;
            let (id, chunks) = &identity.blobs[blob];
            let end = first.checked_add(count).filter(|end| end <= chunks);
            let (Some(end), 1..) = (end, count) else {
                bail!("blob {id} has {chunks} chunks, but the trace names {count} from {first}");
            };
            ensure!(history != 0, "blob {id}, chunk {first}: touched by no start");
            ensure!(entries.len() + count as usize <= MAX_CHUNKS, "more than {MAX_CHUNKS} chunks");
            for index in first..end {
                // Below the number of blobs, which is a u32 in the image.
                let chunk = Chunk { blob: blob as u32, index };
                ensure!(seen.insert(chunk), "blob {id}: chunk {index} is named twice");
                entries.push(Entry { chunk, history });
            }
        }
        Ok(Trace { starts: self.starts, entries })
    }

    /// The text.
    ///
    /// # Errors
    /// None that happens: it holds numbers and strings.
    pub fn to_json(&self) -> anyhow::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }
}

/// A list of at most `MAX` items: more would be held many times larger than they are written, only to be refused.
fn bounded<'de, const MAX: usize, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    struct Bounded<const MAX: usize, T>(PhantomData<T>);

    impl<'de, const MAX: usize, T: Deserialize<'de>> Visitor<'de> for Bounded<MAX, T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX} items")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
            let mut all = Vec::new();
            while let Some(item) = items.next_element()? {
                if all.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                all.push(item);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_seq(Bounded::<MAX, T>(PhantomData))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_bounded_while_they_are_read() {
        let with = |blobs: usize, runs: usize| {
            let list = |item: &str, count: usize| vec![item; count].join(",");
            let (blobs, runs) = (list("\"b\"", blobs), list("[0,0,1,1]", runs));
            let head = r#""version":1,"bootstrap":"sha256:00","starts":1,"complete":true"#;
            Document::parse(format!(r#"{{{head},"blobs":[{blobs}],"order":[{runs}]}}"#).as_bytes())
        };
        assert!(with(MAX_BLOBS, MAX_CHUNKS).is_ok());
        for (blobs, runs) in [(MAX_BLOBS + 1, 1), (1, MAX_CHUNKS + 1)] {
            let error = format!("{:#}", with(blobs, runs).unwrap_err());
            assert!(error.contains("not a trace") && error.contains("invalid length"), "{error}");
        }
    }
}
