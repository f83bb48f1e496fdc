//! v2: TOML or JSON with `version = 2`.

use std::path::PathBuf;

use serde_json::Value;

use super::{BackendConfig, Config, ConfigError, PrefetchConfig, prefetch};
use crate::writable::OverlayConfig;
use storage::config::KINDS;
use storage::config::section::Section;

/// Parses a v2 document.
pub(super) fn parse(document: Value) -> Result<Config, ConfigError> {
    let mut warnings = Vec::new();
    let mut root = Section::root(document)?;
    match root.take_u64("version")? {
        Some(2) => {}
        other => return Err(ConfigError::new(format!("`version`: {}: want 2", other.unwrap_or(0)))),
    }

    let mut backend = root.require_section("backend")?;
    let kind_name = backend.name("type");
    let kind = backend.require_string("type")?;
    let Some(key) = KINDS.into_iter().find(|known| *known == kind) else {
        return Err(BackendConfig::unknown(&kind, &kind_name));
    };
    let fields = backend.require_section(key)?;
    let backend_config = BackendConfig::read(&kind, &kind_name, fields, &mut warnings)?;
    // A document may describe several places and choose one by `type`.
    for other in KINDS {
        backend.take_section(other)?;
    }
    backend.finish(&mut warnings);
    root.refuse("external_backends")?;
    let overlay = read_overlay(root.take_section("overlay")?, &mut warnings)?;

    let mut cache = root.require_section("cache")?;
    let kind_name = cache.name("type");
    super::check_cache_type(&kind_name, cache.take_string("type")?.as_deref())?;
    cache.refuse("compressed")?;
    cache.take_bool("validate")?;
    let cache_prefetch = PrefetchConfig::read(cache.take_section("prefetch")?, &prefetch::V2, &mut warnings)?;
    let work_dir = super::read_filecache(cache.take_section("filecache")?, &mut warnings)?;
    cache.take_section("fscache")?;
    cache.finish(&mut warnings);

    let mut config = Config::new(backend_config, work_dir);
    config.overlay = overlay;
    config.warnings = warnings;
    config.id = root.take_string("id")?.unwrap_or_default();
    if let Some(mut rafs) = root.take_section("rafs")? {
        config.read_common(&mut rafs)?;
        rafs.take_bool("validate")?;
        config.read_ahead = prefetch::read_ahead(&mut rafs, "batch_size")?;
        let section = rafs.take_section("prefetch")?;
        config.prefetch = PrefetchConfig::read(section, &prefetch::V2, &mut config.warnings)?;
        rafs.finish(&mut config.warnings);
    }
    config.prefetch = config.prefetch.join(cache_prefetch);
    root.finish(&mut config.warnings);
    Ok(config)
}

/// Where changes go, if the image is to be written to.
fn read_overlay(
    section: Option<Section>,
    warnings: &mut Vec<String>,
) -> Result<Option<OverlayConfig>, ConfigError> {
    let Some(mut section) = section else { return Ok(None) };
    let mut directory = |key| {
        let path = PathBuf::from(section.require_string(key)?);
        match path.is_absolute() {
            true => Ok(path),
            false => Err(ConfigError::new(format!("`overlay.{key}`: {path:?}: want an absolute path"))),
        }
    };
    let overlay = OverlayConfig { upper_dir: directory("upper_dir")?, work_dir: directory("work_dir")? };
    section.finish(warnings);
    Ok(Some(overlay))
}
