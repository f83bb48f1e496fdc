//! `nydusd`: serves images through host FUSE, and fetches them ahead.

use nydusd::cli::{Cli, Command};
use nydusd::{daemon, limits, logging, preheat};

fn main() {
    let cli = Cli::parse_arguments(std::env::args_os()).unwrap_or_else(|e| e.exit());
    limits::keep_heap_small();
    let global = match &cli.command {
        Command::Fuse(args) => &args.global,
        Command::Prefetch(args) => &args.global,
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
    });
}
