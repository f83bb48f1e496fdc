//! From a description of a source to the source.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{BackendConfig, Dialect, RegistryConfig, StoreConfig};
use crate::Result;
use crate::backend::health::HealthPolicy;
use crate::backend::http_proxy::HttpProxySource;
use crate::backend::object::{ObjectStoreSource, StoreCredentials, StoreOptions};
use crate::backend::registry::{MirrorOptions, ProxyOptions, RegistrySource, Rewrite};
use crate::backend::retry::RetryPolicy;
use crate::backend::{BlobSource, Supplier};
use crate::oci::auth::{Credentials, Secret};
use crate::oci::client::{RegistryClient, RegistryOptions, Scheme};
use crate::oci::token::Login;

impl BackendConfig {
    /// The source it describes. `work_dir` is where a registry's answers may be kept for a
    /// while. Does no I/O but reading what the fields name: CA files, keys.
    ///
    /// # Errors
    /// `Invalid`: a field that only the source understands is malformed. `Io`: a file it names
    /// can not be read.
    pub fn source(&self, work_dir: &Path) -> Result<Arc<dyn BlobSource>> {
        Ok(match self {
            BackendConfig::LocalFs(local) => Arc::new(crate::backend::localfs::LocalFs::new(
                local.dir.clone(),
                local.alt_dirs.clone(),
                local.blob_file.clone(),
            )?),
            BackendConfig::OciLayout(path) => {
                Arc::new(crate::backend::layout::OciLayoutSource::new(path.clone()))
            }
            BackendConfig::LocalDisk(disk) => Arc::new(crate::backend::localdisk::LocalDisk::new(
                disk.device_path.clone(),
                disk.disable_gpt,
            )),
            BackendConfig::Registry(registry) => {
                Arc::new(registry_source(registry)?.with_spool_dir(work_dir.to_owned()))
            }
            BackendConfig::Store(store) => Arc::new(store_source(store)?),
            BackendConfig::HttpProxy(proxy) => Arc::new(HttpProxySource::new(
                &proxy.addr,
                &proxy.path,
                proxy.transport.http_options(),
                RetryPolicy::READS,
            )?),
        })
    }
}

/// A bucket, signed for as the configuration says.
fn store_source(config: &StoreConfig) -> Result<ObjectStoreSource> {
    let credentials = match &config.keys {
        Some((id, secret)) => StoreCredentials::Keys { id: id.clone(), secret: secret.clone() },
        None if config.credentials_from_environment => StoreCredentials::Environment,
        None => StoreCredentials::Anonymous,
    };
    let options = StoreOptions {
        endpoint: config.endpoint.clone(),
        secure: config.scheme == "https",
        bucket: config.bucket_name.clone(),
        prefix: config.object_prefix.clone(),
        credentials,
        http: config.transport.http_options(),
        retry: RetryPolicy::READS,
    };
    Ok(match &config.dialect {
        Dialect::S3(region) => ObjectStoreSource::s3(options, region)?,
        Dialect::Oss => ObjectStoreSource::oss(options)?,
    })
}

/// A registry with the login and transport of the configuration alone: a daemon must not
/// depend on whose login files lie around.
fn registry_source(config: &RegistryConfig) -> Result<RegistrySource> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let options = RegistryOptions {
        http: config.transport.http_options(),
        scheme: if config.scheme == "http" { Scheme::Http } else { Scheme::Https },
        login: Login::Fixed(Credentials::from_base64(&text(&config.auth))?),
        token: config.registry_token.clone().map(Secret::new),
        retry: RetryPolicy::COMMANDS,
    };
    let mut proxied = options.clone();
    proxied.http.proxy = config.proxy.as_ref().map(|proxy| Secret::new(&proxy.url));
    // Without the way back to a direct connection the proxy is the connection.
    let only_proxied = config.proxy.as_ref().filter(|proxy| !proxy.fallback);
    let mut own = if only_proxied.is_some() { proxied.clone() } else { options.clone() };
    let plain = only_proxied.is_some_and(|proxy| proxy.use_http);
    if plain {
        own.scheme = Scheme::Http;
    }
    let client = RegistryClient::new(&config.host, own)?;
    let rewrite = Rewrite::new(&text(&config.blob_url_scheme), &text(&config.blob_redirected_host))?;
    let rewrite = if plain { Rewrite { scheme: Some("http".to_owned()), ..rewrite } } else { rewrite };
    // Readers are served until their deadline; `retry_limit` promises no more than that.
    let mut source = RegistrySource::new(client, &config.repo, rewrite, RetryPolicy::READS)?;
    for mirror in &config.mirrors {
        let mirror = MirrorOptions {
            host: mirror.host.clone(),
            headers: mirror.headers.clone(),
            login: mirror.auth_through,
            health: HealthPolicy {
                failures: mirror.failure_limit,
                interval: mirror.health_check_interval,
                pause: PING_PAUSE,
                ping: ping_url(&mirror.ping_url)?,
            },
        };
        source = source.with_mirror(&mirror, options.clone())?;
    }
    match &config.proxy {
        Some(proxy) if proxy.fallback => {
            let health = HealthPolicy {
                failures: PROXY_FAILURES,
                interval: proxy.check_interval,
                pause: proxy.check_pause_elapsed,
                ping: ping_url(&proxy.ping_url)?,
            };
            Ok(source.with_proxy(&ProxyOptions { use_http: proxy.use_http, health }, proxied)?)
        }
        Some(_) => Ok(source.with_supplier(Supplier::Proxy)),
        None => Ok(source),
    }
}

/// Pings of a mirror end after so long without a read.
const PING_PAUSE: Duration = Duration::from_secs(300);
/// Failures in a row after which a proxy is left out for a while.
const PROXY_FAILURES: u32 = 3;

fn ping_url(text: &str) -> Result<Option<crate::backend::http::Url>> {
    if text.is_empty() {
        return Ok(None);
    }
    Ok(Some(crate::backend::http::parse_url("`ping_url`", text)?))
}
