//! The one error of this crate: a kind to act on, a context to read, a source.

use std::fmt;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a caller may act on it.
///
/// The kind decides retry, log line and metric; front ends answer any failure to
/// obtain file data with `EIO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller's input (configuration, reference, path) is malformed.
    Invalid,
    /// Bytes differ from what their digest, size or encoding promises.
    Corrupt,
    /// The object does not exist at its source.
    NotFound,
    /// The source refuses access: missing, wrong or insufficient credentials.
    Denied,
    /// A deadline passed. The call may be repeated.
    TimedOut,
    /// The request was withdrawn by its owner.
    Cancelled,
    /// An offset or size lies outside its object.
    OutOfRange,
    /// Valid input that this build does not handle.
    Unsupported,
    /// The source answered with a passing fault (5xx, 429, reset); retries are used up.
    Unavailable,
    /// A local operating system error.
    Io,
}

/// An error with its kind, what was being done to which object, and its cause.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<std::sync::Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `context` names the operation and the object.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// Attaches the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(std::sync::Arc::from(source.into()));
        self
    }

    /// An operating system error while doing `context`; the kind follows the errno.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            std::io::ErrorKind::TimedOut => ErrorKind::TimedOut,
            _ => ErrorKind::Io,
        };
        Self::new(kind, context).with_source(source)
    }

    /// Puts `outer` in front of the context: what the caller was doing.
    #[must_use]
    pub fn context(mut self, outer: impl fmt::Display) -> Self {
        self.context = format!("{outer}: {}", self.context);
        self
    }

    /// Kind, context and cause, for a caller that makes an error of its own type of them.
    pub fn into_parts(
        self,
    ) -> (ErrorKind, String, Option<std::sync::Arc<dyn std::error::Error + Send + Sync>>) {
        (self.kind, self.context, self.source)
    }

    /// The kind to act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as &(dyn std::error::Error + 'static))
    }
}
