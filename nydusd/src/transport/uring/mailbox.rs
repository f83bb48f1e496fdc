//! Answers of reads that have waited, on their way to the thread whose entries they go into.

use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::transport::message::OutHeader;
use crate::transport::reads::Way;

/// One answer.
pub(super) struct Mail {
    pub entry: usize,
    pub header: OutHeader,
    pub data: Vec<u8>,
}

/// The mailbox of one ring thread. It holds at most one answer for each of its entries.
pub(super) struct Mailbox {
    /// Held for a few moves. Whoever finds it empty raises the bell.
    mail: Mutex<Vec<Mail>>,
    bell: EventFd,
}

impl Mailbox {
    /// An empty one.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> nix::Result<Self> {
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { mail: Mutex::default(), bell })
    }

    /// Readable while there is mail that was not taken.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Takes what there is.
    pub fn take(&self) -> Vec<Mail> {
        // First the bell: who puts something in meanwhile finds mail there and is taken with it, or raises it again.
        match self.bell.read() {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(e) => tracing::warn!("read a mailbox's bell: {e}"),
        }
        std::mem::take(&mut *self.mail.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, mail: Mail) {
        let mut all = self.mail.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(mail);
        if all.len() == 1
            && let Err(e) = self.bell.write(1)
        {
            tracing::error!("raise a mailbox's bell: {e}");
        }
    }
}

/// The way of one answer to its entry.
pub(super) struct ToEntry {
    pub mailbox: Arc<Mailbox>,
    pub entry: usize,
}

impl Way for ToEntry {
    fn answer(&self, header: OutHeader, data: Vec<u8>) {
        self.mailbox.put(Mail { entry: self.entry, header, data });
    }
}
