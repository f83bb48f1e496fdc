//! `nydusctl`: talks to running `nydusd` daemons, and looks after caches and machines.

/// Writes a line to standard output; where that is gone, the error ends the command.
macro_rules! say {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), $($argument)*)?
    }};
}

mod cache;
mod check;
mod cli;
mod client;
mod discover;
mod info;
mod metrics;
mod mount;
mod mounts;
mod prefetch;
mod refusal;
mod top;
mod trace;
mod why;

use std::io::ErrorKind;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use serde_json::json;

use cli::{Cli, Command, Setting};
use client::Client;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Mount(options) = &cli.command {
        options.check().unwrap_or_else(|e| e.exit());
    }
    match run(&cli) {
        Ok(code) => code,
        // `nydusctl … | head` has seen enough.
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("Error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let timeout = Duration::from_secs(cli.timeout);
    match &cli.command {
        // Those that need no daemon, or ask them all.
        Command::Cache(options) => return cache::run(options, cli.sock.as_deref(), timeout, cli.raw),
        Command::Check(check) => return check::run(check, cli.raw),
        Command::Pages { directory } => {
            nydusd::pages::write(Cli::command(), nydusd::version::DESCRIBE, directory)
                .with_context(|| directory.display().to_string())?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Mounts => {
            mounts::run(&discover::all(cli.sock.as_deref())?, timeout, cli.raw)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Top(options) => {
            top::run(cli.sock.as_deref(), options, timeout, cli.raw)?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let socket = discover::one(cli.sock.as_deref())?;
    let client = Client::new(&socket, timeout)?;
    match &cli.command {
        Command::Info => {
            let info = client.get("/api/v1/daemon")?;
            say!("{}", if cli.raw { info.to_string() } else { info::text(&info) });
        }
        Command::Set(Setting::LogLevel { value }) => {
            client.put("/api/v1/daemon", &json!({ "log_level": value }))?;
        }
        Command::Metrics(family) => metrics::run(&client, family, cli.raw)?,
        Command::Prefetch(prefetch) => prefetch::run(&client, prefetch, cli.raw)?,
        Command::Mount(options) => mount::mount(&client, options)?,
        Command::Umount(options) => client.umount(&options.mountpoint)?,
        Command::Why(options) => why::run(&client, options, cli.raw)?,
        Command::Trace(show) => trace::run(&client, show)?,
        Command::Mounts | Command::Top(_) | Command::Cache(_) | Command::Check(_) | Command::Pages { .. } => {
        }
    }
    Ok(ExitCode::SUCCESS)
}
