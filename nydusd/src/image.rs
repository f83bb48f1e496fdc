//! What to mount: from the command line and the configuration to a [`MountSpec`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use storage::backend::ReadContext;
use storage::backend::registry::Rewrite;
use storage::engine::Engine;
use storage::oci::auth::{AuthFiles, Credentials};
use storage::oci::client::{RegistryOptions, Scheme};
use storage::oci::image::{Image, ImageName};
use storage::oci::manifest::Platform;
use storage::oci::nydus::{FetchOptions, NydusImage};
use storage::oci::reference::DEFAULT_HOST;
use storage::oci::token::Login;

use crate::cli::{ImageArgs, ServeArgs};
use crate::config::{BackendConfig, Config, RegistryConfig, TransportConfig};
use crate::mount::MountSpec;
use crate::vfs::command::MountCommand;

/// Environment variable that replaces the registry's `auth` (contract 1.4).
const PULL_AUTH: &str = "IMAGE_PULL_AUTH";

/// What the command line asks for, nothing fetched yet.
#[derive(Debug)]
pub enum Plan {
    /// A bootstrap file and where its blobs are.
    Bootstrap(PathBuf, Box<Config>),
    /// An image by its name. Its manifest says what the bootstrap is.
    Named(ImageName, Box<RegistryOptions>, Box<Config>),
}

/// Reads the configuration and decides what to mount; `None`: nothing.
///
/// # Errors
/// The configuration is refused, or there is none.
pub fn plan(args: &ImageArgs, config: Option<&Path>) -> anyhow::Result<Option<Plan>> {
    if let Some(name) = &args.image {
        return plan_named(name, args).map(Some);
    }
    // Without a bootstrap the configuration is not even opened: clients leave unusable ones.
    let Some(bootstrap) = &args.bootstrap else { return Ok(None) };
    let mut config = match (config, &args.localfs_dir) {
        (Some(path), _) => Config::load(path)?,
        (None, Some(dir)) => Config::localfs_dir(dir),
        (None, None) => bail!("--bootstrap needs --config or --localfs-dir to find the image's blobs"),
    };
    apply_arguments(&mut config, args);
    apply_pull_auth(&mut config)?;
    Ok(Some(Plan::Bootstrap(bootstrap.clone(), Box::new(config))))
}

/// `--image`: everything has a default.
fn plan_named(name: &str, args: &ImageArgs) -> anyhow::Result<Plan> {
    let name: ImageName = name.parse()?;
    let login = match std::env::var(PULL_AUTH) {
        Ok(auth) => Login::Fixed(Credentials::from_base64(&auth).with_context(|| PULL_AUTH.to_owned())?),
        Err(_) => Login::Files(AuthFiles::from_environment()),
    };
    let transport = TransportConfig {
        ca_cert_files: args.ca_cert.clone(),
        proxy_from_environment: args.proxy_from_environment,
        ..TransportConfig::default()
    };
    let options = RegistryOptions {
        http: transport.http_options(),
        scheme: if args.plain_http { Scheme::Http } else { Scheme::Auto },
        login,
        ..RegistryOptions::default()
    };
    let backend = match &name {
        ImageName::Layout { path, .. } => BackendConfig::OciLayout(path.clone()),
        ImageName::Registry(reference) => BackendConfig::Registry(RegistryConfig {
            transport,
            ..RegistryConfig::new(reference.host(), reference.repository())
        }),
    };
    let work_dir = match &args.cache_dir {
        Some(dir) => dir.clone(),
        None => default_cache_dir()?,
    };
    let mut config = Config::new(backend, work_dir);
    // Nobody has said otherwise: what the image itself recommends is fetched.
    config.prefetch.enable = true;
    apply_arguments(&mut config, args);
    Ok(Plan::Named(name, Box::new(options), Box::new(config)))
}

/// Where the cache is unless somebody says so: root's belongs to the host, anyone else's to their account.
///
/// # Errors
/// The account has no home.
pub fn default_cache_dir() -> anyhow::Result<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/nydus/cache"));
    }
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("nydus"))
        .context("neither XDG_CACHE_HOME nor HOME is set; say --cache-dir")
}

/// What the command line says goes before the document.
fn apply_arguments(config: &mut Config, args: &ImageArgs) {
    config.expect_root = args.expect_root.or(config.expect_root);
    config.expect_bootstrap = args.expect_bootstrap.or(config.expect_bootstrap);
    config.allow_unverified |= args.allow_unverified;
    config.read_timeout = args.read_timeout.unwrap_or(config.read_timeout);
    config.on_outage = args.on_outage.unwrap_or(config.on_outage);
    config.read_ahead.prefer = args.prefer.unwrap_or(config.read_ahead.prefer);
}

impl Plan {
    /// The configuration so far.
    pub fn config_mut(&mut self) -> &mut Config {
        match self {
            Self::Bootstrap(_, config) | Self::Named(_, _, config) => config,
        }
    }
}

/// What daemons alone have on their command lines.
///
/// # Errors
/// The list of files to prefetch can not be read or is not one.
pub fn apply_serve_arguments(config: &mut Config, args: &ServeArgs) -> anyhow::Result<()> {
    config.trace = args.trace.unwrap_or(config.trace);
    config.trace_limits.longest = args.trace_seconds.unwrap_or(config.trace_limits.longest);
    config.push_trace = args.push_trace;
    if let Some(list) = &args.prefetch_files {
        config.prefetch_files = Some(crate::preheat::list::load(list).context("--prefetch-files")?);
        if args.global.config.is_none() {
            config.prefetch.enable = true;
        } else if !config.prefetch.enable {
            config.warnings.push("prefetch is off, so --prefetch-files has no effect".to_owned());
        }
    }
    if args.backend_source.is_some() {
        config.warnings.push("--backend-source has no effect yet".to_owned());
    }
    Ok(())
}

fn apply_pull_auth(config: &mut Config) -> anyhow::Result<()> {
    let Some(auth) = std::env::var_os(PULL_AUTH) else { return Ok(()) };
    if let BackendConfig::Registry(registry) = &mut config.backend {
        let auth = auth.into_string().ok().with_context(|| format!("{PULL_AUTH} is not base64"))?;
        crate::config::check_basic_auth(PULL_AUTH, &auth)?;
        registry.auth = Some(auth);
    }
    Ok(())
}

/// What [`crate::mount::open`] needs for the API's command: an image. `amend` has the last word on its
/// configuration.
///
/// # Errors
/// Its configuration or its list of files is refused.
pub fn commanded(command: MountCommand, amend: impl FnOnce(&mut Config)) -> anyhow::Result<MountSpec> {
    if command.config.trim().is_empty() {
        bail!(
            "invalid argument: `config` is empty, and an image needs one: the text of a configuration file, which says \
             where its blobs are and where its cache is (`nydusctl mount --config FILE`)"
        );
    }
    let mut config = Config::parse(&command.config).context("the mount's `config`")?;
    if config.overlay.is_some() {
        bail!(
            "`overlay` is for the image that a daemon is started with; start one for this image, or mount an \
             overlay over it"
        );
    }
    amend(&mut config);
    if let Some(files) = &command.prefetch_files {
        let files = files.iter().map(|path| path.clone().into_bytes()).collect::<Vec<_>>();
        files.iter().try_for_each(|path| crate::preheat::list::check(path)).context("`prefetch_files`")?;
        if files.len() > crate::preheat::list::MAX_PATHS {
            bail!(
                "`prefetch_files` has more than {} files; name directories instead",
                crate::preheat::list::MAX_PATHS
            );
        }
        if !config.prefetch.enable {
            config.warnings.push("prefetch is off, so `prefetch_files` has no effect".to_owned());
        }
        config.prefetch_files = Some(files);
    }
    Ok(MountSpec {
        mountpoint: command.mountpoint.clone(),
        bootstrap: command.source.clone(),
        command: Some(command),
        fetched: None,
        stated_root: None,
        source: config.backend.source(&config.work_dir)?,
        subject: None,
        config,
    })
}

/// Turns the plan into what [`crate::mount::open`] needs at `mountpoint`; fetches what that takes.
///
/// # Errors
/// The source refuses or does not have the image.
pub fn resolve(engine: &Arc<Engine>, plan: Plan, mountpoint: String) -> anyhow::Result<MountSpec> {
    match plan {
        Plan::Bootstrap(bootstrap, config) => Ok(MountSpec {
            mountpoint,
            command: None,
            bootstrap,
            fetched: None,
            stated_root: None,
            source: config.backend.source(&config.work_dir)?,
            subject: None,
            config: *config,
        }),
        Plan::Named(name, options, config) => fetch(engine, name, *options, *config, mountpoint),
    }
}

/// The same for an image whose bootstrap is at hand from an earlier mount: nothing is fetched.
///
/// # Errors
/// The configuration of the source is refused.
pub fn resolve_again(plan: Plan, mountpoint: String, bootstrap: PathBuf) -> anyhow::Result<MountSpec> {
    let (source, config) = match plan {
        Plan::Bootstrap(_, config) => (config.backend.source(&config.work_dir)?, config),
        Plan::Named(name, options, config) => {
            let image = Image::open(name, *options)?;
            (image.blob_source(Rewrite::default(), config.work_dir.clone())?, config)
        }
    };
    Ok(MountSpec {
        mountpoint,
        command: None,
        bootstrap,
        fetched: None,
        stated_root: None,
        source,
        subject: None,
        config: *config,
    })
}

/// Fetches manifest and bootstrap. The manifest is the authority: what it names is verified
/// against its digests on the way in.
fn fetch(
    engine: &Arc<Engine>,
    name: ImageName,
    options: RegistryOptions,
    config: Config,
    mountpoint: String,
) -> anyhow::Result<MountSpec> {
    let work_dir = &config.work_dir;
    let context = || format!("the cache directory {} can not be used", work_dir.display());
    crate::mount::make_cache_dir(work_dir)?;
    let fetched = tempfile::Builder::new().prefix(".fetch-").tempfile_in(work_dir).with_context(context)?;
    let fetched = fetched.into_temp_path();
    tracing::info!("fetching manifest and bootstrap of {name}");
    let image = Image::open(name, options)?;
    let fetch = FetchOptions {
        platform: Platform::host(),
        bootstrap: fetched.to_path_buf(),
        rewrite: Rewrite::default(),
    };
    let context = ReadContext::on_demand(config.outage_policy().deadline());
    let nydus =
        engine.block_on(NydusImage::fetch(&image, fetch, &context)).map_err(|e| match image.name() {
            ImageName::Registry(reference) if reference.host() == DEFAULT_HOST => anyhow!(
                "{} (a name without a registry is one of {DEFAULT_HOST}: for another write \
                 docker://HOST/REPOSITORY[:TAG], for a layout on disk oci:PATH[:TAG])",
                crate::logging::chain(&e)
            ),
            _ => e.into(),
        })?;
    tracing::info!("image {} is manifest {}", image.name(), nydus.manifest_digest);
    Ok(MountSpec {
        mountpoint,
        command: None,
        bootstrap: nydus.bootstrap,
        fetched: Some(fetched),
        stated_root: nydus.root_digest,
        source: nydus.source,
        subject: nydus.subject,
        config,
    })
}
