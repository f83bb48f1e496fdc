//! Ways to a registry's blobs beside the registry: `mirrors` and `proxy`.

use std::time::Duration;

use super::ConfigError;
use super::section::Section;

/// A registry that holds the same blobs, tried before the registry itself.
#[derive(Clone, PartialEq, Eq)]
pub struct MirrorConfig {
    /// `HOST[:PORT]` over TLS, or `http[s]://HOST[:PORT]`.
    pub host: String,
    /// Asked while it is left out; empty: it is tried again instead.
    pub ping_url: String,
    /// Sent with each request. Secret.
    pub headers: Vec<(String, String)>,
    /// Time between pings or tries.
    pub health_check_interval: Duration,
    /// Failures in a row after which it is left out.
    pub failure_limit: u32,
    /// It may have the registry's login.
    pub auth_through: bool,
}

/// A proxy that blobs go through.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyConfig {
    /// `http://[USER:PASSWORD@]HOST:PORT`. Secret.
    pub url: String,
    /// Asked while it is left out; empty: it is tried again instead.
    pub ping_url: String,
    /// Go directly where it fails.
    pub fallback: bool,
    /// Time between pings or tries.
    pub check_interval: Duration,
    /// Pings end after so long without a read.
    pub check_pause_elapsed: Duration,
    /// Ask it for http URLs also where the registry speaks TLS.
    pub use_http: bool,
}

impl std::fmt::Debug for MirrorConfig {
    /// Names the place, never the headers.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MirrorConfig").field("host", &self.host).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ProxyConfig {
    /// Not the URL, which may hold a login.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProxyConfig").field("fallback", &self.fallback).finish_non_exhaustive()
    }
}

fn seconds(value: Option<u64>, default: u64) -> Duration {
    Duration::from_secs(value.unwrap_or(default).max(1))
}

impl MirrorConfig {
    pub(super) fn read_all(
        section: &mut Section,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Self>, ConfigError> {
        let mut mirrors = Vec::new();
        for mut mirror in section.take_sections("mirrors")? {
            let limit_name = mirror.name("failure_limit");
            let limit = mirror.take_u64("failure_limit")?.unwrap_or(5);
            let host_name = mirror.name("host");
            let host = mirror.require_string("host")?;
            if host.contains('@') {
                // Not repeated: it may be a login.
                let why = "want [http[s]://]HOST[:PORT]; logins belong into `headers`";
                return Err(ConfigError::new(format!("`{host_name}`: {why}")));
            }
            mirrors.push(Self {
                host,
                ping_url: mirror.take_string("ping_url")?.unwrap_or_default(),
                headers: mirror.take_string_map("headers")?,
                health_check_interval: seconds(mirror.take_u64("health_check_interval")?, 5),
                failure_limit: u32::try_from(limit)
                    .map_err(|_| ConfigError::new(format!("`{limit_name}`: {limit} is too large")))?,
                auth_through: mirror.take_bool("auth_through")?.unwrap_or(false),
            });
            mirror.finish(warnings);
        }
        Ok(mirrors)
    }
}

impl ProxyConfig {
    /// The proxy at `url` with every default of the contract.
    pub fn new(url: String) -> Self {
        Self {
            url,
            ping_url: String::new(),
            fallback: true,
            check_interval: seconds(None, 5),
            check_pause_elapsed: seconds(None, 300),
            use_http: false,
        }
    }

    /// `None`: no `url` is set; the rest of the block speaks about nothing then.
    pub(super) fn read(
        section: &mut Section,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Self>, ConfigError> {
        let Some(mut proxy) = section.take_section("proxy")? else { return Ok(None) };
        let config = Self {
            url: proxy.take_string("url")?.unwrap_or_default(),
            ping_url: proxy.take_string("ping_url")?.unwrap_or_default(),
            fallback: proxy.take_bool("fallback")?.unwrap_or(true),
            check_interval: seconds(proxy.take_u64("check_interval")?, 5),
            check_pause_elapsed: seconds(proxy.take_u64("check_pause_elapsed")?, 300),
            use_http: proxy.take_bool("use_http")?.unwrap_or(false),
        };
        proxy.no_effect("dragonfly_scheduler_endpoint", warnings);
        proxy.finish(warnings);
        Ok(Some(config).filter(|config| !config.url.is_empty()))
    }
}
