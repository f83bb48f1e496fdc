//! Where an image's tree and data are, as typed: what several commands share.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use builder::image::{self, DataOptions, ImageData, Opened};
use clap::Args;
use clap::builder::PossibleValuesParser;
use serde_json::Value;
use storage::backend::localfs::LocalFs;
use storage::backend::{Backend, BlobSource};
use storage::config::{BackendConfig, KINDS};
use storage::engine::{Engine, EngineConfig};
use storage::ids::BlobId;
use tokio_util::sync::CancellationToken;

use crate::cli::bootstrap_file;

/// Largest backend configuration.
const MAX_CONFIG_SIZE: u64 = 1 << 20;

/// The image's bootstrap.
#[derive(Args, Debug)]
pub struct BootstrapArgs {
    /// Bootstrap, or a blob with its bootstrap inside
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap_flag", value_parser = bootstrap_file())]
    bootstrap: Option<PathBuf>,

    /// Bootstrap, or a blob with its bootstrap inside
    #[arg(short = 'B', long = "bootstrap", value_name = "bootstrap", conflicts_with = "bootstrap", value_parser = bootstrap_file())]
    bootstrap_flag: Option<PathBuf>,
}

impl BootstrapArgs {
    /// The path, however it was given.
    pub fn path(&self) -> anyhow::Result<&Path> {
        self.bootstrap
            .as_ref()
            .or(self.bootstrap_flag.as_ref())
            .map(PathBuf::as_path)
            .context("no bootstrap given")
    }
}

/// Where blobs are that are not files here.
#[derive(Args, Debug)]
pub struct BackendArgs {
    /// Kind of the backend that has the blobs
    #[arg(long, value_name = "backend-type", value_parser = PossibleValuesParser::new(KINDS))]
    backend_type: Option<String>,

    /// The backend's fields as a JSON object, as in the daemon's configuration
    #[arg(
        long,
        value_name = "backend-config",
        requires = "backend_type",
        conflicts_with = "backend_config_file"
    )]
    backend_config: Option<String>,

    /// File with the backend's fields
    #[arg(long, value_name = "backend-config-file", requires = "backend_type")]
    backend_config_file: Option<PathBuf>,
}

impl BackendArgs {
    /// The backend, if one is named.
    pub fn open(&self) -> anyhow::Result<Option<Arc<dyn BlobSource>>> {
        let Some(kind) = &self.backend_type else { return Ok(None) };
        let (name, text) = match (&self.backend_config, &self.backend_config_file) {
            (Some(text), _) => ("--backend-config".to_owned(), text.clone()),
            (None, Some(path)) => (path.display().to_string(), read_config(path)?),
            (None, None) => bail!("--backend-type {kind} needs --backend-config or --backend-config-file"),
        };
        let fields = serde_json::from_str(&text).with_context(|| format!("{name}: not valid JSON"))?;
        let mut warnings = Vec::new();
        let config = BackendConfig::from_fields(kind, fields, &mut warnings).context(name)?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        Ok(Some(config.source(&std::env::temp_dir())?))
    }
}

/// Where the image's blobs are.
#[derive(Args, Debug)]
pub struct PlaceArgs {
    /// The only blob of the image
    #[arg(short = 'b', long, value_name = "blob", conflicts_with_all = ["blob_dir", "backend_type"])]
    blob: Option<PathBuf>,

    /// Directory with the blobs, named by their ids
    #[arg(short = 'D', long, value_name = "blob-dir", conflicts_with = "backend_type")]
    blob_dir: Option<PathBuf>,

    #[command(flatten)]
    backend: BackendArgs,
}

/// The image's blobs, to be read.
#[derive(Args, Debug)]
pub struct SourceArgs {
    #[command(flatten)]
    places: PlaceArgs,

    /// Read chunks that the image has no digest for, unverified
    #[arg(long)]
    allow_unverified: bool,
}

impl SourceArgs {
    /// The directory with the blobs, if one is given.
    pub fn blob_dir(&self) -> Option<&Path> {
        self.places.blob_dir.as_deref()
    }

    /// The image with its data at hand.
    pub fn open(&self, opened: Opened, cancel: &CancellationToken) -> anyhow::Result<ImageData> {
        let source = self.places.source(&opened)?;
        let engine = engine(EngineConfig::default())?;
        let options = DataOptions {
            allow_unverified: self.allow_unverified,
            cancel: cancel.clone(),
            ..DataOptions::default()
        };
        Ok(ImageData::open(engine, opened.bootstrap, &*source, options)?)
    }
}

impl PlaceArgs {
    /// The image with its data at hand, to have all of it checked; `None` if nothing says where that is.
    /// `config` is the file of a daemon's configuration.
    pub fn open_for_check(&self, opened: Opened, config: Option<&Path>) -> anyhow::Result<Option<ImageData>> {
        let named = self.blob.is_some() || self.blob_dir.is_some() || self.backend.backend_type.is_some();
        let source = match config {
            _ if named => self.source(&opened)?,
            Some(path) => {
                HeldContext::before(configured_backend(path)?.source(&std::env::temp_dir())?, &opened)?
            }
            None => return Ok(None),
        };
        let engine = engine(EngineConfig::default())?;
        let options = DataOptions { allow_unverified: true, every_context: true, ..DataOptions::default() };
        Ok(Some(ImageData::open(engine, opened.bootstrap, &*source, options)?))
    }

    fn source(&self, opened: &Opened) -> anyhow::Result<Arc<dyn BlobSource>> {
        let count = opened.bootstrap.blobs().len();
        if let Some(dir) = &self.blob_dir {
            return Ok(Arc::new(BesideHolder::new(dir, opened)?));
        }
        if let Some(backend) = self.backend.open()? {
            return HeldContext::before(backend, opened);
        }
        let [blob] = opened.bootstrap.blobs() else {
            return match (count, &self.blob) {
                // Never read.
                (0, _) => Ok(Arc::new(LocalFs::new(None, Vec::new(), Some(PathBuf::from("/dev/null")))?)),
                (_, None) => {
                    bail!("the image's data is in {count} blobs: say where with --blob-dir or --backend-type")
                }
                (_, Some(_)) => {
                    bail!(
                        "the image has {count} blobs: say where they all are with --blob-dir or --backend-type"
                    )
                }
            };
        };
        // A blob whose data is an original layer may hold the bootstrap, but not the data.
        let inside = opened.blob.as_ref().filter(|_| blob.context_id.is_none());
        let Some(file) = self.blob.as_ref().or(inside) else {
            bail!(
                "the image's data is in blob {}: say where with --blob, --blob-dir or --backend-type",
                blob.id
            )
        };
        let beside = file.parent().map(Path::to_owned);
        Ok(Arc::new(OneBlob {
            id: blob.id.clone(),
            data: LocalFs::new(None, Vec::new(), Some(file.clone()))?,
            context: LocalFs::new(beside, Vec::new(), opened.blob.clone())?,
        }))
    }
}

/// One blob in a file of any name. Where its data is an original layer, what says where chunks
/// lie is in another: one beside it, or that of the bootstrap.
#[derive(Debug)]
pub struct OneBlob {
    id: BlobId,
    data: LocalFs,
    context: LocalFs,
}

impl OneBlob {
    /// The blob `id` in the file `data`; what says where its chunks lie is in the file `context`.
    pub fn with_context(id: BlobId, data: &Path, context: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            id,
            data: LocalFs::new(None, Vec::new(), Some(data.to_owned()))?,
            context: LocalFs::new(None, Vec::new(), Some(context.to_owned()))?,
        })
    }
}

impl BlobSource for OneBlob {
    fn kind(&self) -> &'static str {
        "localfs"
    }

    fn blob(&self, id: &BlobId) -> storage::Result<Arc<dyn Backend>> {
        if *id == self.id { self.data.blob(id) } else { self.context.blob(id) }
    }
}

/// What says where the chunks of an original layer lie, in the file of the bootstrap, and blobs elsewhere.
#[derive(Debug)]
struct HeldContext {
    id: BlobId,
    here: LocalFs,
    elsewhere: Arc<dyn BlobSource>,
}

impl HeldContext {
    /// Blobs `elsewhere`, unless the file of the bootstrap is one that has no data but says where that lies.
    fn before(elsewhere: Arc<dyn BlobSource>, opened: &Opened) -> anyhow::Result<Arc<dyn BlobSource>> {
        let Some((id, file)) = opened.context_holder() else { return Ok(elsewhere) };
        Ok(Arc::new(Self { id, here: LocalFs::new(None, Vec::new(), Some(file.to_owned()))?, elsewhere }))
    }
}

impl BlobSource for HeldContext {
    fn kind(&self) -> &'static str {
        self.elsewhere.kind()
    }

    fn blob(&self, id: &BlobId) -> storage::Result<Arc<dyn Backend>> {
        if *id == self.id { self.here.blob(id) } else { self.elsewhere.blob(id) }
    }

    fn blob_of_size(&self, id: &BlobId, stored_size: u64) -> storage::Result<Arc<dyn Backend>> {
        if *id == self.id { self.here.blob(id) } else { self.elsewhere.blob_of_size(id, stored_size) }
    }
}

/// Blobs in a directory, and what is in the file of the bootstrap.
#[derive(Debug)]
struct BesideHolder {
    dir: LocalFs,
    /// The blob that holds the bootstrap, in the directory or where it was opened.
    held: Option<(BlobId, LocalFs)>,
}

impl BesideHolder {
    fn new(dir: &Path, opened: &Opened) -> anyhow::Result<Self> {
        let held = match (&opened.blob, opened.bootstrap.blobs()) {
            (Some(file), [blob]) => {
                // If its data is an original layer, it is not in there, but only what says where chunks lie.
                let id = blob.context_id.as_ref().unwrap_or(&blob.id).clone();
                Some((id, LocalFs::new(Some(dir.to_owned()), Vec::new(), Some(file.clone()))?))
            }
            _ => None,
        };
        Ok(Self { dir: LocalFs::new(Some(dir.to_owned()), Vec::new(), None)?, held })
    }

    fn holds(&self, id: &BlobId) -> bool {
        self.held.as_ref().is_some_and(|(held, _)| held == id)
    }
}

impl BlobSource for BesideHolder {
    fn kind(&self) -> &'static str {
        "localfs"
    }

    fn blob(&self, id: &BlobId) -> storage::Result<Arc<dyn Backend>> {
        match &self.held {
            Some((held, place)) if held == id => place.blob(id),
            _ => self.dir.blob(id),
        }
    }
}

/// Blobs at hand, and those that are not there elsewhere.
#[derive(Debug)]
struct DirectoryThen {
    dir: PathBuf,
    here: BesideHolder,
    elsewhere: Arc<dyn BlobSource>,
}

impl DirectoryThen {
    /// Whether the blob is at hand with at least so many bytes.
    fn is_here(&self, id: &BlobId, stored_size: u64) -> storage::Result<bool> {
        if self.here.holds(id) {
            return Ok(true);
        }
        let path = self.dir.join(id.as_str());
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() < stored_size => {
                tracing::warn!(
                    "{} has {} of {stored_size} bytes and is passed over: the blob is read from the backend",
                    path.display(),
                    metadata.len()
                );
                Ok(false)
            }
            Ok(_) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(storage::Error::io(format!("look for {}", path.display()), e)),
        }
    }
}

impl BlobSource for DirectoryThen {
    fn kind(&self) -> &'static str {
        self.elsewhere.kind()
    }

    fn blob(&self, id: &BlobId) -> storage::Result<Arc<dyn Backend>> {
        if self.is_here(id, 0)? { self.here.blob(id) } else { self.elsewhere.blob(id) }
    }

    fn blob_of_size(&self, id: &BlobId, stored_size: u64) -> storage::Result<Arc<dyn Backend>> {
        if self.is_here(id, stored_size)? {
            self.here.blob(id)
        } else {
            self.elsewhere.blob_of_size(id, stored_size)
        }
    }
}

/// The image with its data in `dir` and, as far as it is not there, in the backend or in the blob that
/// holds the bootstrap.
pub fn open_beside(
    opened: Opened,
    dir: &Path,
    backend: &BackendArgs,
    cancel: &CancellationToken,
) -> anyhow::Result<ImageData> {
    let here = BesideHolder::new(dir, &opened)?;
    let source: Arc<dyn BlobSource> = match backend.open()? {
        Some(elsewhere) => Arc::new(DirectoryThen { dir: dir.to_owned(), here, elsewhere }),
        None => Arc::new(here),
    };
    let options = DataOptions { cancel: cancel.clone(), ..DataOptions::default() };
    Ok(ImageData::open(engine(EngineConfig::default())?, opened.bootstrap, &*source, options)?)
}

/// An engine to read images with. Its threads pass pieces of a MiB on to one another, of which the
/// heap of each would keep some.
pub fn engine(config: EngineConfig) -> anyhow::Result<Arc<Engine>> {
    storage::heap::keep_small();
    Ok(Engine::new(config)?)
}

/// The blobs in `dir`, named by their ids.
pub fn directory(dir: &Path) -> anyhow::Result<Arc<dyn BlobSource>> {
    Ok(Arc::new(LocalFs::new(Some(dir.to_owned()), Vec::new(), None)?))
}

/// A blob entry as clients of the daemon write it: where an image's bootstrap and blobs are.
pub struct BlobEntry {
    /// The bootstrap, if the entry names one.
    pub bootstrap: Option<PathBuf>,
    /// Where the blobs are.
    pub backend: BackendConfig,
}

impl BlobEntry {
    /// Reads an entry, or a list with one entry of type `bootstrap`, from the file `path`.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let document: Value = serde_json::from_str(&read_config(path)?)
            .with_context(|| format!("{}: not valid JSON", path.display()))?;
        Self::parse(&document).with_context(|| format!("blob entry {}", path.display()))
    }

    fn parse(document: &Value) -> anyhow::Result<Self> {
        let entry = match document.get("blobs").and_then(Value::as_array) {
            Some(list) => {
                let mut bootstraps = list.iter().filter(|entry| entry["type"] == "bootstrap");
                match (bootstraps.next(), bootstraps.next()) {
                    (Some(only), None) => only,
                    _ => bail!("`blobs`: want one entry of type bootstrap"),
                }
            }
            None => document,
        };
        let (config, kind, fields) = match (entry.get("config_v2"), entry.get("config")) {
            (Some(config), _) => {
                let backend = &config["backend"];
                let kind = backend["type"].as_str().context("`config_v2.backend.type` is required")?;
                (config, kind, &backend[kind])
            }
            (None, Some(config)) => {
                let kind = config["backend_type"].as_str().context("`config.backend_type` is required")?;
                (config, kind, &config["backend_config"])
            }
            (None, None) => bail!("one of `config` and `config_v2` is required"),
        };
        let mut warnings = Vec::new();
        let backend = BackendConfig::from_fields(kind, fields.clone(), &mut warnings)?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let bootstrap = config["metadata_path"].as_str().filter(|path| !path.is_empty()).map(PathBuf::from);
        Ok(Self { bootstrap, backend })
    }
}

/// The backend in a configuration of the daemon: JSON as most clients write it, JSON or TOML with
/// `version = 2`, or a blob entry.
fn configured_backend(path: &Path) -> anyhow::Result<BackendConfig> {
    let text = read_config(path)?;
    let parse = || -> anyhow::Result<BackendConfig> {
        let document: Value = match serde_json::from_str(&text) {
            Ok(document) => document,
            Err(json) => {
                toml::from_str(&text).map_err(|toml| anyhow!("neither JSON ({json}) nor TOML ({toml})"))?
            }
        };
        let (backend, fields) = match (document.pointer("/device/backend"), document.get("backend")) {
            (Some(backend), _) => (backend, "config"),
            (None, Some(backend)) => (backend, backend["type"].as_str().unwrap_or_default()),
            (None, None) => return Ok(BlobEntry::parse(&document)?.backend),
        };
        let kind = backend["type"].as_str().context("the backend's `type` is required")?;
        let fields = backend.get(fields).with_context(|| format!("the backend's `{fields}` is required"))?;
        let mut warnings = Vec::new();
        let config = BackendConfig::from_fields(kind, fields.clone(), &mut warnings)?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        Ok(config)
    };
    parse().with_context(|| format!("configuration {}", path.display()))
}

fn read_config(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let failed = || format!("read {}", path.display());
    let file = std::fs::File::open(path).with_context(failed)?;
    file.take(MAX_CONFIG_SIZE + 1).read_to_string(&mut text).with_context(failed)?;
    if text.len() as u64 > MAX_CONFIG_SIZE {
        bail!("{} is larger than {MAX_CONFIG_SIZE} bytes", path.display());
    }
    Ok(text)
}

/// Opens the bootstrap at `path`, wherever it is.
pub fn open_bootstrap(path: &Path) -> anyhow::Result<Opened> {
    Ok(image::open(path)?)
}
