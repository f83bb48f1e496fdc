//! `nydusctl trace`.

use std::fmt::Write as _;

use serde_json::Value;

use crate::cli::{Trace, TraceAction};
use crate::client::{Client, of_mount};
use nydusd::words::counted;

const DOCUMENT: &str = "/api/v1/trace";
const PUSH: &str = "/api/v1/trace/push";

/// Prints the trace in the form that was asked for.
pub fn run(client: &Client<'_>, show: &Trace) -> anyhow::Result<()> {
    if let Some(TraceAction::Push { id }) = &show.action {
        let answer = client.post(&of_mount(PUSH, id.as_deref()), &Value::Null)?;
        match answer["digest"].as_str() {
            Some(digest) => say!("pushed as {digest}"),
            None => say!("the registry knows as much"),
        }
        return Ok(());
    }
    let id = show.id.as_deref();
    let document = || client.get(&of_mount(DOCUMENT, id));
    let files = || {
        let path = of_mount(DOCUMENT, id);
        let separator = if path.contains('?') { '&' } else { '?' };
        client.get(&format!("{path}{separator}format=optimize"))
    };
    let text = match (show.json, show.optimize) {
        (true, _) => document()?.to_string(),
        (_, true) => files()?.to_string(),
        _ => text(&document()?, &files()?),
    };
    say!("{text}");
    Ok(())
}

/// A trace for people: a line a file, with `first byte+bytes` of each range.
fn text(document: &Value, files: &Value) -> String {
    let runs = || document["order"].as_array().into_iter().flatten();
    let chunks: u64 = runs().filter_map(|run| run[2].as_u64()).sum();
    let files = files["files"].as_array().map_or(&[][..], Vec::as_slice);
    let state = if document["complete"] == true { "ended" } else { "goes on" };
    let mut text = format!(
        "{:<12}{}\n{:<12}{}\n{:<12}{chunks} in {}\n{:<12}{state}\n",
        "Bootstrap:",
        document["bootstrap"].as_str().unwrap_or_default(),
        "Starts:",
        document["starts"],
        "Chunks:",
        counted(files.len() as u64, "file"),
        "Recording:",
    );
    for file in files {
        // Writing to a string does not fail.
        let _ = write!(text, "\n{}", file["path"].as_str().unwrap_or_default().escape_debug());
        for range in file["ranges"].as_array().into_iter().flatten() {
            let _ = write!(text, " {}+{}", range[0], range[1]);
        }
    }
    text
}
