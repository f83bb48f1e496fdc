//! What is fetched ahead of readers, and how far a read is widened.

use std::num::NonZeroU64;

use serde_json::{Value, json};
use storage::prefetch::{Prefer, ReadAhead};

use super::ConfigError;
use storage::config::section::Section;

/// Bound of every size here (contract 2.9).
const MAX_SIZE: u32 = 256 << 20;
/// Default of every size here (contract 2.2).
const DEFAULT_SIZE: u32 = 1 << 20;
/// Bound of every thread count (contract 2.9).
const MAX_THREADS: u64 = 1024;
/// Default thread count (contract 2.2).
const DEFAULT_THREADS: u32 = 8;

/// What is fetched after the mount without being asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefetchConfig {
    /// Anything at all: the list of files that was given, else the image's own prefetch table.
    pub enable: bool,
    /// The image's own hints where nothing else is known. Off if `enable` is said to be false.
    pub hints: bool,
    /// After that, the rest of the image.
    pub all: bool,
    /// Bytes a second at most, as stored; `None`: what the link gives.
    pub bandwidth: Option<NonZeroU64>,
    /// Requests that are merged into one, in bytes, 0 to 256 MiB.
    pub batch_size: u32,
    /// 1 to 1024. How many requests run at once follows from the link; this is shown in metrics.
    pub threads: u32,
}

impl Default for PrefetchConfig {
    fn default() -> Self {
        let (batch_size, threads) = (DEFAULT_SIZE, DEFAULT_THREADS);
        Self { enable: false, hints: true, all: false, bandwidth: None, batch_size, threads }
    }
}

/// Names of the keys whose spelling differs between the formats, and their other default.
pub(super) struct PrefetchKeys {
    threads: &'static str,
    batch_size: &'static str,
    bandwidth: &'static str,
    all: bool,
}

/// `fs_prefetch` of v1.
pub(super) const V1: PrefetchKeys = PrefetchKeys {
    threads: "threads_count",
    batch_size: "merging_size",
    bandwidth: "bandwidth_rate",
    all: true,
};

/// `rafs.prefetch` and `cache.prefetch` of v2.
pub(super) const V2: PrefetchKeys =
    PrefetchKeys { threads: "threads", batch_size: "batch_size", bandwidth: "bandwidth_limit", all: false };

impl PrefetchConfig {
    /// Reads a prefetch block; its values are checked only if it is enabled.
    pub(super) fn read(
        section: Option<Section>,
        keys: &PrefetchKeys,
        warnings: &mut Vec<String>,
    ) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        let Some(mut section) = section else { return Ok(config) };
        let enable = section.take_bool("enable")?;
        (config.enable, config.hints) = (enable.unwrap_or(false), enable != Some(false));
        // To read whole blobs in one go is how the engine reads everything.
        let stream = section.take_bool("stream_prefetch")?.unwrap_or(false);
        config.all = section.take_bool("prefetch_all")?.unwrap_or(keys.all) || stream;
        config.bandwidth = section.take_u64(keys.bandwidth)?.and_then(NonZeroU64::new);
        let threads_name = section.name(keys.threads);
        let threads = section.take_u64(keys.threads)?.unwrap_or(DEFAULT_THREADS.into());
        let size_name = section.name(keys.batch_size);
        let size = section.take_u64(keys.batch_size)?.unwrap_or(DEFAULT_SIZE.into());
        section.finish(warnings);
        if !config.enable {
            return Ok(config);
        }
        config.threads =
            u32::try_from(threads).ok().filter(|n| (1..=MAX_THREADS).contains(&u64::from(*n))).ok_or_else(
                || ConfigError::new(format!("`{threads_name}`: {threads}: want 1 to {MAX_THREADS}")),
            )?;
        config.batch_size = check_size(&size_name, size)?;
        Ok(config)
    }

    /// The block of the file system and that of the cache taken together: what either asks for,
    /// within both limits of bandwidth. Sizes are those of the first that is enabled.
    pub(super) fn join(self, cache: Self) -> Self {
        let hints = self.hints && cache.hints;
        match (self.enable, cache.enable) {
            (_, false) => Self { hints, ..self },
            (false, true) => Self { hints, ..cache },
            (true, true) => Self {
                hints,
                all: self.all || cache.all,
                bandwidth: [self.bandwidth, cache.bandwidth].into_iter().flatten().min(),
                ..self
            },
        }
    }

    /// As `rafs.prefetch` of v2.
    pub(super) fn public_json(&self) -> Value {
        json!({
            "enable": self.enable,
            "prefetch_all": self.all,
            "bandwidth_limit": self.bandwidth.map_or(0, NonZeroU64::get),
            "batch_size": self.batch_size,
            "threads": self.threads,
        })
    }
}

/// The word for a preference.
pub(super) fn prefer_name(prefer: Prefer) -> &'static str {
    match prefer {
        Prefer::Time => "time",
        Prefer::Bytes => "bytes",
    }
}

/// The preference that a word means.
pub(crate) fn parse_prefer(text: &str) -> Result<Prefer, String> {
    match text {
        "time" => Ok(Prefer::Time),
        "bytes" => Ok(Prefer::Bytes),
        _ => Err(format!("{text:?}: want time or bytes")),
    }
}

/// Reads `prefer` and the size called `amplify` in this format.
pub(super) fn read_ahead(section: &mut Section, amplify: &'static str) -> Result<ReadAhead, ConfigError> {
    let mut read_ahead = ReadAhead::default();
    let name = section.name(amplify);
    if let Some(size) = section.take_u64(amplify)? {
        read_ahead.amplify = check_size(&name, size)?;
    }
    let name = section.name("prefer");
    if let Some(text) = section.take_string("prefer")? {
        read_ahead.prefer = parse_prefer(&text).map_err(|e| ConfigError::new(format!("`{name}`: {e}")))?;
    }
    Ok(read_ahead)
}

fn check_size(name: &str, size: u64) -> Result<u32, ConfigError> {
    let fits = u32::try_from(size).ok().filter(|size| *size <= MAX_SIZE);
    fits.ok_or_else(|| ConfigError::new(format!("`{name}`: {size}: want at most {MAX_SIZE}")))
}
