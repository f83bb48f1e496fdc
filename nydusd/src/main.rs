//! `nydusd`: serves images through host FUSE, and fetches them ahead.

use std::path::Path;

use clap::CommandFactory as _;
use nydusd::cli::{self, Cli, Command, GlobalArgs};
use nydusd::failover::holder;
use nydusd::sandbox::{self, Sandbox};
use nydusd::transport::uring::Plan;
use nydusd::{daemon, limits, logging, pages, preheat, writable};

fn main() {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(why) = cli::no_service(&arguments) {
        eprintln!("Error: {why}");
        std::process::exit(1);
    }
    let cli = Cli::parse_arguments(arguments).unwrap_or_else(|e| e.exit());
    limits::keep_heap_small();
    std::process::exit(match cli.command {
        Command::Fuse(args) => {
            sandbox::leave_launcher();
            // Before there are threads, and before anything of anybody else is read.
            let sandbox = Sandbox::begin(&args);
            prepare(&args.global);
            let rings = if args.fuse_io_uring { Plan::new(&args) } else { None };
            match sandbox.enter(&args) {
                Ok(host) => daemon::run(*args, host, rings),
                Err(e) => {
                    logging::print_failure(&e);
                    1
                }
            }
        }
        Command::Prefetch(args) => {
            prepare(&args.global);
            preheat::standalone::run(*args)
        }
        Command::Supervise(args) => {
            sandbox::leave_launcher();
            holder::run(&args)
        }
        Command::Overlay(args) => writable::run(&args),
        Command::Pages { directory } => write_pages(&directory),
    });
}

/// Sets up log and limits.
fn prepare(global: &GlobalArgs) {
    if let Err(e) = logging::init(global) {
        logging::print_failure(&e);
        std::process::exit(1);
    }
    let version = nydusd::version::BUILD;
    tracing::info!("nydusd {} {} ({})", version.package_ver, version.git_commit, version.profile);
    limits::raise_nofile(global.rlimit_nofile);
}

/// Answers the exit code.
fn write_pages(directory: &Path) -> i32 {
    match pages::write(Cli::command(), nydusd::version::DESCRIBE, directory) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("Error: {}: {e}", directory.display());
            1
        }
    }
}
