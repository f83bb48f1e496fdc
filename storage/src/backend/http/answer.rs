//! The answer to a request: its head, and its body piece by piece.

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::HeaderMap;
use reqwest::{Response, StatusCode, Url, Version};

use super::meaning::{Help, error_text, judge, retry_after};
use super::progress;
use crate::backend::ReadContext;
use crate::backend::origin::Ticket;
use crate::backend::retry::Failure;
use crate::{Error, ErrorKind};

/// An error page is read this far for its message, and for so long.
const MAX_ERROR_BODY: usize = 4096;
const ERROR_PATIENCE: Duration = Duration::from_millis(500);

/// The head of an answer, its body still to come.
#[derive(Debug)]
pub struct Answer {
    pub(super) what: String,
    pub(super) response: Response,
    pub(super) silence: Option<Duration>,
    pub(super) ticket: Ticket,
}

impl Answer {
    /// `METHOD URL` of the request, fit to be shown.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// The protocol it came by.
    pub fn version(&self) -> Version {
        self.response.version()
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// A header's value, if it is there and text.
    pub fn header(&self, name: impl reqwest::header::AsHeaderName) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// Where the answer comes from.
    pub fn url(&self) -> &Url {
        self.response.url()
    }

    /// The next bytes of the body; `None` at its end.
    ///
    /// # Errors
    /// A passing failure: reset, truncation, silence. `TimedOut`, `Cancelled`.
    pub async fn chunk(&mut self, context: &ReadContext) -> std::result::Result<Option<Bytes>, Failure> {
        let piece = progress(self.silence, &self.what, context, self.response.chunk()).await;
        match &piece {
            Ok(Some(piece)) => self.ticket.received(piece.len()),
            Ok(None) => self.ticket.ended(),
            Err(failure) if failure.passing => self.ticket.broke(failure.error.to_string()),
            Err(_) => self.ticket.left(),
        }
        piece
    }

    /// The body ended where it should not have: the server failed.
    pub(in crate::backend) fn broke(&mut self, why: String) {
        self.ticket.broke(why);
    }

    /// The whole body, at most `cap` bytes.
    ///
    /// # Errors
    /// Those of [`Answer::chunk`]; `Invalid`: it is longer.
    pub async fn bytes(mut self, cap: u64, context: &ReadContext) -> std::result::Result<Vec<u8>, Failure> {
        let mut all = Vec::new();
        while let Some(piece) = self.chunk(context).await? {
            if (all.len() + piece.len()) as u64 > cap {
                let why = format!("{}: the answer is longer than {cap} bytes", self.what);
                return Err(Error::new(ErrorKind::Invalid, why).into());
            }
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    /// Turns an unwelcome answer into a failure that says what it means and what helps.
    pub async fn into_failure<'h>(mut self, help: impl Into<Help<'h>>, context: &ReadContext) -> Failure {
        let status = self.status();
        let retry_after = retry_after(self.headers());
        let mut page = Vec::new();
        // The page only embellishes the message; what can not be read is left out.
        let read = async {
            while page.len() < MAX_ERROR_BODY && self.response.status() != StatusCode::NOT_MODIFIED {
                match self.chunk(context).await {
                    Ok(Some(piece)) => page.extend_from_slice(&piece),
                    Ok(None) | Err(_) => break,
                }
            }
        };
        let _ = tokio::time::timeout(ERROR_PATIENCE, read).await;
        page.truncate(MAX_ERROR_BODY);
        let (kind, passing, meaning) = judge(status, help.into());
        let mut text = format!("{}: {status}", self.what);
        for part in [error_text(&page).as_str(), meaning.as_str()].into_iter().filter(|part| !part.is_empty())
        {
            text = format!("{text}; {part}");
        }
        Failure { error: Error::new(kind, text), passing, retry_after }
    }
}
