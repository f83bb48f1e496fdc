//! Values of flags.

use clap::ValueEnum;
use storage::digest::{Digest, TaggedDigest};

/// Severity threshold of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// For developers.
    Debug,
    /// State changes.
    Info,
    /// What we coped with.
    Warn,
    /// A user's request failed.
    Error,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What becomes of requests that a daemon took and did not answer before it was gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FailoverPolicy {
    /// Leave them.
    None,
    /// Ask the kernel to send them again.
    Resend,
    /// Ask the kernel to fail them.
    Flush,
}

pub(super) fn parse_tagged(text: &str) -> Result<TaggedDigest, String> {
    text.parse::<TaggedDigest>().map_err(|e| e.to_string())
}

/// A SHA-256 in hex, with or without its `sha256:` tag.
pub(crate) fn parse_sha256(text: &str) -> Result<Digest, String> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    Digest::from_hex(hex).map_err(|_| format!("{text:?}: want sha256: and 64 hex digits"))
}

pub(super) fn parse_seconds(text: &str) -> Result<std::time::Duration, String> {
    text.parse::<f64>()
        .ok()
        .and_then(|seconds| std::time::Duration::try_from_secs_f64(seconds).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("{text:?}: want a number of seconds above 0"))
}
