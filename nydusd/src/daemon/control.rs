//! The control plane: what the main thread does until something ends the daemon.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::{Daemon, End};
use crate::api;
use crate::cli::{Front, ServeArgs};
use crate::sandbox::Privileged;
use crate::transport::Prepared;

/// Runs one daemon to its end and answers the exit code. Does not return before the mount,
/// if any, is gone or meant to stay.
///
/// The caller exits without dropping anything: fetches may still be waiting for their source,
/// and joining them would take as long as the source does.
pub fn run(front: Front, args: ServeArgs, host: Arc<Privileged>, prepared: Prepared) -> i32 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            crate::logging::print_failure(&anyhow::Error::new(e).context("start the control plane"));
            return 1;
        }
    };
    let (ends, receiver) = mpsc::unbounded_channel();
    let log_is_file = args.global.log_file.is_some();
    let daemon = Arc::new(Daemon::new(front, args, host, prepared, ends));
    let result = runtime.block_on(control(&daemon, receiver));
    daemon.host.dismiss();
    // Never dropped: see above.
    std::mem::forget((daemon, runtime));
    match result {
        Ok(()) => 0,
        Err(e) => {
            // Once where the log goes to standard error, too.
            if log_is_file {
                tracing::error!("{e:#}");
            }
            crate::logging::print_failure(&e);
            1
        }
    }
}

/// Signals that end a daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Only where `nydusd supervise` has another daemon take over.
    hangup: Option<Signal>,
}

impl Signals {
    /// Waits for one of them; whether the daemon unmounts then.
    async fn end(&mut self, daemon: &Daemon) -> bool {
        tokio::select! {
            _ = self.terminate.recv() => daemon.unmounts(),
            _ = self.interrupt.recv() => daemon.unmounts(),
            () = told(&mut self.hangup) => false,
        }
    }
}

/// Waits for a signal, for ever where there is none to wait for.
async fn told(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// The control plane: waits for the start, serves the API, waits for the end.
async fn control(daemon: &Arc<Daemon>, mut ends: mpsc::UnboundedReceiver<End>) -> anyhow::Result<()> {
    let supervised = daemon.args.global.holder.is_some();
    let hangup = supervised.then(|| signal(SignalKind::hangup())).transpose().context("catch SIGHUP")?;
    let mut signals = Signals {
        terminate: signal(SignalKind::terminate()).context("catch SIGTERM")?,
        interrupt: signal(SignalKind::interrupt()).context("catch SIGINT")?,
        hangup,
    };
    let (started, start) = oneshot::channel();
    let starter = Arc::clone(daemon);
    std::thread::Builder::new()
        .name("start".to_owned())
        .spawn(move || {
            // The receiver is gone if a signal came first.
            if let Err(Err(e)) = started.send(starter.start()) {
                tracing::info!("the start was given up: {e:#}");
            }
        })
        .context("start the start thread")?;

    let unmount = tokio::select! {
        biased;
        _ = signals.terminate.recv() => daemon.unmounts(),
        _ = signals.interrupt.recv() => daemon.unmounts(),
        result = start => {
            if let Err(e) = result.context("the start thread panicked").flatten() {
                daemon.stop(!daemon.is_inherited());
                return Err(e);
            }
            return serve(daemon, &mut ends, signals).await;
        }
    };
    daemon.stop(unmount);
    Ok(())
}

/// Serves the API until something ends the daemon.
async fn serve(
    daemon: &Arc<Daemon>,
    ends: &mut mpsc::UnboundedReceiver<End>,
    mut signals: Signals,
) -> anyhow::Result<()> {
    let supervised = daemon.args.global.holder.is_some();
    let socket: Option<PathBuf> = daemon.args.global.apisock.clone();
    let server = match &socket {
        Some(path) => {
            let bound = tokio::select! {
                biased;
                unmount = signals.end(daemon) => {
                    daemon.stop(unmount);
                    return Ok(());
                }
                bound = api::Server::bind(path, Arc::clone(daemon)) => bound,
            };
            match bound {
                Ok(server) => Some(server),
                Err(e) => {
                    daemon.stop(!daemon.is_inherited());
                    return Err(e);
                }
            }
        }
        None => None,
    };
    let exporter = match daemon.args.global.metrics_addr {
        Some(address) => match api::Exporter::bind(address, Arc::clone(daemon)).await {
            Ok(exporter) => Some(exporter),
            Err(e) => {
                daemon.stop(!daemon.is_inherited());
                return Err(e);
            }
        },
        None => None,
    };
    let result = tokio::select! {
        unmount = signals.end(daemon) => Ok(unmount),
        () = daemon.host.ended(), if supervised => {
            tracing::error!("the broker has ended; this daemon ends, for one with a broker to take its mount over");
            Ok(false)
        }
        end = ends.recv() => match end {
            Some(End::Exit) => Ok(false),
            Some(End::Fuse(result)) => result.and_then(|()| daemon.unmounted()).map(|()| true),
            None => Ok(true),
        },
    };
    drop(exporter);
    if let Some(server) = server {
        server.close().await;
    }
    daemon.stop(*result.as_ref().unwrap_or(&!daemon.is_survived()));
    result.map(|_| ())
}
