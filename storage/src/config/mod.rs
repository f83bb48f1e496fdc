//! Sources of blobs, as configuration documents describe them.
//!
//! The daemon and the image tool read the same fields (`backend` of a daemon's configuration,
//! `--backend-config` of the tool), so both take them from here.

mod backend;
mod detour;
pub mod section;
mod source;
mod store;
mod transport;

use std::fmt;

pub use backend::{
    BackendConfig, HttpProxyConfig, KINDS, LocalDiskConfig, LocalFsConfig, RegistryConfig, check_basic_auth,
};
pub use detour::{MirrorConfig, ProxyConfig};
pub use store::{Dialect, StoreConfig};
pub use transport::TransportConfig;

/// Why a configuration is refused: the key and the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(String);

impl ConfigError {
    /// Refused because of `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}
