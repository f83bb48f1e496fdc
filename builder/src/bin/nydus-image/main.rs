//! `nydus-image`: builds, merges, checks, inspects and converts images.
//!
//! Results go to stdout, diagnosis to stderr. Exit 0: done; 1: failed or the answer is no;
//! 2: usage, or images that can not be merged with one another.

mod check;
mod chunkdict;
mod cli;
mod compact;
mod convert;
mod create;
mod data;
mod export;
mod inspect;
mod interrupt;
mod logging;
mod merge;
mod optimize;
mod output;
#[path = "../../../../misc/pages.rs"]
mod pages;
mod progress;
mod stat;
mod unpack;
mod values;
mod version;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout with 0, misuse to stderr with 2. Nobody is left to tell if
            // that fails.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("Error: {error:#}");
            let inconsistent = error
                .downcast_ref::<builder::Error>()
                .is_some_and(|e| e.kind() == builder::ErrorKind::Inconsistent);
            ExitCode::from(if inconsistent { 2 } else { 1 })
        }
    }
}

/// A directory source keeps one descriptor open for each level: ask for all that is allowed.
fn raise_descriptor_limit() {
    // Refused, the soft limit stays, and a tree too deep for it says so.
    let _ = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    raise_descriptor_limit();
    builder::turns::run_as_batch();
    if cli.version {
        output::print(version::BLOCK)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(command) = cli.command else {
        Cli::command().print_help()?;
        return Ok(ExitCode::SUCCESS);
    };
    // Clients parse stdout and stderr of a single inspect request together.
    let silent = matches!(&command, Command::Inspect(args) if args.request.is_some());
    logging::init(cli.log_file.as_deref(), cli.log_level, silent)?;
    match command {
        Command::Create(args) => create::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Pages { directory } => {
            pages::write(Cli::command(), version::NUMBER, &directory)
                .with_context(|| directory.display().to_string())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Chunkdict(args) => chunkdict::run(&args),
        Command::Optimize(args) => optimize::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Stat(args) => stat::run(&args),
        Command::Compact(args) => compact::run(&args),
        Command::Unpack(args) => unpack::run(&args),
    }
}
