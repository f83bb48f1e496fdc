use std::os::unix::fs::PermissionsExt as _;

use rafs::bootstrap::{Bootstrap, Nid, OpenOptions};
use rafs::fs::RafsOptions;

use super::*;

fn chunks(list: &[(u32, u32)]) -> Vec<Chunk> {
    list.iter().map(|&(blob, index)| Chunk { blob, index }).collect()
}

fn listed(trace: &Trace) -> Vec<(u32, u32, u8)> {
    trace.entries.iter().map(|e| (e.chunk.blob, e.chunk.index, e.history)).collect()
}

/// Files of 1 MiB and less in chunks of 4 KiB.
fn golden() -> Arc<Rafs> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/none-4k/image.boot");
    let bytes = std::fs::read(path).unwrap();
    let bootstrap: Arc<dyn Bootstrap> =
        Arc::from(rafs::bootstrap::from_bytes(bytes, &OpenOptions::default()).unwrap());
    Arc::new(Rafs::new(bootstrap, Vec::new(), RafsOptions::default()).unwrap())
}

fn find(rafs: &Rafs, path: &str) -> Nid {
    let bootstrap = rafs.bootstrap();
    path.split('/')
        .fold(bootstrap.root(), |dir, name| bootstrap.lookup(dir, name.as_bytes()).unwrap().unwrap().nid)
}

fn slices(rafs: &Rafs, path: &str, offset: u64, len: u32) -> Vec<ReadSlice> {
    let mut slices = Vec::new();
    rafs.read(find(rafs, path), offset, len, &mut slices).unwrap();
    slices
}

fn tracer(rafs: &Arc<Rafs>, dir: &Path, mode: Mode, limits: Limits) -> Tracer {
    Tracer::new(TracerSpec {
        mode,
        limits,
        work_dir: dir,
        bootstrap: Digest([7; 32]),
        root: None,
        rafs: Arc::clone(rafs),
        share: None,
    })
}

#[test]
fn what_starts_have_in_common_goes_first() {
    let once = Trace::default().merged(&chunks(&[(0, 5), (0, 1), (1, 2)]));
    assert_eq!((once.starts, listed(&once)), (1, vec![(0, 5, 1), (0, 1, 1), (1, 2, 1)]));
    let twice = once.merged(&chunks(&[(3, 3), (1, 2), (0, 5)]));
    assert_eq!((twice.starts, listed(&twice)), (2, vec![(1, 2, 3), (0, 5, 3), (3, 3, 1), (0, 1, 2)]));
    let thrice = twice.merged(&chunks(&[(0, 1), (9, 9)]));
    let expected = vec![(0, 1, 0b101), (1, 2, 0b110), (0, 5, 0b110), (9, 9, 1), (3, 3, 0b10)];
    assert_eq!((thrice.starts, listed(&thrice)), (3, expected));

    // What eight starts in a row do not touch is forgotten.
    let mut trace = thrice;
    for _ in 0..8 {
        trace = trace.merged(&chunks(&[(4, 4)]));
    }
    assert_eq!((trace.starts, listed(&trace)), (8, vec![(4, 4, 0xff)]));

    let everything: Vec<Chunk> = (0..MAX_CHUNKS as u32).map(|index| Chunk { blob: 0, index }).collect();
    let full = trace.merged(&everything);
    assert_eq!(full.entries.len(), MAX_CHUNKS);
    assert_eq!(listed(&full)[0], (4, 4, 0b1111_1110), "common to several starts");
}

#[test]
fn each_chunk_is_recorded_once_in_the_order_of_first_reads() {
    let rafs = golden();
    let dir = tempfile::tempdir().unwrap();
    let tracer = tracer(&rafs, dir.path(), Mode::On, Limits::default());
    assert!(tracer.document().is_none());
    // Behind what other files share with it.
    let big = |offset: u64, len| slices(&rafs, "files/exact_1m", (512 << 10) + offset, len);
    let reads = [big(8192, 8192), slices(&rafs, "files/one_byte", 0, 1), big(0, 16384), big(8192, 4096)];
    for read in reads {
        tracer.touch(&read);
    }
    let expected: Vec<Chunk> = [big(8192, 8192), slices(&rafs, "files/one_byte", 0, 1), big(0, 8192)]
        .concat()
        .iter()
        .map(|slice| Chunk { blob: slice.blob, index: slice.extent.index.0 })
        .collect();
    let trace = tracer.current().unwrap();
    assert_eq!(trace.entries.iter().map(|entry| entry.chunk).collect::<Vec<_>>(), expected);
    assert!(serde_json::to_string(&tracer.document().unwrap()).unwrap().contains(r#""complete":false"#));

    // Several files of this image share chunks; whichever is named, its ranges are these chunks.
    let files = files::Optimize::new(&trace, &**rafs.bootstrap()).unwrap();
    let mut named: Vec<Chunk> = Vec::new();
    for file in files.files() {
        for &(offset, size) in file.ranges() {
            let size = u32::try_from(size).unwrap();
            let slices = slices(&rafs, file.path().trim_start_matches('/'), offset, size);
            named.extend(slices.iter().map(|s| Chunk { blob: s.blob, index: s.extent.index.0 }));
        }
    }
    assert_eq!(named[0], expected[0]);
    let sorted = |mut chunks: Vec<Chunk>| {
        chunks.sort_by_key(|chunk| (chunk.blob, chunk.index));
        chunks
    };
    assert_eq!(sorted(named), sorted(expected.clone()));
    let json = serde_json::to_value(&files).unwrap();
    assert_eq!(json["version"], "v1");
    assert!(json["files"][0]["path"].as_str().unwrap().starts_with("/files/"));
    assert!(json["files"][0]["ranges"][0][1].is_u64(), "{json}");

    let order: Vec<_> = trace.order(&rafs).map(|(blob, extent)| (blob, extent.index.0)).collect();
    assert_eq!(order, expected.iter().map(|chunk| (chunk.blob, chunk.index)).collect::<Vec<_>>());

    tracer.finish();
    tracer.touch(&big(65536, 4096));
    tracer.finish();
    assert_eq!(tracer.current().unwrap(), trace, "nothing is recorded behind the end");
}

#[test]
fn recording_ends_by_itself() {
    let rafs = golden();
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (soon, late) = (Duration::from_millis(1), Duration::from_secs(3600));
    for limits in [Limits { longest: soon, idle: late }, Limits { longest: late, idle: soon }] {
        let tracer = tracer(&rafs, dir.path(), Mode::Record, limits);
        tracer.touch(&slices(&rafs, "files/one_byte", 0, 1));
        runtime.block_on(tracer.shared.wait_for_end());
    }
    // Full.
    let wake = Arc::<Notify>::default();
    let recorder = Recorder::new([1 << 20].into_iter(), Arc::clone(&wake));
    let mut slice = slices(&rafs, "files/one_byte", 0, 1)[0].clone();
    for index in (0..MAX_CHUNKS as u32 + 10).rev() {
        slice.extent.index = ChunkIndex(index);
        recorder.touch(std::slice::from_ref(&slice));
    }
    assert!(!recorder.is_on());
    assert_eq!(recorder.take().len(), MAX_CHUNKS);
    runtime.block_on(wake.notified());
    // The mount went away before anything was read.
    let tracer = tracer(&rafs, dir.path(), Mode::Record, Limits::default());
    let shared = Arc::clone(&tracer.shared);
    drop(tracer);
    runtime.block_on(shared.wait_for_end());
}

#[test]
fn many_readers_record_each_chunk_once() {
    let rafs = golden();
    let recorder = Recorder::new([1 << 14].into_iter(), Arc::default());
    let slice = slices(&rafs, "files/one_byte", 0, 1)[0].clone();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (recorder, mut slice) = (&recorder, slice.clone());
            scope.spawn(move || {
                for index in 0..10_000u32 {
                    slice.extent.index = ChunkIndex((index * 7 + thread * 2500) % 10_000);
                    recorder.touch(std::slice::from_ref(&slice));
                }
            });
        }
    });
    let mut touched: Vec<u32> = recorder.take().iter().map(|chunk| chunk.index).collect();
    touched.sort_unstable();
    assert_eq!(touched, (0..10_000).collect::<Vec<_>>());
}

#[test]
fn the_next_mount_finds_what_was_recorded() {
    let rafs = golden();
    let dir = tempfile::tempdir().unwrap();
    let open = |mode| tracer(&rafs, dir.path(), mode, Limits::default());
    let off = open(Mode::Off);
    off.touch(&slices(&rafs, "files/one_byte", 0, 1));
    off.finish();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    let first = open(Mode::On);
    assert!(first.earlier().is_none());
    first.touch(&slices(&rafs, "files/exact_1m", 0, 1 << 20));
    first.finish();
    let recorded = first.current();
    let path = dir.path().join(format!("{}.trace", "07".repeat(32)));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let second = open(Mode::On);
    assert_eq!(second.earlier().as_deref(), recorded.as_ref());
    assert!(open(Mode::Record).earlier().is_none(), "recording only");
    // A start that reads nothing changes nothing.
    let before = std::fs::read(&path).unwrap();
    second.finish();
    assert_eq!(std::fs::read(&path).unwrap(), before);
    drop(second);

    std::fs::write(&path, "{}").unwrap();
    assert!(open(Mode::On).earlier().is_none());
    std::fs::write(&path, vec![b' '; MAX_DOCUMENT as usize + 1]).unwrap();
    assert!(open(Mode::On).earlier().is_none());
}

#[test]
fn a_document_that_does_not_fit_the_image_is_refused() {
    let rafs = golden();
    let blobs = rafs.bootstrap().blobs();
    let (id, count) = (blobs[0].id.to_string(), blobs[0].chunk_count);
    let identity = Identity::new(Digest([7; 32]), blobs);
    let image = format!("sha256:{}", "07".repeat(32));
    let document = |image: &str, id: &str, starts: u32, order: &str| {
        let text = format!(
            r#"{{"version":1,"bootstrap":"{image}","starts":{starts},"complete":true,"blobs":["{id}"],"order":{order}}}"#
        );
        Document::parse(text.as_bytes()).and_then(|document| document.trace(&identity))
    };
    let good = document(&image, &id, 2, "[[0,3,2,3],[0,0,1,1]]").unwrap();
    assert_eq!((good.starts, listed(&good)), (2, vec![(0, 3, 3), (0, 4, 3), (0, 0, 1)]));
    let written = Document::new(&identity, None, &good, true).to_json().unwrap();
    assert_eq!(Document::parse(&written).unwrap().trace(&identity).unwrap(), good);

    let other = format!("sha256:{}", "08".repeat(32));
    for (image, id, starts, order, what) in [
        (&other, &id, 1, "[]".to_owned(), "another image"),
        (&image, &"x".to_owned(), 1, "[]".to_owned(), "does not have"),
        (&image, &id, 0, "[]".to_owned(), "starts"),
        (&image, &id, 9, "[]".to_owned(), "starts"),
        (&image, &id, 1, format!("[[0,{count},1,1]]"), "chunks, but"),
        (&image, &id, 1, format!("[[0,0,{},1]]", count + 1), "chunks, but"),
        (&image, &id, 1, format!("[[0,1,{},1]]", u32::MAX), "chunks, but"),
        (&image, &id, 1, "[[0,0,0,1]]".to_owned(), "chunks, but"),
        (&image, &id, 1, "[[1,0,1,1]]".to_owned(), "run of blob 1"),
        (&image, &id, 1, "[[0,0,1,0]]".to_owned(), "no start"),
        (&image, &id, 1, "[[0,0,1,256]]".to_owned(), "not a trace"),
        (&image, &id, 1, "[[0,0,2,1],[0,1,1,1]]".to_owned(), "twice"),
    ] {
        let error = document(image, id, starts, &order).unwrap_err();
        assert!(format!("{error:#}").contains(what), "{order}: {error:#}");
    }
    for (text, what) in [("", "not a trace"), ("[1]", "not a trace"), ("{\"version\":1}", "not a trace")] {
        assert!(format!("{:#}", Document::parse(text.as_bytes()).unwrap_err()).contains(what), "{text}");
    }
    let later = String::from_utf8(written).unwrap().replace(r#""version":1"#, r#""version":2"#);
    assert!(Document::parse(later.as_bytes()).unwrap_err().to_string().contains("version 2"));
}

#[test]
fn a_trace_of_a_huge_blob_is_bounded() {
    let rafs = golden();
    let mut blob = rafs.bootstrap().blobs()[0].clone();
    blob.chunk_count = 1 << 24;
    let identity = Identity::new(Digest([7; 32]), &[blob.clone()]);
    let text = format!(
        r#"{{"version":1,"bootstrap":"sha256:{}","starts":1,"complete":true,"blobs":["{}"],"order":[[0,0,65537,1]]}}"#,
        "07".repeat(32),
        blob.id
    );
    let error = Document::parse(text.as_bytes()).unwrap().trace(&identity).unwrap_err();
    assert!(error.to_string().contains("more than 65536 chunks"), "{error}");
    // The largest one fits into a file.
    let entries = (0..MAX_CHUNKS as u32)
        .map(|place| Entry { chunk: Chunk { blob: 0, index: (1 << 24) - 1 - place * 2 }, history: 255 })
        .collect();
    let trace = Trace { starts: 8, entries };
    let written = Document::new(&identity, None, &trace, true).to_json().unwrap();
    assert_eq!(Document::parse(&written).unwrap().trace(&identity).unwrap(), trace);
}
