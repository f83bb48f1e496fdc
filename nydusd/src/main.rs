//! `nydusd`: serves images through host FUSE, and fetches them ahead.

use clap::CommandFactory as _;
use nydusd::cli::{self, Cli, Command};
use nydusd::{daemon, limits, logging, pages, preheat};

fn main() {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(why) = cli::no_service(&arguments) {
        eprintln!("Error: {why}");
        std::process::exit(1);
    }
    let cli = Cli::parse_arguments(arguments).unwrap_or_else(|e| e.exit());
    limits::keep_heap_small();
    let global = match &cli.command {
        Command::Fuse(args) => &args.global,
        Command::Prefetch(args) => &args.global,
        Command::Pages { directory } => {
            let written = pages::write(Cli::command(), nydusd::version::DESCRIBE, directory);
            std::process::exit(written.map_or_else(
                |e| {
                    eprintln!("Error: {}: {e}", directory.display());
                    1
                },
                |()| 0,
            ));
        }
    };
    if let Err(e) = logging::init(global) {
        logging::print_failure(&e);
        std::process::exit(1);
    }
    let version = nydusd::version::BUILD;
    tracing::info!("nydusd {} {} ({})", version.package_ver, version.git_commit, version.profile);
    limits::raise_nofile(global.rlimit_nofile);
    std::process::exit(match cli.command {
        Command::Fuse(args) => daemon::run(*args),
        Command::Prefetch(args) => preheat::standalone::run(*args),
        Command::Pages { .. } => 0,
    });
}
