//! The report as one page that needs nothing else: no script, no resource, and a policy that
//! lets none in. Names come from images and processes: all text is escaped.

use base64::Engine as _;
use nydusd::why::Report;
use nydusd::words::counted;
use storage::digest::DigestAlgorithm;

use super::timeline::{self, PHASES};
use super::{
    amplification, chunk_name, duration, file_name, forgotten, process_name, saving, size, source_name,
};

const STYLE: &str = include_str!("style.css");

/// Rows of a table.
const ROWS: usize = 100;

/// The page.
pub fn page(report: &Report) -> String {
    let digest = DigestAlgorithm::Sha256.digest(STYLE.as_bytes());
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'",
        base64::engine::general_purpose::STANDARD.encode(digest.0)
    );
    let class = if report.verdict.lazy { "lazy" } else { "greedy" };
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>nydusctl why {mountpoint}</title>\n<style>{STYLE}</style></head>\n<body>\n\
         <h1>Why <code>{mountpoint}</code> took its time</h1>\n\
         <p class=\"verdict {class}\">{verdict}</p>\n{tiles}\n<p>{saving}</p>\n{forgotten}\
         {phases}\n{timeline}\n{reads}\n{files}\n{supplied}\n</body></html>\n",
        mountpoint = escape(&report.mountpoint),
        verdict = escape(&report.verdict.text),
        tiles = tiles(report),
        saving = escape(&saving(report)),
        forgotten = forgotten(report).map_or_else(String::new, |text| format!("<p>{}</p>", escape(&text))),
        phases = phases(report),
        timeline = timeline::draw(report),
        reads = reads(report),
        files = files(report),
        supplied = supplied(report),
    )
}

/// Text for an element or an attribute in double quotes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn tiles(report: &Report) -> String {
    let (image, totals) = (&report.image, &report.totals);
    let share = totals.fetched_bytes as f64 * 100.0 / image.bytes.max(1) as f64;
    let amplified = amplification(report).map_or_else(
        || "nobody asked for it".to_owned(),
        |factor| format!("x{factor:.2} of what readers asked for"),
    );
    let tiles = [
        (
            "image",
            size(image.bytes),
            format!("{}, {} cached at the mount", counted(image.chunks, "chunk"), image.cached_chunks),
        ),
        ("fetched", size(totals.fetched_bytes), format!("{share:.0} % of the image, {amplified}")),
        (
            "requests",
            totals.requests.to_string(),
            counted(report.fetches.len() as u64 + report.dropped_fetches, "chunk"),
        ),
        ("reads", totals.reads.to_string(), format!("{} waited, {} failed", totals.waited, totals.failed)),
        ("waited", duration(totals.waited_us), "summed over reads".to_owned()),
        ("blocked", duration(totals.blocked_us), "some reader was waiting".to_owned()),
    ];
    let tiles = tiles.map(|(name, value, more)| {
        format!(
            "<div><dt>{name}</dt><dd>{}</dd><dd class=\"more\">{}</dd></div>",
            escape(&value),
            escape(&more)
        )
    });
    format!("<dl class=\"tiles\">{}</dl>", tiles.concat())
}

/// All waits as one bar, and the legend of the timeline.
fn phases(report: &Report) -> String {
    let parts = report.waits.parts();
    let sum = parts.iter().map(|(_, us)| us).sum::<u64>().max(1) as f64;
    let mut at = 0.0;
    let mut bars = String::new();
    let mut legend = String::new();
    for ((name, us), (class, meaning)) in parts.iter().zip(PHASES) {
        let width = *us as f64 * 1000.0 / sum;
        bars += &format!("<rect class=\"{class}\" x=\"{at:.1}\" width=\"{width:.1}\" height=\"14\"/>");
        at += width;
        legend += &format!(
            "<li><svg width=\"12\" height=\"12\"><rect class=\"{class}\" width=\"12\" height=\"12\" rx=\"2\"/></svg> \
             <b>{name}</b> {} <span>{meaning}</span></li>",
            duration(*us)
        );
    }
    format!(
        "<h2>What reads waited for</h2><svg class=\"shares\" viewBox=\"0 0 1000 14\" \
         preserveAspectRatio=\"none\">{bars}</svg><ul class=\"legend\">{legend}</ul>"
    )
}

fn table(class: &str, heading: &str, columns: &[&str], rows: &[Vec<String>], all: usize) -> String {
    let head: String = columns.iter().map(|name| format!("<th>{name}</th>")).collect();
    let body: String = rows
        .iter()
        .map(|row| {
            let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
            format!("<tr>{cells}</tr>\n")
        })
        .collect();
    let more = match all.saturating_sub(rows.len()) {
        0 => String::new(),
        more => format!("<p class=\"more\">and {more} more</p>"),
    };
    format!(
        "<h2>{heading}</h2><div class=\"scroll\"><table class=\"{class}\"><thead><tr>{head}</tr></thead>\
         <tbody>\n{body}</tbody></table></div>{more}"
    )
}

fn reads(report: &Report) -> String {
    let rows: Vec<Vec<String>> = report
        .reads
        .iter()
        .take(ROWS)
        .map(|read| {
            let mut row = vec![duration(read.took_us)];
            row.extend(read.waits.parts().map(|(_, us)| if us == 0 { "–".to_owned() } else { duration(us) }));
            row.extend([
                duration(read.at_us),
                process_name(report, read.process),
                file_name(report, read.file).to_owned(),
                format!("{} at {}", size(read.len.into()), read.offset),
                read.chunk.map_or_else(String::new, |chunk| chunk_name(report, chunk)),
                source_name(read).to_owned(),
            ]);
            row
        })
        .collect();
    let columns = [
        "waited", "queue", "network", "decode", "disk", "other", "at", "process", "file", "bytes", "chunk",
        "from",
    ];
    table("reads", "Longest waits", &columns, &rows, report.reads.len())
}

fn files(report: &Report) -> String {
    let waited: Vec<_> = report.files.iter().filter(|file| file.waited > 0).collect();
    let rows: Vec<Vec<String>> = waited
        .iter()
        .take(ROWS)
        .map(|file| {
            vec![
                duration(file.blocked_us),
                duration(file.waited_us),
                file.waited.to_string(),
                file.reads.to_string(),
                size(file.bytes),
                file.path.clone(),
            ]
        })
        .collect();
    let columns = ["could be saved", "waited", "waits", "reads", "bytes", "file"];
    table("files", "What fetching a file ahead could have saved", &columns, &rows, waited.len())
}

fn supplied(report: &Report) -> String {
    let rows: Vec<Vec<String>> = report
        .supplied
        .iter()
        .map(|s| vec![s.chunks.to_string(), size(s.bytes), s.purpose.to_string(), s.source.to_string()])
        .collect();
    table("supplied", "Where chunks came from", &["chunks", "bytes", "for", "from"], &rows, rows.len())
}
