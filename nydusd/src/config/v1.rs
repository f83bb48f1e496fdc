//! v1: the JSON that every Go client writes.

use serde_json::Value;

use super::section::Section;
use super::{BackendConfig, Config, ConfigError, MAX_PREFETCH_SIZE};

/// Parses a v1 document.
pub(super) fn parse(document: Value) -> Result<Config, ConfigError> {
    let mut warnings = Vec::new();
    let mut root = Section::root(document)?;
    let mut device = root.require_section("device")?;

    let mut backend = device.require_section("backend")?;
    let kind_name = backend.name("type");
    let kind = backend.require_string("type")?;
    let fields = backend.require_section("config")?;
    let backend_config = BackendConfig::read(&kind, &kind_name, fields, &mut warnings)?;
    backend.finish(&mut warnings);
    device.refuse("external_backends")?;

    let mut cache = device.require_section("cache")?;
    let kind_name = cache.name("type");
    super::check_cache_type(&kind_name, cache.take_string("type")?.as_deref())?;
    cache.refuse("compressed")?;
    // Chunks are always verified: asking for it changes nothing.
    cache.take_bool("validate")?;
    let work_dir = super::read_filecache(cache.take_section("config")?, &mut warnings)?;
    cache.finish(&mut warnings);

    let mut config = Config::new(backend_config, work_dir);
    config.warnings = warnings;
    config.id = device.take_string("id")?.unwrap_or_default();
    device.finish(&mut config.warnings);

    config.read_common(&mut root)?;
    root.take_bool("digest_validate")?;
    let amplify = root.take_u64("amplify_io")?;
    if amplify.is_some_and(|size| size > MAX_PREFETCH_SIZE) {
        return Err(ConfigError::new(format!("`amplify_io`: want at most {MAX_PREFETCH_SIZE}")));
    }
    if amplify.is_some_and(|size| size != 0) {
        config.warnings.push("`amplify_io` has no effect yet".to_owned());
    }
    let prefetch = root.take_section("fs_prefetch")?;
    let keys = ["threads_count", "merging_size", "bandwidth_rate"];
    super::read_prefetch(prefetch, keys, &mut config.warnings)?;
    for key in ["readahead", "readahead_sec", "warmup"] {
        root.no_effect(key, &mut config.warnings);
    }
    root.finish(&mut config.warnings);
    Ok(config)
}
