//! The report for a terminal.

use std::fmt::Write as _;

use nydusd::why::Report;
use nydusd::why::report::Waits;
use nydusd::words::counted;

use super::{
    amplification, chunk_name, duration, file_name, forgotten, process_name, saving, size, source_name,
};

/// The report, with at most `count` rows a table.
pub fn text(report: &Report, count: usize) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = write(&mut out, report, count);
    out
}

fn write(out: &mut String, report: &Report, count: usize) -> std::fmt::Result {
    let (image, totals) = (&report.image, &report.totals);
    writeln!(out, "{}: {}", report.mountpoint, report.verdict.text)?;
    writeln!(
        out,
        "Image of {} in {}, {} of them in the cache now, {} when it was mounted {} ago.",
        size(image.bytes),
        counted(image.chunks, "chunk"),
        image.ready_chunks,
        image.cached_chunks,
        duration(report.age_us)
    )?;
    write!(out, "Fetched {} in {}", size(totals.fetched_bytes), counted(totals.requests, "request"))?;
    if let Some(factor) = amplification(report) {
        write!(out, ", x{factor:.2} of the {} that readers asked for", size(totals.asked_bytes))?;
    }
    for (at, supplied) in report.supplied.iter().enumerate() {
        let separator = if at == 0 { ": " } else { ", " };
        write!(out, "{separator}{} from {} on {}", size(supplied.bytes), supplied.source, supplied.purpose)?;
    }
    writeln!(out, ".\n{}", saving(report))?;
    if let Some(forgotten) = forgotten(report) {
        writeln!(out, "{forgotten}")?;
    }
    if totals.waited_us > 0 {
        writeln!(out, "Waits by phase: {}.", shares(&report.waits))?;
    }
    reads(out, report, count)?;
    files(out, report, count)
}

/// `queue 3 %, network 90 %, …`
fn shares(waits: &Waits) -> String {
    let sum: u64 = waits.parts().iter().map(|(_, us)| us).sum();
    let shares =
        waits.parts().map(|(name, us)| format!("{name} {:.0} %", us as f64 * 100.0 / sum.max(1) as f64));
    shares.join(", ")
}

fn reads(out: &mut String, report: &Report, count: usize) -> std::fmt::Result {
    if report.reads.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nLongest waits (`at` counts from the mount)")?;
    writeln!(
        out,
        "{:>9} {:>9} {:>9} {:>9} {:>9} {:>9}  {:>9}  {:<22} {:<13} FILE",
        "WAITED", "QUEUE", "NETWORK", "DECODE", "DISK", "OTHER", "AT", "PROCESS", "FROM"
    )?;
    for read in report.reads.iter().take(count) {
        write!(out, "{:>9}", duration(read.took_us))?;
        for (_, us) in read.waits.parts() {
            write!(out, " {:>9}", if us == 0 { "-".to_owned() } else { duration(us) })?;
        }
        write!(
            out,
            "  {:>9}  {:<22} {:<13} {}, {} at {}",
            duration(read.at_us),
            process_name(report, read.process),
            source_name(read),
            file_name(report, read.file),
            size(read.len.into()),
            read.offset
        )?;
        match read.chunk {
            Some(chunk) => writeln!(out, ", chunk {}", chunk_name(report, chunk))?,
            None => writeln!(out)?,
        }
    }
    rest(out, report.reads.len(), count)
}

fn files(out: &mut String, report: &Report, count: usize) -> std::fmt::Result {
    let waited: Vec<_> = report.files.iter().filter(|file| file.waited > 0).collect();
    if waited.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nFiles that were waited for, and what fetching them ahead could have saved at most")?;
    writeln!(out, "{:>9} {:>9} {:>7} {:>7}  FILE", "SAVED", "WAITED", "WAITS", "READS")?;
    for file in waited.iter().take(count) {
        writeln!(
            out,
            "{:>9} {:>9} {:>7} {:>7}  {}",
            duration(file.blocked_us),
            duration(file.waited_us),
            file.waited,
            file.reads,
            file.path
        )?;
    }
    rest(out, waited.len(), count)
}

fn rest(out: &mut String, all: usize, shown: usize) -> std::fmt::Result {
    match all.saturating_sub(shown) {
        0 => Ok(()),
        more => writeln!(out, "(and {more} more; --count shows them)"),
    }
}
