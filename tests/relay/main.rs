//! `link-relay`: a link with latency and a bandwidth between a client and a server on loopback.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use tests::link::{Link, LinkOptions};
use tests::{Context, Result, ensure};

/// Passes TCP connections on to a server as a link of the given latency and bandwidth would.
///
/// Prints its address, and with --control a second one where HTTP GET answers counters as JSON:
/// connections, HTTP requests, bytes up and down. Ends when its standard input ends.
#[derive(Debug, Parser)]
struct Cli {
    /// Where to listen; port 0 is any free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The server
    #[arg(long)]
    upstream: SocketAddr,
    /// Round trip in milliseconds
    #[arg(long, default_value_t = 0.0)]
    delay: f64,
    /// Bandwidth towards the clients in Mbit/s, of all connections together
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    /// Where to serve the counters
    #[arg(long)]
    control: Option<SocketAddr>,
    /// File that gets a line for every request
    #[arg(long)]
    log: Option<PathBuf>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let rate = cli.rate * 1e6 / 8.0;
    ensure!(rate.is_finite() && rate >= 1.0, "--rate {}: want Mbit/s above 0", cli.rate);
    let round_trip = Duration::try_from_secs_f64(cli.delay / 1e3).context("--delay: want milliseconds")?;
    // Checked above: positive and finite; a larger one than u64 holds is cut to it.
    let options = LinkOptions { round_trip, rate: rate as u64 };
    let link = Link::start(cli.listen, cli.upstream, options).context("listen")?;
    if let Some(path) = &cli.log {
        link.log_to(std::fs::File::create(path).with_context(|| path.display().to_string())?);
    }
    let mut out = std::io::stdout();
    writeln!(out, "{}", link.address())?;
    if let Some(listen) = cli.control {
        writeln!(out, "{}", link.serve_counters(listen).context("listen for --control")?)?;
    }
    out.flush()?;
    // Whoever started it holds the other end, and is gone when this ends.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}
