//! One monitor after the other.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use anyhow::Context as _;
use nix::sys::socket::{Backlog, listen as listen_on};
use vhost::vhost_user::{Error as VhostError, Listener};
use vhost_user_backend::{Error, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::Memory;
use super::backend::{Backend, Device};

/// Monitors that wait for the one before to leave.
const BACKLOG: i32 = 16;

/// How long to wait when there can be no device for want of descriptors or threads.
const PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// Serves `device` to whoever connects to `socket`, which is bound: one at a time, until the process ends.
///
/// # Errors
/// The system refuses to listen, or a thread.
pub(in crate::transport) fn listen(socket: OwnedFd, device: Arc<dyn Device>) -> anyhow::Result<()> {
    listen_on(&socket, Backlog::new(BACKLOG)?).context("listen on the vhost-user socket")?;
    let socket = UnixListener::from(socket);
    socket.set_nonblocking(false)?;
    let mut listener = Listener::from(socket);
    let run = move || {
        loop {
            match serve_one(&mut listener, &device) {
                Ok(()) => tracing::info!("{}: the monitor has left", device.name()),
                Err(e) => {
                    tracing::error!("{}: {e:#}", device.name());
                    std::thread::sleep(PAUSE);
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("vhost-user".to_owned())
        .spawn(run)
        .context("start the device's thread")?;
    Ok(())
}

/// Serves the next monitor until it leaves.
fn serve_one(listener: &mut Listener, device: &Arc<dyn Device>) -> anyhow::Result<()> {
    let backend = Arc::new(Backend::new(Arc::clone(device)).context("make the device")?);
    let memory = Memory::new(GuestMemoryMmap::new());
    let served = || -> anyhow::Result<()> {
        let name = device.name().to_owned();
        let mut daemon = VhostUserDaemon::new(name, Arc::clone(&backend), memory)
            .map_err(|e| anyhow::anyhow!("start the device: {e}"))?;
        for (handler, (fd, number)) in daemon.get_epoll_handlers().iter().zip(backend.wakers()) {
            handler.register_listener(fd, EventSet::IN, number).context("watch a ring")?;
        }
        daemon.start(listener).map_err(|e| anyhow::anyhow!("wait for a monitor: {e}"))?;
        tracing::info!("{}: a monitor has connected", device.name());
        let left = daemon.wait();
        backend.close();
        match left {
            // It was killed in the middle of something, perhaps.
            Ok(()) | Err(Error::HandleRequest(VhostError::Disconnected | VhostError::PartialMessage)) => {
                Ok(())
            }
            // What it asked for is its fault, and the next one may know better.
            Err(e) => {
                tracing::warn!("{}: the monitor is left: {e}", device.name());
                Ok(())
            }
        }
    };
    let served = served();
    backend.close_exits();
    served
}
