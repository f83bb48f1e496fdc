use std::path::Path;

use rafs::bootstrap::OpenOptions;
use rafs::fs::RafsOptions;
use storage::extent::ChunkExtent;

use super::*;
use crate::config::PrefetchConfig;

fn golden(name: &str) -> Arc<Rafs> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name).join("image.boot");
    let bootstrap: Arc<dyn Bootstrap> =
        Arc::from(rafs::bootstrap::open(&path, &OpenOptions::default()).unwrap());
    Arc::new(Rafs::new(bootstrap, Vec::new(), RafsOptions::default()).unwrap())
}

/// The image `name` with the mark of prefetch files on its first `marked` blobs.
fn optimized(name: &str, marked: usize) -> Arc<Rafs> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name).join("image.boot");
    let mut bytes = std::fs::read(path).unwrap();
    // The blob table lies at 4096 in these images; features are bytes 84 to 87 of a record of 256.
    for record in 0..marked {
        bytes[4096 + 256 * record + 85] |= (BlobFeatures::IS_SEPARATED_WITH_PREFETCH_FILES.bits() >> 8) as u8;
    }
    let bootstrap: Arc<dyn Bootstrap> =
        Arc::from(rafs::bootstrap::from_bytes(bytes, &OpenOptions::default()).unwrap());
    Arc::new(Rafs::new(bootstrap, Vec::new(), RafsOptions::default()).unwrap())
}

fn resolve(rafs: &Rafs, wish: &Wish) -> (Chunks, Vec<String>) {
    let mut missing = Vec::new();
    let note = |path: &[u8]| missing.push(String::from_utf8_lossy(path).into_owned());
    let chunks = Chunks::resolve(rafs, wish, note, || false);
    (chunks, missing)
}

fn files(paths: &[&str]) -> Wish {
    Wish::Files(paths.iter().map(|path| path.as_bytes().to_vec()).collect())
}

/// What reading the file at `path` needs.
fn chunks_of(rafs: &Rafs, path: &str) -> Vec<(u32, ChunkExtent)> {
    let nid = list::find(&**rafs.bootstrap(), path.as_bytes()).unwrap();
    let mut chunks = Vec::new();
    rafs.file_extents(nid, &mut |blob, extent| {
        chunks.push((blob, extent));
        Ok(())
    })
    .unwrap();
    chunks
}

#[test]
fn paths_are_found_through_links_inside_the_image_only() {
    let rafs = golden("tar-rafs");
    let find = |path: &str| list::find(&**rafs.bootstrap(), path.as_bytes());
    let file = find("/a.txt");
    assert!(file.is_some());
    for same in ["/d/sym", "//a.txt/", "/./d/../a.txt", "/../../a.txt", "/d/hard"] {
        assert_eq!(find(same), file, "{same}");
    }
    assert_eq!(find("/"), Some(rafs.bootstrap().root()));
    for none in ["/nope", "/a.txt/x", "/a.txt/..", "/d/sym/x"] {
        assert_eq!(find(none), None, "{none}");
    }
    let deep = "/d/..".repeat(4 * list::MAX_PATH);
    assert_eq!(find(&deep), None, "more steps than any path has");
}

#[test]
fn orders_follow_the_list_and_leave_nothing_out() {
    let rafs = golden("zstd-4k");
    let all: Vec<_> = order::image(&rafs).collect();
    let counts: u64 = rafs.bootstrap().blobs().iter().map(|blob| u64::from(blob.chunk_count)).sum();
    assert_eq!(all.len() as u64, counts);
    assert!(all.windows(2).all(|pair| (pair[0].0, pair[0].1.index) < (pair[1].0, pair[1].1.index)));

    // Everything by walking is everything by counting.
    let mut walked: Vec<_> = order::nodes(&rafs, vec![rafs.bootstrap().root()]).collect();
    walked.sort_unstable_by_key(|(blob, extent)| (*blob, extent.index));
    walked.dedup();
    assert_eq!(walked, all);

    let rafs = golden("tar-rafs");
    let (chunks, missing) = resolve(&rafs, &files(&["/d/e", "/nope", "/a.txt", "/d/sym", "/fifo", "/empty"]));
    assert_eq!(missing, ["/nope"]);
    let order: Vec<_> = chunks.order(&rafs).collect();
    assert_eq!(order, [chunks_of(&rafs, "/d/e/b.txt"), chunks_of(&rafs, "/a.txt")].concat());

    // The root is the whole image, as stored, behind what stands before it.
    let (chunks, _) = resolve(&rafs, &files(&["/a.txt", "/", "/one"]));
    assert!(chunks.image && chunks.nodes.len() == 1);
    let order: Vec<_> = chunks.order(&rafs).collect();
    let behind: Vec<_> = order::image(&rafs).collect();
    assert_eq!(order, [chunks_of(&rafs, "/a.txt"), behind].concat());
}

#[test]
fn the_prefetch_table_is_followed_in_its_order() {
    let rafs = golden("prefetch");
    let table = rafs.bootstrap().prefetch();
    assert_eq!(table.len(), 3);
    let (chunks, missing) = resolve(&rafs, &Wish::Table);
    assert_eq!((chunks.image, missing.len()), (table.contains(&rafs.bootstrap().root()), 0));
    let wanted: Vec<_> = table.iter().flat_map(|nid| order::nodes(&rafs, vec![*nid])).collect();
    assert!(!wanted.is_empty());
    assert_eq!(chunks.order(&rafs).take(wanted.len()).collect::<Vec<_>>(), wanted);
}

#[test]
fn totals_count_chunks_and_each_unit_once() {
    let rafs = golden("tar-rafs");
    let all: Vec<_> = order::image(&rafs).collect();
    let total = order::total(order::image(&rafs), || false).unwrap();
    let stored: u64 = all.iter().map(|(_, extent)| extent.unit.compressed.len()).sum();
    assert_eq!((total.chunks, total.bytes), (all.len() as u64, stored));
    assert_eq!(order::total(order::image(&rafs), || true), None);
}

#[test]
fn lists_are_read_line_by_line() {
    let read = |text: &[u8]| list::read(text).map_err(|e| format!("{e:#}"));
    let paths: Vec<&[u8]> = vec![b"/a b", b"/c", b"/d\xff"];
    assert_eq!(read(b"  /a b \r\n\n\t\n/c\n/d\xff").unwrap(), paths);
    assert_eq!(read(b"").unwrap(), Vec::<Vec<u8>>::new());
    let longest = format!("/{}", "x".repeat(list::MAX_PATH - 1));
    assert_eq!(read(longest.as_bytes()).unwrap(), [longest.as_bytes()]);
    for (text, part) in [
        (b"/a\nb/c\n".to_vec(), "line 2"),
        (format!("{longest}x\n").into_bytes(), "4096"),
        (vec![b' '; list::MAX_PATH + 2], "not an absolute path"),
        ("/x\n".repeat(list::MAX_PATHS + 1).into_bytes(), "name directories"),
    ] {
        let error = read(&text).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_list_goes_before_the_table_and_both_before_the_rest() {
    let (tabled, plain) = (golden("prefetch"), golden("tar-rafs"));
    let after = |config: &Config, rafs: &Rafs| after_mount(config, &**rafs.bootstrap());
    let mut config = Config::localfs_dir(Path::new("/x"));
    config.prefetch_files = Some(vec![b"/a".to_vec()]);
    assert_eq!(after(&config, &tabled), None, "off is off");
    config.prefetch = PrefetchConfig { enable: true, bandwidth: NonZeroU64::new(7), ..config.prefetch };
    let request = after(&config, &tabled).unwrap();
    assert_eq!((request.what, request.bandwidth), ("start", NonZeroU64::new(7)));
    assert_eq!(request.stages, [(Class::Predicted, files(&["/a"]))]);
    config.prefetch_files = None;
    assert_eq!(after(&config, &plain), None, "there is no table");
    config.prefetch.all = true;
    assert_eq!(after(&config, &plain).unwrap().stages, [(Class::Background, Wish::Image)]);
    let stages = after(&config, &tabled).unwrap().stages;
    assert_eq!(stages, [(Class::Predicted, Wish::Table), (Class::Background, Wish::Image)]);
}

#[test]
fn what_was_put_together_goes_first() {
    let (first, rest) = (Class::Predicted, Class::Background);
    let (merged, tabled) = (optimized("merged", 1), optimized("prefetch", 1));
    let mut config = Config::localfs_dir(Path::new("/x"));
    let stages = |request: Option<Request>| request.map(|request| request.stages);
    let both = vec![(first, Wish::Optimized), (first, Wish::Table)];
    // All data of this one is marked, which is no hint.
    assert_eq!(stages(hints(&config, &**tabled.bootstrap())), Some(both[1..].to_vec()));
    // The table of this one asks for everything, which is no hint.
    assert_eq!(stages(hints(&config, &**merged.bootstrap())), Some(vec![(first, Wish::Optimized)]));
    assert!(!is_left_to_follow(&config, &**merged.bootstrap()));
    config.prefetch = PrefetchConfig { enable: true, all: true, ..config.prefetch };
    let all = [both, vec![(rest, Wish::Image)]].concat();
    assert_eq!(stages(after_mount(&config, &**tabled.bootstrap())), Some(all));
    config.prefetch_files = Some(vec![b"/a".to_vec()]);
    assert_eq!(stages(after_mount(&config, &**tabled.bootstrap())).unwrap()[0], (first, files(&["/a"])));

    let (chunks, _) = resolve(&merged, &Wish::Optimized);
    let order: Vec<_> = chunks.order(&merged).collect();
    let stored: Vec<_> = order::image(&merged).filter(|(blob, _)| *blob == 0).collect();
    assert!(!order.is_empty() && order == stored && order.len() < order::image(&merged).count());

    // With all blobs marked there is nothing to go first, and of several the last one does.
    let config = Config::localfs_dir(Path::new("/x"));
    let all = optimized("merged", 2);
    assert_eq!(stages(hints(&config, &**all.bootstrap())), None);
    assert!(is_left_to_follow(&config, &**all.bootstrap()));
    assert_eq!(resolve(&all, &Wish::Optimized).0.blobs, [1, 0]);
}

#[test]
fn hints_are_followed_unless_the_configuration_speaks_of_prefetch() {
    let (tabled, plain) = (golden("prefetch"), golden("tar-rafs"));
    let config = |prefetch: &str| {
        let text = format!(
            r#"{{"version":2,"backend":{{"type":"localfs","localfs":{{"dir":"/b"}}}},
            "cache":{{"type":"filecache"}},"rafs":{{{prefetch}}}}}"#
        );
        Config::parse(&text).unwrap()
    };
    let hinted = |prefetch: &str, rafs: &Rafs| {
        hints(&config(prefetch), &**rafs.bootstrap()).map(|request| request.stages)
    };
    assert_eq!(hinted("", &tabled), Some(vec![(Class::Predicted, Wish::Table)]));
    assert_eq!(hinted("", &plain), None, "there is no table");
    assert_eq!(hinted(r#""prefetch":{"enable":false}"#, &tabled), None);
    assert_eq!(hinted(r#""prefetch":{"enable":true}"#, &tabled), None, "the table is fetched as configured");
    // A start is followed where neither image nor configuration says what it reads.
    let follows = |prefetch: &str, rafs: &Rafs| is_left_to_follow(&config(prefetch), &**rafs.bootstrap());
    assert!(follows("", &plain) && !follows("", &tabled));
    assert!(follows("", &golden("merged")), "its table asks for everything");
    assert!(
        follows(r#""prefetch":{"enable":true}"#, &plain)
            && !follows(r#""prefetch":{"enable":false}"#, &plain)
    );
    let listed =
        Config { prefetch_files: Some(vec![b"/a".to_vec()]), ..config(r#""prefetch":{"enable":true}"#) };
    assert!(!is_left_to_follow(&listed, &**plain.bootstrap()));
}
