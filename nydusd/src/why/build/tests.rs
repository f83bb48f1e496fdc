use super::super::processes::ProcessIndex;
use super::super::record::{CopyEvent, FileUse};
use super::*;
use storage::backend::Supplier;

fn read(nid: u64, began_us: u64, took_us: u32) -> ReadEvent {
    ReadEvent {
        nid: Nid(nid),
        offset: 0,
        began_us,
        took_us,
        len: 10,
        process: ProcessIndex(0),
        end: End::Done,
    }
}

fn fetch(chunk: u32, wanted_us: u64, steps: [u32; 4]) -> FetchEvent {
    let [queue_us, answer_us, transfer_us, decode_us] = steps;
    FetchEvent {
        wanted_us,
        queue_us,
        answer_us,
        transfer_us,
        decode_us,
        blob: 0,
        chunk,
        stored: 100,
        supplier: Some(Supplier::Origin),
        demanded: true,
        failed: false,
    }
}

fn recorded(reads: Vec<ReadEvent>, fetches: Vec<FetchEvent>) -> Recorded {
    Recorded {
        reads,
        dropped_reads: 0,
        fetches,
        dropped_fetches: 0,
        copies: vec![CopyEvent { began_us: 5050, took_us: 30, blob: 0, chunk: 3 }],
        files: HashMap::from([(Nid(9), FileUse { reads: 1, bytes: 1 })]),
        other_files: FileUse::default(),
        processes: Vec::new(),
        totals: Default::default(),
        before_first_read: 0,
        age_us: 0,
    }
}

/// A read waits for the chunk that is ready last, and only for the part of its fetch that
/// falls into the wait.
#[test]
fn a_wait_is_told_by_the_fetch_that_ended_last() {
    let recorded = recorded(
        vec![read(5, 1000, 500), read(6, 5000, 100), ReadEvent { end: End::SlowHit, ..read(6, 9000, 70) }],
        vec![
            fetch(1, 1010, [20, 100, 100, 10]),
            // Fetched ahead: begun before anybody read.
            fetch(2, 400, [100, 300, 600, 60]),
            // Long over when it is read.
            fetch(3, 10, [1, 1, 1, 1]),
        ],
    );
    let chunks_of = |event: &ReadEvent| {
        let indexes: &[u32] = if event.nid == Nid(5) { &[1, 2] } else { &[3] };
        indexes.iter().map(|&index| Chunk { blob: 0, index }).collect()
    };
    let mut names = Names::new(&recorded);
    let (reads, fetched_for) = join(&recorded, chunks_of, &mut names);
    assert_eq!(reads[0].chunk, Some(Chunk { blob: 0, index: 2 }));
    let waits = Waits { queue_us: 0, network_us: 400, decode_us: 60, disk_us: 0, other_us: 40 };
    assert_eq!((reads[0].waits, reads[0].source.as_deref()), (waits, Some("origin")));
    assert_eq!(fetched_for, HashMap::from([(0, 0), (1, 0)]));
    // Another process fetched what the second read wanted, and it was read from the disk.
    let waits = reads[1].waits;
    assert_eq!((waits.disk_us, waits.other_us, reads[1].source.as_deref()), (30, 70, None));
    assert_eq!((reads[2].waits.disk_us, reads[2].source.as_deref()), (70, Some("cache")));
    // Files in the order of their numbers: 5, 6, and 9, which only hit.
    assert_eq!((reads[1].file, names.places.len()), (1, 3));
}

#[test]
fn the_union_counts_no_moment_twice() {
    assert_eq!(union([(10, 20), (0, 5), (15, 30), (16, 18), (40, 41)].into_iter()), 5 + 20 + 1);
    assert_eq!(union(std::iter::empty()), 0);
}

#[test]
fn a_mount_that_is_not_lazy_is_called_so() {
    let image = Image { bytes: 1000, chunks: 10, cached_chunks: 0, ready_chunks: 0 };
    let totals = Totals { reads: 1, requests: 1, fetched_bytes: 300, asked_bytes: 300, ..Totals::default() };
    let judged = |image: &Image, totals: &Totals| judge(image, totals, &[]);
    assert_eq!(
        judged(&image, &totals),
        Verdict { lazy: true, text: "lazy: 30 % of the image was fetched".into() }
    );
    for (image, totals, text) in [
        (Image { cached_chunks: 10, ..image.clone() }, totals.clone(), "before it was mounted"),
        (
            image.clone(),
            Totals { fetched_bytes: 950, ..totals.clone() },
            "95 % of the image was fetched, though",
        ),
        (image.clone(), Totals { fetched_bytes: 950, asked_bytes: 900, ..totals.clone() }, "asked for most"),
        (
            image.clone(),
            Totals { fetched_bytes: 600, before_first_read_bytes: 500, ..totals.clone() },
            "50 % of the image came before",
        ),
    ] {
        let verdict = judged(&image, &totals);
        assert!(!verdict.lazy && verdict.text.contains(text), "{verdict:?}");
    }
    // The hints of a start come before its reads, too.
    assert!(judged(&image, &Totals { before_first_read_bytes: 290, ..totals }).lazy);
}

#[test]
fn names_do_no_harm() {
    for (name, shown) in [
        ("plain-é".as_bytes(), "plain-é"),
        (b"a\x1b[31m".as_slice(), r"a\x1b[31m"),
        (b"\xff".as_slice(), r"\xff"),
        ("a\u{202e}b".as_bytes(), r"a\xe2\x80\xaeb"),
    ] {
        assert_eq!(readable(name), shown);
    }
}
