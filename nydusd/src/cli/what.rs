//! What is to be fetched ahead, as `nydusd prefetch` and `nydusctl prefetch` are told it.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use crate::preheat;
use crate::trace::{Document, MAX_DOCUMENT};

/// What to fetch ahead, and how fast.
#[derive(Args, Clone, Debug)]
pub struct WhatArgs {
    /// What.
    #[command(flatten)]
    pub part: PartArgs,

    /// Bytes a second at most, as stored: 10MiB, 500kB
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth: Option<std::num::NonZeroU64>,
}

/// One of these.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct PartArgs {
    /// The whole image
    #[arg(long)]
    pub all: bool,

    /// What this list names, one absolute path a line, directories with all below them; - for standard input
    #[arg(long, value_name = "LIST")]
    pub files: Option<PathBuf>,

    /// What starts of the image read: the document of `nydusctl trace --json`
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// What to fetch, as read from the files that were named.
#[derive(Debug)]
pub enum Part {
    /// The whole image.
    All,
    /// Absolute paths.
    Files(Vec<Vec<u8>>),
    /// A trace, of whatever image.
    Trace(Box<Document>),
}

impl Part {
    /// The word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Files(_) => "files",
            Self::Trace(_) => "trace",
        }
    }
}

impl PartArgs {
    /// Reads the list or the trace.
    ///
    /// # Errors
    /// It can not be read, the list is not one, or the trace is larger than any.
    pub fn load(&self) -> anyhow::Result<Part> {
        use std::io::Read as _;
        if let Some(path) = &self.trace {
            let context = || format!("trace {}", path.display());
            let file = std::fs::File::open(path).with_context(context)?;
            let mut bytes = Vec::new();
            // One byte more than any trace has, so that a larger file is refused as such.
            file.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).with_context(context)?;
            return Ok(Part::Trace(Box::new(Document::parse(&bytes).with_context(context)?)));
        }
        Ok(match &self.files {
            None => Part::All,
            Some(path) if path.as_os_str() == "-" => {
                Part::Files(preheat::list::read(std::io::stdin().lock())?)
            }
            Some(path) => Part::Files(preheat::list::load(path)?),
        })
    }
}

fn parse_rate(text: &str) -> Result<std::num::NonZeroU64, String> {
    text.parse::<bytesize::ByteSize>()
        .ok()
        .and_then(|size| std::num::NonZeroU64::new(size.as_u64()))
        .ok_or_else(|| format!("{text:?}: want a number of bytes above 0, as in 10MiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_units() {
        for (text, rate) in [("1", 1), ("10MiB", 10 << 20), ("1.5 KiB", 1536), ("2GB", 2_000_000_000)] {
            assert_eq!(parse_rate(text).map(std::num::NonZeroU64::get), Ok(rate), "{text}");
        }
    }
}
