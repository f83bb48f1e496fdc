use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::backend::fault_server::{Asked, FaultServer, Reply};
use crate::digest::{DigestAlgorithm, TaggedDigest};
use crate::oci::manifest::{Document, MAX_MANIFEST_SIZE};
use crate::oci::reference::Reference;

const MANIFEST: &str = r#"{"schemaVersion":2,"layers":[]}"#;

fn quick() -> RetryPolicy {
    let tiny = Duration::from_micros(100);
    RetryPolicy { on_demand: 2, base: tiny, cap: tiny, retry_after_cap: tiny, ..RetryPolicy::COMMANDS }
}

fn client(server: &FaultServer, login: Credentials) -> RegistryClient {
    let options =
        RegistryOptions { login: Login::Fixed(login), retry: quick(), ..RegistryOptions::default() };
    RegistryClient::new(server.host(), options).unwrap()
}

fn login() -> Credentials {
    // user:hunter2
    Credentials::from_base64("dXNlcjpodW50ZXIy").unwrap()
}

fn reference(server: &FaultServer) -> Reference {
    format!("{}/a/b:t", server.host()).parse().unwrap()
}

async fn get(client: &RegistryClient, server: &FaultServer) -> Result<Document> {
    client.get_manifest(&reference(server), &ReadContext::on_demand(None)).await
}

/// Registry and token server in one: wants a bearer token that names the current
/// generation, and hands it out as `tokens` says.
async fn bearer(
    generation: Arc<AtomicUsize>,
    tokens: impl Fn(&Asked, String) -> Reply + Send + Sync + 'static,
) -> FaultServer {
    FaultServer::start(move |asked| {
        let token = format!("token-{}", generation.load(Ordering::SeqCst));
        if asked.path.starts_with("/token") {
            return tokens(asked, format!(r#"{{"token":"{token}","expires_in":300}}"#));
        }
        if asked.authorization() == format!("Bearer {token}") {
            return Reply::new(200, MANIFEST);
        }
        let host = asked.headers["host"].to_str().unwrap();
        Reply::unauthorized(&format!(
            r#"Bearer realm="http://{host}/token",service="svc",scope="repository:a/b:pull""#
        ))
    })
    .await
}

fn count(server: &FaultServer, prefix: &str) -> usize {
    server.asked().iter().filter(|asked| asked.path.starts_with(prefix)).count()
}

#[tokio::test]
async fn anonymous_tokens_are_fetched_kept_and_renewed_after_401() {
    let generation = Arc::new(AtomicUsize::new(0));
    let server = bearer(generation.clone(), |_, answer| Reply::new(200, answer)).await;
    let client = client(&server, Credentials::Anonymous);
    get(&client, &server).await.unwrap();
    get(&client, &server).await.unwrap();
    let asked = server.asked();
    assert_eq!(asked.len(), 4);
    assert_eq!(
        (asked[1].method.as_str(), asked[1].path.as_str()),
        ("GET", "/token?service=svc&scope=repository%3Aa%2Fb%3Apull&client_id=nydus-registry-client")
    );
    assert!(asked[1].authorization().is_empty());
    // The token expires before its time.
    generation.store(1, Ordering::SeqCst);
    get(&client, &server).await.unwrap();
    assert_eq!((count(&server, "/token"), count(&server, "/v2/")), (2, 5));
}

#[tokio::test]
async fn passwords_are_posted_and_fall_back_to_a_query() {
    let server = bearer(Arc::default(), |asked, answer| {
        let form = String::from_utf8_lossy(&asked.body);
        assert!(form.contains("grant_type=password&username=user&password=hunter2"), "{form}");
        Reply::new(200, answer)
    })
    .await;
    get(&client(&server, login()), &server).await.unwrap();
    assert_eq!(count(&server, "/token"), 1);

    let server = bearer(Arc::default(), |asked, answer| match asked.method.as_str() {
        "GET" if asked.authorization() == "Basic dXNlcjpodW50ZXIy" => Reply::new(200, answer),
        "GET" => Reply::new(401, ""),
        _ => Reply::new(404, ""),
    })
    .await;
    get(&client(&server, login()), &server).await.unwrap();
    assert_eq!(count(&server, "/token"), 2);
}

#[tokio::test]
async fn identity_tokens_are_exchanged() {
    let server = bearer(Arc::default(), |asked, answer| {
        let form = String::from_utf8_lossy(&asked.body);
        Reply::new(
            if form.contains("grant_type=refresh_token&refresh_token=idt") { 200 } else { 401 },
            answer,
        )
    })
    .await;
    let identity = Credentials::IdentityToken(Secret::new("idt"));
    get(&client(&server, identity), &server).await.unwrap();
}

#[tokio::test]
async fn refused_logins_name_the_remedy_and_no_secret() {
    let server = bearer(Arc::default(), |_, _| Reply::new(401, "")).await;
    let err = get(&client(&server, login()), &server).await.unwrap_err();
    let text = format!("{err} {err:?}");
    assert_eq!(err.kind(), ErrorKind::Denied);
    assert!(text.contains(&format!("docker login {}", server.host())) && !text.contains("hunter2"), "{text}");

    // A token that does not help is not fetched again and again.
    let server = bearer(Arc::default(), |_, _| Reply::new(200, r#"{"token":"useless"}"#)).await;
    let err = get(&client(&server, login()), &server).await.unwrap_err();
    assert_eq!((err.kind(), count(&server, "/token")), (ErrorKind::Denied, 1));
    assert!(!format!("{err} {err:?}").contains("useless"));

    // Nor by many who ask one behind the other.
    let server = bearer(Arc::default(), |_, _| Reply::new(403, "")).await;
    let refused = client(&server, login());
    for _ in 0..20 {
        assert_eq!(get(&refused, &server).await.unwrap_err().kind(), ErrorKind::Denied);
    }
    assert_eq!(count(&server, "/token"), 2);

    let server = FaultServer::start(|_| Reply::unauthorized("Negotiate")).await;
    let err = get(&client(&server, login()), &server).await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn basic_logins_are_sent_after_the_first_challenge() {
    let server = FaultServer::start(|asked| match asked.authorization() {
        "Basic dXNlcjpodW50ZXIy" => Reply::new(200, MANIFEST),
        _ => Reply::unauthorized("Basic realm=\"Registry Realm\""),
    })
    .await;
    let user = client(&server, login());
    get(&user, &server).await.unwrap();
    get(&user, &server).await.unwrap();
    assert_eq!(server.asked().len(), 3);
    let err = get(&client(&server, Credentials::Anonymous), &server).await.unwrap_err();
    assert!(err.kind() == ErrorKind::Denied && err.to_string().contains("docker login"), "{err}");
    // A hot change takes effect with the next request.
    let other = client(&server, Credentials::from_base64("dTp3cm9uZw==").unwrap());
    assert_eq!(get(&other, &server).await.unwrap_err().kind(), ErrorKind::Denied);
    other.set_credentials(login());
    get(&other, &server).await.unwrap();
}

#[tokio::test]
async fn a_given_token_is_used_until_it_is_refused() {
    let generation = Arc::new(AtomicUsize::new(7));
    let server = bearer(generation.clone(), |_, answer| Reply::new(200, answer)).await;
    let options = RegistryOptions {
        login: Login::Fixed(Credentials::Anonymous),
        token: Some(Secret::new("token-7")),
        retry: quick(),
        ..RegistryOptions::default()
    };
    let client = RegistryClient::new(server.host(), options).unwrap();
    get(&client, &server).await.unwrap();
    assert_eq!(server.asked().len(), 1);
    generation.store(8, Ordering::SeqCst);
    get(&client, &server).await.unwrap();
    assert_eq!(count(&server, "/token"), 1);
}

#[tokio::test]
async fn many_readers_fetch_one_token() {
    let server = bearer(Arc::default(), |_, answer| Reply::new(200, answer)).await;
    let client = client(&server, Credentials::Anonymous);
    let reads = (0..16).map(|_| get(&client, &server));
    for result in futures_util::future::join_all(reads).await {
        result.unwrap();
    }
    assert_eq!(count(&server, "/token"), 1);
}

#[tokio::test]
async fn wrong_manifests_are_refused() {
    let context = ReadContext::on_demand(None);
    let server = FaultServer::start(|_| Reply::new(200, MANIFEST)).await;
    let client_ = client(&server, Credentials::Anonymous);
    let algorithm = DigestAlgorithm::Sha256;
    let right = TaggedDigest { algorithm, digest: algorithm.digest(MANIFEST.as_bytes()) };
    let wrong = TaggedDigest { algorithm, digest: algorithm.digest(b"other") };
    let at = |digest| reference(&server).at_digest(digest);
    assert_eq!(client_.get_manifest(&at(right), &context).await.unwrap().digest, right);
    let err = client_.get_manifest(&at(wrong), &context).await.unwrap_err();
    assert!(err.kind() == ErrorKind::Corrupt && err.to_string().contains(&right.to_string()), "{err}");

    let server =
        FaultServer::start(move |_| Reply::new(200, MANIFEST).header("docker-content-digest", wrong)).await;
    let err = get(&client(&server, Credentials::Anonymous), &server).await.unwrap_err();
    assert_eq!((err.kind(), server.asked().len()), (ErrorKind::Corrupt, 1));

    let server = FaultServer::start(|_| Reply::new(200, vec![b' '; MAX_MANIFEST_SIZE as usize + 1])).await;
    assert_eq!(
        get(&client(&server, Credentials::Anonymous), &server).await.unwrap_err().kind(),
        ErrorKind::Invalid
    );

    let server = FaultServer::start(|asked| match asked.number {
        0 => Reply::new(200, MANIFEST).cut_after(5),
        1 => Reply::new(307, "").header("location", "/elsewhere"),
        _ => Reply::new(200, MANIFEST),
    })
    .await;
    assert_eq!(get(&client(&server, Credentials::Anonymous), &server).await.unwrap().digest, right);
    assert_eq!(server.asked()[2].path, "/elsewhere");

    let server = FaultServer::start(|_| Reply::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#)).await;
    let err = get(&client(&server, Credentials::Anonymous), &server).await.unwrap_err();
    assert!(err.kind() == ErrorKind::NotFound && err.to_string().contains("a/b:t"), "{err}");
}

#[tokio::test]
async fn heads_tell_what_is_there() {
    let context = ReadContext::on_demand(None);
    let digest =
        TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest: DigestAlgorithm::Sha256.digest(b"x") };
    let server = FaultServer::start(move |asked| match asked.path.as_str() {
        "/v2/a/b/manifests/t" => Reply::new(200, "").header("docker-content-digest", digest),
        "/v2/a/c/manifests/latest" => Reply::new(404, ""),
        path if path.starts_with("/v2/a/b/blobs/") => Reply::new(200, "12345"),
        _ => Reply::new(404, ""),
    })
    .await;
    let client = client(&server, Credentials::Anonymous);
    assert_eq!(client.manifest_digest(&reference(&server), &context).await.unwrap(), Some(digest));
    let other = format!("{}/a/c", server.host()).parse().unwrap();
    assert_eq!(client.manifest_digest(&other, &context).await.unwrap(), None);
    assert_eq!(client.blob_size("a/b", digest, &context).await.unwrap(), Some(5));
    assert_eq!(client.blob_size("a/c", digest, &context).await.unwrap(), None);
}

#[tokio::test]
async fn streamed_bodies_are_not_repeated_by_themselves() {
    let server = FaultServer::start(|asked| match asked.authorization() {
        "Basic dXNlcjpodW50ZXIy" => Reply::new(201, asked.body.clone()),
        _ => Reply::unauthorized("Basic realm=x"),
    })
    .await;
    let client = client(&server, login());
    let context = ReadContext::on_demand(None);
    let put = || {
        let mut call =
            Call::new(Method::PUT, client.url("a/b/blobs/uploads/x").unwrap(), Access::push("a/b"));
        let stream = futures_util::stream::iter([Ok::<_, std::io::Error>("by"), Ok("tes")]);
        call.body = Some(Body::wrap_stream(stream));
        client.send(call, &context)
    };
    let failure = put().await.unwrap_err();
    assert!(failure.passing, "{failure:?}");
    let answer = put().await.unwrap();
    assert_eq!(answer.bytes(100, &context).await.unwrap(), b"bytes");
}

#[tokio::test]
async fn credentials_stay_at_home() {
    let elsewhere = FaultServer::start(|_| Reply::unauthorized("Basic realm=x")).await;
    let server = FaultServer::start(|asked| match asked.authorization() {
        "" => Reply::unauthorized("Basic realm=x"),
        _ => Reply::new(200, MANIFEST),
    })
    .await;
    let client = client(&server, login());
    get(&client, &server).await.unwrap();
    let url = Url::parse(&format!("http://{}/upload", elsewhere.host())).unwrap();
    let call = Call::new(Method::PUT, url, Access::push("a/b"));
    let answer = client.send(call, &ReadContext::on_demand(None)).await.unwrap();
    assert_eq!(answer.status(), 401);
    assert!(elsewhere.asked().iter().all(|asked| asked.authorization().is_empty()));
}

#[tokio::test]
async fn only_the_careless_are_served_without_tls() {
    let server = FaultServer::start(|asked| match asked.method.as_str() {
        "GET" => Reply::new(200, MANIFEST),
        _ => Reply::new(400, ""),
    })
    .await;
    let with = |skip_verify| {
        let http = HttpOptions { skip_verify, ..HttpOptions::default() };
        let login = Login::Fixed(Credentials::Anonymous);
        let options = RegistryOptions { http, scheme: Scheme::Https, login, token: None, retry: quick() };
        RegistryClient::new(server.host(), options).unwrap()
    };
    assert_eq!(get(&with(false), &server).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(server.asked().is_empty());
    let careless = with(true);
    get(&careless, &server).await.unwrap();
    get(&careless, &server).await.unwrap();
    assert_eq!((server.asked().len(), server.connections()), (2, 3 + 1 + 1));
}

#[tokio::test]
async fn this_machine_is_asked_for_tls_first_by_those_who_name_an_authority() {
    let server = FaultServer::start(|_| Reply::new(200, MANIFEST)).await;
    let authority = concat!(env!("CARGO_MANIFEST_DIR"), "/src/oci/client/authority.pem");
    for (ca_files, in_vain) in [(Vec::new(), 0), (vec![authority.into()], 1)] {
        let before = (server.asked().len(), server.connections());
        let http = HttpOptions { ca_files, ..HttpOptions::default() };
        let login = Login::Fixed(Credentials::Anonymous);
        let options = RegistryOptions { http, login, retry: quick(), ..RegistryOptions::default() };
        let client = RegistryClient::new(server.host(), options).unwrap();
        get(&client, &server).await.unwrap();
        get(&client, &server).await.unwrap();
        let after = (server.asked().len(), server.connections());
        assert_eq!((after.0 - before.0, after.1 - before.1), (2, 1 + in_vain));
    }
}

#[test]
fn tls_is_not_left_by_a_redirect() {
    let url = |text| Url::parse(text).unwrap();
    for (from, to, downgrade) in [
        ("https://r.io/v2/", "http://s.io/x", true),
        ("https://r.io/v2/", "https://s.io/x", false),
        ("http://r.io/v2/", "http://s.io/x", false),
        ("http://r.io/v2/", "https://s.io/x", false),
    ] {
        assert_eq!(is_downgrade(&url(from), &url(to)), downgrade, "{from} {to}");
    }
}

/// With `skip_verify`, any answer without TLS was taken for the registry's, and the client stayed there.
#[tokio::test]
async fn what_is_no_registry_is_not_spoken_to_without_tls() {
    let pages: [fn() -> Reply; 3] = [
        || Reply::new(301, "").header("location", "https://elsewhere.invalid/v2/"),
        || Reply::new(200, "<html>").header("content-type", "text/html; charset=utf-8"),
        || Reply::new(503, ""),
    ];
    for page in pages {
        let server = FaultServer::start(move |asked| match asked.number {
            0..3 => page(),
            _ => Reply::new(200, MANIFEST),
        })
        .await;
        let http = HttpOptions { skip_verify: true, ..HttpOptions::default() };
        let login = Login::Fixed(Credentials::Anonymous);
        let options = RegistryOptions { http, scheme: Scheme::Https, login, token: None, retry: quick() };
        let client = RegistryClient::new(server.host(), options).unwrap();
        let err = get(&client, &server).await.unwrap_err();
        assert_eq!((err.kind(), server.asked().len()), (ErrorKind::Unavailable, 3), "{err}");
        assert!(!client.inner.settled.load(Ordering::Relaxed) && !client.inner.plain.load(Ordering::Relaxed));
        get(&client, &server).await.unwrap();
        assert!(client.inner.plain.load(Ordering::Relaxed));
    }
}

#[tokio::test]
async fn a_server_that_is_down_is_not_one_without_tls() {
    let server = FaultServer::start(|_| Reply::new(200, MANIFEST)).await;
    let http = Http::new(&HttpOptions::default()).unwrap();
    let ask = async || {
        let url = Url::parse(&format!("https://{}/v2/", server.host())).unwrap();
        http.send(Request::new(Method::GET, url), &ReadContext::on_demand(None)).await.unwrap_err().error
    };
    assert!(is_tls_refused(&ask().await));
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = Url::parse(&format!("https://{}/v2/", gone.local_addr().unwrap())).unwrap();
    drop(gone);
    let failure = http.send(Request::new(Method::GET, url), &ReadContext::on_demand(None)).await.unwrap_err();
    assert!(failure.passing && !is_tls_refused(&failure.error), "{failure:?}");
}

/// A registry that answers in TLS has no login sent in clear, whatever it might have been.
#[tokio::test]
async fn the_clear_is_for_registries_in_the_clear() {
    let server =
        FaultServer::start(|_| Reply::unauthorized(r#"Bearer realm="http://0.0.0.0:1/token",service="s""#))
            .await;
    let with = |scheme| {
        let http = HttpOptions { skip_verify: true, ..HttpOptions::default() };
        let options =
            RegistryOptions { http, scheme, login: Login::Fixed(login()), token: None, retry: quick() };
        RegistryClient::new(server.host(), options).unwrap()
    };
    let (secure, plain) = (with(Scheme::Https), with(Scheme::Http));
    let challenge = || Challenge::parse(r#"Bearer realm="http://0.0.0.0:1/token""#);
    let (access, context) = (Access::pull("a/b"), ReadContext::on_demand(None));
    let ask = async |client: &RegistryClient| {
        client.inner.auth.renew(&access, challenge(), None, &context).await.unwrap_err().error
    };
    assert!(ask(&secure).await.to_string().contains("in clear"));
    assert!(!ask(&plain).await.to_string().contains("in clear"));
}

/// A page of an error that drips held up the read that met it.
#[tokio::test]
async fn pages_of_errors_are_not_waited_for() {
    let server = FaultServer::start(|asked| match asked.authorization() {
        "" => Reply::new(401, vec![b'x'; 4000]).header("www-authenticate", "Basic realm=x").drip_after(1),
        _ => Reply::new(200, MANIFEST),
    })
    .await;
    // 40 seconds for all of it.
    let context = ReadContext::on_demand(Some(std::time::Instant::now() + Duration::from_secs(20)));
    client(&server, login()).get_manifest(&reference(&server), &context).await.unwrap();
    let err = client(&server, Credentials::Anonymous)
        .get_manifest(&reference(&server), &context)
        .await
        .unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Denied, "{err}");
}

/// What one place refuses to everybody says nothing of the login: the blobs go on.
#[tokio::test]
async fn a_place_that_refuses_everybody_closes_no_other() {
    let server = FaultServer::start(|asked| match asked.path.contains("/closed") {
        false => Reply::new(200, MANIFEST),
        true => Reply::unauthorized("Basic realm=x"),
    })
    .await;
    for login in [login(), Credentials::Anonymous] {
        let client = client(&server, login);
        get(&client, &server).await.unwrap();
        let closed = format!("{}/a/b:closed", server.host()).parse().unwrap();
        let refused = client.get_manifest(&closed, &ReadContext::on_demand(None)).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Denied);
        get(&client, &server).await.unwrap();
    }
}
