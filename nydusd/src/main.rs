//! `nydusd`: serves images through host FUSE.

use nydusd::cli::{Cli, Command};
use nydusd::{daemon, limits, logging};

fn main() {
    let cli = Cli::parse_arguments(std::env::args_os()).unwrap_or_else(|e| e.exit());
    let Command::Fuse(args) = cli.command;
    if let Err(e) = logging::init(&args.global) {
        logging::print_failure(&e);
        std::process::exit(1);
    }
    let version = nydusd::version::BUILD;
    tracing::info!("nydusd {} {} ({})", version.package_ver, version.git_commit, version.profile);
    limits::raise_nofile(args.global.rlimit_nofile);
    std::process::exit(daemon::run(*args));
}
