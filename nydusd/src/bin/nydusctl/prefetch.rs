//! `nydusctl prefetch`: has the daemon fetch ahead, and waits if told to.

use anyhow::{Context as _, bail};
use nydusd::cli::Part;
use nydusd::preheat::show::{Show, TICK, text};
use serde_json::json;

use crate::cli::Prefetch;
use crate::client::Client;

const PATH: &str = "/api/v1/prefetch";

/// Starts a prefetch and prints its id; with `--wait`, its end.
pub fn run(client: &Client<'_>, prefetch: &Prefetch, raw: bool) -> anyhow::Result<()> {
    let what = &prefetch.what;
    let mut body = match what.part.load()? {
        Part::All => json!({ "all": true }),
        Part::Files(paths) => {
            let paths: Result<Vec<_>, _> = paths.into_iter().map(String::from_utf8).collect();
            // JSON can not say other names; `nydusd prefetch` reads them.
            json!({ "files": paths.context("the API takes paths in UTF-8 only; name their directory")? })
        }
        Part::Trace(document) => json!({ "trace": document }),
    };
    if let Some(mountpoint) = &prefetch.mountpoint {
        body["mountpoint"] = json!(mountpoint);
    }
    if let Some(bandwidth) = what.bandwidth {
        body["bandwidth"] = json!(bandwidth);
    }
    let started = client.post(PATH, &body)?;
    let id = started["id"].as_u64().context("the daemon names no id")?;
    if !prefetch.wait {
        say!("{}", if raw { started.to_string() } else { format!("prefetch {id} has begun") });
        return Ok(());
    }
    let mut show = Show::default();
    let report = loop {
        let report = client.get(&format!("{PATH}?id={id}"))?;
        show.update(&report);
        if report["finished"] == true {
            break report;
        }
        std::thread::sleep(TICK);
    };
    show.end();
    let shown = if raw { report.to_string() } else { text(&report) };
    if report["state"] != "done" {
        bail!("{shown}");
    }
    say!("{shown}");
    Ok(())
}
