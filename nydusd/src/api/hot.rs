//! `/api/v1/config`: what may be changed while images are mounted (contract 3.7).
//!
//! | key | takes effect |
//! |---|---|
//! | `registry_auth` | base64 of `user:password`, or empty for none: with the next request to the registry; tokens made with the old login are dropped |
//! | `proxy_url` | for images that are mounted later |
//! | `dragonfly_scheduler_endpoint` | never: it is kept for those who ask for it |
//!
//! An id need not name a mount: what is said before the mount holds for it, too. The values
//! are given back to nobody but `GET` of the same path, whose client has the right to set them;
//! no log, error or other document has them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use storage::oci::auth::Credentials;

use super::reply::Reply;
use crate::config::{BackendConfig, Config, ProxyConfig};
use crate::daemon::Daemon;
use crate::mount::Mount;

/// Ids that values are kept for: far more than images are ever mounted, and a bound.
const MAX_IDS: usize = 4096;

/// Longest value in bytes.
const MAX_VALUE: usize = 64 << 10;

/// Where an image is mounted if no id says so.
const DEFAULT_ID: &str = "/";

const REGISTRY_AUTH: &str = "registry_auth";
const PROXY_URL: &str = "proxy_url";
const KEYS: [&str; 3] = [REGISTRY_AUTH, PROXY_URL, "dragonfly_scheduler_endpoint"];

type Values = BTreeMap<String, String>;

/// What was set, by id.
#[derive(Default)]
pub struct HotConfig {
    /// Held to copy in or out.
    values: Mutex<Settings>,
}

/// What was set, by id. Secret: for saved state, never for logs.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Settings(BTreeMap<String, Values>);

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

impl HotConfig {
    fn lock(&self) -> MutexGuard<'_, Settings> {
        // Insertions and removals leave the map whole.
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `values` to those of `id`; false if there are too many ids.
    fn set(&self, id: &str, values: Values) -> bool {
        let all = &mut self.lock().0;
        if all.len() >= MAX_IDS && !all.contains_key(id) {
            return false;
        }
        all.entry(id.to_owned()).or_default().extend(values);
        true
    }

    /// The values of `id`, or all as `id:key`.
    fn get(&self, id: Option<&str>) -> Values {
        let all = &self.lock().0;
        match id {
            Some(id) => all.get(id).cloned().unwrap_or_default(),
            None => {
                let flat = all.iter().flat_map(|(id, values)| {
                    values.iter().map(move |(key, value)| (format!("{id}:{key}"), value.clone()))
                });
                flat.collect()
            }
        }
    }

    /// Forgets what was set for `mountpoint`: its image is unmounted.
    pub fn forget(&self, mountpoint: &str) {
        self.lock().0.remove(mountpoint);
    }

    /// What a successor must know: a login may have been renewed since the mount.
    pub fn save(&self) -> Settings {
        self.lock().clone()
    }

    /// Takes over what was set for a predecessor, before its mounts are made again.
    pub fn restore(&self, settings: Settings) {
        *self.lock() = settings;
    }

    /// Has a mount of the command line, made again by a successor, log in as was said since.
    pub fn log_in(&self, mount: &Mount) {
        let own = self.get(Some(mount.mountpoint()));
        let auth = own
            .get(REGISTRY_AUTH)
            .cloned()
            .or_else(|| self.get(Some(&mount.config().id)).remove(REGISTRY_AUTH));
        // What the first daemon refused was never set.
        if let Some(Ok(credentials)) = auth.map(|auth| Credentials::from_base64(&auth)) {
            mount.set_credentials(credentials);
        }
    }

    /// Puts what was set for `mountpoint`, or for the document's own id, in the place of what
    /// `config` says.
    pub fn amend(&self, mountpoint: &str, config: &mut Config) {
        let mut values = if config.id.is_empty() { Values::new() } else { self.get(Some(&config.id)) };
        values.extend(self.get(Some(mountpoint)));
        let BackendConfig::Registry(registry) = &mut config.backend else { return };
        if let Some(auth) = values.remove(REGISTRY_AUTH) {
            registry.auth = Some(auth).filter(|auth| !auth.is_empty());
            registry.registry_token = None;
        }
        if let Some(url) = values.remove(PROXY_URL) {
            registry.proxy = match registry.proxy.take() {
                _ if url.is_empty() => None,
                Some(proxy) => Some(ProxyConfig { url, ..proxy }),
                None => Some(ProxyConfig::new(url)),
            };
        }
    }
}

/// What was set for `id`, or for all.
pub(super) fn get(daemon: &Daemon, id: Option<&str>) -> Reply {
    Reply::json(&daemon.hot().get(id))
}

/// Sets values for `id`.
pub(super) fn put(daemon: &Daemon, id: Option<&str>, body: &[u8]) -> Reply {
    let values: Values = match serde_json::from_slice(body) {
        Ok(values) => values,
        Err(e) => return Reply::bad_body(&e),
    };
    if values.keys().any(|key| !KEYS.contains(&key.as_str())) {
        return Reply::error(500, "Configure(ResponsePayloadType)");
    }
    if values.values().any(|value| value.len() > MAX_VALUE) {
        return invalid(&format!("a value is longer than {MAX_VALUE} bytes"));
    }
    let id = id.unwrap_or(DEFAULT_ID);
    let mounts = daemon.adapter().table().mounts();
    let named = || mounts.iter().filter(|mount| mount.mountpoint() == id || mount.config().id == id);
    // Read before anything is changed, and only where it means something: others may name
    // images that have no login.
    let mut logins = named().filter(|mount| matches!(mount.config().backend, BackendConfig::Registry(_)));
    let credentials = match values.get(REGISTRY_AUTH).map(|auth| Credentials::from_base64(auth)) {
        Some(Ok(credentials)) => Some(credentials),
        Some(Err(e)) if logins.next().is_some() => return invalid(&format!("{REGISTRY_AUTH}: {e}")),
        _ => None,
    };
    if !daemon.hot().set(id, values) {
        return invalid(&format!("values are kept for {MAX_IDS} ids at most"));
    }
    if let Some(credentials) = credentials {
        for mount in named() {
            if mount.set_credentials(credentials.clone()) {
                tracing::info!("the image at {} has a new registry login", mount.mountpoint());
            }
        }
    }
    Reply::empty()
}

fn invalid(why: &str) -> Reply {
    Reply::error(500, &format!("Configure(InvalidArguments({why:?}))"))
}
