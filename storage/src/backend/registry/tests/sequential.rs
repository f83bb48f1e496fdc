//! Servers that ignore `Range`.

use super::*;

async fn whole_server() -> FaultServer {
    let data = data();
    FaultServer::start(move |_| Reply::new(200, data.clone())).await
}

#[tokio::test]
async fn the_blob_comes_once_whatever_is_read() {
    let server = whole_server().await;
    let blob = blob(&server);
    for (start, len) in [(5, 10), (123_456, 70_000), (0, 200_000), (199_999, 1), (0, 10)] {
        check(&blob, start, len).await;
    }
    let ranges = [range(5, 10), range(100, 10)];
    assert!(blob.open_many(&ranges, &ReadContext::on_demand(None)).await.unwrap().is_none());
    assert_eq!(server.asked().len(), 1);
    let err = read(&blob, 199_999, 2).await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::OutOfRange, "{err}");
}

#[tokio::test]
async fn readers_side_by_side_share_the_stream() {
    let server = whole_server().await;
    let source = source(&server, Rewrite::default());
    let first = source.blob(&blob_id()).unwrap();
    check(&first, 1, 10).await;
    // Another blob of a server that is known by now.
    let blob = source.blob(&blob_id()).unwrap();
    let reads = (0..20usize).map(|i| {
        let blob = Arc::clone(&blob);
        tokio::spawn(async move { check(&blob, i * 9_999, 10_000).await })
    });
    for read in reads.collect::<Vec<_>>() {
        read.await.unwrap();
    }
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn a_whole_blob_that_was_asked_for_whole_is_no_sign() {
    let server = whole_server().await;
    let blob = blob(&server);
    check(&blob, 0, 200_000).await;
    // Else this would come from what was kept.
    check(&blob, 0, 200_000).await;
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn a_stream_that_breaks_goes_on_behind_what_it_brought() {
    let plain = data();
    let server = FaultServer::start(move |asked| {
        let reply = Reply::new(200, plain.clone());
        match asked.number {
            0 => reply.cut_after(60_000),
            1 => Reply::new(503, ""),
            2 => reply.cut_after(120_000),
            _ => reply,
        }
    })
    .await;
    let blob = blob(&server);
    check(&blob, 150_000, 50_000).await;
    check(&blob, 0, 200_000).await;
    assert_eq!(server.asked().len(), 4);
}

#[tokio::test]
async fn a_stream_that_ends_for_good_is_an_error_and_may_be_begun_again() {
    let plain = data();
    let server = FaultServer::start(move |asked| match asked.number {
        0 => Reply::new(200, plain.clone()).cut_after(60_000),
        1 => Reply::new(404, ""),
        _ => Reply::new(200, plain.clone()),
    })
    .await;
    let blob = blob(&server);
    let err = read(&blob, 150_000, 10).await.unwrap_err();
    assert!(err.kind() == ErrorKind::NotFound && err.to_string().contains("404"), "{err}");
    check(&blob, 150_000, 10).await;
    assert_eq!(server.asked().len(), 3);
}

#[tokio::test]
async fn the_stream_stops_with_the_last_reader_and_deadlines_hold() {
    let plain = data();
    let server = FaultServer::start(move |_| Reply::new(200, plain.clone()).stall_after(60_000)).await;
    let blob = blob(&server);
    check(&blob, 100, 1000).await;
    let soon = ReadContext::on_demand(Some(Instant::now() + Duration::from_millis(50)));
    let err = fetch(&*blob, range(150_000, 10), &soon).await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::TimedOut);
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn a_server_that_learned_ranges_is_read_by_ranges_again() {
    let plain = data();
    let server = FaultServer::start(move |asked| match asked.number {
        0 => Reply::new(200, plain.clone()),
        _ => Reply::ranged(asked, &plain),
    })
    .await;
    let source = source(&server, Rewrite::default());
    check(&source.blob(&blob_id()).unwrap(), 100, 1000).await;
    let blob = source.blob(&blob_id()).unwrap();
    check(&blob, 100, 1000).await;
    check(&blob, 5000, 1000).await;
    assert_eq!(server.asked()[2].range, Some((5000, 6000)));
}

#[tokio::test]
async fn a_file_that_can_not_be_made_is_named() {
    let server = whole_server().await;
    let source = source(&server, Rewrite::default()).with_spool_dir("/nonexistent/spool".into());
    let err = read(&source.blob(&blob_id()).unwrap(), 5, 10).await.unwrap_err();
    assert!(
        err.to_string().contains("/nonexistent/spool") && err.to_string().contains("ignores Range"),
        "{err}"
    );
}

/// Pages that proxies and portals send with 200 were kept as the blob, for as long as it was mounted.
#[tokio::test]
async fn a_page_is_not_taken_for_the_blob() {
    let plain = data();
    let server = FaultServer::start(move |asked| match (asked.method.as_str(), asked.number) {
        ("HEAD", _) => Reply::new(200, plain.clone()),
        (_, 0) => Reply::new(200, vec![b'<'; 5000]),
        (_, 1) => Reply::new(200, vec![b'<'; 1_000_000]),
        _ => Reply::new(200, plain.clone()),
    })
    .await;
    let blob = source(&server, Rewrite::default()).blob_of_size(&blob_id(), 200_000).unwrap();
    check(&blob, 100, 1000).await;
    check(&blob, 199_000, 1000).await;
    let methods: Vec<_> = server.asked().iter().map(|asked| asked.method.to_string()).collect();
    assert_eq!(methods, ["GET", "GET", "HEAD", "GET"]);

    let server = FaultServer::start(|_| Reply::new(200, vec![b'<'; 50])).await;
    let blob = source(&server, Rewrite::default()).blob_of_size(&blob_id(), 200_000).unwrap();
    let err = read(&blob, 100, 10).await.unwrap_err();
    assert!(err.kind() == ErrorKind::Unavailable && err.to_string().contains("50 bytes in place"), "{err}");
}

#[tokio::test]
async fn a_bootstrap_behind_the_data_is_not_kept() {
    let plain = data();
    let server = FaultServer::start(move |_| Reply::new(200, plain.clone())).await;
    let blob = source(&server, Rewrite::default()).blob_of_size(&blob_id(), 150_000).unwrap();
    check(&blob, 149_000, 1000).await;
    let err = read(&blob, 149_000, 1001).await.unwrap_err();
    assert!(err.kind() == ErrorKind::OutOfRange && err.to_string().contains("150000 bytes"), "{err}");
}

/// What was kept was wrong until the image was mounted again.
#[tokio::test]
async fn wrong_bytes_are_not_kept_and_come_once_more() {
    let plain = data();
    let server = FaultServer::start(move |asked| match asked.number {
        0 => Reply::new(200, vec![0; 200_000]),
        _ => Reply::new(200, plain.clone()),
    })
    .await;
    let blob = blob(&server);
    assert!(read(&blob, 100, 10).await.unwrap() == [0; 10]);
    assert!(!blob.distrust(Supplier::Origin.into()));
    check(&blob, 100, 10).await;
    // Whose bytes stay wrong is not asked for them all the time.
    assert!(!blob.distrust(Supplier::Origin.into()));
    check(&blob, 5000, 10).await;
    assert_eq!(server.asked().len(), 2);
}

/// Each read fetched all that was kept already, to find the disk full again.
#[tokio::test]
async fn where_nothing_can_be_kept_nothing_is_asked_for() {
    use std::os::unix::fs::MetadataExt as _;
    let full = std::fs::metadata("/dev/full").is_ok_and(|file| file.rdev() == 0x107);
    assert!(full, "this test needs the device /dev/full");
    let server = whole_server().await;
    let client = RegistryClient::new(server.host(), options()).unwrap();
    let digest =
        TaggedDigest { algorithm: DigestAlgorithm::Sha256, digest: DigestAlgorithm::Sha256.digest(&data()) };
    let mut spool = Spool::new("/dev".into());
    spool.make = |_| std::fs::File::options().read(true).write(true).open("/dev/full");
    let mut blob = RegistryBlob::new(client, "a/b", digest).with_retry(QUICK);
    blob.spool = Some(Arc::new(spool));
    let blob: Arc<dyn Backend> = Arc::new(blob);
    for _ in 0..3 {
        let err = read(&blob, 100, 10).await.unwrap_err();
        assert!(err.kind() == ErrorKind::Io && err.to_string().contains("make room"), "{err}");
    }
    assert_eq!(server.asked().len(), 1);
}
