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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// Bytes of all ids and values: they are part of what a successor is told, which has a bound.
const MAX_BYTES: usize = 2 << 20;

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

fn bytes(id: &str, values: &Values) -> usize {
    id.len() + values.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
}

impl HotConfig {
    fn lock(&self) -> MutexGuard<'_, Settings> {
        // Insertions and removals leave the map whole.
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `values` to those of `id`; false if there would be too many ids or bytes.
    fn set(&self, id: &str, values: Values) -> bool {
        let all = &mut self.lock().0;
        if all.len() >= MAX_IDS && !all.contains_key(id) {
            return false;
        }
        let mut new = all.get(id).cloned().unwrap_or_default();
        new.extend(values);
        let others = all.iter().filter(|(other, _)| *other != id).map(|(id, values)| bytes(id, values));
        if others.sum::<usize>() + bytes(id, &new) > MAX_BYTES {
            return false;
        }
        all.insert(id.to_owned(), new);
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

    /// What was set for `mountpoint`, or else for the configuration's own `id`.
    fn of(&self, mountpoint: &str, id: &str) -> Values {
        let mut values = if id.is_empty() { Values::new() } else { self.get(Some(id)) };
        values.extend(self.get(Some(mountpoint)));
        values
    }

    /// Has a mount that can be found by now log in as was said since its configuration was made.
    pub fn renew(&self, mount: &Mount) {
        let BackendConfig::Registry(registry) = &mount.config().backend else { return };
        let mut values = self.of(mount.mountpoint(), &mount.config().id);
        let Some(auth) = values.remove(REGISTRY_AUTH) else { return };
        let logs_in_so = auth == registry.auth.as_deref().unwrap_or_default();
        if logs_in_so && registry.registry_token.is_none() {
            return;
        }
        match Credentials::from_base64(&auth) {
            Ok(credentials) => drop(mount.set_credentials(credentials)),
            Err(e) => tracing::warn!("{}: {REGISTRY_AUTH}: {e}", mount.mountpoint()),
        }
    }

    /// Puts what was set for `mountpoint`, or for the document's own id, in the place of what
    /// `config` says.
    pub fn amend(&self, mountpoint: &str, config: &mut Config) {
        let mut values = self.of(mountpoint, &config.id);
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
    let named = || {
        let mut mounts = daemon.adapter().table().mounts();
        mounts.retain(|mount| mount.mountpoint() == id || mount.config().id == id);
        mounts
    };
    // Read before anything is changed, and only where it means something: others may name
    // images that have no login.
    let is_login = |mount: &Arc<Mount>| matches!(mount.config().backend, BackendConfig::Registry(_));
    let credentials = match values.get(REGISTRY_AUTH).map(|auth| Credentials::from_base64(auth)) {
        Some(Ok(credentials)) => Some(credentials),
        Some(Err(e)) if named().iter().any(is_login) => {
            return Reply::error(
                400,
                &format!("Configure(InvalidArguments({:?}))", format!("{REGISTRY_AUTH}: {e}")),
            );
        }
        Some(Err(e)) => {
            tracing::warn!(
                "{REGISTRY_AUTH} for {id} is kept, but an image there would not mount with it: {e}"
            );
            None
        }
        None => None,
    };
    if !daemon.hot().set(id, values) {
        return invalid(&format!(
            "values are kept for {MAX_IDS} ids and in {MAX_BYTES} bytes at most; unmount what is not needed"
        ));
    }
    if named().is_empty() {
        tracing::info!("nothing is mounted at {id}: its new configuration waits for an image there");
    }
    if let Some(credentials) = credentials {
        // Looked for only now: a mount that comes later reads what was set.
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};

    use rafs::bootstrap::{Bootstrap, OpenOptions};
    use rafs::fs::{Rafs, RafsOptions};
    use storage::backend::{Backend, BlobSource};
    use storage::ids::BlobId;

    use super::*;
    use crate::config::RegistryConfig;
    use crate::vfs::place::Place;

    /// Counts logins.
    #[derive(Debug, Default)]
    struct Source(AtomicU32);

    impl BlobSource for Source {
        fn kind(&self) -> &'static str {
            "registry"
        }

        fn blob(&self, _: &BlobId) -> storage::Result<Arc<dyn Backend>> {
            Err(storage::Error::new(storage::ErrorKind::NotFound, "nothing is here"))
        }

        fn set_credentials(&self, _: Credentials) -> bool {
            self.0.fetch_add(1, Ordering::Relaxed);
            true
        }
    }

    /// A login that was set while an image was opened, with the configuration read already, is used by it.
    #[test]
    fn what_is_kept_is_bounded() {
        let hot = HotConfig::default();
        let values = |len: usize| Values::from([(PROXY_URL.to_owned(), "x".repeat(len))]);
        assert!(hot.set("/a", values(MAX_BYTES / 2)));
        assert!(!hot.set("/b", values(MAX_BYTES / 2)));
        assert!(hot.get(Some("/b")).is_empty());
        // In the place of what is there.
        assert!(hot.set("/a", values(MAX_BYTES - 64)));
        hot.forget("/a");
        assert!(hot.set("/b", values(MAX_BYTES / 2)));
    }

    #[test]
    fn a_login_set_during_a_mount_is_not_lost() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/empty/image.boot");
        let bytes = std::fs::read(path).unwrap();
        let bootstrap: Arc<dyn Bootstrap> =
            Arc::from(rafs::bootstrap::from_bytes(bytes, &OpenOptions::default()).unwrap());
        let rafs = Arc::new(Rafs::new(bootstrap, Vec::new(), RafsOptions::default()).unwrap());
        let (old, new) = ("b2xkOm9sZA==", "bmV3Om5ldw==");
        for (id, set, logins) in [
            ("/m", new, 1),
            ("/m", old, 0),
            ("/m", "", 1),
            ("/other", new, 0),
            ("/id", new, 1),
            ("/m", "?", 0),
        ] {
            let hot = HotConfig::default();
            let mut registry = RegistryConfig::new("host", "repo");
            registry.auth = Some(old.to_owned());
            let mut config = Config::new(BackendConfig::Registry(registry), "/nonexistent".into());
            config.id = "/id".to_owned();
            hot.amend("/m", &mut config);
            assert!(hot.set(id, Values::from([(REGISTRY_AUTH.to_owned(), set.to_owned())])));
            let source = Arc::<Source>::default();
            let mount =
                Mount::for_tests_from("/m", Place::unseen(), Arc::clone(&rafs), config, source.clone());
            hot.renew(&mount);
            assert_eq!(source.0.load(Ordering::Relaxed), logins, "{id} {set}");
        }
    }
}
