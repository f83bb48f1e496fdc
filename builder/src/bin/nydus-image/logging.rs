//! The log: to stderr or to a file.

use std::path::Path;

use anyhow::Context as _;
use storage::log::Line;
use tracing_subscriber::filter::LevelFilter;

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
