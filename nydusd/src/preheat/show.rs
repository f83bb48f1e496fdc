//! Progress for people: a bar on a terminal, a line now and then otherwise. On standard error;
//! standard output is for results.

use crate::words::counted;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::Value;

/// Between two lines while nobody watches.
const QUIET: Duration = Duration::from_secs(5);

/// How often to look again.
pub const TICK: Duration = Duration::from_millis(100);

/// The progress of one job.
#[derive(Debug)]
pub struct Show {
    bar: Option<ProgressBar>,
    last: Instant,
}

impl Default for Show {
    fn default() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::no_length();
            if let Ok(style) = ProgressStyle::with_template("prefetch {wide_bar} {pos}/{len} chunks {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self { bar, last: Instant::now() }
    }
}

impl Show {
    /// Shows a job's report, as the API has it.
    pub fn update(&mut self, report: &Value) {
        if let Some(bar) = &self.bar {
            if let Some(total) = report["total_chunks"].as_u64() {
                bar.set_length(total);
            }
            bar.set_position(number(report, "chunks"));
            bar.set_message(HumanBytes(number(report, "bytes")).to_string());
        } else if self.last.elapsed() >= QUIET {
            self.last = Instant::now();
            // A closed standard error must not end the work.
            let _ = writeln!(std::io::stderr(), "{}", text(report));
        }
    }

    /// Takes the bar away.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A job's report in one line, and its troubles in further ones.
pub fn text(report: &Value) -> String {
    let mut text = format!(
        "prefetch {} ({}) {}: {} of {}, {} there before, {} fetched in {:.1} s",
        report["id"],
        report["what"].as_str().unwrap_or_default(),
        report["state"].as_str().unwrap_or_default(),
        report["chunks"],
        report["total_chunks"]
            .as_u64()
            .map_or_else(|| "? chunks".to_owned(), |total| counted(total, "chunk")),
        report["present_chunks"],
        HumanBytes(number(report, "bytes")),
        report["seconds"].as_f64().unwrap_or_default(),
    );
    let failed = number(report, "failed_chunks");
    if failed > 0 {
        let first = report["error"].as_str().unwrap_or("unknown");
        text.push_str(&format!("\n  {} could not be had; the first: {first}", counted(failed, "chunk")));
    }
    let missing = number(report, "missing_files");
    if missing > 0 {
        text.push_str(&format!("\n  not in the image, {}:", counted(missing, "file")));
        let named = report["missing"].as_array().into_iter().flatten().filter_map(Value::as_str);
        named.for_each(|path| text.push_str(&format!("\n    {}", path.escape_debug())));
    }
    text
}

fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_default()
}
