//! The log: `[DATE TIME OFFSET] LEVEL message`, with the source line for levels other than
//! info; to stderr or to a file.

use std::fmt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::cli::LogLevel;

/// Starts logging. `silent` keeps stderr clean; a log file is written all the same.
pub fn init(file: Option<&Path>, level: LogLevel, silent: bool) -> anyhow::Result<()> {
    let level = match level {
        LogLevel::Trace => LevelFilter::TRACE,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    let builder = tracing_subscriber::fmt().with_ansi(false).event_format(Line);
    match file {
        Some(path) => {
            let file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("open log file {}", path.display()))?;
            builder.with_max_level(level).with_writer(file).init();
        }
        None => {
            let level = if silent { LevelFilter::OFF } else { level };
            builder.with_max_level(level).with_writer(std::io::stderr).init();
        }
    }
    Ok(())
}

struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        write!(out, "[{} +00:00] {}", utc(since.as_secs(), since.subsec_micros()), event.metadata().level())?;
        if *event.metadata().level() != Level::INFO
            && let (Some(file), Some(line)) = (event.metadata().file(), event.metadata().line())
        {
            write!(out, " [{file}:{line}]")?;
        }
        out.write_char(' ')?;
        context.field_format().format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}

/// `YYYY-MM-DD HH:MM:SS.ffffff` of a time since the epoch.
fn utc(seconds: u64, micros: u32) -> String {
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Days to a date of the Gregorian calendar: years start in March, eras have 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_gregorian() {
        for (seconds, want) in [
            (0, "1970-01-01 00:00:00.000007"),
            (951_782_400, "2000-02-29 00:00:00.000007"),
            (4_107_542_399, "2100-02-28 23:59:59.000007"),
            (4_107_542_400, "2100-03-01 00:00:00.000007"),
        ] {
            assert_eq!(super::utc(seconds, 7), want);
        }
    }
}
