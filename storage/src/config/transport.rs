//! How remote sources are reached: the keys that all of them share.

use std::path::PathBuf;
use std::time::Duration;

use crate::backend::http::HttpOptions;
use crate::backend::origin::Limits;
use serde_json::{Map, Value, json};

use super::ConfigError;
use super::section::Section;

/// More requests at once are no use, and servers take them for an attack.
const MAX_REQUESTS: usize = 1024;

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
    /// PEM files of the certificate chain and the key for servers that ask for them.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// Requests to one server at once.
    pub max_requests: usize,
    /// Send a read's request twice if its answer is late.
    pub hedge: bool,
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
            client_certificate: None,
            max_requests: Limits::default().requests,
            hedge: true,
        }
    }
}

impl TransportConfig {
    pub(super) fn read(section: &mut Section, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let seconds = |value: Option<u64>| match value.unwrap_or(5) {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        };
        let mut file = |key| {
            let text = section.take_string(key)?.filter(|text| !text.is_empty());
            Ok::<_, ConfigError>(text.map(PathBuf::from))
        };
        let client_certificate = match (file("client_cert_file")?, file("client_key_file")?) {
            (Some(chain), Some(key)) => Some((chain, key)),
            (None, None) => None,
            _ => {
                let (chain, key) = (section.name("client_cert_file"), section.name("client_key_file"));
                return Err(ConfigError::new(format!("`{chain}` and `{key}` go together: set both or none")));
            }
        };
        let max_requests = section.take_u64("max_requests")?.unwrap_or(Limits::default().requests as u64);
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
            client_certificate,
            max_requests: usize::try_from(max_requests).unwrap_or(usize::MAX).min(MAX_REQUESTS),
            hedge: section.take_bool("hedge")?.unwrap_or(true),
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
            ("client_cert_file", json!(self.client_certificate.as_ref().map(|(chain, _)| chain))),
            ("client_key_file", json!(self.client_certificate.as_ref().map(|(_, key)| key))),
            ("max_requests", json!(self.max_requests)),
            ("hedge", json!(self.hedge)),
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
            client_certificate: self.client_certificate.clone(),
            limits: Limits { requests: self.max_requests, hedge: self.hedge, ..Limits::default() },
            ..HttpOptions::default()
        }
    }
}
