//! What is no HTTP never reaches [`super::routes`]: hyper refuses it by itself, with a head and no body. Here
//! it gets the body that clients decode.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::reply::error_document;

/// A connection whose refusals have a body.
pub(super) struct Refusals<T> {
    inner: T,
    /// A refusal on its way.
    pending: Vec<u8>,
}

impl<T> Refusals<T> {
    pub fn new(inner: T) -> Self {
        Self { inner, pending: Vec::new() }
    }
}

impl<T: AsyncWrite + Unpin> Refusals<T> {
    fn poll_pending(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let written = ready!(Pin::new(&mut self.inner).poll_write(context, &self.pending))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.drain(..written);
        }
        Poll::Ready(Ok(()))
    }
}

/// `bytes` with a body, if they end with a refusal of hyper's own: the heads of our answers name the server,
/// and say the length of what follows them.
fn with_body(bytes: &[u8]) -> Option<Vec<u8>> {
    const START: &[u8] = b"HTTP/1.";
    let start = bytes.windows(START.len()).rposition(|window| window == START)?;
    let (before, head) = bytes.split_at(start);
    let head = std::str::from_utf8(head).ok()?.strip_suffix("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?;
    let code: u16 = status.split(' ').nth(1)?.parse().ok()?;
    let lines: Vec<String> = lines.map(str::to_lowercase).collect();
    let is_own = lines.iter().any(|line| line.starts_with("server:"));
    if code < 400 || is_own || !lines.iter().any(|line| line == "content-length: 0") {
        return None;
    }
    let body = error_document("BadRequest");
    let head = format!(
        "{status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    Some([before, head.as_bytes(), &body].concat())
}

impl<T: AsyncRead + Unpin> AsyncRead for Refusals<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

// Not vectored: a refusal comes in one piece then.
impl<T: AsyncWrite + Unpin> AsyncWrite for Refusals<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(context))?;
        match with_body(bytes) {
            Some(refusal) => {
                self.pending = refusal;
                // What does not go now goes with the flush.
                match self.poll_pending(context)? {
                    Poll::Ready(()) | Poll::Pending => Poll::Ready(Ok(bytes.len())),
                }
            }
            None => Pin::new(&mut self.inner).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(context))?;
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(context))?;
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_refusals_of_others_get_a_body() {
        let refusal =
            b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\ndate: x\r\n\r\n";
        let answer = b"HTTP/1.1 200 OK\r\nserver: Nydus API\r\ncontent-length: 2\r\n\r\n{}";
        let both = [&answer[..], refusal].concat();
        for (bytes, before) in [(&refusal[..], &b""[..]), (&both, answer)] {
            let text = String::from_utf8(with_body(bytes).unwrap()).unwrap();
            let (head, body) = text[before.len()..].split_once("\r\n\r\n").unwrap();
            assert!(text.as_bytes().starts_with(before) && head.starts_with("HTTP/1.1 400 Bad Request\r\n"));
            assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
            assert_eq!(body, r#"{"code":"UNDEFINED","message":"BadRequest"}"#);
        }
        for other in [
            &answer[..],
            b"HTTP/1.1 204 No Content\r\nserver: Nydus API\r\n\r\n",
            b"HTTP/1.1 500 \r\nserver: Nydus API\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"\r\n\r\n",
        ] {
            assert!(with_body(other).is_none());
        }
    }
}
