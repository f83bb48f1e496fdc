//! Where blobs come from, as configured.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::ConfigError;
use super::detour::{MirrorConfig, ProxyConfig};
use super::section::Section;
use super::store::StoreConfig;
use super::transport::TransportConfig;

/// The types a document may name.
pub const KINDS: [&str; 6] = ["localfs", "localdisk", "registry", "oss", "s3", "http-proxy"];

/// A source of blobs.
#[derive(Clone, Debug)]
pub enum BackendConfig {
    /// Files of this host.
    LocalFs(LocalFsConfig),
    /// A disk of this host, one partition per blob.
    LocalDisk(LocalDiskConfig),
    /// A repository of an OCI registry.
    Registry(RegistryConfig),
    /// A bucket of an object store.
    Store(StoreConfig),
    /// A plain HTTP server.
    HttpProxy(HttpProxyConfig),
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

/// A disk of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalDiskConfig {
    /// Block device or image file.
    pub device_path: PathBuf,
    /// The disk has no partitions: all of it is the one blob.
    pub disable_gpt: bool,
}

/// A plain HTTP server that has each blob as `addr/path/ID`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpProxyConfig {
    /// http or https URL without a login, or absolute path of a unix socket.
    pub addr: String,
    /// Below it; not used with a unix socket.
    pub path: String,
    /// How to reach it.
    pub transport: TransportConfig,
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
    /// Tried first, in this order.
    pub mirrors: Vec<MirrorConfig>,
    /// Tried next.
    pub proxy: Option<ProxyConfig>,
    /// How to reach it.
    pub transport: TransportConfig,
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
            Self::LocalDisk(_) => "localdisk",
            Self::Registry(_) => "registry",
            Self::Store(store) => store.dialect.kind(),
            Self::HttpProxy(_) => "http-proxy",
            Self::OciLayout(_) => "oci-layout",
        }
    }

    /// Its fields without secrets.
    pub fn public_json(&self) -> Value {
        match self {
            Self::LocalFs(local) => {
                json!({ "dir": local.dir, "alt_dirs": local.alt_dirs, "blob_file": local.blob_file })
            }
            Self::LocalDisk(disk) => {
                json!({ "device_path": disk.device_path, "disable_gpt": disk.disable_gpt })
            }
            Self::Registry(registry) => registry.transport.public_json(Map::from_iter([
                ("scheme".to_owned(), json!(registry.scheme)),
                ("host".to_owned(), json!(registry.host)),
                ("repo".to_owned(), json!(registry.repo)),
                ("mirrors".to_owned(), registry.mirrors.iter().map(|mirror| json!(mirror.host)).collect()),
                ("proxy".to_owned(), json!(registry.proxy.is_some())),
            ])),
            Self::Store(store) => store.public_json(),
            Self::HttpProxy(proxy) => proxy.transport.public_json(Map::from_iter([
                ("addr".to_owned(), json!(proxy.addr)),
                ("path".to_owned(), json!(proxy.path)),
            ])),
            Self::OciLayout(path) => json!({ "path": path }),
        }
    }

    /// Reads the backend `kind` from its `section`.
    pub fn read(
        kind: &str,
        kind_name: &str,
        mut section: Section,
        warnings: &mut Vec<String>,
    ) -> Result<Self, ConfigError> {
        let backend = match kind {
            "localfs" => Self::LocalFs(LocalFsConfig::read(&mut section)?),
            "localdisk" => Self::LocalDisk(LocalDiskConfig::read(&mut section)?),
            "registry" => Self::Registry(RegistryConfig::read(&mut section, warnings)?),
            "s3" => Self::Store(StoreConfig::read_s3(&mut section, warnings)?),
            "oss" => Self::Store(StoreConfig::read_oss(&mut section, warnings)?),
            "http-proxy" => Self::HttpProxy(HttpProxyConfig::read(&mut section, warnings)?),
            _ => return Err(Self::unknown(kind, kind_name)),
        };
        section.finish(warnings);
        Ok(backend)
    }

    /// The backend `kind` from the object of its fields alone. What has no effect here is told in
    /// `warnings`.
    ///
    /// # Errors
    /// `kind` is none, or a field is missing or malformed.
    pub fn from_fields(kind: &str, fields: Value, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        Self::read(kind, "type", Section::root(fields)?, warnings)
    }

    /// What is said of a type that is none.
    pub fn unknown(kind: &str, kind_name: &str) -> ConfigError {
        ConfigError::new(format!("`{kind_name}`: {kind:?}: want one of {}", KINDS.join(", ")))
    }
}

impl LocalDiskConfig {
    fn read(section: &mut Section) -> Result<Self, ConfigError> {
        Ok(Self {
            device_path: PathBuf::from(section.require_string("device_path")?),
            disable_gpt: section.take_bool("disable_gpt")?.unwrap_or(false),
        })
    }
}

impl HttpProxyConfig {
    fn read(section: &mut Section, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let name = section.name("addr");
        let addr = section.require_string("addr")?;
        // A login in the URL would be shown with it.
        let bare = match crate::backend::http::parse_url("addr", &addr) {
            Ok(url) => url.username().is_empty() && url.password().is_none(),
            Err(_) => Path::new(&addr).is_absolute(),
        };
        if !bare {
            let why = "want an http or https URL without a login, or the absolute path of a unix socket";
            return Err(ConfigError::new(format!("`{name}`: {why}")));
        }
        Ok(Self {
            addr,
            path: section.take_string("path")?.unwrap_or_default(),
            transport: TransportConfig::read(section, warnings)?,
        })
    }
}

/// `scheme`: https unless said otherwise.
pub(super) fn read_scheme(section: &mut Section) -> Result<String, ConfigError> {
    let name = section.name("scheme");
    let scheme = text(section.take_string("scheme")?).unwrap_or_else(|| "https".to_owned());
    if scheme != "https" && scheme != "http" {
        return Err(ConfigError::new(format!("`{name}`: {scheme:?}: want https or http")));
    }
    Ok(scheme)
}

/// An empty text is none.
pub(super) fn text(value: Option<String>) -> Option<String> {
    value.filter(|text| !text.is_empty())
}

impl LocalFsConfig {
    fn read(section: &mut Section) -> Result<Self, ConfigError> {
        let path = |value| text(value).map(PathBuf::from);
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
            mirrors: Vec::new(),
            proxy: None,
            transport: TransportConfig::default(),
        }
    }

    fn read(section: &mut Section, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let scheme = read_scheme(section)?;
        let auth_name = section.name("auth");
        let auth = text(section.take_string("auth")?);
        if let Some(auth) = &auth {
            check_basic_auth(&auth_name, auth)?;
        }
        Ok(Self {
            scheme,
            host: section.require_string("host")?,
            repo: section.require_string("repo")?,
            auth,
            registry_token: text(section.take_string("registry_token")?),
            blob_url_scheme: text(section.take_string("blob_url_scheme")?),
            blob_redirected_host: text(section.take_string("blob_redirected_host")?),
            mirrors: MirrorConfig::read_all(section, warnings)?,
            proxy: ProxyConfig::read(section, warnings)?,
            transport: TransportConfig::read(section, warnings)?,
        })
    }
}

/// Checks that `auth` is base64 of `user:password`; the message does not repeat it.
pub fn check_basic_auth(name: &str, auth: &str) -> Result<(), ConfigError> {
    use base64::Engine as _;
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(auth.trim())
        .map_err(|e| ConfigError::new(format!("`{name}`: not base64 of user:password: {e}")))?;
    if !decoded.contains(&b':') {
        return Err(ConfigError::new(format!("`{name}`: no colon in the decoded text; want user:password")));
    }
    Ok(())
}
