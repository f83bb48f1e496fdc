//! `nydusd`: serves images through host FUSE or to virtual machines, and fetches them ahead.

use std::path::Path;

use clap::CommandFactory as _;
use nydusd::cli::{self, Cli, Command, Front, GlobalArgs, ServeArgs};
use nydusd::failover::holder;
use nydusd::sandbox::{self, Sandbox};
use nydusd::transport::Prepared;
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
        Command::Fuse(args) => serve(Front::Fuse(args.front), args.serve),
        Command::Virtiofs(args) => serve(Front::Virtiofs(args.front), args.serve),
        Command::Blk(args) => serve(Front::Blk(args.front), args.serve),
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

/// Runs a daemon to its end; its exit code.
fn serve(front: Front, args: ServeArgs) -> i32 {
    sandbox::leave_launcher();
    // Before there are threads, and before anything of anybody else is read.
    let sandbox = Sandbox::begin(&front, &args);
    prepare(&args.global);
    let prepared = Prepared::new(&front, &args);
    match sandbox.enter(&front, &args) {
        Ok(host) => daemon::run(front, args, host, prepared),
        Err(e) => {
            logging::print_failure(&e);
            1
        }
    }
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
