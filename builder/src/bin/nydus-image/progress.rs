//! Progress for people: bars on a terminal, one plain line for each finished part otherwise.
//! All of it goes to stderr; stdout is for results.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::time::Instant;

use builder::progress::{Activity, Meter, Observer, Silent};
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

/// Bars or lines, as stderr is.
pub fn observer() -> Box<dyn Observer> {
    if std::io::stderr().is_terminal() { Box::new(Bars(MultiProgress::new())) } else { Box::new(Lines) }
}

fn verb(activity: Activity) -> &'static str {
    match activity {
        Activity::Read => "read",
        Activity::Write => "write",
    }
}

/// One bar a part.
struct Bars(MultiProgress);

impl Observer for Bars {
    fn begin(&self, activity: Activity, name: &str, total: Option<u64>) -> Box<dyn Meter> {
        let (bar, template) = match total {
            Some(total) => {
                (ProgressBar::new(total), "{prefix:5} {wide_msg} {bar:24} {bytes:>10}/{total_bytes:10}")
            }
            None => (ProgressBar::no_length(), "{prefix:5} {wide_msg} {bytes:>10}"),
        };
        let bar = self.0.add(bar);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(verb(activity));
        bar.set_message(name.to_owned());
        Box::new(Bar { bar, name: name.to_owned() })
    }

    fn note(&self, message: &str) {
        // The terminal is gone if this fails; the work goes on.
        let _ = self.0.println(message);
    }
}

struct Bar {
    bar: ProgressBar,
    name: String,
}

impl Meter for Bar {
    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn set(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    fn finish(&self, outcome: &str) {
        if let Some(total) = self.bar.length() {
            self.bar.set_position(total);
        }
        let message =
            if outcome.is_empty() { self.name.clone() } else { format!("{}: {outcome}", self.name) };
        self.bar.finish_with_message(message);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if !self.bar.is_finished() {
            self.bar.abandon();
        }
    }
}

/// One line a finished part, which whoever asks for warnings alone does not want.
struct Lines;

impl Observer for Lines {
    fn begin(&self, activity: Activity, name: &str, total: Option<u64>) -> Box<dyn Meter> {
        if !tracing::enabled!(tracing::Level::INFO) {
            return Box::new(Silent);
        }
        let state = Mutex::new(total.unwrap_or_default());
        Box::new(Line {
            activity,
            name: name.to_owned(),
            known: total.is_some(),
            bytes: state,
            start: Instant::now(),
        })
    }

    fn note(&self, message: &str) {
        say(message);
    }
}

struct Line {
    activity: Activity,
    name: String,
    known: bool,
    /// The total if it is known, else the count so far.
    bytes: Mutex<u64>,
    start: Instant,
}

impl Meter for Line {
    fn advance(&self, bytes: u64) {
        if !self.known {
            *self.bytes.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += bytes;
        }
    }

    fn set(&self, bytes: u64) {
        if !self.known {
            *self.bytes.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bytes;
        }
    }

    fn finish(&self, outcome: &str) {
        let bytes = *self.bytes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let outcome = if outcome.is_empty() { String::new() } else { format!(", {outcome}") };
        say(&format!(
            "{} {}: {} in {:.1} s{outcome}",
            verb(self.activity),
            self.name,
            HumanBytes(bytes),
            self.start.elapsed().as_secs_f64()
        ));
    }
}

fn say(message: &str) {
    // A closed stderr must not end the work.
    let _ = writeln!(std::io::stderr(), "{message}");
}
