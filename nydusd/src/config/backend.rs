//! Where blobs come from, as configured.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use super::ConfigError;
use super::section::Section;

/// A source of blobs.
#[derive(Clone, Debug)]
pub enum BackendConfig {
    /// Files of this host.
    LocalFs(LocalFsConfig),
    /// A repository of an OCI registry.
    Registry(RegistryConfig),
    /// An OCI image layout directory (`--image oci:PATH`).
    OciLayout(PathBuf),
}

/// Files of this host: a blob is `dir/ID`, else `alt_dirs[i]/ID`, or the one `blob_file`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalFsConfig {
    /// First directory to look in.
    pub dir: Option<PathBuf>,
    /// Further directories.
    pub alt_dirs: Vec<PathBuf>,
    /// The one file that holds the blob, whatever its id.
    pub blob_file: Option<PathBuf>,
}

/// A repository of a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryConfig {
    /// `https` or `http`.
    pub scheme: String,
    /// Host, with port if not the scheme's.
    pub host: String,
    /// Repository.
    pub repo: String,
    /// Base64 of `user:password`. Secret.
    pub auth: Option<String>,
    /// Bearer token to start with. Secret.
    pub registry_token: Option<String>,
    /// Scheme to put into redirects.
    pub blob_url_scheme: Option<String>,
    /// Host to put into redirects.
    pub blob_redirected_host: Option<String>,
    /// Accept any certificate.
    pub skip_verify: bool,
    /// Use the proxies of `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`. Otherwise they are ignored.
    pub proxy_from_environment: bool,
    /// Further trust roots, PEM.
    pub ca_cert_files: Vec<PathBuf>,
    /// Time limit of one request; `None` for no limit.
    pub timeout: Option<Duration>,
    /// Time limit of connecting; `None` for no limit.
    pub connect_timeout: Option<Duration>,
    /// Further attempts of one request.
    pub retry_limit: u32,
}

impl std::fmt::Debug for RegistryConfig {
    /// Names the place, never the secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryConfig")
            .field("scheme", &self.scheme)
            .field("host", &self.host)
            .field("repo", &self.repo)
            .finish_non_exhaustive()
    }
}

impl BackendConfig {
    /// The word for it in configuration and metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LocalFs(_) => "localfs",
            Self::Registry(_) => "registry",
            Self::OciLayout(_) => "oci-layout",
        }
    }

    /// Its fields without secrets.
    pub(super) fn public_json(&self) -> Value {
        match self {
            Self::LocalFs(local) => {
                json!({ "dir": local.dir, "alt_dirs": local.alt_dirs, "blob_file": local.blob_file })
            }
            Self::Registry(registry) => json!({
                "scheme": registry.scheme,
                "host": registry.host,
                "repo": registry.repo,
                "skip_verify": registry.skip_verify,
                "proxy_from_environment": registry.proxy_from_environment,
                "ca_cert_files": registry.ca_cert_files,
                "timeout": registry.timeout.map_or(0, |t| t.as_secs()),
                "connect_timeout": registry.connect_timeout.map_or(0, |t| t.as_secs()),
                "retry_limit": registry.retry_limit,
            }),
            Self::OciLayout(path) => json!({ "path": path }),
        }
    }

    /// Reads the backend `kind` from its `section`.
    pub(super) fn read(
        kind: &str,
        kind_name: &str,
        mut section: Section,
        warnings: &mut Vec<String>,
    ) -> Result<Self, ConfigError> {
        Self::check_kind(kind, kind_name)?;
        let backend = match kind {
            "localfs" => Self::LocalFs(LocalFsConfig::read(&mut section)?),
            _ => Self::Registry(RegistryConfig::read(&mut section, warnings)?),
        };
        section.finish(warnings);
        Ok(backend)
    }

    /// Refuses a kind of backend that is unknown or not built yet, by name.
    pub(super) fn check_kind(kind: &str, kind_name: &str) -> Result<(), ConfigError> {
        let why = match kind {
            "localfs" | "registry" => return Ok(()),
            "oss" | "s3" | "localdisk" | "http-proxy" => format!("backend {kind:?} is not built yet"),
            _ => format!("{kind:?}"),
        };
        Err(ConfigError::new(format!("`{kind_name}`: {why}; want localfs or registry")))
    }
}

impl LocalFsConfig {
    fn read(section: &mut Section) -> Result<Self, ConfigError> {
        let path = |text: Option<String>| text.filter(|text| !text.is_empty()).map(PathBuf::from);
        let config = Self {
            blob_file: path(section.take_string("blob_file")?),
            dir: path(section.take_string("dir")?),
            alt_dirs: section.take_strings("alt_dirs")?.into_iter().map(PathBuf::from).collect(),
        };
        if config.dir.is_none() && config.blob_file.is_none() {
            return Err(ConfigError::new(format!(
                "one of `{}` and `{}` is required",
                section.name("dir"),
                section.name("blob_file")
            )));
        }
        Ok(config)
    }
}

impl RegistryConfig {
    /// A repository with every default of the contract.
    pub fn new(host: &str, repo: &str) -> Self {
        Self {
            scheme: "https".to_owned(),
            host: host.to_owned(),
            repo: repo.to_owned(),
            auth: None,
            registry_token: None,
            blob_url_scheme: None,
            blob_redirected_host: None,
            skip_verify: false,
            proxy_from_environment: false,
            ca_cert_files: Vec::new(),
            timeout: Some(Duration::from_secs(5)),
            connect_timeout: Some(Duration::from_secs(5)),
            retry_limit: 0,
        }
    }

    fn read(section: &mut Section, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let text = |value: Option<String>| value.filter(|text| !text.is_empty());
        let seconds = |value: Option<u64>| match value.unwrap_or(5) {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        };
        let scheme_name = section.name("scheme");
        let scheme = text(section.take_string("scheme")?).unwrap_or_else(|| "https".to_owned());
        if scheme != "https" && scheme != "http" {
            return Err(ConfigError::new(format!("`{scheme_name}`: {scheme:?}: want https or http")));
        }
        let auth_name = section.name("auth");
        let auth = text(section.take_string("auth")?);
        if let Some(auth) = &auth {
            check_basic_auth(&auth_name, auth)?;
        }
        let retry_name = section.name("retry_limit");
        let retry_limit = section.take_u64("retry_limit")?.unwrap_or(0);
        let config = Self {
            scheme,
            host: section.require_string("host")?,
            repo: section.require_string("repo")?,
            auth,
            registry_token: text(section.take_string("registry_token")?),
            blob_url_scheme: text(section.take_string("blob_url_scheme")?),
            blob_redirected_host: text(section.take_string("blob_redirected_host")?),
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
}

/// Checks that `auth` is base64 of `user:password`; the message does not repeat it.
pub(crate) fn check_basic_auth(name: &str, auth: &str) -> Result<(), ConfigError> {
    use base64::Engine as _;
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(auth.trim())
        .map_err(|e| ConfigError::new(format!("`{name}`: not base64 of user:password: {e}")))?;
    if !decoded.contains(&b':') {
        return Err(ConfigError::new(format!("`{name}`: no colon in the decoded text; want user:password")));
    }
    Ok(())
}
