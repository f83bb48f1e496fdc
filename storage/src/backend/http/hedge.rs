//! A second request where the answer to the first is late.

use std::time::Duration;

use reqwest::{Response, StatusCode};

use crate::backend::origin::Origin;
use crate::backend::retry::Failure;
use crate::{Error, ErrorKind};

pub(super) type Head = std::result::Result<Response, Failure>;

/// The answer of the first request; if that is late, the first good one of it and a second.
pub(super) async fn sooner<F: Future<Output = Head>>(
    first: impl Future<Output = Head>,
    late: Duration,
    second: impl FnOnce() -> F,
    origin: &Origin,
) -> Head {
    tokio::pin!(first);
    tokio::select! {
        biased;
        head = &mut first => return head,
        () = tokio::time::sleep(late) => {}
    }
    let Some(_place) = origin.second() else { return first.await };
    let good = |head: &Head| {
        let bad = |status: StatusCode| status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
        head.as_ref().is_ok_and(|response| !bad(response.status()))
    };
    let second = second();
    tokio::pin!(second);
    let (head, other) = tokio::select! {
        biased;
        head = &mut first => {
            let other = if good(&head) { None } else { Some(second.await) };
            (Some(head), other)
        }
        other = &mut second => {
            let head = if good(&other) { None } else { Some(first.await) };
            (head, Some(other))
        }
    };
    match (head, other) {
        (Some(head), other) if good(&head) || !other.as_ref().is_some_and(good) => head,
        (_, Some(other)) => {
            origin.second_won();
            other
        }
        // One of them is always there.
        (Some(head), None) => head,
        (None, None) => Err(Error::new(ErrorKind::Cancelled, "a request without an end").into()),
    }
}
