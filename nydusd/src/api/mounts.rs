//! `/api/v1/mount`: mount, remount, unmount (contract 3.5).

use std::sync::Arc;

use hyper::Method;

use super::reply::Reply;
use crate::daemon::Daemon;
use crate::vfs::command::MountRequest;
use crate::vfs::error::{MountError, MountErrorKind};

/// Answers a `POST`, `PUT` or `DELETE` for `mountpoint`.
pub(super) async fn answer(daemon: &Arc<Daemon>, method: &Method, mountpoint: String, body: &[u8]) -> Reply {
    let daemon = Arc::clone(daemon);
    let request = match method {
        &Method::DELETE => return finish(move || daemon.umount(&mountpoint)).await,
        _ => match serde_json::from_slice::<MountRequest>(body) {
            Ok(request) => request,
            Err(e) => return Reply::bad_body(&e),
        },
    };
    let remount = method == Method::PUT;
    finish(move || {
        let command = request.command(&mountpoint)?;
        if remount { daemon.remount(command) } else { daemon.mount(command) }
    })
    .await
}

/// Runs a command that may wait for disks, sources and the kernel, beside the control plane.
async fn finish(command: impl FnOnce() -> Result<(), MountError> + Send + 'static) -> Reply {
    match tokio::task::spawn_blocking(command).await {
        Ok(Ok(())) => Reply::empty(),
        Ok(Err(e)) => refuse(&e),
        Err(_) => Reply::error(500, "Mount(MountFilesystem(Other(\"the command panicked\")))"),
    }
}

fn refuse(error: &MountError) -> Reply {
    match error.kind() {
        MountErrorKind::NotReady => Reply::error(503, "Mount(DaemonAbnormal(NotReady))"),
        MountErrorKind::AlreadyExists
        | MountErrorKind::NotFound
        | MountErrorKind::InvalidArgument
        | MountErrorKind::Image
        | MountErrorKind::Busy
        | MountErrorKind::Unsupported => {
            let text = error.to_string();
            tracing::warn!("a mount command failed: {text}");
            Reply::error(500, &format!("Mount(MountFilesystem(Other({text:?})))"))
        }
    }
}
