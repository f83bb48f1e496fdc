//! An image in a registry behind a relay: where most journeys with faults begin.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;

use crate::daemon::DaemonOptions;
use crate::image::Image;
use crate::journey::{Journey, convert};
use crate::registry::Registry;
use crate::relay::Relay;

/// Repository of the converted image.
const NAME: &str = "scene";

/// The image, the registry that holds it converted, and the relay before that.
#[derive(Debug)]
pub struct Scene {
    /// The image and its scratch directory.
    pub journey: Journey,
    /// What daemons speak to.
    pub relay: Relay,
    /// What stands behind it.
    pub registry: Registry,
}

impl Scene {
    /// Converts `image` with `flags` into a new registry behind a relay that passes everything.
    ///
    /// # Errors
    /// One of the programs fails.
    pub fn set(image: &Image, flags: &[&str]) -> Result<Self> {
        Self::behind(image, flags, Relay::start)
    }

    /// The same, behind the relay that `launch` makes for the registry's address.
    ///
    /// # Errors
    /// Those of [`Scene::set`] and of `launch`.
    pub fn behind(
        image: &Image,
        flags: &[&str],
        launch: impl FnOnce(SocketAddr) -> Result<Relay>,
    ) -> Result<Self> {
        let journey = Journey::start(image)?;
        let registry = Registry::open()?;
        let relay = launch(registry.address())?;
        convert(&journey.source.reference(), &registry.reference(NAME), flags)?;
        Ok(Self { journey, relay, registry })
    }

    /// A daemon of that image, through the relay, with [`Scene::cache`].
    pub fn options(&self) -> DaemonOptions {
        DaemonOptions::image(&self.reference(), &self.cache())
    }

    /// The image, through the relay.
    pub fn reference(&self) -> String {
        self.relay.reference(NAME)
    }

    /// The cache directory of its daemons.
    pub fn cache(&self) -> PathBuf {
        self.journey.path("cache")
    }
}
