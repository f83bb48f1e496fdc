//! `nydusctl mounts`: what is mounted, from where, and how much of it is local.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use nydusd::words::printable;

use crate::client::{Client, encode};
use crate::discover::{self, Found};
use crate::why::size;

/// Prints a line a mount, of every daemon in `found`.
///
/// # Errors
/// None of the daemons answers.
pub fn run(found: &[Found], timeout: Duration, raw: bool) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    let mut failed = None;
    for (daemon, answer) in found.iter().zip(discover::each(found, |daemon| ask(daemon, timeout))) {
        match answer {
            Ok(mounts) => rows.extend(mounts.into_iter().map(|mount| (daemon, mount))),
            Err(e) => {
                eprintln!("nydusctl: nydusd {} at {}: {e:#}", daemon.pid, daemon.socket.display());
                failed = Some(e);
            }
        }
    }
    if let (Some(e), true) = (failed, rows.is_empty()) {
        return Err(e);
    }
    if raw {
        let rows = rows.iter().map(|(daemon, mount)| {
            json!({
                "pid": daemon.pid,
                "socket": daemon.socket.to_string_lossy(),
                "path": host_path(daemon, &mount.info).to_string_lossy(),
                "mount": mount.info,
                "cache": mount.cache,
            })
        });
        say!("{}", rows.collect::<Value>());
        return Ok(());
    }
    say!("{:<8} {:<32} {:<9} {:>6} {:>20}  FROM", "PID", "MOUNT", "TYPE", "LOCAL", "CHUNKS");
    for (daemon, mount) in rows {
        let (local, chunks) = local(mount.cache.as_ref());
        say!(
            "{:<8} {:<32} {:<9} {local:>6} {chunks:>20}  {}",
            daemon.pid,
            printable(&host_path(daemon, &mount.info).to_string_lossy()),
            kind(&mount.info),
            printable(&source(&mount.info))
        );
    }
    Ok(())
}

/// One mount of a daemon.
pub struct Mounted {
    /// Its member of the daemon's `backend_collection`.
    pub info: Value,
    /// Its cache counters; `None` where nothing is cached.
    pub cache: Option<Value>,
}

/// The mounts of a daemon, in order of their places.
///
/// # Errors
/// It does not answer, or no more.
pub fn ask(daemon: &Found, timeout: Duration) -> anyhow::Result<Vec<Mounted>> {
    let client = Client::new(&daemon.socket, timeout)?;
    let info = client.get("/api/v1/daemon")?;
    let mounts = info["backend_collection"].as_object().into_iter().flatten();
    let mounted = mounts.map(|(mountpoint, info)| {
        let cache = client.get_any(&format!("/api/v1/metrics/blobcache?id={}", encode(mountpoint)))?;
        Ok(Mounted { info: info.clone(), cache })
    });
    mounted.collect()
}

/// Where a mount is on this host; seen from the daemon's root if that is not known.
pub fn host_path(daemon: &Found, info: &Value) -> std::path::PathBuf {
    let inside = Path::new(info["mountpoint"].as_str().unwrap_or("/"));
    match (&daemon.mountpoint, inside.strip_prefix("/")) {
        (Some(host), Ok(rest)) if rest.as_os_str().is_empty() => host.clone(),
        (Some(host), Ok(rest)) => host.join(rest),
        _ => inside.to_owned(),
    }
}

fn kind(info: &Value) -> &str {
    match info["backend_type"].as_str() {
        Some("Rafs") => "image",
        Some("PassthroughFs") => "directory",
        _ => "-",
    }
}

/// How much of an image is local: per cent of its chunks, and their numbers.
pub fn local(cache: Option<&Value>) -> (String, String) {
    let number = |key: &str| cache.and_then(|cache| cache[key].as_u64());
    match (number("entries_count"), number("chunks_total")) {
        (Some(ready), Some(all)) if all > 0 => {
            // Rounded down: 100 % says that nothing is missing.
            (format!("{} %", ready.saturating_mul(100) / all), format!("{ready} of {all}"))
        }
        (Some(_), Some(_)) => ("100 %".to_owned(), "0".to_owned()),
        _ => ("-".to_owned(), "-".to_owned()),
    }
}

/// Where the data of a mount comes from, in a few words.
pub fn source(info: &Value) -> String {
    let backend = &info["config"]["backend"];
    let Some(kind) = backend["type"].as_str() else {
        return info["source"].as_str().unwrap_or("-").to_owned();
    };
    let fields = &backend[kind];
    let text = |key: &str| fields[key].as_str().unwrap_or_default();
    let place = match kind {
        "registry" => format!("{}/{}", text("host"), text("repo")),
        "s3" | "oss" => format!("{}/{}/{}", text("endpoint"), text("bucket_name"), text("object_prefix")),
        "http-proxy" => format!("{}/{}", text("addr"), text("path")),
        _ => ["dir", "blob_file", "device_path", "path"]
            .into_iter()
            .map(text)
            .find(|value| !value.is_empty())
            .unwrap_or_default()
            .to_owned(),
    };
    format!("{kind} {}", place.trim_end_matches('/'))
}

/// Bytes stored of an image, for people.
pub fn stored(cache: Option<&Value>) -> String {
    cache.and_then(|cache| cache["compressed_bytes_total"].as_u64()).map_or_else(String::new, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_told_in_a_few_words() {
        for (backend, words) in [
            (json!({"type": "registry", "registry": {"host": "h:5", "repo": "a/b"}}), "registry h:5/a/b"),
            (json!({"type": "localfs", "localfs": {"dir": "/d", "blob_file": null}}), "localfs /d"),
            (json!({"type": "localfs", "localfs": {"dir": null, "blob_file": "/f"}}), "localfs /f"),
            (
                json!({"type": "s3", "s3": {"endpoint": "e", "bucket_name": "b", "object_prefix": ""}}),
                "s3 e/b",
            ),
            (json!({"type": "oci-layout", "oci-layout": {"path": "/l"}}), "oci-layout /l"),
            (
                json!({"type": "http-proxy", "http-proxy": {"addr": "http://a", "path": "p"}}),
                "http-proxy http://a/p",
            ),
            (Value::Null, "-"),
        ] {
            assert_eq!(source(&json!({ "config": { "backend": backend } })), words);
        }
        assert_eq!(source(&json!({ "source": "/host", "config": null })), "/host");
    }

    #[test]
    fn all_of_it_is_local_only_when_nothing_is_missing() {
        let of =
            |ready: u64, all: u64| local(Some(&json!({ "entries_count": ready, "chunks_total": all }))).0;
        assert_eq!([of(999, 1000), of(1000, 1000), of(0, 3), of(0, 0)], ["99 %", "100 %", "0 %", "100 %"]);
        assert_eq!(local(None).0, "-");
    }
}
