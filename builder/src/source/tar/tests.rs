use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use tar::{Builder, EntryType, Header};

use super::*;
use crate::ErrorKind;
use crate::content::ChunkSource;
use crate::pipeline::{DataOptions, Output, Placement, Session};
use crate::sink::BlobSink;

mod sparse;

/// A writer whose bytes can be looked at afterwards.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Read {
    tree: Tree,
    output: Output,
    blob: Vec<u8>,
}

fn read_with(archive: &[u8], options: TarOptions) -> Result<Read> {
    let data = DataOptions {
        codec: Codec::None,
        digester: DigestAlgorithm::Blake3,
        chunk_size: 0x1000,
        threads: 1,
        placement: Placement::Blob,
        batch_size: 0,
        cipher: None,
    };
    let session = Session::new(data).unwrap();
    let sink = Memory::default();
    let mut layer = session.layer(BlobSink::new("blob", sink.clone())).unwrap();
    let tree = match read_layer("layer 7", archive, &mut layer, options) {
        Ok(tree) => tree,
        Err(error) => return Err(layer.abort(error)),
    };
    layer.finish()?;
    let output = session.finish()?;
    let blob = sink.0.lock().unwrap().clone();
    Ok(Read { tree, output, blob })
}

fn read(archive: &[u8]) -> Result<Read> {
    read_with(archive, TarOptions::default())
}

fn refused(archive: &[u8]) -> (ErrorKind, String) {
    let error = read(archive).err().expect("the archive is refused");
    let text = error.to_string();
    assert!(text.starts_with("layer 7: "), "{text}");
    (error.kind(), text)
}

impl Read {
    fn inode(&self, path: &str) -> &Inode {
        self.tree.inode(self.tree.lookup(path.as_bytes()).unwrap_or_else(|| panic!("{path} is missing")))
    }

    fn data(&self, path: &str) -> Vec<u8> {
        let Content::Regular { file, size } = self.inode(path).content else { panic!("{path} is no file") };
        let mut data = Vec::new();
        for &chunk in self.output.content.file_chunks(file) {
            let row = self.output.content.row(chunk);
            data.extend_from_slice(
                &self.blob[row.compressed_offset as usize..][..row.compressed_size as usize],
            );
        }
        assert_eq!(data.len() as u64, size);
        data
    }
}

fn header(kind: u8, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.as_old_mut().linkflag[0] = kind;
    header.set_size(size);
    header.set_mode(0o640);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(3);
    header
}

/// Puts `path` into the header as it is, whatever it says.
fn raw_name(header: &mut Header, path: &[u8]) {
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
}

struct Archive(Vec<u8>);

impl Archive {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn raw(mut self, mut header: Header, data: &[u8]) -> Self {
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, data: &[u8]) -> Self {
        let mut h = header(b'0', data.len() as u64);
        raw_name(&mut h, path.as_bytes());
        self.raw(h, data)
    }

    fn other(self, kind: u8, path: &str, link: &str) -> Self {
        let mut h = header(kind, 0);
        raw_name(&mut h, path.as_bytes());
        h.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        self.raw(h, b"")
    }

    fn pax(self, kind: u8, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let len = (1..).find(|digits| (rest + digits).to_string().len() == *digits).unwrap() + rest;
            data.extend_from_slice(format!("{len} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        let mut h = header(kind, data.len() as u64);
        raw_name(&mut h, b"pax");
        self.raw(h, &data)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

#[test]
fn every_type_arrives_from_every_compression() {
    let big: Vec<u8> = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
    let mut device = header(b'3', 0);
    raw_name(&mut device, b"dev/null");
    device.as_gnu_mut().unwrap().set_device_major(1);
    device.as_gnu_mut().unwrap().set_device_minor(3);
    let mut block = header(b'4', 0);
    raw_name(&mut block, b"dev/sda");
    block.as_gnu_mut().unwrap().set_device_major(4095);
    block.as_gnu_mut().unwrap().set_device_minor(1_048_575);
    let plain = Archive::new()
        .other(b'5', "./", "")
        .other(b'5', "a/", "")
        .file("a/big", &big)
        .file("/a//./small", b"hello")
        .file("a/empty", b"")
        .other(b'1', "link", "./a/small")
        .other(b'2', "a/sym", "../small")
        .raw(device, b"")
        .raw(block, b"")
        .other(b'6', "fifo", "")
        .other(0, "old-dir/", "")
        .other(b'1', "sym2", "/a/sym")
        .file(".wh.gone", b"")
        .end();
    let gzip = {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(&plain).unwrap();
        out.finish().unwrap()
    };
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    for archive in [plain, gzip, zstd] {
        let read = read(&archive).unwrap();
        assert_eq!(read.data("a/big"), big);
        assert_eq!(read.data("a/small"), b"hello");
        assert_eq!(read.data("a/empty"), b"");
        assert_eq!(read.tree.lookup(b"link"), read.tree.lookup(b"a/small"));
        assert_eq!(read.inode("a/sym").content, Content::Symlink((*b"../small").into()));
        assert_eq!(read.inode("sym2").content, read.inode("a/sym").content);
        assert_ne!(read.tree.lookup(b"sym2"), read.tree.lookup(b"a/sym"));
        assert_eq!(read.inode("dev/null").content, Content::CharDevice { major: 1, minor: 3 });
        assert_eq!(read.inode("dev/sda").content, Content::BlockDevice { major: 4095, minor: 1_048_575 });
        assert_eq!(read.inode("fifo").content, Content::Fifo);
        assert!(read.inode("old-dir").is_dir());
        assert!(read.inode(".wh.gone").is_regular());
        // What only paths imply, and what an entry says.
        assert!(read.inode("dev").implied);
        assert_eq!(read.inode("dev").metadata, Metadata::implied_directory());
        let meta = &read.inode("a/big").metadata;
        assert_eq!((meta.mode, meta.uid, meta.gid, meta.mtime), (0o640, 1, 2, 3));
        assert!(!read.inode("").implied && read.inode("").metadata.mtime == 3);
    }
}

#[test]
fn pax_records_override_headers() {
    let capability = b"\x01\0\0\x02\n\n= \0";
    let long = "d/".to_owned() + &"n".repeat(255);
    let archive = Archive::new()
        .pax(b'g', &[("uid", b"77"), ("comment", b"x"), ("SCHILY.xattr.user.global", b"g")])
        .pax(
            b'x',
            &[
                ("path", long.as_bytes()),
                ("mtime", b"-1.5"),
                ("uid", b"4294967294"),
                ("gid", b"4294967294"),
                ("size", b"3"),
                ("LIBARCHIVE.xattr.security.capability", b"AAAA"),
                ("SCHILY.xattr.security.capability", capability),
                ("LIBARCHIVE.xattr.user.a%20b", b"aGk"),
                ("SCHILY.xattr.com.apple.provenance", b"x"),
                ("SCHILY.xattr.user.empty", b""),
            ],
        )
        .file("short", b"abc")
        .file("plain", b"")
        .pax(b'x', &[("uid", b""), ("linkpath", "t".repeat(4000).as_bytes())])
        .other(b'2', "sym", "")
        .end();
    let read = read(&archive).unwrap();
    let meta = &read.inode(&long).metadata;
    assert_eq!(
        (meta.uid, meta.gid, meta.mtime, meta.mtime_nsec),
        (u32::MAX - 1, u32::MAX - 1, -2, 500_000_000)
    );
    let names: Vec<_> = meta.xattrs.iter().map(|x| (&*x.name, &*x.value)).collect();
    assert_eq!(
        names,
        [
            (&b"security.capability"[..], &capability[..]),
            (b"user.a b", b"hi"),
            (b"user.empty", b""),
            (b"user.global", b"g"),
        ]
    );
    assert_eq!(read.inode("plain").metadata.uid, 77);
    // An empty value takes the global one back.
    assert_eq!(read.inode("sym").metadata.uid, 1);
    assert_eq!(read.inode("sym").content, Content::Symlink("t".repeat(4000).into_bytes().into()));
}

#[test]
fn gnu_headers_carry_long_names_and_large_numbers() {
    let name = [b"x/", &[0xff; 255][..]].concat();
    let target = vec![b'/'; 4096];
    let mut long_name = header(b'L', name.len() as u64 + 1);
    raw_name(&mut long_name, b"././@LongLink");
    let mut long_link = header(b'K', target.len() as u64 + 1);
    raw_name(&mut long_link, b"././@LongLink");
    let mut entry = header(b'2', 0);
    entry.set_uid(u64::from(u32::MAX) - 1);
    entry.as_old_mut().mtime = *b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe";
    let archive = Archive::new()
        .raw(long_name, &[&name[..], b"\0"].concat())
        .raw(long_link, &[&target[..], b"\0"].concat())
        .raw(entry, b"")
        .end();
    let read = read(&archive).unwrap();
    let inode = read.tree.inode(read.tree.lookup(&name).unwrap());
    assert_eq!(inode.content, Content::Symlink(target.into()));
    assert_eq!((inode.metadata.uid, inode.metadata.mtime), (u32::MAX - 1, -2));
}

#[test]
fn hostile_paths_and_links_are_refused_by_name() {
    let long = "n".repeat(256);
    let cases = [
        (Archive::new().file("../evil", b"x"), "../evil"),
        (Archive::new().file("a/../../evil", b"x"), "a/../../evil"),
        (Archive::new().pax(b'x', &[("path", b"a\0b")]).file("f", b"x"), "a\\0b"),
        (Archive::new().pax(b'x', &[("path", long.as_bytes())]).file("f", b"x"), "nnn"),
        (Archive::new().other(b'2', "s", "/etc").file("s/passwd", b"x"), "s/passwd"),
        (Archive::new().file("f", b"x").file("f/g", b"x"), "f/g"),
        (Archive::new().other(b'1', "l", "../../etc/passwd"), "\"l\""),
        (Archive::new().other(b'1', "l", "missing"), "missing"),
        (Archive::new().other(b'5', "d", "").other(b'1', "l", "d"), "is a directory"),
        (Archive::new().other(b'1', "l", "l"), "\"l\""),
        (Archive::new().file("f", b"").other(b'1', "./", "f"), "root"),
        (Archive::new().file("./", b"x"), "root"),
        (Archive::new().file("", b"x"), "root"),
        (Archive::new().other(b'2', "empty", ""), "empty"),
        (Archive::new().other(b'2', "s", "d").other(b'5', "d", "").other(b'1', "s/l", "d"), "s/l"),
    ];
    for (archive, name) in cases {
        let (kind, text) = refused(&archive.end());
        assert_eq!(kind, ErrorKind::Corrupt, "{text}");
        assert!(text.contains(name), "{name}: {text}");
    }
    for flag in [b'D', b'M', b'N', b'Z'] {
        let (kind, text) = refused(&Archive::new().other(flag, "odd", "").end());
        assert!(kind == ErrorKind::Unsupported && text.contains("odd"), "{text}");
    }
    for (records, what) in
        [(&[("uid", &b"4294967295"[..])][..], "uid"), (&[("gid", b"18446744073709551615")], "gid")]
    {
        let (kind, text) = refused(&Archive::new().pax(b'x', records).file("f", b"").end());
        assert!(kind == ErrorKind::Limit && text.contains(what) && text.contains("\"f\""), "{text}");
    }
    for records in [&[("mtime", &b"soon"[..])][..], &[("size", b"-1")], &[("uid", b"0x1")]] {
        assert_eq!(refused(&Archive::new().pax(b'x', records).file("f", b"").end()).0, ErrorKind::Corrupt);
    }
}

#[test]
fn giant_headers_and_bombs_are_bounded() {
    for flag in [b'x', b'g', b'L', b'K'] {
        let mut giant = header(flag, 1 << 40);
        raw_name(&mut giant, b"giant");
        assert_eq!(refused(&Archive::new().raw(giant, b"").end()).0, ErrorKind::Limit);
    }
    let value = vec![b'v'; 600_000];
    let globals = Archive::new().pax(b'g', &[("a", &value)]).pax(b'g', &[("b", &value)]);
    assert_eq!(refused(&globals.end()).0, ErrorKind::Limit);

    let options = TarOptions { max_entries: 2, ..TarOptions::default() };
    let three = Archive::new().file("a", b"").file("a", b"").file("a", b"").end();
    assert_eq!(read_with(&three, options).err().unwrap().kind(), ErrorKind::Limit);

    // Two entries whose paths imply 1000 directories.
    let deep = |name: &str| format!("{name}/{}", "d/".repeat(500));
    let options = TarOptions { max_entries: 900, ..TarOptions::default() };
    let implied = ["a", "b", "c"].into_iter().fold(Archive::new(), |archive, name| {
        archive.pax(b'x', &[("path", deep(name).as_bytes())]).file("short", b"")
    });
    assert_eq!(read_with(&implied.end(), options).err().unwrap().kind(), ErrorKind::Limit);

    // Sparse files without data: 1 KiB of archive for 2^40 bytes, which is 2 GiB of chunk indexes.
    let hole = (1u64 << 40).to_string();
    let holes = Archive::new()
        .pax(b'x', &[("GNU.sparse.size", hole.as_bytes()), ("GNU.sparse.map", b"")])
        .file("f", b"");
    let (kind, text) = refused(&holes.end());
    assert!(kind == ErrorKind::Limit && text.contains("largest bootstrap"), "{text}");

    // 30000 attributes in one header would be compared with one another.
    let names: Vec<String> = (0..30_000).map(|n| format!("SCHILY.xattr.user.{n}")).collect();
    let records: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
    let (kind, text) = refused(&Archive::new().pax(b'x', &records).file("f", b"").end());
    assert!(kind == ErrorKind::Limit && text.contains("more than 4096 xattrs"), "{text}");

    // A header that promises far more than the stream holds.
    let mut huge = header(b'0', 1 << 38);
    raw_name(&mut huge, b"huge");
    let (kind, text) = refused(&Archive::new().raw(huge, b"").end());
    assert!(kind == ErrorKind::Corrupt && text.contains("huge"), "{text}");

    // 100 MB behind the end marker, 3 KB compressed.
    let mut bomb = Archive::new().file("a", b"").end();
    bomb.resize(100 << 20, 0);
    assert_eq!(refused(&zstd::encode_all(&bomb[..], 1).unwrap()).0, ErrorKind::Limit);

    // 16 GB of zeros in 3 lines of sparse map.
    let sparse = Archive::new()
        .pax(b'x', &[("GNU.sparse.size", b"17179869184"), ("GNU.sparse.map", b"")])
        .file("f", b"");
    let read = read(&sparse.end()).unwrap();
    assert_eq!(read.output.content.chunk_count(), 1);
}

#[test]
fn a_stream_cut_anywhere_is_an_error_that_names_the_place() {
    let archive =
        Archive::new().pax(b'x', &[("path", b"first")]).file("f", &[7; 5000]).file("second", b"abc").end();
    for cut in (0..archive.len() - 1024).step_by(61) {
        let (kind, text) = refused(&archive[..cut]);
        assert_eq!(kind, ErrorKind::Corrupt);
        if cut > 7000 {
            assert!(text.contains("first") || text.contains("second"), "{text}");
        }
    }
    // Without end marker: refused, unless something else vouches for the stream.
    let open = &archive[..archive.len() - 1024];
    assert!(refused(open).1.contains("cut short"));
    assert!(read_with(open, TarOptions { require_end: false, ..TarOptions::default() }).is_ok());

    let gzip = {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(&archive).unwrap();
        out.finish().unwrap()
    };
    for stored in [gzip, zstd::encode_all(&archive[..], 1).unwrap()] {
        for cut in 4..stored.len() {
            let (kind, text) = refused(&stored[..cut]);
            assert_eq!(kind, ErrorKind::Corrupt, "{text}");
        }
    }
}

#[test]
fn later_entries_win() {
    let archive = Archive::new()
        .file("f", b"one")
        .other(b'1', "keeps", "f")
        .file("f", b"two")
        .file("d/x", b"x")
        .other(b'2', "d", "elsewhere")
        .other(b'2', "e", "elsewhere")
        .other(b'5', "e", "")
        .file("e/y", b"y")
        .other(b'5', "e/", "")
        .end();
    let read = read(&archive).unwrap();
    assert_eq!(read.data("f"), b"two");
    assert_eq!(read.data("keeps"), b"one");
    assert_eq!(read.inode("d").content, Content::Symlink((*b"elsewhere").into()));
    assert_eq!(read.data("e/y"), b"y");
}

/// An entry of a generated archive and its model.
#[derive(Clone, Debug, PartialEq)]
enum Item {
    Dir,
    File(Vec<u8>),
    Link(String),
    Fifo,
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        Just(Item::Dir),
        (0usize..9000, any::<u8>()).prop_map(|(len, byte)| Item::File(vec![byte; len])),
        "[a-z]{1,200}".prop_map(Item::Link),
        Just(Item::Fifo),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Flat names, so that every sequence is valid; the tar crate writes, the model is a map.
    #[test]
    fn what_the_tar_crate_writes_is_read(
        entries in prop::collection::vec(("[a-c]{1,2}|[a-d]{150,255}", item(), 0u32..0o10000, any::<u32>(), any::<u32>()), 0..30)
    ) {
        let mut builder = Builder::new(Vec::new());
        let mut model = BTreeMap::new();
        for (name, item, mode, uid, mtime) in entries {
            let uid = uid.min(u32::MAX - 1);
            let mut h = Header::new_gnu();
            h.set_mode(mode);
            h.set_uid(u64::from(uid));
            h.set_gid(0);
            h.set_mtime(u64::from(mtime));
            h.set_size(0);
            match &item {
                Item::Dir => h.set_entry_type(EntryType::Directory),
                Item::Fifo => h.set_entry_type(EntryType::Fifo),
                Item::Link(_) => h.set_entry_type(EntryType::Symlink),
                Item::File(data) => h.set_size(data.len() as u64),
            }
            match &item {
                Item::Link(target) => builder.append_link(&mut h, &name, target).unwrap(),
                Item::File(data) => builder.append_data(&mut h, &name, data.as_slice()).unwrap(),
                _ => builder.append_data(&mut h, &name, std::io::empty()).unwrap(),
            }
            model.insert(name, (item, mode, uid, mtime));
        }
        let read = read(&builder.into_inner().unwrap()).unwrap();
        let names: Vec<_> = read.tree.inode(read.tree.root()).children().unwrap().keys().cloned().collect();
        prop_assert_eq!(names, model.keys().map(|n| n.as_bytes().into()).collect::<Vec<Box<[u8]>>>());
        for (name, (item, mode, uid, mtime)) in model {
            let inode = read.inode(&name);
            let meta = &inode.metadata;
            prop_assert_eq!((meta.mode, meta.uid, meta.mtime), (mode, uid, i64::from(mtime)));
            let found = match &inode.content {
                Content::Directory(_) => Item::Dir,
                Content::Fifo => Item::Fifo,
                Content::Symlink(target) => Item::Link(String::from_utf8(target.to_vec()).unwrap()),
                _ => Item::File(read.data(&name)),
            };
            prop_assert_eq!(found, item);
        }
    }

    /// Whatever the bytes, the reader answers.
    #[test]
    fn damaged_archives_never_panic(flips in prop::collection::vec((0usize..6000, any::<u8>()), 1..8)) {
        let mut archive = Archive::new()
            .pax(b'x', &[("path", b"dir/name"), ("mtime", b"1.5"), ("SCHILY.xattr.user.a", b"b")])
            .file("f", b"data")
            .pax(b'x', &[("GNU.sparse.size", b"20000"), ("GNU.sparse.map", b"4096,512")])
            .file("s", &[1; 512])
            .other(b'1', "l", "f")
            .end();
        for (at, byte) in flips {
            let at = at % archive.len();
            archive[at] = byte;
            // Repair the checksums, so that the fields behind them are reached.
            let block = at / 512 * 512;
            let mut h = Header::new_old();
            h.as_mut_bytes().copy_from_slice(&archive[block..block + 512]);
            h.set_cksum();
            archive[block + 148..block + 156].copy_from_slice(&h.as_bytes()[148..156]);
        }
        let _ = read(&archive);
    }
}
