//! v1: the JSON that every Go client writes.

use serde_json::Value;

use super::{BackendConfig, Config, ConfigError, PrefetchConfig, prefetch};
use storage::config::section::Section;

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
    config.read_ahead = prefetch::read_ahead(&mut root, "amplify_io")?;
    let section = root.take_section("fs_prefetch")?;
    config.prefetch = PrefetchConfig::read(section, &prefetch::V1, &mut config.warnings)?;
    for key in ["readahead", "readahead_sec", "warmup"] {
        root.no_effect(key, &mut config.warnings);
    }
    root.finish(&mut config.warnings);
    Ok(config)
}
