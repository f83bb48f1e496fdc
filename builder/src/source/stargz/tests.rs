use serde_json::{Value, json};

use super::*;
use crate::content::ChunkSource as _;

const CHUNK: u32 = 0x1000;
/// The layer's end.
const END: u64 = 100_000;

fn read(entries: Value) -> Result<Indexed> {
    read_text(json!({ "version": 1, "entries": entries }).to_string().as_bytes())
}

fn read_text(text: &[u8]) -> Result<Indexed> {
    let mut collector = Collector::new(CHUNK);
    read_entries("index", text, &mut collector)?;
    collector.finish(END)
}

fn digest(byte: u8) -> String {
    format!("sha256:{}", format!("{byte:02x}").repeat(32))
}

fn file(name: &str, offset: u64, size: u64, byte: u8) -> Value {
    json!({ "name": name, "type": "reg", "size": size, "offset": offset, "chunkDigest": digest(byte), "mode": 420 })
}

fn fault(entries: Value) -> String {
    read(entries).err().expect("refused").to_string()
}

#[test]
fn an_index_is_a_tree_and_places() {
    let indexed = read(json!([
        { "name": ".prefetch.landmark", "type": "reg", "size": 1, "offset": 40, "chunkDigest": digest(9) },
        { "name": "d/", "type": "dir", "mode": 0o40755, "uid": 7, "gid": 8, "modtime": "2024-02-29T12:34:56Z",
          "xattrs": { "user.a": "AAEC" }, "userName": "whoever", "NumLink": 3 },
        { "name": "d/later", "type": "hardlink", "linkName": "d/file" },
        file("d/small", 100, 5, 1),
        { "name": "d/file", "type": "reg", "size": 5000, "offset": 300, "chunkSize": 4096, "chunkDigest": digest(2),
          "digest": digest(3), "mode": 0o4755 },
        { "name": "d/file", "type": "chunk", "offset": 4000, "chunkOffset": 4096, "chunkDigest": digest(4) },
        { "name": "d/empty", "type": "reg" },
        { "name": "d/again", "type": "reg", "size": 5, "offset": 5000, "digest": digest(1) },
        { "name": "d/link", "type": "symlink", "linkName": "/x/../y" },
        { "name": "d/chain", "type": "hardlink", "linkName": "d/later" },
        { "name": "n", "type": "char", "devMajor": 1, "devMinor": 3 },
        { "name": "n2", "type": "hardlink", "linkName": "n" },
        { "name": "p", "type": "fifo", "xattrs": null },
    ]))
    .unwrap();
    let Indexed { tree, content } = indexed;
    let at = |path: &str| tree.inode(tree.lookup(path.as_bytes()).expect(path)).clone();
    assert_eq!(tree.lookup(b".prefetch.landmark"), None);
    let d = at("d").metadata;
    assert_eq!((d.mode, d.uid, d.gid, d.mtime), (0o755, 7, 8, 1_709_210_096));
    assert_eq!(d.xattrs.get(b"user.a"), Some(&[0, 1, 2][..]));
    assert_eq!(tree.lookup(b"d/later"), tree.lookup(b"d/file"));
    assert_eq!(tree.lookup(b"d/chain"), tree.lookup(b"d/file"));
    assert_eq!(at("n2").content, Content::CharDevice { major: 1, minor: 3 });
    let chunks = |path: &str| -> Vec<_> {
        let Content::Regular { file, .. } = at(path).content else { panic!("{path}") };
        content.file_chunks(file).iter().map(|&id| content.row(id)).collect()
    };
    let places = |path: &str| -> Vec<_> {
        chunks(path).iter().map(|c| (c.compressed_offset, c.compressed_size, c.uncompressed_size)).collect()
    };
    assert_eq!(places("d/small"), [(100, 200, 5)]);
    assert_eq!(places("d/file"), [(300, 3700, 4096), (4000, 1000, 904)]);
    assert_eq!(places("d/empty"), []);
    // Equal to what comes before, and the last: nothing is fetched from there.
    assert_eq!(places("d/again"), [(100, 200, 5)]);
    assert!(chunks("d/file").iter().all(|chunk| chunk.flags & 1 == 1));
}

/// Stored sizes stay in bounds although headers of many entries may follow a chunk.
#[test]
fn a_member_with_much_behind_its_chunk_is_not_fetched_whole() {
    let text = json!({ "version": 1, "entries": [file("a", 10, 5, 1)] }).to_string();
    let mut collector = Collector::new(CHUNK);
    read_entries("index", text.as_bytes(), &mut collector).unwrap();
    let indexed = collector.finish(1 << 30).unwrap();
    assert_eq!(indexed.content.row(ChunkId(0)).compressed_size, 10 + (64 << 10));
}

#[test]
fn hostile_indexes_are_refused_by_name() {
    let chunk = |name: &str, offset: u64, at: u64| json!({ "name": name, "type": "chunk", "offset": offset, "chunkOffset": at, "chunkDigest": digest(5) });
    let with = |mut entry: Value, key: &str, value: Value| {
        entry[key] = value;
        entry
    };
    let two = |size: u64| with(file("f", 10, size, 1), "chunkSize", json!(4096));
    for (entries, says) in [
        (json!([file("../f", 10, 5, 1)]), ".."),
        (json!([file("a\u{0}b", 10, 5, 1)]), "NUL"),
        (json!([file("f", 10, 5, 1), file("f/g", 20, 5, 1)]), "not a directory"),
        (json!([file("f", 10, 5, 1), file("g", 10, 5, 2)]), "ascend"),
        (json!([file("f", 10, 5, 1), file("g", 9, 5, 2)]), "ascend"),
        (json!([file("f", END, 5, 1)]), "ascend"),
        (json!([file("f", u64::MAX, 5, 1)]), "ascend"),
        (json!([file("f", 10, u64::MAX, 1)]), "largest bootstrap"),
        (json!([file("f", 10, 5000, 1)]), "--chunk-size"),
        (json!([two(5000)]), "4096 of its 5000"),
        (json!([two(5000), file("g", 20, 5, 1)]), "4096 of its 5000"),
        (json!([two(5000), chunk("g", 20, 4096)]), "follow its file"),
        (json!([two(5000), chunk("f", 20, 4095)]), "want one at 4096"),
        (json!([two(5000), with(chunk("f", 20, 4096), "chunkSize", json!(905))]), "want one at 4096"),
        (json!([two(9000), with(chunk("f", 20, 4096), "chunkSize", json!(1000))]), "--chunk-size"),
        (json!([two(5000), with(chunk("f", 20, 4096), "innerOffset", json!(7))]), "estargz-ref"),
        (json!([chunk("f", 20, 0)]), "follow its file"),
        (json!([with(file("f", 10, 5, 1), "chunkDigest", json!(""))]), "no digest"),
        (json!([with(file("f", 10, 5, 1), "chunkDigest", json!("md5:00"))]), "sha256:"),
        (json!([with(file("f", 10, 5, 1), "modtime", json!("yesterday"))]), "modtime"),
        (json!([with(file("f", 10, 5, 1), "xattrs", json!({ "user.a": "!" }))]), "base64"),
        (json!([file("f\u{fffd}", 10, 5, 1)]), "estargz-ref"),
        (json!([{ "name": "a", "type": "hardlink", "linkName": "b" }]), "not in the index"),
        (
            json!([
                { "name": "a", "type": "hardlink", "linkName": "b" },
                { "name": "b", "type": "hardlink", "linkName": "a" },
            ]),
            "link to link",
        ),
        (json!([{ "name": "a", "type": "hardlink", "linkName": "a" }]), "link to link"),
        (
            json!([{ "name": "d", "type": "dir" }, { "name": "a", "type": "hardlink", "linkName": "d" }]),
            "directory",
        ),
        (
            json!([file("a", 10, 5, 1), file("b", 20, 5, 2), { "name": "a", "type": "hardlink", "linkName": "b" }]),
            "named twice",
        ),
        (json!([{ "name": "a", "type": "symlink" }]), "symlink target"),
        (json!([{ "name": "a", "type": "what" }]), "no index"),
        (json!([{ "name": "a", "type": "reg", "size": -1 }]), "no index"),
        (json!([{ "type": "reg" }]), "no index"),
        (json!({}), "no index"),
    ] {
        let says_so = fault(entries.clone());
        assert!(says_so.contains(says), "{entries}: {says_so}");
    }
    for text in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"version":2,"entries":[]}"#,
        r#"{"entries":[]} x"#,
        r#"{"entries":[],"entries":[]}"#,
    ] {
        assert!(read_text(text.as_bytes()).is_err(), "{text}");
    }
    // Names longer than any path.
    let long = "d/".repeat(2049);
    let link = |name: &str, target: &str| json!({ "name": name, "type": "hardlink", "linkName": target });
    for entry in [file(&long, 10, 5, 1), link(&long, "a"), link("a", &long)] {
        assert!(fault(json!([entry])).contains("a path of 4098 bytes"));
    }
    // Hard links wait for the last entry, so all of their names together have a bound.
    let long = format!("{}x", "d/".repeat(2047));
    let links: Vec<Value> = (0..FREE_LINK_BYTES / 4095 + 200).map(|_| link(&long, "a")).collect();
    assert!(fault(json!(links)).contains("hard links have names"));
    // One string that goes on and on is not held.
    let long = format!(r#"{{"entries":[{{"name":"{}"#, "x".repeat(17 << 20));
    assert!(read_text(long.as_bytes()).err().unwrap().to_string().contains("read index"));
    assert!(read(json!([])).unwrap().content.chunks.is_empty());
}

/// Of several entries with one path the last one stays, as in an extraction.
#[test]
fn a_path_may_be_listed_twice() {
    let indexed = read(json!([file("f", 10, 5, 1), file("f", 20, 6, 2)])).unwrap();
    let id = indexed.tree.lookup(b"f").unwrap();
    assert!(matches!(indexed.tree.inode(id).content, Content::Regular { size: 6, .. }));
}

mod layers {
    use std::io::{Read as _, Write as _};

    use super::*;

    fn member(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn index(name: &str, text: &[u8], size: u64) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_size(size);
        header.set_cksum();
        member(&[&header.as_bytes()[..], text, &[0; 1024]].concat())
    }

    fn footer(extra: &[u8]) -> Vec<u8> {
        let head = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, extra.len() as u8, 0];
        [&head[..], extra, &[1, 0, 0, 0xff, 0xff], &[0; 8]].concat()
    }

    fn extra(start: u64) -> Vec<u8> {
        [b"SG\x16\0", format!("{start:016x}STARGZ").as_bytes()].concat()
    }

    fn open(bytes: &[u8]) -> Result<Index> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        super::open("layer", file)
    }

    #[test]
    fn an_index_is_found_at_the_end_of_its_layer() {
        let (data, text) = (member(b"data"), br#"{"entries":[]}"#);
        let index = index("stargz.index.json", text, text.len() as u64);
        let layer = [&data[..], &index, &footer(&extra(data.len() as u64))].concat();
        let mut found = open(&layer).unwrap();
        let mut json = Vec::new();
        found.json.read_to_end(&mut json).unwrap();
        assert_eq!(json, text);
        assert_eq!((found.data_end, found.layer_size), (Some(data.len() as u64), Some(layer.len() as u64)));
        // As older writers end a layer.
        let layer = [&data[..], &index, &footer(&extra(data.len() as u64)[4..])].concat();
        let mut found = open(&layer).unwrap();
        json.clear();
        found.json.read_to_end(&mut json).unwrap();
        assert_eq!(json, text);
        assert_eq!((found.data_end, found.layer_size), (Some(data.len() as u64), Some(layer.len() as u64)));
        // JSON as it is.
        let mut found = open(text).unwrap();
        json.clear();
        found.json.read_to_end(&mut json).unwrap();
        assert_eq!((&json[..], found.data_end, found.layer_size), (&text[..], None, None));
    }

    #[test]
    fn layers_without_an_index_are_refused() {
        let (data, text) = (member(b"data"), br#"{"entries":[]}"#);
        let at = data.len() as u64;
        let good = index("stargz.index.json", text, text.len() as u64);
        let layer = |index: &[u8], extra: &[u8]| [&data[..], index, &footer(extra)].concat();
        let mut broken = good.clone();
        // A block of a type that does not exist.
        broken[10] = 7;
        let end = (data.len() + good.len()) as u64;
        for (bytes, says) in [
            (data.clone(), "too short"),
            (
                member(b"no two letters are quite alike, so this takes more bytes than a footer has"),
                "without the footer",
            ),
            (layer(&good, b"SG\x16\x00000000000000000xSTARGZ"), "without the footer"),
            (layer(&good, &extra(end)), "without the footer"),
            (layer(&good, &extra(u64::MAX)), "without the footer"),
            (layer(&good, &extra(0)), "leads to no index"),
            (layer(&good, &extra(at + 1)), "damaged"),
            (layer(&broken, &extra(at)), "damaged"),
            (layer(&index("other", text, 5), &extra(at)), "leads to no index"),
            (layer(&index("stargz.index.json", text, 1 << 40), &extra(at)), "are accepted"),
        ] {
            let error = open(&bytes).err().expect(says).to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
    }

    /// What the header promises and the member does not hold is missed by who reads it.
    #[test]
    fn an_index_that_ends_too_early_is_refused() {
        let data = member(b"data");
        let text = br#"{"entries":[{"name":"a","type":"reg"}"#;
        let index = index("stargz.index.json", text, 5000);
        let layer = [&data[..], &index, &footer(&extra(data.len() as u64))].concat();
        let mut collector = Collector::new(CHUNK);
        let error = read_entries("layer", open(&layer).unwrap().json, &mut collector).unwrap_err();
        assert!(error.to_string().contains("no index"), "{error}");
    }
}
