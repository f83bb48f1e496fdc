//! How remote sources are reached: the keys that all of them share.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};
use storage::backend::http::HttpOptions;

use super::ConfigError;
use super::section::Section;

/// Connections, time limits and trust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportConfig {
    /// Accept any certificate.
    pub skip_verify: bool,
    /// Use the proxies of `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`. Otherwise they are ignored.
    pub proxy_from_environment: bool,
    /// Further trust roots, PEM.
    pub ca_cert_files: Vec<PathBuf>,
    /// Longest silence within one request; `None` for no limit.
    pub timeout: Option<Duration>,
    /// Time limit of connecting; `None` for no limit.
    pub connect_timeout: Option<Duration>,
    /// Further attempts of one request.
    pub retry_limit: u32,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            skip_verify: false,
            proxy_from_environment: false,
            ca_cert_files: Vec::new(),
            timeout: Some(Duration::from_secs(5)),
            connect_timeout: Some(Duration::from_secs(5)),
            retry_limit: 0,
        }
    }
}

impl TransportConfig {
    pub(super) fn read(section: &mut Section, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let seconds = |value: Option<u64>| match value.unwrap_or(5) {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        };
        let retry_name = section.name("retry_limit");
        let retry_limit = section.take_u64("retry_limit")?.unwrap_or(0);
        let config = Self {
            skip_verify: section.take_bool("skip_verify")?.unwrap_or(false),
            proxy_from_environment: section.take_bool("proxy_from_environment")?.unwrap_or(false),
            ca_cert_files: section.take_strings("ca_cert_files")?.into_iter().map(PathBuf::from).collect(),
            timeout: seconds(section.take_u64("timeout")?),
            connect_timeout: seconds(section.take_u64("connect_timeout")?),
            retry_limit: u32::try_from(retry_limit)
                .map_err(|_| ConfigError::new(format!("`{retry_name}`: {retry_limit} is too large")))?,
        };
        section.no_effect("mirrors", warnings);
        if let Some(mut proxy) = section.take_section("proxy")? {
            proxy.refuse("url")?;
            // Without a proxy the rest of the block speaks about nothing.
            for key in ["ping_url", "fallback", "check_interval", "check_pause_elapsed", "use_http"] {
                proxy.no_effect(key, &mut Vec::new());
            }
            proxy.no_effect("dragonfly_scheduler_endpoint", warnings);
            proxy.finish(warnings);
        }
        Ok(config)
    }

    /// Its keys beside those of `fields`; none is a secret.
    pub(super) fn public_json(&self, mut fields: Map<String, Value>) -> Value {
        let seconds = |limit: Option<Duration>| limit.map_or(0, |limit| limit.as_secs());
        for (key, value) in [
            ("skip_verify", json!(self.skip_verify)),
            ("proxy_from_environment", json!(self.proxy_from_environment)),
            ("ca_cert_files", json!(self.ca_cert_files)),
            ("timeout", json!(seconds(self.timeout))),
            ("connect_timeout", json!(seconds(self.connect_timeout))),
            ("retry_limit", json!(self.retry_limit)),
        ] {
            fields.insert(key.to_owned(), value);
        }
        Value::Object(fields)
    }

    /// The same for `storage`.
    pub fn http_options(&self) -> HttpOptions {
        HttpOptions {
            connect_timeout: self.connect_timeout,
            // Time without a byte, not time for the whole answer: a slow link is no outage.
            progress_timeout: self.timeout,
            ca_files: self.ca_cert_files.clone(),
            skip_verify: self.skip_verify,
            proxy_from_environment: self.proxy_from_environment,
            ..HttpOptions::default()
        }
    }
}
