//! Ctrl-C and SIGTERM: the first asks the work to end cleanly, the second ends the process.

use anyhow::{Context as _, Result, bail};
use builder::ErrorKind;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of a process ended by SIGINT, as shells report it.
const EXIT_INTERRUPTED: i32 = 130;

/// Signals turned into a cancellation, for as long as this lives.
pub struct Interrupt {
    token: CancellationToken,
    // Dropping the runtime ends the task that waits.
    _runtime: tokio::runtime::Runtime,
}

impl Interrupt {
    /// Takes over SIGINT and SIGTERM.
    pub fn install() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("signals")
            .enable_io()
            .build()
            .context("waiting for signals")?;
        let token = CancellationToken::new();
        let fired = token.clone();
        let (mut interrupts, mut terminations) = {
            let _inside = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        runtime.spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupts.recv() => {}
                    _ = terminations.recv() => {}
                }
                if fired.is_cancelled() {
                    std::process::exit(EXIT_INTERRUPTED);
                }
                fired.cancel();
            }
        });
        Ok(Self { token, _runtime: runtime })
    }

    /// Fires at the first signal.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }
}

/// What work came to; of one that a signal has ended, that nothing is written.
pub fn interruptible<T>(done: builder::Result<T>) -> Result<T> {
    match done {
        Err(error) if error.kind() == ErrorKind::Cancelled => bail!("interrupted: nothing is written"),
        done => Ok(done?),
    }
}
