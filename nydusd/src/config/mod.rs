//! What the configuration means: two document formats, one [`Config`].
//!
//! A document is tried as v2 in JSON, v2 in TOML, then v1 in JSON ([`Config::parse`]); `version`
//! tells v2 from v1. Beyond the contract's keys both formats know:
//!
//! | v1 | v2 | meaning |
//! |---|---|---|
//! | `read_timeout` | `rafs.read_timeout` | seconds after which a read that misses the cache fails with EIO, all retries included (default 60) |
//! | `on_outage` | `rafs.on_outage` | `"fail"` (default): as above; `"wait"`: such reads wait for ever |
//! | `expect_root` | `rafs.expect_root` | `alg:hex`; another image root digest is refused |
//! | `expect_bootstrap` | `rafs.expect_bootstrap` | `sha256:hex`; another bootstrap is refused |
//! | `allow_unverified` | `rafs.allow_unverified` | serve images without chunk digests |
//! | `why` | `rafs.why` | `false`: do not record what readers wait for |
//! | `trace` | `rafs.trace` | `"on"` (default), `"record"` or `"off"`: see [`crate::trace`] |
//! | `trace_seconds` | `rafs.trace_seconds` | longest recording of a start (default 60) |
//! | `id_mapping` | `rafs.id_mapping` | `[internal, external, count]`: owners shown elsewhere |
//! | `prefer` | `rafs.prefer` | `"time"` (default) or `"bytes"`: what reading ahead saves |
//! | `proxy_from_environment` in a remote backend's fields | the same | use `HTTPS_PROXY` and its kin, else ignored |
//! | `credentials_from_environment` in an object store's fields | the same | sign as the store's own tools would |
//!
//! Unknown keys are ignored with a warning. A key of the contract that this build does not
//! implement is refused by name where ignoring it would change what users get, and accepted
//! with a warning where clients send it and ignoring it only costs speed.

mod prefetch;
mod v1;
mod v2;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use storage::digest::{Digest, TaggedDigest};
use storage::prefetch::ReadAhead;
use storage::read::OutagePolicy;

use crate::metrics::FileOptions;
use crate::trace;
use crate::writable::OverlayConfig;

pub use prefetch::PrefetchConfig;
pub(crate) use prefetch::parse_prefer;
pub(crate) use storage::config::check_basic_auth;
use storage::config::section::Section;
pub use storage::config::{
    BackendConfig, ConfigError, Dialect, HttpProxyConfig, LocalDiskConfig, LocalFsConfig, MirrorConfig,
    ProxyConfig, RegistryConfig, StoreConfig, TransportConfig,
};

/// Largest configuration document (contract 2.1).
const MAX_CONFIG_SIZE: u64 = 1 << 20;

/// What a read does when its source does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnOutage {
    /// Fail with EIO after the read timeout.
    Fail,
    /// Wait for ever.
    Wait,
}

/// A remap of owners: `count` ids from `internal` are shown from `external` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMapping {
    /// First id in the image.
    pub internal: u32,
    /// What that id is shown as.
    pub external: u32,
    /// Ids in the range.
    pub count: u32,
}

impl IdMapping {
    /// The id to show for `id` of the image.
    pub fn shown(self, id: u32) -> u32 {
        match id.checked_sub(self.internal) {
            Some(delta) if delta < self.count => self.external.wrapping_add(delta),
            _ => id,
        }
    }
}

/// Everything one mounted image is configured with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Instance id; key of blob cache metrics.
    pub id: String,
    /// Where blobs come from.
    pub backend: BackendConfig,
    /// Cache directory.
    pub work_dir: PathBuf,
    /// Show extended attributes. Absent means true.
    pub enable_xattr: bool,
    /// Remap of owners.
    pub id_mapping: Option<IdMapping>,
    /// Seconds until a read that misses fails.
    pub read_timeout: Duration,
    /// Fail or wait.
    pub on_outage: OnOutage,
    /// The image root digest that is demanded.
    pub expect_root: Option<TaggedDigest>,
    /// The bootstrap digest (SHA-256) that is demanded.
    pub expect_bootstrap: Option<Digest>,
    /// Serve images without chunk digests.
    pub allow_unverified: bool,
    /// Record what readers wait for.
    pub why: bool,
    /// What to keep of single files.
    pub files: FileOptions,
    /// What is fetched after the mount without being asked for.
    pub prefetch: PrefetchConfig,
    /// Absolute paths to fetch after the mount, in place of the image's prefetch table.
    pub prefetch_files: Option<Vec<Vec<u8>>>,
    /// How far what is fetched goes beyond what is read.
    pub read_ahead: ReadAhead,
    /// What is done about start-up traces.
    pub trace: trace::Mode,
    /// When their recording ends.
    pub trace_limits: trace::Limits,
    /// Push what was recorded to the image's repository.
    pub push_trace: bool,
    /// Where changes go, if the image is to be written to.
    pub overlay: Option<OverlayConfig>,
    /// What the document said that has no effect here; to be logged once.
    pub warnings: Vec<String>,
}

impl Config {
    /// A configuration with defaults for everything but source and cache.
    pub fn new(backend: BackendConfig, work_dir: PathBuf) -> Self {
        let OutagePolicy::FailAfter(read_timeout) = OutagePolicy::DEFAULT else {
            unreachable!("the default policy fails after a time")
        };
        Self {
            id: String::new(),
            backend,
            work_dir,
            enable_xattr: true,
            id_mapping: None,
            read_timeout,
            on_outage: OnOutage::Fail,
            expect_root: None,
            expect_bootstrap: None,
            allow_unverified: false,
            why: true,
            files: FileOptions::default(),
            prefetch: PrefetchConfig::default(),
            prefetch_files: None,
            read_ahead: ReadAhead::default(),
            trace: trace::Mode::default(),
            trace_limits: trace::Limits::default(),
            push_trace: false,
            overlay: None,
            warnings: Vec::new(),
        }
    }

    /// `--localfs-dir`: blobs and cache in one directory.
    pub fn localfs_dir(dir: &Path) -> Self {
        let backend = LocalFsConfig { dir: Some(dir.to_owned()), alt_dirs: Vec::new(), blob_file: None };
        Self::new(BackendConfig::LocalFs(backend), dir.to_owned())
    }

    /// Reads and parses the file at `path`.
    ///
    /// # Errors
    /// Unreadable, larger than 1 MiB, or what [`Config::parse`] refuses.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        use std::io::Read as _;
        let explain = |e: std::io::Error| ConfigError::new(format!("configuration {}: {e}", path.display()));
        let file = storage::outside::open_or_wait(path).map_err(explain)?;
        let mut text = String::new();
        file.take(MAX_CONFIG_SIZE + 1).read_to_string(&mut text).map_err(explain)?;
        if text.len() as u64 > MAX_CONFIG_SIZE {
            return Err(ConfigError::new(format!(
                "configuration {} is larger than {MAX_CONFIG_SIZE} bytes",
                path.display()
            )));
        }
        Self::parse(&text).map_err(|e| ConfigError::new(format!("configuration {}: {e}", path.display())))
    }

    /// Parses a document: v2 JSON, v2 TOML, v1 JSON, in this order. What is recognised as v2
    /// (it has a numeric `version`) and then refused is not tried as v1.
    ///
    /// # Errors
    /// The key that is missing, malformed or not built, and what is wanted.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let json = serde_json::from_str::<Value>(text);
        if let Ok(document) = &json {
            return if is_v2(document) { v2::parse(document.clone()) } else { v1::parse(document.clone()) };
        }
        match toml::from_str::<Value>(text) {
            Ok(document) if is_v2(&document) => v2::parse(document),
            Ok(_) => Err(ConfigError::new("a TOML configuration needs `version = 2`")),
            // Most documents are JSON; its parser's position helps more than TOML's.
            Err(toml_error) => match json {
                Err(json_error) if text.trim_start().starts_with('{') => {
                    Err(ConfigError::new(format!("not valid JSON: {json_error}")))
                }
                _ => Err(ConfigError::new(format!("neither JSON nor TOML: {}", toml_error.message()))),
            },
        }
    }

    /// What reads do when the source does not answer.
    pub fn outage_policy(&self) -> OutagePolicy {
        match self.on_outage {
            OnOutage::Fail => OutagePolicy::FailAfter(self.read_timeout),
            OnOutage::Wait => OutagePolicy::Wait,
        }
    }

    /// The configuration in v2 form with secrets left out, for daemon info.
    pub fn public_json(&self) -> Value {
        let kind = self.backend.kind();
        let mut document = json!({
            "version": 2,
            "id": self.id,
            "backend": { "type": kind, kind: self.backend.public_json() },
            "cache": { "type": "filecache", "filecache": { "work_dir": self.work_dir } },
            "rafs": {
                "mode": "direct",
                "validate": true,
                "enable_xattr": self.enable_xattr,
                "read_timeout": self.read_timeout.as_secs_f64(),
                "on_outage": match self.on_outage { OnOutage::Fail => "fail", OnOutage::Wait => "wait" },
                "allow_unverified": self.allow_unverified,
                "why": self.why,
                "iostats_files": self.files.counters,
                "access_pattern": self.files.pattern,
                "latest_read_files": self.files.latest,
                "batch_size": self.read_ahead.amplify,
                "prefer": prefetch::prefer_name(self.read_ahead.prefer),
                "prefetch": self.prefetch.public_json(),
                "trace": self.trace.name(),
                "trace_seconds": self.trace_limits.longest.as_secs_f64(),
            },
        });
        if let Some(overlay) = &self.overlay {
            document["overlay"] = json!({ "upper_dir": overlay.upper_dir, "work_dir": overlay.work_dir });
        }
        document
    }

    /// Reads the keys that both formats share, from v1's top level or v2's `rafs`.
    fn read_common(&mut self, section: &mut Section) -> Result<(), ConfigError> {
        let name = section.name("mode");
        match section.take_string("mode")?.as_deref() {
            None | Some("direct" | "cached") => {}
            Some(other) => {
                return Err(ConfigError::new(format!("`{name}`: {other:?}: want direct or cached")));
            }
        }
        if let Some(enable) = section.take_bool("enable_xattr")? {
            self.enable_xattr = enable;
        }
        let name = section.name("id_mapping");
        if let Some(numbers) = section.take_numbers("id_mapping")? {
            self.id_mapping = read_id_mapping(&name, &numbers)?;
        }
        self.why = section.take_bool("why")?.unwrap_or(true);
        self.files = FileOptions {
            counters: section.take_bool("iostats_files")?.unwrap_or(false),
            pattern: section.take_bool("access_pattern")?.unwrap_or(false),
            latest: section.take_bool("latest_read_files")?.unwrap_or(false),
        };
        if let Some(timeout) = read_seconds(section, "read_timeout")? {
            self.read_timeout = timeout;
        }
        let name = section.name("on_outage");
        match section.take_string("on_outage")?.as_deref() {
            None => {}
            Some("fail") => self.on_outage = OnOutage::Fail,
            Some("wait") => self.on_outage = OnOutage::Wait,
            Some(other) => return Err(ConfigError::new(format!("`{name}`: {other:?}: want fail or wait"))),
        }
        let name = section.name("expect_root");
        if let Some(text) = section.take_string("expect_root")? {
            self.expect_root =
                Some(text.parse().map_err(|e: storage::Error| ConfigError::new(format!("`{name}`: {e}")))?);
        }
        let name = section.name("expect_bootstrap");
        if let Some(text) = section.take_string("expect_bootstrap")? {
            let digest = crate::cli::parse_sha256(&text);
            self.expect_bootstrap = Some(digest.map_err(|e| ConfigError::new(format!("`{name}`: {e}")))?);
        }
        self.allow_unverified = section.take_bool("allow_unverified")?.unwrap_or(false);
        let name = section.name("trace");
        if let Some(word) = section.take_string("trace")? {
            self.trace = <trace::Mode as clap::ValueEnum>::from_str(&word, false)
                .map_err(|_| ConfigError::new(format!("`{name}`: {word:?}: want on, record or off")))?;
        }
        if let Some(longest) = read_seconds(section, "trace_seconds")? {
            self.trace_limits.longest = longest;
        }
        Ok(())
    }
}

/// A number of seconds above 0.
fn read_seconds(section: &mut Section, key: &'static str) -> Result<Option<Duration>, ConfigError> {
    let name = section.name(key);
    let Some(seconds) = section.take_f64(key)? else { return Ok(None) };
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| !duration.is_zero())
        .map(Some)
        .ok_or_else(|| ConfigError::new(format!("`{name}`: {seconds}: want seconds above 0")))
}

/// `[internal, external, count]`; a range of nothing is no mapping.
fn read_id_mapping(name: &str, numbers: &[u64]) -> Result<Option<IdMapping>, ConfigError> {
    let bad = || ConfigError::new(format!("`{name}`: {numbers:?}: want [internal, external, count]"));
    let &[internal, external, count] = numbers else { return Err(bad()) };
    let number = |value: u64| u32::try_from(value).map_err(|_| bad());
    let mapping =
        IdMapping { internal: number(internal)?, external: number(external)?, count: number(count)? };
    let fits = |first: u32| first.checked_add(mapping.count.saturating_sub(1)).is_some();
    if !fits(mapping.internal) || !fits(mapping.external) {
        return Err(bad());
    }
    Ok((mapping.count > 0 && mapping.internal != mapping.external).then_some(mapping))
}

/// The recogniser of v2: a `version` that is a number.
fn is_v2(document: &Value) -> bool {
    document.get("version").is_some_and(Value::is_number)
}

/// Reads the fields of a file cache: everything but `work_dir` is refused when it asks for something.
fn read_filecache(section: Option<Section>, warnings: &mut Vec<String>) -> Result<PathBuf, ConfigError> {
    let Some(mut section) = section else { return Ok(PathBuf::from(".")) };
    let work_dir = section.take_string("work_dir")?.unwrap_or_else(|| ".".to_owned());
    for key in ["disable_indexed_map", "enable_encryption", "enable_convergent_encryption", "encryption_key"]
    {
        section.refuse(key)?;
    }
    section.finish(warnings);
    Ok(PathBuf::from(work_dir))
}

/// Checks the cache type: only a file cache works for RAFS v6 under FUSE (contract 2.9).
fn check_cache_type(name: &str, kind: Option<&str>) -> Result<(), ConfigError> {
    match kind.unwrap_or_default() {
        "blobcache" | "filecache" => Ok(()),
        "fscache" => {
            Err(ConfigError::new(format!("`{name}`: fscache does not work with FUSE; want blobcache")))
        }
        "" | "dummycache" => {
            Err(ConfigError::new(format!("`{name}`: RAFS v6 needs a cache; want blobcache or filecache")))
        }
        other => Err(ConfigError::new(format!("`{name}`: {other:?}: want blobcache or filecache"))),
    }
}

#[cfg(test)]
mod tests;
