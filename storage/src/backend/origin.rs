//! What is known about each server that was spoken to: one [`Origin`] a scheme, host and port.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Url;

/// Servers remembered at once. Redirects name them, so hostile registries could name many.
const MAX_ORIGINS: usize = 256;

/// One server.
#[derive(Debug, Default)]
pub struct Origin {
    /// It does not answer several ranges with one body. Relaxed, as it guards nothing: a late
    /// look costs one request.
    single: AtomicBool,
    /// It sends whole objects whatever the range. Relaxed, as `single`.
    whole: AtomicBool,
}

impl Origin {
    /// May several ranges be asked for at once?
    pub fn takes_many(&self) -> bool {
        !self.single.load(Relaxed)
    }

    /// It was asked for several ranges and answered something else.
    pub fn refuses_many(&self, why: &str) {
        if !self.single.swap(true, Relaxed) {
            tracing::debug!(why, "a server has no multi-range requests; ranges are asked for one by one");
        }
    }

    /// Does it send whole objects whatever the range?
    pub fn ignores_range(&self) -> bool {
        self.whole.load(Relaxed)
    }

    /// It was asked for a part of an object and sent that, or all of it.
    pub(super) fn set_ignores_range(&self, ignores: bool) {
        if self.whole.swap(ignores, Relaxed) != ignores && ignores {
            tracing::warn!("a server ignores Range; its blobs are read whole, once, from front to end");
        }
    }
}

/// The servers of one pool of connections. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    known: Arc<Mutex<HashMap<String, Arc<Origin>>>>,
}

impl Origins {
    /// The server that `url` is asked of.
    pub fn of(&self, url: &Url) -> Arc<Origin> {
        let name = url.origin().ascii_serialization();
        // No code panics while holding it; were it so, the map is still valid.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_ORIGINS && !known.contains_key(&name) {
            known.retain(|_, origin| Arc::strong_count(origin) > 1);
        }
        Arc::clone(known.entry(name).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_told_apart_and_bounded() {
        let origins = Origins::default();
        let of = |url: &str| origins.of(&Url::parse(url).unwrap());
        let first = of("https://a.io/x");
        first.refuses_many("test");
        assert!(!of("https://a.io:443/y?z").takes_many());
        assert!(of("http://a.io/").takes_many() && of("https://a.io:444/").takes_many());
        for i in 0..MAX_ORIGINS * 2 {
            of(&format!("https://h{i}.io/"));
        }
        assert!(origins.known.lock().unwrap().len() <= MAX_ORIGINS);
        assert!(!of("https://a.io/").takes_many(), "what is in use was forgotten");
    }
}
