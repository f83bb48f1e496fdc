//! `nydusctl metrics`: a family of counters once, or its changes at an interval.

use std::thread::sleep;
use std::time::{Duration, Instant};

use nydusd::metrics::FOP_NAMES;
use serde_json::Value;

use crate::cli::Metrics;
use crate::client::{Client, of_mount};

/// Prints the counters; with an interval, for ever.
pub fn run(client: &Client<'_>, family: &Metrics, raw: bool) -> anyhow::Result<()> {
    let (path, repeat) = match family {
        Metrics::Backend(repeat) => ("/api/v1/metrics/backend", repeat),
        Metrics::Cache(repeat) => ("/api/v1/metrics/blobcache", repeat),
        Metrics::Fsstats(repeat) => ("/api/v1/metrics", repeat),
        Metrics::Prometheus => {
            say!("{}", client.get_text("/metrics")?.trim_end());
            return Ok(());
        }
    };
    let show = |document: &Value| if raw { document.to_string() } else { text(family, document) };
    let path = &of_mount(path, repeat.id.as_deref());
    let mut last = client.get(path)?;
    say!("{}", show(&last));
    let Some(interval) = repeat.interval else { return Ok(()) };
    let mut taken = Instant::now();
    loop {
        sleep(Duration::from_secs(interval));
        let now = client.get(path)?;
        let seconds = taken.elapsed().as_secs_f64();
        taken = Instant::now();
        say!("{}", if raw { now.to_string() } else { change(family, &last, &now, seconds) });
        last = now;
    }
}

fn number(document: &Value, key: &str) -> u64 {
    document[key].as_u64().unwrap_or(0)
}

fn text(family: &Metrics, document: &Value) -> String {
    let counters = |keys: &[(&str, &str)]| -> Vec<String> {
        keys.iter().map(|(label, key)| format!("{label:<26}{}", document[key])).collect()
    };
    let lines = match family {
        Metrics::Backend(_) => counters(&[
            ("Backend type:", "backend_type"),
            ("Requests:", "read_count"),
            ("Failed requests:", "read_errors"),
            ("Repeated requests:", "read_retries"),
            ("Bytes received:", "read_amount_total"),
            ("Time in requests, ms:", "read_cumulative_latency_millis_total"),
        ]),
        Metrics::Prometheus => Vec::new(),
        Metrics::Cache(_) => [
            counters(&[
                ("Directory:", "store_path"),
                ("Reads:", "total"),
                ("  from the cache:", "whole_hits"),
                ("  partly from the cache:", "partial_hits"),
                ("  failed:", "read_errors"),
                ("Chunks ready:", "entries_count"),
                ("  of:", "chunks_total"),
                ("Chunks fetched:", "fetched_chunks"),
                ("Bytes fetched:", "fetched_bytes"),
                ("  of:", "compressed_bytes_total"),
                ("Chunks of other caches:", "deduplicated_chunks"),
                ("  bytes not fetched:", "deduplicated_bytes"),
                ("Corrupt units:", "verification_failures"),
                ("Failed cache writes:", "write_errors"),
            ]),
            fetches(document),
        ]
        .concat(),
        Metrics::Fsstats(_) => {
            let mut lines = counters(&[("Mountpoint:", "id"), ("Bytes read:", "data_read")]);
            lines.push(format!("{:<26}{:>12}{:>10}{:>14}", "Operation", "done", "failed", "mean us"));
            for (at, name) in FOP_NAMES.iter().enumerate() {
                let cell = |key: &str| document[key][at].as_u64().unwrap_or(0);
                let (done, failed) = (cell("fop_hits"), cell("fop_errors"));
                if done + failed > 0 {
                    let mean = cell("fop_cumulative_latency_total") as f64 / (done + failed) as f64;
                    lines.push(format!("{name:<26}{done:>12}{failed:>10}{mean:>14.1}"));
                }
            }
            lines
        }
    };
    lines.join("\n")
}

/// Where bytes came from, and where their time went.
fn fetches(document: &Value) -> Vec<String> {
    let fetches = &document["fetches"];
    let seconds = |key: &str| fetches[key].as_f64().unwrap_or(0.0);
    let mut lines = vec![format!("{:<26}{:>10}{:>12}{:>16}", "Supplied by", "for", "chunks", "bytes")];
    for row in fetches["supplied"].as_array().into_iter().flatten() {
        let word = |key: &str| row[key].as_str().unwrap_or_default();
        lines.push(format!(
            "{:<26}{:>10}{:>12}{:>16}",
            word("source"),
            word("purpose"),
            number(row, "chunks"),
            number(row, "bytes")
        ));
    }
    let asked = number(document, "asked_bytes");
    let amplification = number(document, "fetched_bytes") as f64 / asked as f64;
    if asked > 0 {
        lines.push(format!("{:<26}{amplification:.2}", "Fetched per byte asked:"));
    }
    let chunks: u64 = number(document, "fetched_chunks");
    if chunks > 0 {
        for (label, key) in [
            ("Mean wait in queue, ms:", "queue_seconds"),
            ("Mean network time, ms:", "network_seconds"),
            ("Mean decode time, ms:", "decode_seconds"),
        ] {
            lines.push(format!("{label:<26}{:.1}", seconds(key) * 1e3 / chunks as f64));
        }
    }
    for (label, key) in [("CPU for digests, s:", "verify_cpu_ns"), ("CPU for decoding, s:", "decode_cpu_ns")]
    {
        lines.push(format!("{label:<26}{:.3}", number(document, key) as f64 / 1e9));
    }
    for (kind, bytes) in document["memory"].as_object().into_iter().flatten() {
        lines.push(format!(
            "{:<26}{:.1}",
            format!("Memory, {kind}, MiB:"),
            bytes.as_f64().unwrap_or(0.0) / 1048576.0
        ));
    }
    lines
}

/// One line: what happened in `seconds` between two documents.
fn change(family: &Metrics, before: &Value, after: &Value, seconds: f64) -> String {
    let delta = |key: &str| number(after, key).saturating_sub(number(before, key)) as f64;
    let kib = |bytes: f64| bytes / 1024.0 / seconds;
    match family {
        Metrics::Backend(_) => {
            let requests = delta("read_count");
            let latency =
                if requests > 0.0 { delta("read_cumulative_latency_millis_total") / requests } else { 0.0 };
            format!(
                "{:.1} KiB/s, {:.1} requests/s, {latency:.1} ms mean",
                kib(delta("read_amount_total")),
                requests / seconds
            )
        }
        Metrics::Prometheus => String::new(),
        Metrics::Cache(_) => format!(
            "{:.1} reads/s, {:.1} from the cache, {:.1} KiB/s fetched, {} chunks fetched",
            delta("total") / seconds,
            delta("whole_hits") / seconds,
            kib(delta("fetched_bytes")),
            delta("fetched_chunks")
        ),
        Metrics::Fsstats(_) => {
            let count = |document: &Value| {
                document["fop_hits"].as_array().into_iter().flatten().filter_map(Value::as_u64).sum::<u64>()
            };
            let operations = count(after).saturating_sub(count(before)) as f64;
            format!("{:.1} KiB/s read, {:.1} operations/s", kib(delta("data_read")), operations / seconds)
        }
    }
}
