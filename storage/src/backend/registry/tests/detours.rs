//! Mirrors and proxies.

use super::*;
use crate::backend::Supplier;
use crate::backend::health::HealthPolicy;
use crate::oci::auth::Secret;

fn health(ping: Option<String>) -> HealthPolicy {
    HealthPolicy {
        failures: 3,
        // With a ping soon, without one never.
        interval: if ping.is_some() { Duration::from_millis(1) } else { Duration::from_secs(3600) },
        pause: Duration::from_secs(300),
        ping: ping.map(|url| Url::parse(&url).unwrap()),
    }
}

fn mirror(server: &FaultServer, ping: Option<String>) -> MirrorOptions {
    MirrorOptions {
        host: format!("http://{}", server.host()),
        headers: vec![("x-key".to_owned(), "s3cr3t".to_owned())],
        login: false,
        health: health(ping),
    }
}

fn mirrored(origin: &FaultServer, mirrors: &[&FaultServer]) -> RegistrySource {
    mirrors.iter().fold(source(origin, Rewrite::default()), |source, server| {
        source.with_mirror(&mirror(server, None), options()).unwrap()
    })
}

/// Reads the right bytes and says who sent them.
async fn supplier(blob: &Arc<dyn Backend>, start: u64, len: u64) -> Supplier {
    let mut stream = blob.open(range(start, len), &ReadContext::on_demand(None)).await.unwrap();
    let supplier = stream.supplier();
    let mut all = Vec::new();
    while let Some(piece) = futures_util::StreamExt::next(&mut stream).await {
        all.extend_from_slice(&piece.unwrap());
    }
    assert!(all == data()[start as usize..(start + len) as usize], "wrong bytes");
    supplier
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_get_no_login() {
    let (first, second, origin) =
        (server(|_| Some(Reply::new(404, ""))).await, server(|_| None).await, server(|_| None).await);
    let login = Login::Fixed(Credentials::from_base64("dTpw").unwrap());
    let with_login = RegistryOptions { login, token: Some(Secret::new("given")), ..options() };
    let source = source(&origin, Rewrite::default())
        .with_mirror(&mirror(&first, None), with_login.clone())
        .unwrap()
        .with_mirror(&mirror(&second, None), with_login)
        .unwrap();
    let blob = source.blob(&blob_id()).unwrap();
    for i in 0..3 {
        assert_eq!(supplier(&blob, i * 100, 100).await, Supplier::Mirror);
    }
    // A blob that a mirror does not have is asked for once.
    assert_eq!((first.asked().len(), second.asked().len(), origin.asked().len()), (1, 3, 0));
    for asked in first.asked().iter().chain(&second.asked()) {
        assert!(asked.authorization().is_empty() && asked.headers["x-key"] == "s3cr3t");
    }
    assert!(!format!("{source:?} {blob:?}").contains("s3cr3t"));
}

#[tokio::test]
async fn the_login_goes_to_a_mirror_that_may_have_it() {
    let mirror_server = server(|asked| {
        (asked.authorization() != "Basic dTpw").then(|| Reply::unauthorized("Basic realm=\"x\""))
    })
    .await;
    let origin = server(|_| None).await;
    let login = Login::Fixed(Credentials::from_base64("dTpw").unwrap());
    for (may, wanted) in [(true, Supplier::Mirror), (false, Supplier::Origin)] {
        let mirror = MirrorOptions { login: may, ..mirror(&mirror_server, None) };
        let options = RegistryOptions { login: login.clone(), ..options() };
        let source = source(&origin, Rewrite::default()).with_mirror(&mirror, options).unwrap();
        assert_eq!(supplier(&source.blob(&blob_id()).unwrap(), 0, 10).await, wanted);
    }
}

/// A mirror's answer.
type Answering = fn(&Asked, &[u8]) -> Reply;

#[tokio::test]
async fn what_goes_wrong_at_a_mirror_costs_no_read() {
    let origin = server(|_| None).await;
    let data = data();
    let wrongs: [(&str, Answering); 6] = [
        ("500", |_, _| Reply::new(500, "")),
        ("403", |_, _| Reply::new(403, "")),
        ("416", |_, _| Reply::new(416, "")),
        ("another range", |_, _| Reply::new(206, "x").header("content-range", "bytes 0-0/9")),
        ("whole", |_, data| Reply::new(200, data.to_vec())),
        ("cut", |asked, data| Reply::ranged(asked, data).cut_after(100)),
    ];
    for (name, wrong) in wrongs {
        let data = data.clone();
        let bad = FaultServer::start(move |asked| wrong(asked, &data)).await;
        let blob = mirrored(&origin, &[&bad]).blob(&blob_id()).unwrap();
        for i in 0..6 {
            supplier(&blob, 5 + i * 20_000, 20_000).await;
        }
        let prefetch =
            ReadContext { priority: crate::backend::Priority::Prefetch, ..ReadContext::on_demand(None) };
        fetch(&*blob, range(7, 30_000), &prefetch).await.unwrap();
        assert!((1..=3).contains(&bad.asked().len()), "{name}: {}", bad.asked().len());
    }
    // One that is not there at all.
    let gone = server(|_| None).await;
    let source = mirrored(&origin, &[&gone]);
    drop(gone);
    assert_eq!(supplier(&source.blob(&blob_id()).unwrap(), 0, 10).await, Supplier::Origin);
}

#[tokio::test]
async fn a_mirror_that_answers_its_ping_is_used_again() {
    let well = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let state = Arc::clone(&well);
    let mirror_server = server(move |_| (!state.load(Ordering::SeqCst)).then(|| Reply::new(500, ""))).await;
    let origin = server(|_| None).await;
    let ping = Some(format!("http://{}/ping", mirror_server.host()));
    let source =
        source(&origin, Rewrite::default()).with_mirror(&mirror(&mirror_server, ping), options()).unwrap();
    let blob = source.blob(&blob_id()).unwrap();
    for _ in 0..5 {
        assert_eq!(supplier(&blob, 0, 10).await, Supplier::Origin);
    }
    let reads = |server: &FaultServer| server.asked().iter().filter(|a| a.path != "/ping").count();
    assert_eq!(reads(&mirror_server), 3);
    well.store(true, Ordering::SeqCst);
    while supplier(&blob, 0, 10).await != Supplier::Mirror {
        tokio::task::yield_now().await;
    }
    assert!(mirror_server.asked().iter().any(|asked| asked.path == "/ping"));
}

#[tokio::test]
async fn wrong_bytes_of_a_mirror_are_asked_for_elsewhere() {
    let liar = FaultServer::start(|asked| {
        let zeros = vec![0; 200_000];
        Reply::ranged(asked, &zeros)
    })
    .await;
    let origin = server(|_| None).await;
    let blob = mirrored(&origin, &[&liar]).blob(&blob_id()).unwrap();
    assert!(read(&blob, 100, 10).await.unwrap() == [0; 10]);
    assert!(!blob.distrust(Supplier::Origin.into()));
    let stream = blob.open(range(100, 10), &ReadContext::on_demand(None)).await.unwrap();
    assert!(blob.distrust(stream.sender()));
    assert_eq!(supplier(&blob, 100, 10).await, Supplier::Origin);
    assert_eq!((liar.asked().len(), origin.asked().len()), (2, 1));
}

/// All mirrors were left out for what one of them did.
#[tokio::test]
async fn only_the_one_that_lied_is_left_out() {
    let data = data();
    let wrong = vec![0; data.len()];
    let liar = FaultServer::start(move |asked| Reply::ranged(asked, &wrong)).await;
    let honest = server(|_| None).await;
    let origin = server(|_| None).await;
    let blob = mirrored(&origin, &[&liar, &honest]).blob(&blob_id()).unwrap();
    let stream = blob.open(range(100, 10), &ReadContext::on_demand(None)).await.unwrap();
    assert_eq!(stream.sender(), Sender { supplier: Supplier::Mirror, way: 1 });
    assert!(blob.distrust(stream.sender()));
    assert_eq!(supplier(&blob, 100, 10).await, Supplier::Mirror);
    assert_eq!((liar.asked().len(), honest.asked().len(), origin.asked().len()), (1, 1, 0));
}

/// It took the reader's time to its end: each byte in time, and never all of them.
#[tokio::test]
async fn a_mirror_whose_bodies_drip_is_left_before_the_deadline() {
    let data = data();
    let dripping = FaultServer::start(move |asked| Reply::ranged(asked, &data).drip_after(100)).await;
    let origin = server(|_| None).await;
    let blob = mirrored(&origin, &[&dripping]).blob(&blob_id()).unwrap();
    let context = ReadContext::on_demand(Some(Instant::now() + Duration::from_secs(4)));
    let mut stream = blob.open(range(5, 20_000), &context).await.unwrap();
    assert_eq!(stream.supplier(), Supplier::Mirror);
    let mut all = Vec::new();
    while let Some(piece) = futures_util::StreamExt::next(&mut stream).await {
        all.extend_from_slice(&piece.unwrap());
    }
    assert!(all == self::data()[5..20_005], "wrong bytes");
    assert_eq!(stream.supplier(), Supplier::Origin);
    assert!(origin.asked()[0].range.unwrap().0 >= 5 + 100, "what it brought came again");
    // Other reads do not begin there.
    assert_eq!(supplier(&blob, 0, 10).await, Supplier::Origin);
}

/// The head of an answer was success enough, so that one that breaks every body never failed in a row.
#[tokio::test]
async fn a_mirror_that_breaks_every_body_is_left_out() {
    let data = data();
    let bad = FaultServer::start(move |asked| Reply::ranged(asked, &data).cut_after(100)).await;
    let origin = server(|_| None).await;
    let source = mirrored(&origin, &[&bad]);
    for _ in 0..6 {
        // A blob whose body broke is asked for elsewhere: each is another one.
        check(&source.blob(&blob_id()).unwrap(), 0, 20_000).await;
    }
    assert_eq!(bad.asked().len(), 3);
}

#[tokio::test]
async fn many_ranges_come_from_mirrors_too() {
    let data = data();
    let mirror = FaultServer::start(move |asked| Reply::many(asked, &data)).await;
    let origin = server(|_| None).await;
    let blob = mirrored(&origin, &[&mirror]).blob(&blob_id()).unwrap();
    let ranges = [range(5, 10), range(100, 10)];
    let stream = blob.open_many(&ranges, &ReadContext::on_demand(None)).await.unwrap().unwrap();
    assert_eq!(stream.supplier(), Supplier::Mirror);
    assert_eq!((mirror.asked().len(), origin.asked().len()), (1, 0));
}

#[tokio::test]
async fn bytes_come_through_a_proxy_and_directly_if_it_fails() {
    let origin = server(|_| None).await;
    let data = data();
    let mode = Arc::new(AtomicUsize::new(200));
    let state = Arc::clone(&mode);
    let proxy = FaultServer::start(move |asked| match state.load(Ordering::SeqCst) {
        200 => Reply::ranged(asked, &data),
        status => Reply::new(status as u16, ""),
    })
    .await;
    let http =
        HttpOptions { proxy: Some(Secret::new(format!("http://u:s3cr3t@{}", proxy.host()))), ..http() };
    let options = RegistryOptions { http, ..options() };
    let through = ProxyOptions { use_http: false, health: health(None) };
    let source = source(&origin, Rewrite::default()).with_proxy(&through, options.clone()).unwrap();
    let blob = source.blob(&blob_id()).unwrap();
    assert_eq!(supplier(&blob, 0, 10).await, Supplier::Proxy);
    assert_eq!(proxy.asked()[0].path, format!("http://{}/v2/a/b/blobs/sha256:{}", origin.host(), blob_id()));
    assert!(proxy.asked()[0].headers.contains_key("proxy-authorization"));

    mode.store(403, Ordering::SeqCst);
    assert_eq!(read(&blob, 0, 10).await.unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(origin.asked().len(), 0);
    mode.store(502, Ordering::SeqCst);
    for _ in 0..5 {
        assert_eq!(supplier(&blob, 0, 10).await, Supplier::Origin);
    }
    assert_eq!(proxy.asked().len(), 2 + 3);
    assert!(!format!("{source:?} {options:?}").contains("s3cr3t"));
}

#[test]
fn mirrors_are_named_by_host_or_plain_url() {
    for (host, good) in [
        ("m.io", true),
        ("m.io:5000", true),
        ("https://m.io", true),
        ("http://m.io:5000/", true),
        ("http://m.io/sub", false),
        ("http://u:s3cr3t@m.io", false),
        ("ftp://m.io", false),
        ("", false),
    ] {
        let client = RegistryClient::new("r.io", options()).unwrap();
        let source = RegistrySource::new(client, "a/b", Rewrite::default(), QUICK).unwrap();
        let mirror =
            MirrorOptions { host: host.to_owned(), headers: Vec::new(), login: false, health: health(None) };
        match source.with_mirror(&mirror, options()) {
            Ok(_) => assert!(good, "{host}"),
            Err(e) => {
                assert!(!good && e.to_string().contains("mirror") && !e.to_string().contains("s3cr3t"), "{e}")
            }
        }
    }
}
