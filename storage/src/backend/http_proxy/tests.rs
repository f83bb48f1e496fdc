use super::*;
use crate::backend::fault_server::{self, Asked, FaultServer, QUICK, Reply};
use crate::engine::fetch;

type Fault = Box<dyn Fn(&Asked) -> Reply + Send + Sync>;

fn data() -> Vec<u8> {
    fault_server::data(100_000)
}

async fn server(plan: impl Fn(&Asked) -> Option<Reply> + Send + Sync + 'static) -> FaultServer {
    fault_server::planned(data(), plan).await
}

fn blob(addr: &str, path: &str) -> Arc<dyn Backend> {
    let source = HttpProxySource::new(addr, path, HttpOptions::default(), QUICK).unwrap();
    assert_eq!(source.kind(), "http-proxy");
    source.blob(&BlobId::new("b10b").unwrap()).unwrap()
}

async fn read(blob: &Arc<dyn Backend>, start: u64, len: u64) -> Result<Vec<u8>> {
    fetch(&**blob, ByteRange::new(start, len).unwrap(), &ReadContext::on_demand(None)).await
}

/// Reads the size and some ranges and expects the right ones.
async fn check(blob: &Arc<dyn Backend>) {
    assert_eq!(blob.size(&ReadContext::on_demand(None)).await.unwrap(), 100_000);
    for (start, len) in [(0, 10), (99_990, 10), (5, 99_000)] {
        let bytes = read(blob, start, len).await.unwrap();
        assert!(bytes == data()[start as usize..][..len as usize], "wrong bytes at {start}");
    }
}

#[tokio::test]
async fn objects_lie_below_address_and_path() {
    let server = server(|_| None).await;
    for (suffix, path, asked) in [
        ("", "", "/b10b"),
        ("/", "/", "/b10b"),
        ("/a/", "", "/a/b10b"),
        ("", "x/y", "/x/y/b10b"),
        ("/a", "/x//y/", "/a/x/y/b10b"),
    ] {
        let before = server.asked().len();
        check(&blob(&format!("http://{}{suffix}", server.host()), path)).await;
        let log = server.asked();
        assert_eq!(log[before].method, Method::HEAD);
        assert!(log[before..].iter().all(|a| a.path == asked && a.authorization().is_empty()), "{log:?}");
    }
    assert_eq!(server.connections(), 5);
}

/// What the converter of the snapshotter does: a server of its own behind a socket.
#[tokio::test]
async fn a_unix_socket_serves_too_and_the_path_is_not_used() {
    let server = server(|_| None).await;
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("proxy.sock");
    let addr = socket.to_str().unwrap();
    let blob = blob(addr, "not/used");

    let err = read(&blob, 0, 1).await.unwrap_err();
    assert!(err.kind() == ErrorKind::Unavailable && err.to_string().contains(addr), "{err}");

    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let host = server.host().to_owned();
    let relay = tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut far = tokio::net::TcpStream::connect(&host).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut far).await });
        }
    });
    check(&blob).await;
    assert!(server.asked().iter().all(|asked| asked.path == "/b10b"));
    relay.abort();
}

#[tokio::test]
async fn passing_faults_pass_and_no_wrong_byte_gets_through() {
    let good = |asked: &Asked| Reply::ranged(asked, &data());
    let cases: [(&str, Fault); 5] = [
        ("503", Box::new(|_| Reply::new(503, "busy"))),
        ("cut", Box::new(move |asked| good(asked).cut_after(500))),
        ("range ignored", Box::new(|_| Reply::new(200, data()))),
        ("moved", Box::new(|asked| Reply::new(307, "").header("location", format!("{}?again", asked.path)))),
        ("429", Box::new(|_| Reply::new(429, "").header("retry-after", "1"))),
    ];
    for (name, fault) in cases {
        let server = server(move |asked| (asked.number == 0).then(|| fault(asked))).await;
        let blob = blob(&format!("http://{}", server.host()), "");
        let bytes = read(&blob, 1000, 50_000).await.unwrap();
        assert!(bytes == data()[1000..51_000], "{name}: wrong bytes");
        assert!(server.asked().len() <= 2, "{name}");
    }
}

#[tokio::test]
async fn lasting_faults_are_errors_that_say_why() {
    let wrong_range = |asked: &Asked| {
        let (start, end) = asked.range.unwrap_or((0, 1));
        let body = data()[start as usize..end as usize].to_vec();
        Reply::new(206, body).header("content-range", format!("bytes {}-{}/100000", start + 1, end))
    };
    let cases: [(Fault, ErrorKind, &str); 7] = [
        (Box::new(|_| Reply::new(403, "")), ErrorKind::Denied, "sends it no login"),
        (Box::new(|_| Reply::new(404, "")), ErrorKind::NotFound, "blob b10b of http://"),
        (Box::new(|_| Reply::new(503, "")), ErrorKind::Unavailable, "5 attempts"),
        (Box::new(wrong_range), ErrorKind::Corrupt, "is not the range"),
        (Box::new(|_| Reply::new(206, "x")), ErrorKind::Corrupt, "not one of bytes"),
        (Box::new(|_| Reply::new(200, "short")), ErrorKind::OutOfRange, "the blob has 5 bytes"),
        (Box::new(|_| Reply::new(302, "").header("location", "/again")), ErrorKind::Invalid, "redirects"),
    ];
    for (fault, kind, text) in cases {
        let server = server(move |asked| Some(fault(asked))).await;
        let blob = blob(&format!("http://{}", server.host()), "");
        let err = read(&blob, 10, 100).await.unwrap_err();
        assert_eq!(err.kind(), kind, "{err}");
        assert!(err.to_string().contains(text), "{text}: {err}");
    }
}

#[tokio::test]
async fn a_server_without_head_tells_the_size_beside_a_range() {
    for status in [405, 501, 204] {
        let server =
            server(move |asked| (asked.method == Method::HEAD).then(|| Reply::new(status, ""))).await;
        check(&blob(&format!("http://{}", server.host()), "")).await;
    }
    let server = server(|asked| (asked.method == Method::HEAD).then(|| Reply::new(404, ""))).await;
    let blob = blob(&format!("http://{}", server.host()), "");
    let err = blob.size(&ReadContext::on_demand(None)).await.unwrap_err();
    assert_eq!((err.kind(), server.asked().len()), (ErrorKind::NotFound, 1));
}

#[test]
fn addresses_are_checked_and_hold_no_login() {
    for addr in [
        "",
        "relative/path",
        "ftp://h/",
        "h:80",
        "http://",
        "http://u:s3cret@h/",
        "http://h/?q",
        "http://h/#f",
    ] {
        let err = HttpProxySource::new(addr, "", HttpOptions::default(), QUICK).unwrap_err();
        assert!(err.kind() == ErrorKind::Invalid && err.to_string().contains("`addr`"), "{err}");
        assert!(!err.to_string().contains("s3cret"), "{err}");
    }
}

#[tokio::test]
async fn a_far_range_of_a_server_without_ranges_is_refused() {
    let server =
        server(|_| Some(Reply::new(200, "x").header("content-length", 1u64 << 30).stall_after(1))).await;
    let blob = blob(&format!("http://{}", server.host()), "");
    let err = read(&blob, 65 << 20, 10).await.unwrap_err();
    assert_eq!((err.kind(), server.asked().len()), (ErrorKind::Unsupported, 1), "{err}");
}
