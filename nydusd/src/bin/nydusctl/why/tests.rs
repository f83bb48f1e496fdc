use super::*;
use nydusd::why::report::*;

/// A report with names that would like to be markup.
pub fn report() -> Report {
    let waits = Waits { queue_us: 1_000, network_us: 8_000, decode_us: 900, disk_us: 0, other_us: 100 };
    let read = |process, file, at_us, took_us| Read {
        process,
        file,
        offset: 4096,
        len: 131_072,
        at_us,
        took_us,
        waits,
        source: Some("origin".into()),
        chunk: Some(Chunk { blob: 0, index: 7 }),
        outcome: Outcome::Done,
    };
    let fetch = |index, at_us| Fetch {
        chunk: Chunk { blob: 0, index },
        bytes: 5000,
        at_us,
        queue_us: 1_000,
        answer_us: 5_000,
        transfer_us: 3_000,
        decode_us: 900,
        source: Some("origin".into()),
        file: Some(0),
        demanded: index == 7,
        failed: false,
    };
    let file = |path: &str, waited| File {
        path: path.to_owned(),
        reads: 3,
        bytes: 100,
        waited,
        waited_us: 10_000,
        blocked_us: 9_000,
    };
    Report {
        mountpoint: "/".to_owned(),
        age_us: 90_000_000,
        image: Image { bytes: 1 << 30, chunks: 1000, cached_chunks: 0, ready_chunks: 12 },
        verdict: Verdict { lazy: true, text: "lazy: 1 % of the image was fetched".to_owned() },
        totals: Totals {
            reads: 20,
            waited: 3,
            read_bytes: 500,
            waited_us: 30_000,
            blocked_us: 21_000,
            requests: 2,
            fetched_bytes: 15_000,
            asked_bytes: 10_000,
            ..Totals::default()
        },
        waits,
        supplied: vec![Supplied {
            source: "origin".into(),
            purpose: "demand".into(),
            chunks: 2,
            bytes: 10_000,
        }],
        blobs: vec!["0123456789abcdef".to_owned()],
        processes: vec![
            Process { pid: 12, name: "python3".to_owned() },
            Process { pid: 13, name: "<script>alert(1)</script>".to_owned() },
        ],
        files: vec![file("/usr/bin/slow", 2), file("/a\"'&<b>", 1), file("/never/waited", 0)],
        reads: vec![read(0, 0, 1_000, 20_000), read(1, 1, 2_000, 10_000), read(0, 0, 80_000_000, 10_000)],
        fetches: vec![fetch(7, 1_000), fetch(8, 2_000)],
        dropped_reads: 0,
        dropped_fetches: 0,
    }
}

#[test]
fn the_text_names_the_longest_wait_first() {
    let text = text::text(&report(), 2);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "/: lazy: 1 % of the image was fetched");
    assert!(
        text.contains("3 of 20 reads waited, 30.0 ms in all; some reader was waiting during 21.0 ms"),
        "{text}"
    );
    assert!(
        text.contains("x1.50 of the 10000 B that readers asked for: 10000 B from origin on demand."),
        "{text}"
    );
    assert!(text.contains("queue 10 %, network 80 %, decode 9 %, disk 0 %, other 1 %"), "{text}");
    let first = lines.iter().position(|line| line.contains("WAITED") && line.contains("QUEUE")).unwrap() + 1;
    for part in
        ["20.0 ms", "python3 [12]", "origin", "/usr/bin/slow, 128 KiB at 4096, chunk 7 of 0123456789ab"]
    {
        assert!(lines[first].contains(part), "{part}: {}", lines[first]);
    }
    assert!(text.contains("(and 1 more; --count shows them)"), "{text}");
    assert!(!text.contains("/never/waited"), "{text}");
}

#[test]
fn the_page_draws_every_event_and_escapes_every_name() {
    let page = html::page(&report());
    assert_eq!(page.matches("<g class=\"read").count(), 3);
    assert_eq!(page.matches("<g class=\"fetch").count(), 2);
    assert_eq!(page.matches("<g class=\"fetch ahead").count(), 1);
    // 80 seconds in which nothing happened are squeezed.
    assert_eq!(page.matches("class=\"break\"").count(), 1);
    assert!(page.contains("/a&quot;&#39;&amp;&lt;b&gt;") && page.contains("&lt;script&gt;alert"), "{page}");
    for forbidden in ["<script", "<b>\"", "http://", "https://", "src=", "style=\""] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    let empty = Report { reads: Vec::new(), fetches: Vec::new(), files: Vec::new(), ..report() };
    assert!(html::page(&empty).contains("Nothing was waited for"));
    assert!(text::text(&empty, 5).contains("lazy"));
}

#[test]
fn ids_travel_in_a_query() {
    assert_eq!(encode("/a b&c"), "/a%20b%26c");
    for (us, shown) in
        [(0, "0"), (999, "999 us"), (1_500, "1.5 ms"), (2_345_678, "2.35 s"), (200_000_000, "200 s")]
    {
        assert_eq!(duration(us), shown);
    }
}
