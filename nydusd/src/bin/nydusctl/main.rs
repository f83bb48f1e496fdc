//! `nydusctl`: talks to a running `nydusd`.

mod cli;
mod client;
mod info;
mod metrics;
mod prefetch;
mod trace;
mod why;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use serde_json::json;

use cli::{Cli, Command, Setting};
use client::Client;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("Error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let client = Client::new(&cli.sock, Duration::from_secs(cli.timeout))?;
    match &cli.command {
        Command::Info => {
            let info = client.get("/api/v1/daemon")?;
            println!("{}", if cli.raw { info.to_string() } else { info::text(&info) });
            Ok(())
        }
        Command::Set(Setting::LogLevel { value }) => {
            client.put("/api/v1/daemon", &json!({ "log_level": value }))
        }
        Command::Metrics(family) => metrics::run(&client, family, cli.raw),
        Command::Prefetch(prefetch) => prefetch::run(&client, prefetch, cli.raw),
        Command::Why(options) => why::run(&client, options, cli.raw),
        Command::Trace(show) => trace::run(&client, show),
    }
}
