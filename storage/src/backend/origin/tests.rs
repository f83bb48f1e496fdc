use super::*;

/// The server `host`, another one for each test.
fn origin(host: &str, limits: Limits) -> Arc<Origin> {
    Origins::new(limits, Route::default()).of(&Url::parse(&format!("https://{host}/")).unwrap())
}

fn prefetch() -> ReadContext {
    ReadContext { priority: Priority::Prefetch, ..ReadContext::on_demand(None) }
}

#[test]
fn servers_are_told_apart_and_bounded() {
    let origins = Origins::new(Limits { requests: 7, ..Limits::default() }, Route::default());
    let of = |url: &str| origins.of(&Url::parse(url).unwrap());
    let first = of("https://a.io/x");
    first.refuses_many("test");
    assert!(!of("https://a.io:443/y?z").takes_many());
    assert!(of("http://a.io/").takes_many() && of("https://a.io:444/").takes_many());
    let second = of("https://b.io/");
    second.retried();
    for i in 0..MAX_ORIGINS * 2 {
        of(&format!("https://h{i}.io/"));
        // One that is used again and again stays, whatever else comes and goes.
        assert_eq!(of("https://often.io/").snapshot().retries, i as u64);
        of("https://often.io/").retried();
    }
    assert!(origins.known().len() <= MAX_ORIGINS);
    assert_eq!(of("https://b.io/").snapshot().retries, 1, "what is in use was forgotten");
}

/// Each of twenty mounts had a budget of its own for the registry of all of them.
#[tokio::test]
async fn clients_share_what_they_know_of_a_server() {
    let limits = Limits { requests: 4, ..Limits::default() };
    let via = |proxy: &str| Route { proxy: Some(Secret::new(proxy)), ..Route::default() };
    let url = Url::parse("https://shared.io/v2/").unwrap();
    let of = |limits, route| Origins::new(limits, route).of(&url);
    let (first, second) = (of(limits, Route::default()), of(limits, Route::default()));
    let others = [
        of(Limits { requests: 5, ..limits }, Route::default()),
        of(limits, via("http://p:1")),
        of(limits, via("http://p:2")),
        of(limits, Route { unix_socket: Some("/s".into()), ..Route::default() }),
    ];
    let now = ReadContext::on_demand(Some(Instant::now()));
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(first.admit(&now).await.unwrap());
    }
    assert_eq!(second.admit(&now).await.unwrap_err().error.kind(), ErrorKind::TimedOut);
    for other in &others {
        assert!(other.admit(&now).await.is_ok());
    }
    held[0].answered(None, Some(Duration::from_secs(30)));
    assert!(second.snapshot().paused && others.iter().all(|other| !other.snapshot().paused));
    // What was asked is each client's own.
    assert_eq!((first.snapshot().requests, second.snapshot().requests), (4, 0));
    drop((held, first, second));
    assert!(!of(limits, Route::default()).snapshot().paused, "a server that nobody speaks to is kept");
}

#[tokio::test]
async fn places_are_bounded_and_prefetch_leaves_some() {
    let origin = origin("places.io", Limits { requests: 8, ..Limits::default() });
    let now = ReadContext::on_demand(Some(Instant::now()));
    let late = ReadContext { deadline: now.deadline, ..prefetch() };
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(origin.admit(&late).await.unwrap());
    }
    assert_eq!(origin.admit(&late).await.unwrap_err().error.kind(), ErrorKind::TimedOut);
    for _ in 0..2 {
        held.push(origin.admit(&now).await.unwrap());
    }
    let err = origin.admit(&now).await.unwrap_err().error;
    assert!(err.kind() == ErrorKind::TimedOut && err.to_string().contains("https://places.io"), "{err}");
    held.pop();
    assert!(origin.admit(&now).await.is_ok());
}

#[tokio::test]
async fn retry_after_holds_all_back_to_their_deadline() {
    let origin =
        origin("pause.io", Limits { retry_after_cap: Duration::from_secs(3600), ..Limits::default() });
    let mut ticket = origin.admit(&ReadContext::on_demand(None)).await.unwrap();
    ticket.answered(None, Some(Duration::from_secs(7200)));
    drop(ticket);
    assert!(origin.snapshot().paused);
    let soon = ReadContext::on_demand(Some(Instant::now() + Duration::from_secs(60)));
    let err = origin.admit(&soon).await.unwrap_err().error;
    assert!(err.kind() == ErrorKind::TimedOut && err.to_string().contains("Retry-After"), "{err}");
    let context = prefetch();
    context.cancel.cancel();
    assert_eq!(origin.admit(&context).await.unwrap_err().error.kind(), ErrorKind::Cancelled);
}

#[tokio::test]
async fn an_open_breaker_lets_one_reader_try_for_all() {
    let origin = origin("breaker.io", Limits::default());
    let context = ReadContext::on_demand(None);
    for _ in 0..5 {
        origin.admit(&context).await.unwrap().failed("GET x: 503".to_owned(), None);
    }
    let failure = origin.admit(&prefetch()).await.unwrap_err();
    assert!(!failure.passing && failure.error.to_string().contains("GET x: 503"), "{failure:?}");

    let mut probe = origin.admit(&context).await.unwrap();
    let waiting = tokio::spawn({
        let origin = Arc::clone(&origin);
        async move { origin.admit(&ReadContext::on_demand(None)).await }
    });
    // The other reader queues before the probe ends.
    tokio::task::yield_now().await;
    probe.failed("GET x: 502".to_owned(), None);
    let failure = waiting.await.unwrap().unwrap_err();
    assert!(failure.passing && failure.error.to_string().contains("GET x: 502"), "{failure:?}");

    origin.admit(&context).await.unwrap().answered(None, None);
    assert!(origin.admit(&prefetch()).await.is_ok());
    let snapshot = origin.snapshot();
    assert_eq!((snapshot.failures, snapshot.breaker_opens, snapshot.breaker_open), (6, 1, false));
}
