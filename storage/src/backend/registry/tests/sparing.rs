//! How servers are spared, and who is served first: breaker, Retry-After, hedges, connections.

use super::*;
use crate::backend::Priority;
use crate::metrics::OriginSnapshot;

fn prefetch() -> ReadContext {
    ReadContext { priority: Priority::Prefetch, ..ReadContext::on_demand(None) }
}

fn source_with(server: &FaultServer, limits: Limits) -> RegistrySource {
    let http = HttpOptions { limits, ..HttpOptions::default() };
    let client = RegistryClient::new(server.host(), RegistryOptions { http, ..options() }).unwrap();
    RegistrySource::new(client, "a/b", Rewrite::default(), QUICK).unwrap()
}

fn seen(source: &RegistrySource) -> OriginSnapshot {
    let mut all = source.origins();
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

#[tokio::test]
async fn a_hundred_reads_keep_their_connection() {
    let server = server(|_| None).await;
    let source = source(&server, Rewrite::default());
    let blob = source.blob(&blob_id()).unwrap();
    for i in 0..100 {
        check(&blob, i * 1900, 1900).await;
    }
    assert_eq!(server.asked().len(), 100);
    // One, and seldom another: a connection is put back when its answer has ended, just after the
    // reader has the last byte.
    assert!(server.connections() <= 5, "{}", server.connections());
    let seen = seen(&source);
    assert_eq!(
        (seen.requests, seen.failures, seen.retries, seen.hedges, seen.bytes),
        (100, 0, 0, 0, 190_000)
    );
    assert_eq!(seen.origin, format!("http://{}", server.host()));
}

#[tokio::test]
async fn a_broken_server_is_spared_by_prefetch_and_tried_by_readers() {
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let state = Arc::clone(&broken);
    let server = server(move |_| state.load(Ordering::SeqCst).then(|| Reply::new(503, "down"))).await;
    let open = Duration::from_secs(3600);
    let breaker = BreakerPolicy { failures: 3, open, cap: open };
    let source = source_with(&server, Limits { breaker, ..Limits::default() });
    let blob = source.blob(&blob_id()).unwrap();

    let err = read(&blob, 0, 10).await.unwrap_err();
    assert_eq!((err.kind(), server.asked().len()), (ErrorKind::Unavailable, 5));
    let err = fetch(&*blob, range(0, 10), &prefetch()).await.unwrap_err();
    assert!(err.kind() == ErrorKind::Unavailable && err.to_string().contains("prefetch waits"), "{err}");
    assert_eq!(server.asked().len(), 5);
    let before = seen(&source);
    assert_eq!((before.failures, before.retries, before.breaker_opens, before.breaker_open), (5, 4, 1, true));

    broken.store(false, Ordering::SeqCst);
    check(&blob, 0, 10).await;
    fetch(&*blob, range(0, 10), &prefetch()).await.unwrap();
    assert!(!seen(&source).breaker_open);
    assert_eq!(server.asked().len(), 7);
}

/// The head of an answer was success enough.
#[tokio::test]
async fn a_server_that_breaks_every_body_is_spared() {
    let data = data();
    let server = server(move |asked| Some(Reply::ranged(asked, &data).cut_after(10))).await;
    let open = Duration::from_secs(3600);
    let breaker = BreakerPolicy { failures: 3, open, cap: open };
    let source = source_with(&server, Limits { breaker, ..Limits::default() });
    let err = read(&source.blob(&blob_id()).unwrap(), 0, 1000).await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Unavailable);
    let seen = seen(&source);
    assert_eq!((seen.failures, seen.breaker_open), (5, true));
}

#[tokio::test]
async fn a_server_that_wants_peace_is_left_in_peace_by_all() {
    let server = server(|_| Some(Reply::new(429, "").header("retry-after", "3600"))).await;
    let source =
        source_with(&server, Limits { retry_after_cap: Duration::from_secs(3600), ..Limits::default() });
    let blob = source.blob(&blob_id()).unwrap();
    let soon = ReadContext::on_demand(Some(Instant::now() + Duration::from_secs(30)));
    for context in [soon.clone(), ReadContext { priority: Priority::Prefetch, ..soon }] {
        let err = fetch(&*blob, range(0, 10), &context).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::TimedOut, "{err}");
    }
    assert_eq!(server.asked().len(), 1);
    assert!(seen(&source).paused && !seen(&source).breaker_open);
}

#[tokio::test]
async fn a_late_answer_is_overtaken_by_a_second_request() {
    let data = data();
    // After ten quick answers one request is never answered.
    let server =
        FaultServer::start_late(move |asked| (Reply::ranged(asked, &data), asked.number == 10)).await;
    let source = source_with(&server, Limits::default());
    let blob = source.blob(&blob_id()).unwrap();
    for i in 0..10 {
        check(&blob, i * 100, 100).await;
    }
    check(&blob, 5000, 100).await;
    let asked = server.asked();
    assert_eq!((asked.len(), asked[10].range), (12, asked[11].range));
    let first = seen(&source);
    assert_eq!((first.requests, first.hedges, first.hedge_wins, first.failures), (12, 1, 1, 0));
    // The second request had a connection of its own.
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn prefetch_and_what_can_not_be_afforded_is_not_sent_twice() {
    let data = data();
    let server =
        FaultServer::start_late(move |asked| (Reply::ranged(asked, &data), asked.number >= 10)).await;
    for (limits, context, asked) in [
        (Limits::default(), prefetch(), 11),
        (Limits { hedge: false, ..Limits::default() }, ReadContext::on_demand(None), 12),
    ] {
        let source = source_with(&server, limits);
        let blob = source.blob(&blob_id()).unwrap();
        while server.asked().len() < 10 {
            check(&blob, 0, 100).await;
        }
        let deadline = Some(Instant::now() + Duration::from_millis(300));
        let context = ReadContext { deadline, ..context };
        assert_eq!(fetch(&*blob, range(0, 10), &context).await.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!((server.asked().len(), seen(&source).hedges), (asked, 0));
    }
}

#[tokio::test]
async fn readers_that_come_together_log_in_once() {
    let data = data();
    let server = Arc::new(std::sync::OnceLock::<String>::new());
    let host = Arc::clone(&server);
    let registry = FaultServer::start(move |asked| {
        let host = host.get().unwrap();
        if asked.path.starts_with("/token") {
            return Reply::new(200, r#"{"token":"t","expires_in":300}"#);
        }
        match asked.authorization() {
            "Bearer t" => Reply::ranged(asked, &data),
            _ => Reply::unauthorized(&format!(r#"Bearer realm="http://{host}/token",service="s""#)),
        }
    })
    .await;
    server.set(registry.host().to_owned()).unwrap();
    let blob = blob(&registry);
    let reads = (0..20usize).map(|i| {
        let blob = Arc::clone(&blob);
        tokio::spawn(async move { check(&blob, i * 100, 100).await })
    });
    for read in reads.collect::<Vec<_>>() {
        read.await.unwrap();
    }
    // One token and twenty answers; only who came before the first answer was challenged.
    let asked = registry.asked();
    let tokens = asked.iter().filter(|asked| asked.path.starts_with("/token")).count();
    let served = asked.iter().filter(|asked| asked.authorization() == "Bearer t").count();
    assert_eq!((tokens, served), (1, 20));
    assert!((1..=4).contains(&(asked.len() - 21)), "{}", asked.len());
}
