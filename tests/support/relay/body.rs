//! Answers on their way to the client, changed as the rule wants.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::{Request, Response, header};

use super::{Body, Rule, Shared};

/// Hands the body, an answer to `ranges`, on in pieces as they come, changed as the rule wants.
pub(super) async fn pour(
    shared: &Arc<Shared>,
    response: Response<Incoming>,
    rule: Rule,
    ranges: &[(u64, u64)],
) -> Result<Response<Body>> {
    let (mut head, mut body) = response.into_parts();
    if rule == Rule::ShiftContentRange
        && let Some(range) = head.headers.get_mut(header::CONTENT_RANGE)
    {
        *range = shifted(range.to_str()?).parse()?;
    }
    let mut frames: Vec<Result<Frame<Bytes>, std::io::Error>> = Vec::new();
    let mut left = match rule {
        Rule::CutAfter(limit) | Rule::ResetAfter(limit) | Rule::StallAfter(limit) => limit,
        _ => u64::MAX,
    };
    let mut first = rule == Rule::FlipFirstBit;
    while let Some(frame) = body.frame().await {
        let Ok(mut data) = frame?.into_data() else { continue };
        if first && !data.is_empty() {
            let mut flipped = data.to_vec();
            flipped[0] ^= 1;
            data = flipped.into();
            first = false;
        }
        if data.len() as u64 > left {
            data.truncate(usize::try_from(left)?);
            frames.push(Ok(Frame::data(data)));
            if !matches!(rule, Rule::StallAfter(_)) {
                frames.push(Err(std::io::Error::other("cut by rule")));
            }
            break;
        }
        left -= data.len() as u64;
        frames.push(Ok(Frame::data(data)));
    }
    let stream = futures_util::stream::iter(paused(frames, pause_of(rule, ranges))).then(
        |(delay, frame)| async move {
            tokio::time::sleep(delay).await;
            frame
        },
    );
    // Counted when the connection takes them: who hangs up early leaves the rest.
    let counting = Arc::clone(shared);
    let stream = stream.inspect(move |frame: &Result<Frame<Bytes>, std::io::Error>| {
        let data = frame.as_ref().ok().and_then(Frame::data_ref);
        counting.log().bytes += data.map_or(0, |data| data.len() as u64);
    });
    let rules = shared.rule.subscribe();
    let stalls = matches!(rule, Rule::StallAfter(_));
    let end = futures_util::stream::iter(stalls.then_some(())).then(move |()| {
        let mut rules = rules.clone();
        async move {
            // Ends with the relay.
            while rules.changed().await.is_ok() {}
            Err(std::io::Error::other("stalled by rule"))
        }
    });
    let body = http_body_util::StreamBody::new(stream.chain(end));
    Ok(Response::from_parts(head, http_body_util::combinators::BoxBody::new(body)))
}

/// `bytes 10-19/100` as `bytes 11-20/100`: well-formed, and not what was asked for.
fn shifted(range: &str) -> String {
    let parts = range.strip_prefix("bytes ").and_then(|rest| {
        let (range, total) = rest.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?, total))
    });
    match parts {
        Some((first, last, total)) => format!("bytes {}-{}/{total}", first + 1, last + 1),
        None => "bytes */*".to_owned(),
    }
}

/// Bytes before the pause that [`Rule::Late`] wants of an answer to `ranges`, and the pause.
fn pause_of(rule: Rule, ranges: &[(u64, u64)]) -> Option<(u64, Duration)> {
    let Rule::Late(first, last, delay) = rule else { return None };
    match ranges {
        [] => Some((first, delay)),
        [(start, end)] => (*start <= last && first <= *end).then(|| (first.saturating_sub(*start), delay)),
        many => many.iter().any(|(start, end)| *start <= last && first <= *end).then_some((0, delay)),
    }
}

/// The ranges that a request asks for, first and last byte of each.
pub(super) fn ranges_of(request: &Request<Incoming>) -> Vec<(u64, u64)> {
    let header = request.headers().get(header::RANGE).and_then(|value| value.to_str().ok());
    let list = header.and_then(|text| text.strip_prefix("bytes=")).unwrap_or_default();
    let range = |text: &str| {
        let (first, last) = text.trim().split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    list.split(',').filter_map(range).collect()
}

/// The frames, each with the time to wait before it: none but before the byte of `pause`.
fn paused(
    frames: Vec<Result<Frame<Bytes>, std::io::Error>>,
    mut pause: Option<(u64, Duration)>,
) -> Vec<(Duration, Result<Frame<Bytes>, std::io::Error>)> {
    let mut paused = Vec::new();
    let mut at = 0;
    for frame in frames {
        let len = frame.as_ref().ok().and_then(Frame::data_ref).map_or(0, |data| data.len() as u64);
        match pause {
            Some((before, delay)) if before < at + len => {
                pause = None;
                let mut data = frame.ok().and_then(|frame| frame.into_data().ok()).unwrap_or_default();
                let late = data.split_off(usize::try_from(before - at).unwrap_or(0));
                paused.push((Duration::ZERO, Ok(Frame::data(data))));
                paused.push((delay, Ok(Frame::data(late))));
            }
            _ => paused.push((Duration::ZERO, frame)),
        }
        at += len;
    }
    paused
}
