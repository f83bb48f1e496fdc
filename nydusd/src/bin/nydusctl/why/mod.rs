//! `nydusctl why`: what readers waited for.

mod html;
mod text;
mod timeline;

use std::io::Write as _;

use anyhow::Context as _;
use nydusd::why::Report;
use nydusd::why::report::{Chunk, Fetch, Outcome, Read};

use crate::cli::Why;
use crate::client::{Client, encode};

/// Asks for the report and shows it as wanted.
pub fn run(client: &Client<'_>, options: &Why, raw: bool) -> anyhow::Result<()> {
    let path = match &options.id {
        Some(id) => format!("/api/v1/why?id={}", encode(id)),
        None => "/api/v1/why".to_owned(),
    };
    let document = client.get(&path)?;
    if raw {
        say!("{document}");
        return Ok(());
    }
    let report: Report = serde_json::from_value(document)
        .context("the daemon's answer is not the report this nydusctl knows; are they of one version?")?;
    if let Some(file) = &options.html {
        let mut page = std::fs::File::create(file).with_context(|| format!("make {}", file.display()))?;
        page.write_all(html::page(&report).as_bytes())
            .with_context(|| format!("write {}", file.display()))?;
        say!("{}", file.display());
    } else if options.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        say!("{}", text::text(&report, options.count).trim_end());
    }
    Ok(())
}

/// Microseconds for people.
pub fn duration(us: u64) -> String {
    let value = us as f64;
    match us {
        0 => "0".to_owned(),
        1..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", value / 1e3),
        1_000_000..100_000_000 => format!("{:.2} s", value / 1e6),
        _ => format!("{:.0} s", value / 1e6),
    }
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{:.0} KiB", bytes as f64 / 1024.0),
        10_485_760..10_737_418_240 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

/// `python3 [123]`.
pub fn process_name(report: &Report, place: usize) -> String {
    match report.processes.get(place) {
        Some(process) if process.name.is_empty() => format!("[{}]", process.pid),
        Some(process) => format!("{} [{}]", process.name, process.pid),
        None => "?".to_owned(),
    }
}

pub fn file_name(report: &Report, place: usize) -> &str {
    report.files.get(place).map_or("?", |file| &file.path)
}

/// `12 of 0a1b2c3d4e5f`.
fn chunk_name(report: &Report, chunk: Chunk) -> String {
    let blob = report.blobs.get(chunk.blob as usize).map_or("?", String::as_str);
    let short: String = blob.chars().take(12).collect();
    format!("{} of {short}", chunk.index)
}

pub fn source_name(read: &Read) -> &str {
    match (read.outcome, &read.source) {
        (Outcome::Failed, _) => "failed",
        (Outcome::Waiting, _) => "still waiting",
        (Outcome::Done, Some(source)) => source,
        (Outcome::Done, None) => "elsewhere",
    }
}

/// When a fetch was over.
fn fetch_end(fetch: &Fetch) -> u64 {
    fetch.at_us + fetch.queue_us + fetch.answer_us + fetch.transfer_us + fetch.decode_us
}

/// What fetching ahead could have saved, in a sentence.
fn saving(report: &Report) -> String {
    let totals = &report.totals;
    match totals.waited {
        0 => "No read waited: fetching ahead could have saved nothing.".to_owned(),
        waited => format!(
            "{waited} of {} reads waited, {} in all; some reader was waiting during {}: that is what fetching ahead \
             could have saved at most.",
            totals.reads.max(waited),
            duration(totals.waited_us),
            duration(totals.blocked_us)
        ),
    }
}

/// Bytes received for one byte that readers asked for.
fn amplification(report: &Report) -> Option<f64> {
    let totals = &report.totals;
    (totals.asked_bytes > 0).then(|| totals.fetched_bytes as f64 / totals.asked_bytes as f64)
}

/// What is missing from the lists, if anything.
fn forgotten(report: &Report) -> Option<String> {
    let (reads, fetches) = (report.dropped_reads, report.dropped_fetches);
    (reads + fetches > 0).then(|| {
        format!("{reads} waits and {fetches} fetches between the start and the last ones were forgotten to save memory.")
    })
}

#[cfg(test)]
pub mod tests;
