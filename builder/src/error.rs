//! The one error of this crate.

use std::fmt;
use std::sync::Arc;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a caller may act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller's argument (flag, reference, option) is malformed or contradictory.
    Invalid,
    /// A source (tar, layer, manifest, bootstrap) is damaged or breaks the rules of its format.
    Corrupt,
    /// Bytes do not match the digest or size that was promised for them.
    Mismatch,
    /// Valid input of a kind this build does not handle; the message names the kind.
    Unsupported,
    /// The object does not exist at its source.
    NotFound,
    /// Images that can not be combined: version, chunk size, mode or digester differ.
    Inconsistent,
    /// A limit of the format or of this build is exceeded.
    Limit,
    /// The work was withdrawn, by a signal or because another part of it failed.
    Cancelled,
    /// A local operating system error.
    Io,
    /// The storage layer (backend, registry, codec) failed.
    Storage,
    /// The format layer failed.
    Rafs,
}

/// An error with its kind, what was being done to which object, and its cause.
///
/// Cheap to clone: one failure of a pipeline is told to every part of it.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `context` names the operation, the object and the remedy.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// Attaches the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// Puts `outer` in front of the context.
    #[must_use]
    pub fn context(mut self, outer: impl fmt::Display) -> Self {
        self.context = format!("{outer}: {}", self.context);
        self
    }

    /// An operating system error while doing `context`.
    ///
    /// An [`Error`] of this crate that travelled inside the [`std::io::Error`] (readers wrap
    /// theirs, see [`Error::into_io`]) keeps its kind and gets `context` in front.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        match source.downcast::<Self>() {
            Ok(inner) => inner.context(context.into()),
            Err(source) => Self::new(ErrorKind::Io, context).with_source(source),
        }
    }

    /// Wraps this error for passage through [`std::io::Read`] or [`std::io::Write`].
    pub fn into_io(self) -> std::io::Error {
        std::io::Error::other(self)
    }

    /// A malformed argument or option.
    pub fn invalid(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, context)
    }

    /// A source that is damaged or breaks a rule.
    pub fn bad_source(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, context)
    }

    /// An exceeded limit of the format.
    pub fn limit(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Limit, context)
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

impl From<storage::Error> for Error {
    fn from(e: storage::Error) -> Self {
        use storage::ErrorKind as Kind;
        let (kind, context, source) = e.into_parts();
        let kind = match kind {
            Kind::Invalid => ErrorKind::Invalid,
            // Places come from metadata: an object that ends before them is damaged.
            Kind::Corrupt | Kind::OutOfRange => ErrorKind::Corrupt,
            Kind::NotFound => ErrorKind::NotFound,
            Kind::Unsupported => ErrorKind::Unsupported,
            Kind::Cancelled => ErrorKind::Cancelled,
            Kind::Io => ErrorKind::Io,
            Kind::Denied | Kind::TimedOut | Kind::Unavailable => ErrorKind::Storage,
        };
        Self { kind, context, source }
    }
}

impl From<rafs::Error> for Error {
    fn from(e: rafs::Error) -> Self {
        Self::new(ErrorKind::Rafs, "format").with_source(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_survive_io_traits() {
        let io = Error::new(ErrorKind::Mismatch, "layer 2").into_io();
        let back = Error::io("reading", io);
        assert_eq!((back.kind(), back.to_string().as_str()), (ErrorKind::Mismatch, "reading: layer 2"));
        assert_eq!(Error::io("reading", std::io::Error::other("x")).kind(), ErrorKind::Io);
    }
}
