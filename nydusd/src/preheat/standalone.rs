//! `nydusd prefetch`: fills the cache directory for an image that is not mounted, then ends.
//!
//! It is a daemon without a mount: the same caches, locks and verification, so that daemons on
//! the same directory share the work, and a later mount finds its data.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context as _, bail};
use storage::engine::{Engine, EngineConfig};
use storage::prefetch::Class;
use tokio::sync::oneshot;

use super::jobs::{Jobs, State};
use super::show::{Show, TICK, text};
use super::{Request, Wish};
use crate::cli::{Part, PrefetchArgs};
use crate::vfs::known::Known;
use crate::vfs::place::Place;
use crate::words::counted;
use crate::{image, mount};

/// Longest wait for the disk after a signal.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Fetches and answers the exit code: 0 if everything is there.
///
/// The caller exits without dropping anything, as after [`crate::daemon::run`].
pub fn run(args: PrefetchArgs) -> i32 {
    match control(args) {
        Ok(()) => 0,
        Err(e) => {
            crate::logging::print_failure(&e);
            1
        }
    }
}

/// Works beside the signals: a start that hangs on its source can be ended, too.
fn control(args: PrefetchArgs) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let jobs = Arc::<Jobs>::default();
    let (sender, mut ended) = oneshot::channel();
    let (flushed, flush) = mpsc::sync_channel(1);
    let worker = Arc::clone(&jobs);
    std::thread::Builder::new().name("prefetch".to_owned()).spawn(move || {
        let result = fetch(&args, &worker);
        // Nobody waits any more if a signal came long before.
        let _ = flushed.send(());
        let _ = sender.send(result);
    })?;
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("catch SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("catch SIGINT")?;
        tokio::select! {
            result = &mut ended => return result.context("the prefetch thread panicked").flatten(),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        jobs.cancel_all();
        bail!("ended by a signal; what has arrived is kept")
    });
    if result.is_err() {
        let _ = flush.recv_timeout(END_LIMIT);
    }
    // Never dropped: see above.
    std::mem::forget(runtime);
    result
}

fn fetch(args: &PrefetchArgs, jobs: &Jobs) -> anyhow::Result<()> {
    let part = args.what.part.load()?;
    let what = part.name();
    let plan = image::plan(&args.image, args.global.config.as_deref())?
        .context("nothing to fetch: give --image, or --bootstrap with --config or --localfs-dir")?;
    let engine = Engine::new(EngineConfig::default())?;
    let spec = image::resolve(&engine, plan, "/".to_owned())?;
    for warning in &spec.config.warnings {
        tracing::warn!("configuration: {warning}");
    }
    let mount = Arc::new(mount::open(&engine, spec, &Known::default(), None)?.at(Place::unseen()));
    for cache in mount.caches() {
        if let Err(e) = engine.block_on(cache.keep_context()) {
            tracing::warn!("{}", crate::logging::chain(&e));
        }
    }
    let wish = match part {
        Part::All => Wish::Image,
        Part::Files(paths) => Wish::Files(paths),
        Part::Trace(document) => super::trace(&mount, &document)?,
    };
    let request = Request { what, stages: vec![(Class::Preheat, wish)], bandwidth: args.what.bandwidth };
    let id = jobs.start(engine.handle(), &mount, request)?;
    let mut show = Show::default();
    let report = loop {
        let report = jobs.report(id).context("the prefetch is forgotten")?;
        show.update(&serde_json::to_value(&report)?);
        if report.progress.finished {
            break report;
        }
        std::thread::sleep(TICK);
    };
    show.end();
    for cache in mount.caches() {
        cache.flush()?;
    }
    // A later mount finds what is on disk, and nothing else.
    let lost = mount.cache_metrics().snapshot().write_errors;
    let directory = mount.config().work_dir.display();
    if lost > 0 || !mount.caches().iter().all(|cache| cache.keeps_chunks()) {
        bail!(
            "{} fetched but not kept: is the disk of {directory} full or read-only?",
            counted(lost, "chunk")
        );
    }
    let text = text(&serde_json::to_value(&report)?);
    match report.state {
        State::Done => println!("{text}\n{}", directory),
        _ => bail!("{text}"),
    }
    // Dropping the engine would join threads that may wait for a source.
    std::mem::forget(engine);
    Ok(())
}
