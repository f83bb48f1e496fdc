//! Connections that misbehave below HTTP: answers byte by byte, and resets.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Sleep, sleep};

use super::Rule;

/// Between two bytes of [`Rule::Drip`].
const DRIP: Duration = Duration::from_millis(100);

/// The socket of a connection, for what only the socket can do.
#[derive(Clone, Debug)]
pub(super) struct Socket(Arc<OwnedFd>);

impl Socket {
    pub(super) fn of(stream: &TcpStream) -> io::Result<Self> {
        Ok(Self(Arc::new(stream.as_fd().try_clone_to_owned()?)))
    }

    /// The connection ends with RST.
    pub(super) fn reset_on_close(&self) -> io::Result<()> {
        let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
        Ok(nix::sys::socket::setsockopt(&self.0, nix::sys::socket::sockopt::Linger, &at_once)?)
    }
}

/// The stream of a connection, written to as the rule wants.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    rule: watch::Receiver<Rule>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Wire {
    pub(super) fn new(stream: TcpStream, rule: watch::Receiver<Rule>) -> Self {
        Self { stream, rule, pause: None }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if *self.rule.borrow() != Rule::Drip {
            self.pause = None;
            return Pin::new(&mut self.stream).poll_write(context, data);
        }
        let pause = self.pause.get_or_insert_with(|| Box::pin(sleep(DRIP)));
        ready!(pause.as_mut().poll(context));
        self.pause = None;
        let first = &data[..data.len().min(1)];
        Pin::new(&mut self.stream).poll_write(context, first)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
