//! `nydus-image unpack`: an image in, a tar stream out.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use builder::ErrorKind;
use builder::progress::Activity;
use builder::unpack::{self, UnpackOptions};
use clap::Args;

use crate::data::{self, BootstrapArgs, SourceArgs};
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::progress;

/// Bytes gathered before a write to the archive.
const WRITE_BUFFER: usize = 1 << 20;

/// Write an image as a tar archive
#[derive(Args, Debug)]
pub struct UnpackArgs {
    #[command(flatten)]
    bootstrap: BootstrapArgs,

    #[command(flatten)]
    source: SourceArgs,

    /// Where to write the archive: a file, a FIFO, or - for stdout
    #[arg(short = 'o', long, value_name = "output")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(args: &UnpackArgs) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::install()?;
    // Whatever can be refused is refused before the output is opened: for a FIFO's reader that
    // is an archive without a beginning.
    let opened = data::open_bootstrap(args.bootstrap.path()?)?;
    let image = args.source.open(opened, interrupt.token())?;
    let (out, output): (Box<dyn Write>, _) = if args.output == Path::new("-") {
        (Box::new(std::io::stdout().lock()), None)
    } else {
        let mut output = Output::at(&args.output)?;
        (Box::new(output.writer()?), Some(output))
    };
    let observer = progress::observer();
    let meter = observer.begin(Activity::Write, &args.output.display().to_string(), None);
    let mut out = BufWriter::with_capacity(WRITE_BUFFER, out);
    let unpacking = || format!("unpack to {}", args.output.display());
    let done = unpack::unpack(&image, &mut out, UnpackOptions::default(), &|bytes| meter.advance(bytes));
    let done = match done {
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            bail!("interrupted: the archive is not complete")
        }
        done => done.with_context(unpacking)?,
    };
    out.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(unpacking)?;
    if let Some(output) = output {
        output.commit("")?;
    }
    meter.finish(&format!("{} entries", done.entries));
    if done.socket_count > 0 {
        let more = done.socket_count - done.sockets.len() as u64;
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        tracing::warn!("left out, for tar has no sockets: {}{more}", done.sockets.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}
