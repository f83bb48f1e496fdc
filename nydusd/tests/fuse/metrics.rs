//! What is counted, in each of the forms it is shown in.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use crate::common::{PROMPT, Site};

const FILE: &str = "files/exact_1m";

fn site(rafs: &str) -> Site {
    let site = Site::new("none-4k/image.boot", &["none-4k/image.blob"]);
    site.configure(rafs);
    site
}

/// Samples by name with labels, and the lines that are neither sample nor comment.
fn samples(text: &str) -> HashMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?} is no sample"));
            (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line:?} has no value")))
        })
        .collect()
}

/// Status line, head and body of a GET over TCP.
fn scrape(address: &str, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PROMPT)).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_ascii_lowercase(), body.to_owned())
}

/// A scraper gets the same counters over TCP and over the API socket, and they are true.
#[test]
fn a_scraper_gets_true_counters() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site("");
    let daemon = site.start(&["--metrics-addr", "127.0.0.1:0"]);
    let line = daemon.wait_for_line("metrics on http://");
    let address = line.split_once("http://").unwrap().1.split_once('/').unwrap().0;
    let bytes = std::fs::read(site.mount().join(FILE)).unwrap().len() as f64;

    let (mut head, mut body) = scrape(address, "GET /metrics");
    // What was guessed is still coming: a chunk is counted in one place after the other.
    for _ in 0..1000 {
        let found = samples(&body);
        let queued = found.get(r#"nydus_fetch_phase_seconds_count{mount="/",phase="queue"}"#).copied();
        let chunks: f64 = found
            .iter()
            .filter(|(name, _)| name.starts_with("nydus_fetched_chunks_total"))
            .map(|(_, v)| v)
            .sum();
        if queued == Some(chunks) {
            break;
        }
        (head, body) = scrape(address, "GET /metrics");
    }
    assert!(head.starts_with("http/1.1 200"), "{head}");
    assert!(
        head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{head}"
    );
    assert!(body.ends_with("# EOF\n"), "{body}");
    let found = samples(&body);
    let mut labelled = found.iter().filter(|(name, _)| {
        !name.contains("memory") && !name.contains("build_info") && !name.contains("inflight")
    });
    assert!(labelled.all(|(name, _)| name.contains("mount=\"/\"")), "{body}");
    let value = |name: &str| *found.get(name).unwrap_or_else(|| panic!("no {name} in\n{body}"));
    let sum =
        |prefix: &str| found.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, v)| v).sum::<f64>();
    assert_eq!(sum("nydus_read_bytes_total"), bytes);
    assert_eq!(sum("nydus_reads_total"), value(r#"nydus_read_duration_seconds_count{mount="/"}"#));
    let misses = value(r#"nydus_reads_total{mount="/",result="miss"}"#);
    assert!(misses > 0.0);
    assert!(value(r#"nydus_read_wait_seconds_count{mount="/"}"#) >= misses);
    assert_eq!(
        value(r#"nydus_read_wait_seconds_bucket{le="+Inf",mount="/"}"#),
        value(r#"nydus_read_wait_seconds_count{mount="/"}"#)
    );
    let local = sum("nydus_fetched_chunk_bytes_total{mount=\"/\",source=\"local\"");
    assert_eq!(local, sum("nydus_fetched_chunk_bytes_total"));
    assert!(local > 0.0);
    assert!(value(r#"nydus_backend_received_bytes_total{mount="/"}"#) >= local);
    assert!(value(r#"nydus_backend_requests_total{mount="/",backend="localfs",result="ok"}"#) >= 1.0);
    let chunks = sum("nydus_fetched_chunks_total");
    assert!(
        value(r#"nydus_chunks{mount="/",state="ready"}"#) <= value(r#"nydus_chunks{mount="/",state="all"}"#)
    );
    for phase in ["queue", "network", "decode"] {
        assert_eq!(
            value(&format!(r#"nydus_fetch_phase_seconds_count{{mount="/",phase="{phase}"}}"#)),
            chunks
        );
    }
    assert!(value(r#"nydus_cpu_seconds_total{mount="/",work="verify"}"#) > 0.0);
    assert!(value(r#"nydus_amplification_ratio{mount="/"}"#) >= 1.0);
    assert!(value(r#"nydus_memory_bytes{kind="anonymous"}"#) > 0.0);

    let (status, again) = daemon.request("GET", "/metrics", "");
    assert_eq!((status, samples(&again).len()), (200, found.len()));
    assert_eq!(daemon.request("PUT", "/metrics", "").0, 400);
    // Nothing else is served to strangers.
    for request in ["GET /api/v1/daemon", "PUT /api/v1/daemon/exit", "POST /metrics", "GET /metrics/"] {
        assert!(scrape(address, request).0.starts_with("http/1.1 404"), "{request}");
    }
}

/// Files are told apart where the configuration asks for it, as the contract has it.
#[test]
fn files_are_counted_when_configured() {
    if !crate::common::can_mount() {
        return;
    }
    let site = site("iostats_files = true\naccess_pattern = true\nlatest_read_files = true");
    let daemon = site.start(&[]);
    let file = site.mount().join("files/one_byte");
    assert_eq!(std::fs::read(&file).unwrap().len(), 1);
    let inode = std::fs::metadata(&file).unwrap().ino();

    let all = daemon.get("/api/v1/metrics");
    for key in ["files_account_enabled", "access_pattern_enabled", "record_latest_read_files_enabled"] {
        assert_eq!(all[key], true, "{key}");
    }
    let files = daemon.get("/api/v1/metrics/files?id=/");
    let one = &files[inode.to_string()];
    assert_eq!(
        (&one["data_read"], &one["block_count_read"][0], &one["fop_hits"][4]),
        (&1.into(), &1.into(), &1.into())
    );
    let hits: u64 = one["fop_hits"].as_array().unwrap().iter().filter_map(|n| n.as_u64()).sum();
    assert_eq!(one["total_fops"], hits);
    assert_eq!(daemon.get("/api/v1/metrics/files?latest=true"), serde_json::json!([[inode]]));
    assert_eq!(daemon.get("/api/v1/metrics/files?latest=true"), serde_json::json!([]));
    let pattern = daemon.get("/api/v1/metrics/pattern?id=/");
    assert_eq!(
        (pattern.as_array().unwrap().len(), &pattern[0]["ino"], &pattern[0]["nr_read"]),
        (1, &inode.into(), &1.into())
    );
    assert!(pattern[0]["first_access_time_secs"].as_u64().unwrap() > 1_700_000_000);
    let (status, body) = daemon.request("GET", "/api/v1/metrics/pattern?id=/nowhere", "");
    assert!(status == 404 && body.contains("Pattern(Metrics(Stats(NoCounter)))"), "{body}");

    for (family, text) in [("cache", "Supplied by"), ("prometheus", "nydus_reads_total")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nydusctl"));
        let output = command.arg("--sock").arg(&daemon.socket).args(["metrics", family]).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains(text), "{family}: {output:?}");
    }
}
