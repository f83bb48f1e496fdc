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
    assert!(!blob.is_sequential());
    for (start, len) in [(5, 10), (123_456, 70_000), (0, 200_000), (199_999, 1), (0, 10)] {
        check(&blob, start, len).await;
        assert!(blob.is_sequential());
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
    assert!(!blob.is_sequential());
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
    assert!(!blob.is_sequential());
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
