//! The one error of this crate.

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a caller may act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The bytes are not a RAFS image, or break a rule of the format.
    Corrupt,
    /// A valid image of a kind this build does not handle; the message names the kind.
    Unsupported,
    /// No such entry, xattr or chunk.
    NotFound,
    /// The operation needs another type of inode (directory, symlink, regular file).
    WrongType,
    /// The image does not match the digest that was demanded.
    Mismatch,
    /// The caller's argument is malformed.
    Invalid,
    /// A local operating system error.
    Io,
    /// The storage layer failed.
    Storage,
}

/// An error with its kind, where in the image, and its cause.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `context` names the record, its position and the remedy.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// Attaches the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Puts `outer` in front of the context.
    #[must_use]
    pub fn context(mut self, outer: impl std::fmt::Display) -> Self {
        self.context = format!("{outer}: {}", self.context);
        self
    }

    /// An operating system error while doing `context`.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, context).with_source(source)
    }

    /// A broken rule of the format.
    pub fn corrupt(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, context)
    }

    /// The kind to act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<storage::Error> for Error {
    fn from(e: storage::Error) -> Self {
        Self::new(ErrorKind::Storage, "storage").with_source(e)
    }
}
