//! How the programs log: one line an event. Here, because this is the crate that all of them
//! share; which lines, how many and where to is their own affair.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Target prefix of a library whose lines are never to be written, at any level: it shows the
/// keys of object stores in them. Every program that opens [`crate::backend::object`] filters it.
pub const SHOWS_SECRETS: &str = "reqsign";

/// The line format: `[<local date and time> <offset>] LEVEL [file:line] message`; the place is
/// left out at level info. Levels `error` and `warn` are coloured where the writer has colours.
#[derive(Clone, Copy, Debug)]
pub struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let now = chrono::Local::now().format("%Y-%m-%d %H:%M:%S%.6f %:z");
        let level = *metadata.level();
        write!(writer, "[{now}] ")?;
        match (writer.has_ansi_escapes(), level) {
            (true, Level::ERROR) => write!(writer, "\x1b[31m{level}\x1b[0m ")?,
            (true, Level::WARN) => write!(writer, "\x1b[33m{level}\x1b[0m ")?,
            _ => write!(writer, "{level} ")?,
        }
        if level != Level::INFO
            && let (Some(file), Some(line)) = (metadata.file(), metadata.line())
        {
            let file = file.rsplit_once("/src/").map_or(file, |(_, tail)| tail);
            write!(writer, "[{file}:{line}] ")?;
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
