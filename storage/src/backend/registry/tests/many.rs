//! Several ranges with one request.

use super::*;
use crate::backend::MAX_MANY_RANGES;

fn ranges() -> Vec<ByteRange> {
    vec![range(10, 5), range(1000, 70_000), range(90_000, 1), range(150_000, 50_000)]
}

fn wanted(ranges: &[ByteRange]) -> Vec<u8> {
    let data = data();
    ranges.iter().flat_map(|r| data[r.start() as usize..r.end() as usize].to_vec()).collect()
}

/// Reads `ranges` at once; `None` if the source has no such request.
async fn read_many(blob: &Arc<dyn Backend>, ranges: &[ByteRange]) -> Option<Result<Vec<u8>>> {
    let mut stream = match blob.open_many(ranges, &ReadContext::on_demand(None)).await {
        Ok(stream) => stream?,
        Err(e) => return Some(Err(e)),
    };
    let mut all = Vec::new();
    while let Some(piece) = futures_util::StreamExt::next(&mut stream).await {
        match piece {
            Ok(piece) => all.extend_from_slice(&piece),
            Err(e) => return Some(Err(e)),
        }
    }
    Some(Ok(all))
}

/// A server that takes several ranges, except as `plan` says.
async fn many_server(plan: impl Fn(&Asked) -> Option<Reply> + Send + Sync + 'static) -> FaultServer {
    let data = data();
    FaultServer::start(move |asked| plan(asked).unwrap_or_else(|| Reply::many(asked, &data))).await
}

#[tokio::test]
async fn many_ranges_are_one_request_over_a_kept_connection() {
    let server = many_server(|_| None).await;
    let blob = blob(&server);
    for _ in 0..3 {
        assert!(read_many(&blob, &ranges()).await.unwrap().unwrap() == wanted(&ranges()));
    }
    check(&blob, 5, 10).await;
    assert!(read_many(&blob, &ranges()[..1]).await.unwrap().unwrap() == wanted(&ranges()[..1]));
    assert_eq!((server.asked().len(), server.connections()), (5, 1));
    assert_eq!(server.asked()[0].headers["range"], "bytes=10-14,1000-70999,90000-90000,150000-199999");

    let lots: Vec<_> = (0..250).map(|i| range(i * 700, 3)).collect();
    assert!(read_many(&blob, &lots).await.unwrap().unwrap() == wanted(&lots));
    let counts: Vec<_> = server.asked()[5..].iter().map(|asked| asked.ranges.len()).collect();
    assert_eq!(counts, [MAX_MANY_RANGES, MAX_MANY_RANGES, 250 - 2 * MAX_MANY_RANGES]);
}

#[tokio::test]
async fn broken_bodies_of_many_ranges_go_on_where_they_broke() {
    let data = data();
    let server = many_server(move |asked| match asked.number {
        0 => Some(Reply::new(503, "")),
        1 => Some(Reply::many(asked, &data).cut_after(50_000)),
        2 => Some(Reply::many(asked, &data).cut_after(0)),
        _ => None,
    })
    .await;
    assert!(read_many(&blob(&server), &ranges()).await.unwrap().unwrap() == wanted(&ranges()));
    let asked = server.asked();
    assert_eq!(asked.len(), 4);
    // What hyper still had buffered when the connection was cut may be lost.
    let (start, end) = asked[2].ranges[0];
    assert!((10..51_000).contains(&start) && (end == 15 || end == 71_000), "{:?}", asked[2].ranges);
    assert_eq!(asked[2].ranges, asked[3].ranges);
}

/// A server's answer to a request for several ranges.
type Answering = fn(&Asked, &[u8]) -> Reply;

#[tokio::test]
async fn a_server_without_many_ranges_is_asked_once() {
    let answers: [(&str, Answering); 6] = [
        ("whole", |_, data| Reply::new(200, data.to_vec())),
        ("first only", |asked, data| {
            Reply::ranged(&Asked { range: Some(asked.ranges[0]), ..asked.clone() }, data)
        }),
        ("416", |_, _| Reply::new(416, "")),
        ("400", |_, _| Reply::new(400, "")),
        ("reordered", |asked, data| {
            let ranges = asked.ranges.iter().rev().copied().collect();
            Reply::many(&Asked { ranges, ..asked.clone() }, data)
        }),
        ("merged", |asked, data| {
            let ranges = vec![(10, 71_000), asked.ranges[2], asked.ranges[3]];
            Reply::many(&Asked { ranges, ..asked.clone() }, data)
        }),
    ];
    for (name, answer) in answers {
        let data = data();
        let server = many_server(move |asked| (asked.ranges.len() > 1).then(|| answer(asked, &data))).await;
        let source = source(&server, Rewrite::default());
        let blob = source.blob(&blob_id()).unwrap();
        for _ in 0..2 {
            assert!(read_many(&blob, &ranges()).await.is_none(), "{name}");
        }
        let other = source.blob(&blob_id()).unwrap();
        assert!(read_many(&other, &ranges()).await.is_none(), "{name}");
        assert_eq!(server.asked().len(), 1, "{name}");
        check(&blob, 100, 1000).await;
    }
}

#[tokio::test]
async fn parts_that_go_wrong_in_mid_body_are_read_one_by_one() {
    let data = data();
    let server = many_server(move |asked| {
        (asked.ranges.len() > 1).then(|| {
            let ranges = vec![asked.ranges[0], asked.ranges[1], asked.ranges[3], asked.ranges[2]];
            Reply::many(&Asked { ranges, ..asked.clone() }, &data)
        })
    })
    .await;
    let blob = blob(&server);
    assert!(read_many(&blob, &ranges()).await.unwrap().unwrap() == wanted(&ranges()));
    let asked: Vec<_> = server.asked().iter().map(|asked| asked.ranges.clone()).collect();
    assert_eq!(asked[1..], [vec![(90_000, 90_001)], vec![(150_000, 200_000)]]);
    assert!(read_many(&blob, &ranges()).await.is_none());
}

#[tokio::test]
async fn final_answers_to_many_ranges_are_errors() {
    for (status, kind) in [(403, ErrorKind::Denied), (404, ErrorKind::NotFound)] {
        let server = many_server(move |_| Some(Reply::new(status, ""))).await;
        let err = read_many(&blob(&server), &ranges()).await.unwrap().unwrap_err();
        assert_eq!((err.kind(), server.asked().len()), (kind, 1), "{err}");
    }
}
