mod detours;
mod many;
mod sequential;
mod sparing;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::backend::BlobSource;
use crate::backend::breaker::BreakerPolicy;
use crate::backend::fault_server::{self, Asked, FaultServer, QUICK, Reply};
use crate::backend::http::HttpOptions;
use crate::backend::origin::Limits;
use crate::digest::DigestAlgorithm;
use crate::engine::fetch;
use crate::ids::BlobId;
use crate::oci::auth::Credentials;
use crate::oci::client::RegistryOptions;
use crate::oci::token::Login;

fn data() -> Vec<u8> {
    fault_server::data(200_000)
}

fn blob_id() -> BlobId {
    BlobId::new(&DigestAlgorithm::Sha256.digest(&data()).to_string()).unwrap()
}

/// Servers that fail on plan are not left in peace.
fn http() -> HttpOptions {
    let breaker = BreakerPolicy { failures: u32::MAX, ..BreakerPolicy::default() };
    let limits = Limits { breaker, retry_after_cap: Duration::from_millis(1), ..Limits::default() };
    HttpOptions { limits, ..HttpOptions::default() }
}

fn options() -> RegistryOptions {
    RegistryOptions {
        http: http(),
        login: Login::Fixed(Credentials::Anonymous),
        retry: QUICK,
        ..RegistryOptions::default()
    }
}

fn source(server: &FaultServer, rewrite: Rewrite) -> RegistrySource {
    let client = RegistryClient::new(server.host(), options()).unwrap();
    RegistrySource::new(client, "a/b", rewrite, QUICK).unwrap()
}

fn blob(server: &FaultServer) -> Arc<dyn Backend> {
    source(server, Rewrite::default()).blob(&blob_id()).unwrap()
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

async fn read(blob: &Arc<dyn Backend>, start: u64, len: u64) -> Result<Vec<u8>> {
    fetch(&**blob, range(start, len), &ReadContext::on_demand(None)).await
}

/// Reads `len` bytes at `start` and expects the right ones.
async fn check(blob: &Arc<dyn Backend>, start: usize, len: usize) {
    let bytes = read(blob, start as u64, len as u64).await.unwrap();
    assert!(bytes == data()[start..start + len], "wrong bytes at {start}");
}

async fn server(plan: impl Fn(&Asked) -> Option<Reply> + Send + Sync + 'static) -> FaultServer {
    fault_server::planned(data(), plan).await
}

#[tokio::test]
async fn ranges_come_over_one_kept_connection() {
    let server = server(|_| None).await;
    let blob = blob(&server);
    for (start, len) in [(0, 10), (199_990, 10), (5, 150_000), (0, 200_000)] {
        check(&blob, start, len).await;
    }
    assert_eq!(server.connections(), 1);
    let asked = server.asked();
    assert_eq!(asked[1].range, Some((199_990, 200_000)));
    assert_eq!(asked[0].path, format!("/v2/a/b/blobs/sha256:{}", blob_id()));
}

#[tokio::test]
async fn passing_faults_are_retried() {
    for status in [429, 500, 502, 503, 504, 408] {
        let server = server(move |asked| {
            (asked.number < 2).then(|| Reply::new(status, "busy").header("retry-after", "3600"))
        })
        .await;
        check(&blob(&server), 100, 1000).await;
        assert_eq!(server.asked().len(), 3, "{status}");
    }
}

#[tokio::test]
async fn retries_are_bounded_and_the_error_says_what_happened() {
    let server = server(|_| Some(Reply::new(503, r#"{"errors":[{"code":"BUSY","message":"later"}]}"#))).await;
    let err = read(&blob(&server), 0, 10).await.unwrap_err();
    assert_eq!((err.kind(), server.asked().len()), (ErrorKind::Unavailable, 5));
    let text = err.to_string();
    for part in ["503", "BUSY: later", "5 attempts", "/v2/a/b/blobs/", server.host()] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let context =
        ReadContext { priority: crate::backend::Priority::Prefetch, ..ReadContext::on_demand(None) };
    fetch(&*blob(&server), range(0, 10), &context).await.unwrap_err();
    assert_eq!(server.asked().len(), 5 + 2);
}

#[tokio::test]
async fn final_answers_are_final() {
    let cases = [
        (403, ErrorKind::Denied),
        (404, ErrorKind::NotFound),
        (416, ErrorKind::OutOfRange),
        (400, ErrorKind::Invalid),
        (405, ErrorKind::Unsupported),
        (204, ErrorKind::Invalid),
    ];
    for (status, kind) in cases {
        let server = server(move |_| Some(Reply::new(status, ""))).await;
        let client = RegistryClient::new(
            server.host(),
            RegistryOptions { scheme: crate::oci::client::Scheme::Http, ..options() },
        );
        let source = RegistrySource::new(client.unwrap(), "a/b", Rewrite::default(), QUICK).unwrap();
        let err = read(&source.blob(&blob_id()).unwrap(), 0, 10).await.unwrap_err();
        assert_eq!((err.kind(), server.asked().len()), (kind, 1), "{status}: {err}");
        assert!(err.to_string().contains(&blob_id().to_string()), "{err}");
    }
}

#[tokio::test]
async fn a_broken_body_is_continued_where_it_broke() {
    let data = data();
    let server = server(move |asked| match asked.number {
        0 => Some(Reply::ranged(asked, &data).cut_after(70_000)),
        1 => Some(Reply::ranged(asked, &data).cut_after(0)),
        _ => None,
    })
    .await;
    check(&blob(&server), 1000, 150_000).await;
    let ranges: Vec<_> = server.asked().iter().map(|a| a.range.unwrap()).collect();
    assert_eq!(ranges[0], (1000, 151_000));
    assert_eq!(ranges.len(), 3);
    assert_eq!(ranges[1], ranges[2]);
    // What hyper still had buffered when the connection was cut may be lost.
    assert!(ranges[1].0 >= 1000 && ranges[1].0 <= 71_000 && ranges[1].1 == 151_000, "{ranges:?}");
}

#[tokio::test]
async fn a_connection_that_is_refused_is_passing() {
    let server = server(|_| None).await;
    let blob = blob(&server);
    drop(server);
    let deadline = Some(Instant::now() + Duration::from_secs(30));
    let err = fetch(&*blob, range(0, 10), &ReadContext::on_demand(deadline)).await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_stall_ends_at_the_deadline_or_by_cancellation() {
    let data = data();
    let server = server(move |asked| Some(Reply::ranged(asked, &data).stall_after(10))).await;
    let blob = blob(&server);
    let context = ReadContext::on_demand(Some(Instant::now() + Duration::from_millis(50)));
    let err = fetch(&*blob, range(0, 100), &context).await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::TimedOut);
    assert!(err.to_string().contains("/v2/a/b/blobs/"), "{err}");

    let context = ReadContext::on_demand(None);
    let mut stream = blob.open(range(0, 100), &context).await.unwrap();
    let first = futures_util::StreamExt::next(&mut stream).await.unwrap().unwrap();
    assert!(first.len() <= 10);
    context.cancel.cancel();
    let err = loop {
        match futures_util::StreamExt::next(&mut stream).await.unwrap() {
            Ok(_) => {}
            Err(e) => break e,
        }
    };
    assert_eq!(err.kind(), ErrorKind::Cancelled);
}

#[tokio::test]
async fn silence_is_a_passing_fault() {
    let data = data();
    let server =
        server(move |asked| (asked.number == 0).then(|| Reply::ranged(asked, &data).stall_after(10))).await;
    let http = HttpOptions { progress_timeout: Some(Duration::from_millis(50)), ..http() };
    let client = RegistryClient::new(server.host(), RegistryOptions { http, ..options() }).unwrap();
    let source = RegistrySource::new(client, "a/b", Rewrite::default(), QUICK).unwrap();
    check(&source.blob(&blob_id()).unwrap(), 50, 1000).await;
    assert_eq!(server.asked()[1].range.unwrap().1, 1050);
}

#[tokio::test]
async fn bodies_that_do_not_belong_are_refused() {
    let cases = [
        (Some("bytes 0-9/200000"), ErrorKind::Corrupt),
        (Some("bytes 101-110/200000"), ErrorKind::Corrupt),
        (Some("bytes 100-110/200000"), ErrorKind::Corrupt),
        (Some("bytes 100-99/200000"), ErrorKind::Corrupt),
        (Some("bytes */200000"), ErrorKind::Corrupt),
        (Some("100-109"), ErrorKind::Corrupt),
        (None, ErrorKind::Corrupt),
        (Some("bytes 100-104/105"), ErrorKind::OutOfRange),
        (Some("bytes 100-109/50"), ErrorKind::Corrupt),
    ];
    for (header, kind) in cases {
        let server = server(move |_| {
            let reply = Reply::new(206, vec![0; 10]);
            Some(header.into_iter().fold(reply, |reply, value| reply.header("content-range", value)))
        })
        .await;
        let err = read(&blob(&server), 100, 10).await.unwrap_err();
        assert_eq!((err.kind(), server.asked().len()), (kind, 1), "{header:?}: {err}");
    }
    let data = data();
    let server =
        server(move |asked| Some(Reply::ranged(asked, &data).header("content-encoding", "gzip"))).await;
    assert_eq!(read(&blob(&server), 0, 10).await.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn short_answers_are_continued() {
    let data = data();
    let server = server(move |asked| {
        let (start, end) = asked.range.unwrap();
        let asked = Asked { range: Some((start, end.min(start + 1000))), ..asked.clone() };
        Some(Reply::ranged(&asked, &data))
    })
    .await;
    check(&blob(&server), 7, 2500).await;
    let starts: Vec<_> = server.asked().iter().map(|a| a.range.unwrap().0).collect();
    assert_eq!(starts, [7, 1007, 2007]);
}

/// A registry that redirects to `store`, which wants the signature of the latest redirect.
async fn redirecting(store_host: String, token: Arc<AtomicUsize>) -> FaultServer {
    FaultServer::start(move |asked| {
        if asked.authorization() != "Basic dTpw" {
            return Reply::unauthorized("Basic realm=\"x\"");
        }
        let signature = token.load(Ordering::SeqCst);
        Reply::new(307, "").header("location", format!("http://{store_host}/data?sig=s3cr3t{signature}"))
    })
    .await
}

#[tokio::test]
async fn redirects_are_remembered_renewed_and_get_no_credentials() {
    let data = data();
    let token = Arc::new(AtomicUsize::new(1));
    let valid = token.clone();
    let store = FaultServer::start(move |asked| {
        if asked.path == format!("/data?sig=s3cr3t{}", valid.load(Ordering::SeqCst)) {
            Reply::ranged(asked, &data)
        } else {
            Reply::new(403, "expired")
        }
    })
    .await;
    let registry = redirecting(store.host().to_owned(), token.clone()).await;
    let login = Login::Fixed(Credentials::from_base64("dTpw").unwrap());
    let client = RegistryClient::new(registry.host(), RegistryOptions { login, ..options() }).unwrap();
    let source = RegistrySource::new(client, "a/b", Rewrite::default(), QUICK).unwrap();
    let blob = source.blob(&blob_id()).unwrap();
    check(&blob, 0, 10).await;
    check(&blob, 10, 10).await;
    // Challenge and redirect once, then straight to the store.
    assert_eq!((registry.asked().len(), store.asked().len()), (2, 2));

    token.store(2, Ordering::SeqCst);
    check(&blob, 20, 10).await;
    assert_eq!((registry.asked().len(), store.asked().len()), (3, 4));
    assert!(store.asked().iter().all(|asked| asked.authorization().is_empty()));
    let shown = format!("{blob:?}");
    assert!(!shown.contains("s3cr3t"), "{shown}");
}

#[tokio::test]
async fn a_remembered_place_that_answers_nonsense_is_left() {
    let data = data();
    let token = Arc::new(AtomicUsize::new(1));
    let valid = token.clone();
    let store = FaultServer::start(move |asked| {
        if asked.path == format!("/data?sig=s3cr3t{}", valid.load(Ordering::SeqCst)) {
            Reply::ranged(asked, &data)
        } else {
            Reply::new(206, "0123456789").header("content-range", "bytes 0-9/10")
        }
    })
    .await;
    let host = store.host().to_owned();
    let latest = token.clone();
    let registry = FaultServer::start(move |_| {
        let signature = latest.load(Ordering::SeqCst);
        Reply::new(307, "").header("location", format!("http://{host}/data?sig=s3cr3t{signature}"))
    })
    .await;
    let blob = blob(&registry);
    check(&blob, 0, 10).await;
    token.store(2, Ordering::SeqCst);
    check(&blob, 20, 10).await;
    assert_eq!((registry.asked().len(), store.asked().len()), (2, 3));
}

#[tokio::test]
async fn a_store_that_keeps_refusing_is_asked_once_more_only() {
    let store = FaultServer::start(|_| Reply::new(403, "no")).await;
    let host = store.host().to_owned();
    let registry = FaultServer::start(move |_| {
        Reply::new(302, "").header("location", format!("http://u:pw@{host}/d?sig=s3cr3t"))
    })
    .await;
    let err = read(&blob(&registry), 0, 10).await.unwrap_err();
    assert_eq!((err.kind(), store.asked().len()), (ErrorKind::Denied, 1));
    let text = format!("{err} {err:?}");
    assert!(!text.contains("s3cr3t") && !text.contains("pw@") && text.contains("/d"), "{text}");
}

#[tokio::test]
async fn redirects_are_rewritten_and_loops_end() {
    let store = server(|_| None).await;
    let registry =
        FaultServer::start(|_| Reply::new(307, "").header("location", "https://cdn.invalid:9/data?x=1"))
            .await;
    let rewrite = Rewrite::new("http", store.host()).unwrap();
    check(&source(&registry, rewrite).blob(&blob_id()).unwrap(), 3, 30).await;
    assert_eq!(store.asked()[0].path, "/data?x=1");

    let looping = FaultServer::start(|_| Reply::new(307, "").header("location", "/again")).await;
    let err = read(&blob(&looping), 0, 10).await.unwrap_err();
    assert_eq!((err.kind(), looping.asked().len()), (ErrorKind::Invalid, MAX_REDIRECTS + 1));
    for bad in ["ftp://x/y", "http://", "file:///etc/passwd"] {
        let server = FaultServer::start(move |_| Reply::new(307, "").header("location", bad)).await;
        assert_eq!(read(&blob(&server), 0, 10).await.unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
    }
    assert!(Rewrite::new("ftp", "").is_err() && Rewrite::new("", "a/b").is_err());
}

#[tokio::test]
async fn sizes_come_from_head_or_from_a_range() {
    let context = ReadContext::on_demand(None);
    let good = server(|asked| (asked.method == "HEAD").then(|| Reply::new(200, data()))).await;
    let blob_of_good = blob(&good);
    assert_eq!(blob_of_good.size(&context).await.unwrap(), 200_000);
    assert_eq!(blob_of_good.size(&context).await.unwrap(), 200_000);
    assert_eq!(good.asked().len(), 1);
    let no_head = server(|asked| (asked.method == "HEAD").then(|| Reply::new(405, ""))).await;
    assert_eq!(blob(&no_head).size(&context).await.unwrap(), 200_000);
    let missing = server(|_| Some(Reply::new(404, ""))).await;
    assert_eq!(blob(&missing).size(&context).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn only_digests_name_blobs() {
    let client = RegistryClient::new("r.example.com", options()).unwrap();
    assert!(RegistrySource::new(client.clone(), "A/b", Rewrite::default(), QUICK).is_err());
    let source = RegistrySource::new(client, "a/b", Rewrite::default(), QUICK).unwrap();
    assert_eq!(source.blob(&BlobId::new("x").unwrap()).unwrap_err().kind(), ErrorKind::Invalid);
}
