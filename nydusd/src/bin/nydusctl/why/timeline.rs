//! The drawn timeline: a lane a process with its waits, a lane a supplier with its requests, each
//! a strip of the chunks that it brought.
//!
//! Long silences are squeezed, so that a start of a second shows although the daemon has run
//! for days.

use std::collections::BTreeMap;

use nydusd::why::Report;
use nydusd::why::report::{Fetch, Outcome, Read};

use super::html::escape;
use super::{chunk_name, duration, fetch_end, file_name, process_name, size, source_name};

/// Class and meaning of the phases of a wait, in the order of `Waits::parts`.
pub const PHASES: [(&str, &str); 5] = [
    ("queue", "before the request went out"),
    ("network", "request to last byte (pale: to first byte)"),
    ("decode", "decoding and verifying"),
    ("disk", "the cache's disk"),
    ("other", "not known, mostly another process fetching"),
];

/// Bars of each kind; the longest are drawn.
const MAX_BARS: usize = 4000;

/// Rows that a lane may have; what does not fit is drawn over the last.
const MAX_ROWS: usize = 24;

/// Pixels.
const LABELS: f64 = 190.0;
const TOP: f64 = 26.0;
const ROW: f64 = 15.0;
const BAR: f64 = 11.0;
const BREAK: f64 = 26.0;
const NARROWEST: f64 = 1.5;

/// Moments of one request that differ by no more were one, before they were rounded.
const ROUNDING: u64 = 2;

/// Silences longer than this, in microseconds, are squeezed.
const SILENCE: u64 = 400_000;

/// One bar.
struct Bar {
    /// `read` or `fetch`, with what else is to be seen of it.
    class: String,
    from: u64,
    to: u64,
    /// Class and end of each phase; the first begins with the bar.
    parts: Vec<(&'static str, u64)>,
    /// What hovering tells.
    about: String,
}

/// Bars in one row: one read, or the chunks of one request.
type Strip = Vec<Bar>;

fn span(strip: &Strip) -> (u64, u64) {
    let from = strip.iter().map(|bar| bar.from).min().unwrap_or(0);
    (from, strip.iter().map(|bar| bar.to).max().unwrap_or(from))
}

/// The drawing.
pub fn draw(report: &Report) -> String {
    let lanes = lanes(report);
    let spans: Vec<_> = lanes.iter().flat_map(|(_, strips)| strips.iter().map(span)).collect();
    if spans.is_empty() {
        return "<h2>Timeline</h2><p>Nothing was waited for, and nothing fetched.</p>".to_owned();
    }
    let axis = Axis::new(spans);
    let (mut backs, mut drawn) = (String::new(), String::new());
    let mut y = TOP;
    for (name, strips) in &lanes {
        let rows = pack(strips);
        let height = rows.iter().max().map_or(1, |row| row + 1) as f64 * ROW + 6.0;
        backs += &format!(
            "<rect class=\"lane\" x=\"0\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>\
             <text x=\"8\" y=\"{:.1}\">{}</text>\n",
            axis.width(),
            height - 2.0,
            y + 14.0,
            escape(name)
        );
        for (strip, row) in strips.iter().zip(rows) {
            strip.iter().for_each(|bar| drawn += &draw_bar(bar, &axis, y + 3.0 + row as f64 * ROW));
        }
        y += height;
    }
    let reads = report.reads.len().saturating_sub(MAX_BARS);
    let fetches = report.fetches.len().saturating_sub(MAX_BARS);
    let left_out = match reads + fetches {
        0 => String::new(),
        _ => format!(
            "<p class=\"more\">{reads} shorter waits and {fetches} shorter fetches are not drawn.</p>"
        ),
    };
    format!(
        "<h2>Timeline, from the mount on</h2><div class=\"scroll\"><svg class=\"timeline\" width=\"{width:.0}\" \
         height=\"{y:.0}\" viewBox=\"0 0 {width:.0} {y:.0}\">{backs}{grid}\n{drawn}</svg></div>{left_out}",
        width = axis.width(),
        grid = axis.grid(y),
    )
}

/// A name and strips for each process in the order of their first waits, then for each supplier.
fn lanes(report: &Report) -> Vec<(String, Vec<Strip>)> {
    let mut by_process: BTreeMap<usize, Vec<Strip>> = BTreeMap::new();
    for (rank, read) in report.reads.iter().take(MAX_BARS).enumerate() {
        by_process.entry(read.process).or_default().push(vec![read_bar(report, read, rank == 0)]);
    }
    let mut lanes: Vec<_> =
        by_process.into_iter().map(|(place, strips)| (process_name(report, place), strips)).collect();
    lanes.sort_by_key(|(_, strips)| strips.iter().map(span).min());

    let mut fetches: Vec<_> = report.fetches.iter().collect();
    fetches.sort_by_key(|fetch| std::cmp::Reverse(fetch_end(fetch) - fetch.at_us));
    fetches.truncate(MAX_BARS);
    fetches.sort_by_key(|fetch| (&fetch.source, sent(fetch), received(fetch)));
    let together = |a: &&Fetch, b: &&Fetch| {
        a.source == b.source
            && sent(b) - sent(a) <= ROUNDING
            && (sent(a) + a.answer_us).abs_diff(sent(b) + b.answer_us) <= ROUNDING
    };
    let mut by_source: BTreeMap<String, Vec<Strip>> = BTreeMap::new();
    for request in fetches.chunk_by(together) {
        let source = request[0].source.as_deref().unwrap_or("nobody");
        by_source.entry(format!("fetched from {source}")).or_default().push(request_strip(report, request));
    }
    lanes.extend(by_source);
    lanes.iter_mut().for_each(|(_, strips)| strips.sort_by_key(span));
    lanes
}

/// When the request for a chunk went out.
fn sent(fetch: &Fetch) -> u64 {
    fetch.at_us + fetch.queue_us
}

/// When its last byte came.
fn received(fetch: &Fetch) -> u64 {
    sent(fetch) + fetch.answer_us + fetch.transfer_us
}

/// The chunks of one request, in the order they came: the first bar has the wait for the first
/// byte, each other one begins when the one before had come.
fn request_strip(report: &Report, request: &[&Fetch]) -> Strip {
    let mut begin = None;
    request
        .iter()
        .map(|fetch| {
            let answered = sent(fetch) + fetch.answer_us;
            let (from, mut parts) = match begin {
                None => (fetch.at_us, vec![("queue", sent(fetch)), ("answer", answered)]),
                Some(before) => (before, Vec::new()),
            };
            begin = Some(received(fetch));
            parts.extend([("network", received(fetch)), ("decode", fetch_end(fetch))]);
            fetch_bar(report, fetch, from, parts)
        })
        .collect()
}

fn fetch_bar(report: &Report, fetch: &Fetch, from: u64, parts: Vec<(&'static str, u64)>) -> Bar {
    let failed = if fetch.failed { " failed" } else { "" };
    let (word, ahead) = if fetch.demanded { ("asked for", "") } else { ("fetched ahead", " ahead") };
    let source = fetch.source.as_deref().unwrap_or("nobody");
    let file = fetch.file.map_or_else(String::new, |file| format!(" for {}", file_name(report, file)));
    let about = format!(
        "chunk {}, {}{file}\n{word} at {}, from {source}\nqueue {}, first byte {}, rest {}, decode {}",
        chunk_name(report, fetch.chunk),
        size(fetch.bytes),
        duration(fetch.at_us),
        duration(fetch.queue_us),
        duration(fetch.answer_us),
        duration(fetch.transfer_us),
        duration(fetch.decode_us)
    );
    Bar { class: format!("fetch{ahead}{failed}"), from, to: fetch_end(fetch), parts, about }
}

fn read_bar(report: &Report, read: &Read, longest: bool) -> Bar {
    let parts = read.waits.parts();
    let phases: Vec<String> = parts
        .iter()
        .filter(|(_, us)| *us > 0)
        .map(|(name, us)| format!("{name} {}", duration(*us)))
        .collect();
    let chunk = read.chunk.map_or_else(String::new, |chunk| format!(", chunk {}", chunk_name(report, chunk)));
    let about = format!(
        "{} read {} of {} at {}\nwaited {} from {} on: {}\n{}{chunk}",
        process_name(report, read.process),
        size(read.len.into()),
        file_name(report, read.file),
        read.offset,
        duration(read.took_us),
        duration(read.at_us),
        phases.join(", "),
        source_name(read),
    );
    let failed = if read.outcome == Outcome::Done { "" } else { " failed" };
    Bar {
        class: format!("read{}{failed}", if longest { " longest" } else { "" }),
        from: read.at_us,
        to: read.at_us + read.took_us,
        parts: PHASES
            .iter()
            .zip(parts)
            .scan(read.at_us, |at, ((class, _), (_, us))| {
                *at += us;
                Some((*class, *at))
            })
            .collect(),
        about,
    }
}

/// A row for each strip, so that strips of a row do not overlap while there are rows.
fn pack(strips: &[Strip]) -> Vec<usize> {
    let mut ends: Vec<u64> = Vec::new();
    strips
        .iter()
        .map(span)
        .map(|(from, to)| match ends.iter().position(|end| *end <= from) {
            Some(row) => {
                ends[row] = to;
                row
            }
            None if ends.len() < MAX_ROWS => {
                ends.push(to);
                ends.len() - 1
            }
            None => MAX_ROWS - 1,
        })
        .collect()
}

fn draw_bar(bar: &Bar, axis: &Axis, y: f64) -> String {
    let x = axis.x(bar.from);
    let width = (axis.x(bar.to) - x).max(NARROWEST);
    let mut drawn = format!("<g class=\"{}\"><title>{}</title>", bar.class, escape(&bar.about));
    let mut at = x;
    for (class, end) in &bar.parts {
        let part = axis.x(*end) - at;
        // The next chunk of a request may come while this one is decoded.
        let (top, height) = if *class == "decode" && bar.class.starts_with("fetch") {
            (y + BAR / 2.0, BAR / 2.0)
        } else {
            (y, BAR)
        };
        if part > 0.05 {
            drawn += &format!(
                "<rect class=\"{class}\" x=\"{at:.1}\" y=\"{top:.1}\" width=\"{part:.1}\" height=\"{height:.1}\"/>"
            );
            at += part;
        }
    }
    // What hovering finds, however short the bar is.
    drawn += &format!(
        "<rect class=\"area\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\"/></g>\n"
    );
    drawn
}

/// From microseconds to pixels, silences squeezed.
struct Axis {
    /// Busy spans with the pixel of their first moment, in order.
    spans: Vec<(u64, u64, f64)>,
    /// Pixels a microsecond.
    scale: f64,
}

impl Axis {
    fn new(mut all: Vec<(u64, u64)>) -> Self {
        let wanted = (all.len() as f64 * 8.0).clamp(1080.0, 6000.0);
        all.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (from, to) in all {
            match merged.last_mut() {
                Some(last) if from <= last.1.saturating_add(SILENCE) => last.1 = last.1.max(to),
                _ => merged.push((from, to)),
            }
        }
        let busy: u64 = merged.iter().map(|(from, to)| to - from).sum();
        let scale = wanted / busy.max(1) as f64;
        let mut x = LABELS;
        let spans = merged
            .into_iter()
            .map(|(from, to)| {
                let at = x;
                x += (to - from) as f64 * scale + BREAK;
                (from, to, at)
            })
            .collect();
        Self { spans, scale }
    }

    fn x(&self, us: u64) -> f64 {
        let place = self.spans.partition_point(|(from, _, _)| *from <= us).saturating_sub(1);
        let Some((from, to, at)) = self.spans.get(place) else { return LABELS };
        at + us.clamp(*from, *to).saturating_sub(*from) as f64 * self.scale
    }

    fn width(&self) -> f64 {
        self.spans.last().map_or(LABELS, |(from, to, at)| at + (to - from) as f64 * self.scale) + BREAK
    }

    /// Ticks with their times, and the squeezed silences.
    fn grid(&self, height: f64) -> String {
        let mut drawn = String::new();
        let step = nice((110.0 / self.scale).max(1.0));
        for (place, (from, to, at)) in self.spans.iter().enumerate() {
            if place > 0 {
                let silence = from - self.spans[place - 1].1;
                drawn += &format!(
                    "<rect class=\"break\" x=\"{:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\">\
                     <title>{} of silence</title></rect>",
                    at - BREAK + 3.0,
                    BREAK - 6.0,
                    height - TOP,
                    duration(silence)
                );
            }
            let mut ticks: Vec<u64> = (from.div_ceil(step)..=to / step).map(|n| n * step).collect();
            if ticks.is_empty() {
                ticks.push(*from);
            }
            for tick in ticks {
                let x = self.x(tick);
                drawn += &format!(
                    "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{height:.1}\"/>\
                     <text class=\"tick\" x=\"{:.1}\" y=\"14\">{}</text>",
                    TOP - 6.0,
                    x + 3.0,
                    duration(tick)
                );
            }
        }
        drawn
    }
}

/// The next of 1, 2, 5 times a power of ten.
fn nice(us: f64) -> u64 {
    let power = 10f64.powf(us.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= us).unwrap_or(10.0);
    (factor * power).round() as u64
}
