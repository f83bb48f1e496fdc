//! `nydusctl top`: who reads what from where.
//!
//! Each look takes the report of `nydusctl why` and the counters of each mount; what is shown is the
//! difference between two looks, or since the mount in the first one. Reads that waited are known
//! with their process; those that the cache answered at once are only counted, by file.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use nydusd::why::Report;
use nydusd::words::printable;
use serde_json::{Value, json};

use crate::cli::Top;
use crate::client::{Client, encode};
use crate::discover::{self, Found};
use crate::mounts::{self, Mounted, local, source};
use crate::why::{duration, file_name, process_name, size, source_name};

/// Clears a terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Shows the daemons, once or until it is interrupted.
///
/// # Errors
/// None runs, the named one does not answer, or standard output is gone.
pub fn run(named: Option<&Path>, options: &Top, timeout: Duration, raw: bool) -> anyhow::Result<()> {
    let mut before = HashMap::new();
    let mut screen = std::io::stdout();
    let clear = screen.is_terminal() && !options.once && !raw;
    loop {
        let taken = Instant::now();
        let (mut text, mut documents, mut now) = (String::new(), Vec::new(), HashMap::new());
        let daemons = discover::all(named)?;
        let answers = discover::each(&daemons, |daemon| look(daemon, timeout));
        for (daemon, answer) in daemons.iter().zip(answers) {
            // One that is ending is told of, not stumbled over.
            match answer {
                Ok(looks) => {
                    for look in looks {
                        let key = (daemon.pid, look.mountpoint().to_owned());
                        // Writing to a string does not fail.
                        let _ = show(&mut text, daemon, &look, before.get(&key), options.count);
                        documents.push(look.raw(daemon));
                        now.insert(key, look);
                    }
                }
                Err(e) if named.is_some() => return Err(e),
                Err(e) => {
                    let _ = writeln!(text, "nydusd {}: {e:#}\n", daemon.pid);
                }
            }
        }
        before = now;
        match (raw, clear) {
            (true, _) => writeln!(screen, "{}", Value::Array(documents))?,
            (false, true) => write!(screen, "{CLEAR}{text}")?,
            (false, false) => write!(screen, "{text}")?,
        }
        screen.flush()?;
        if options.once {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(options.interval).saturating_sub(taken.elapsed()));
    }
}

/// One mount at one time.
struct Look {
    mount: Mounted,
    counters: Value,
    /// `None`: the daemon records nothing.
    report: Option<Report>,
    taken: Instant,
}

fn look(daemon: &Found, timeout: Duration) -> anyhow::Result<Vec<Look>> {
    let mounted = mounts::ask(daemon, timeout)?;
    let client = Client::new(&daemon.socket, timeout)?;
    let looks = mounted.into_iter().map(|mount| {
        let id = encode(mount.info["mountpoint"].as_str().unwrap_or("/"));
        let taken = Instant::now();
        let report = client.get_any(&format!("/api/v1/why?id={id}"))?;
        Ok(Look {
            counters: client.get_any(&format!("/api/v1/metrics?id={id}"))?.unwrap_or_default(),
            report: report.and_then(|report| serde_json::from_value(report).ok()),
            mount,
            taken,
        })
    });
    looks.collect()
}

impl Look {
    fn mountpoint(&self) -> &str {
        self.mount.info["mountpoint"].as_str().unwrap_or("/")
    }

    fn raw(&self, daemon: &Found) -> Value {
        json!({
            "pid": daemon.pid,
            "socket": daemon.socket.to_string_lossy(),
            "mount": self.mount.info,
            "cache": self.mount.cache,
            "counters": self.counters,
            "why": self.report,
        })
    }

    fn read_bytes(&self) -> u64 {
        self.counters["data_read"].as_u64().unwrap_or(0)
    }

    fn fetched_bytes(&self) -> u64 {
        self.mount.cache.as_ref().and_then(|cache| cache["fetched_bytes"].as_u64()).unwrap_or(0)
    }
}

fn show(
    out: &mut String,
    daemon: &Found,
    now: &Look,
    before: Option<&Look>,
    count: usize,
) -> std::fmt::Result {
    let path = mounts::host_path(daemon, &now.mount.info);
    let (share, chunks) = local(now.mount.cache.as_ref());
    let (path, source) = (printable(&path.to_string_lossy()), printable(&source(&now.mount.info)));
    write!(out, "{path}  nydusd {}  {source}", daemon.pid)?;
    writeln!(out, "  local {share} ({chunks} chunks of {})", mounts::stored(now.mount.cache.as_ref()))?;
    let (read, fetched) = (now.read_bytes(), now.fetched_bytes());
    match before {
        Some(before) => {
            let seconds = now.taken.duration_since(before.taken).as_secs_f64().max(0.001);
            let rate = |now: u64, before: u64| size((now.saturating_sub(before) as f64 / seconds) as u64);
            let read = rate(read, before.read_bytes());
            let fetched = rate(fetched, before.fetched_bytes());
            writeln!(out, "read {read}/s, fetched {fetched}/s")?;
        }
        None => writeln!(out, "read {}, fetched {} since the mount", size(read), size(fetched))?,
    }
    let Some(report) = &now.report else { return writeln!(out, "(no records: `why` is off there)\n") };
    let mut rows = rows(report, before.and_then(|before| before.report.as_ref()));
    rows.sort_by_key(|row| std::cmp::Reverse((row.waited_us, row.bytes)));
    if rows.is_empty() {
        return writeln!(out, "nobody reads\n");
    }
    writeln!(out, "{:<24} {:<9} {:>8} {:>11} {:>10}  FILE", "PROCESS", "FROM", "READS", "BYTES", "WAITED")?;
    for row in rows.iter().take(count) {
        writeln!(
            out,
            "{:<24} {:<9} {:>8} {:>11} {:>10}  {}",
            printable(&row.process),
            row.source,
            row.reads,
            size(row.bytes),
            if row.waited_us == 0 { "-".to_owned() } else { duration(row.waited_us) },
            printable(&row.file)
        )?;
    }
    if let Some(more @ 1..) = rows.len().checked_sub(count) {
        writeln!(out, "and {more} more")?;
    }
    writeln!(out)
}

/// What one process read of one file from one place.
#[derive(Debug, Default, PartialEq, Eq)]
struct Row {
    process: String,
    file: String,
    source: String,
    reads: u64,
    bytes: u64,
    waited_us: u64,
}

/// Who read what between two reports, or since the mount.
fn rows(now: &Report, before: Option<&Report>) -> Vec<Row> {
    let since = before.map_or(0, |before| before.age_us);
    let mut waits: BTreeMap<(String, &str, &str), Row> = BTreeMap::new();
    let mut waited: HashMap<&str, (u64, u64)> = HashMap::new();
    for read in now.reads.iter().filter(|read| before.is_none() || read.at_us + read.took_us >= since) {
        let (file, source) = (file_name(now, read.file), source_name(read));
        let row = waits.entry((process_name(now, read.process), file, source)).or_default();
        row.reads += 1;
        row.bytes += u64::from(read.len);
        row.waited_us += read.took_us;
        let sum = waited.entry(file).or_default();
        *sum = (sum.0 + 1, sum.1 + u64::from(read.len));
    }
    let rows = waits.into_iter().map(|((process, file, source), row)| Row {
        process,
        file: file.to_owned(),
        source: source.to_owned(),
        ..row
    });
    let old: HashMap<&str, (u64, u64)> = before
        .iter()
        .flat_map(|before| &before.files)
        .map(|file| (file.path.as_str(), (file.reads, file.bytes)))
        .collect();
    let hits = now.files.iter().filter_map(|file| {
        let (old_reads, old_bytes) = old.get(file.path.as_str()).copied().unwrap_or_default();
        let (wait_reads, wait_bytes) = waited.get(file.path.as_str()).copied().unwrap_or_default();
        let reads = file.reads.saturating_sub(old_reads).saturating_sub(wait_reads);
        (reads > 0).then(|| Row {
            process: "-".to_owned(),
            file: file.path.clone(),
            source: "cache".to_owned(),
            reads,
            bytes: file.bytes.saturating_sub(old_bytes).saturating_sub(wait_bytes),
            waited_us: 0,
        })
    });
    rows.chain(hits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::why::tests::report;

    #[test]
    fn reads_are_told_by_process_file_and_place() {
        let all = rows(&report(), None);
        let slow: Vec<_> = all.iter().filter(|row| row.file == "/usr/bin/slow").collect();
        let [waited, hit] = &slow[..] else { panic!("{slow:?}") };
        assert_eq!((waited.process.as_str(), waited.source.as_str()), ("python3 [12]", "origin"));
        assert_eq!((waited.reads, waited.waited_us), (2, 30_000));
        // Three reads of the file, two of them waited.
        assert_eq!((hit.process.as_str(), hit.source.as_str(), hit.reads), ("-", "cache", 1));
    }

    #[test]
    fn between_two_looks_only_the_new_counts() {
        let (mut before, mut now) = (report(), report());
        before.age_us = 50_000_000;
        now.files[2].reads += 5;
        now.files[2].bytes += 4096;
        let rows = rows(&now, Some(&before));
        let told: Vec<_> = rows.iter().map(|row| (row.file.as_str(), row.reads, row.bytes)).collect();
        assert_eq!(told, [("/usr/bin/slow", 1, 131_072), ("/never/waited", 5, 4096)]);
    }
}
