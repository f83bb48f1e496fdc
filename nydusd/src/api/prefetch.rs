//! `/api/v1/prefetch`: what is fetched ahead of readers. Not of the contract; the shapes of errors are.
//!
//! | request | answer |
//! |---|---|
//! | `POST`, [`Body`] | `{"id": N}` at once; the fetching goes on behind it |
//! | `GET` | all [`Report`](crate::preheat::jobs::Report)s, those of jobs that ended of late among them |
//! | `GET ?id=N` | one of them |
//! | `DELETE ?id=N` | nothing; the job ends, what has arrived stays |

use std::num::NonZeroU64;

use hyper::Method;
use serde::Deserialize;
use serde_json::json;
use storage::prefetch::Class;

use super::reply::Reply;
use super::routes::find_mount;
use crate::daemon::Daemon;
use crate::preheat::{self, Request, Wish, list};
use crate::trace::Document;

/// Body of `POST`: one of `all`, `files` and `trace`.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Body {
    /// Mountpoint or id of the image; may be left out while there is but one.
    mountpoint: Option<String>,
    /// The whole image.
    all: bool,
    /// Absolute paths in the image, directories with all below them.
    files: Option<Vec<String>>,
    /// The document of [`crate::trace`], as it is.
    trace: Option<Document>,
    /// Bytes a second at most, as stored; 0: no limit.
    bandwidth: u64,
}

/// Answers one request to `/api/v1/prefetch`.
pub(super) fn answer(daemon: &Daemon, method: &Method, id: Option<&str>, body: &[u8]) -> Reply {
    let id = id.map(|text| text.parse::<u64>().map_err(|_| text));
    if let Some(Err(text)) = &id {
        return refuse(400, format!("id {text:?} is not a number"));
    }
    let known = |id: u64| refuse(404, format!("no prefetch has the id {id}, or it ended long ago"));
    match (method, id.and_then(Result::ok)) {
        (&Method::POST, None) => start(daemon, body),
        (&Method::GET, None) => Reply::json(&daemon.preheat().reports()),
        (&Method::GET, Some(id)) => {
            daemon.preheat().report(id).map_or_else(|| known(id), |r| Reply::json(&r))
        }
        (&Method::DELETE, Some(id)) => match daemon.preheat().cancel(id) {
            true => Reply::empty(),
            false => known(id),
        },
        (&Method::DELETE, None) => refuse(400, "say which: ?id=N"),
        _ => Reply::bad_request(),
    }
}

fn start(daemon: &Daemon, body: &[u8]) -> Reply {
    let body: Body = match serde_json::from_slice(body) {
        Ok(body) => body,
        Err(e) => return Reply::bad_body(&e),
    };
    let Some(mount) = find_mount(daemon, body.mountpoint.as_deref()) else {
        return match &body.mountpoint {
            Some(name) => refuse(404, format!("nothing is mounted at {name:?}")),
            None => refuse(404, "no image is mounted, or several: say which by \"mountpoint\""),
        };
    };
    let (what, wish) = match (body.all, body.files, body.trace) {
        (true, None, None) => ("all", Ok(Wish::Image)),
        (false, Some(files), None) => ("files", wish(files)),
        (false, None, Some(document)) => ("trace", preheat::trace(&mount, &document)),
        _ => return refuse(400, "say what: one of \"all\": true, \"files\": [..] and \"trace\": {..}"),
    };
    let wish = match wish {
        Ok(wish) => wish,
        Err(e) => return refuse(400, format!("{e:#}")),
    };
    let bandwidth = NonZeroU64::new(body.bandwidth);
    let request = Request { what, stages: vec![(Class::Preheat, wish)], bandwidth };
    // Whoever has a mount has an engine.
    let Some(engine) = daemon.engine() else { return refuse(503, "the daemon is starting") };
    match daemon.preheat().start(engine.handle(), &mount, request) {
        Ok(id) => Reply::json(&json!({ "id": id })),
        Err(e) => refuse(429, e),
    }
}

fn wish(files: Vec<String>) -> anyhow::Result<Wish> {
    if files.len() > list::MAX_PATHS {
        anyhow::bail!("more than {} files; name directories instead", list::MAX_PATHS);
    }
    files.iter().try_for_each(|path| list::check(path.as_bytes()))?;
    Ok(Wish::Files(files.into_iter().map(String::into_bytes).collect()))
}

fn refuse(status: u16, why: impl std::fmt::Display) -> Reply {
    Reply::error(status, &format!("Prefetch({:?})", why.to_string()))
}
