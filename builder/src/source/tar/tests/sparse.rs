//! Sparse members, and whole archives of GNU tar.

use tar::GnuExtSparseHeader;

use super::*;

/// The file that all sparse archives below describe: 512 × `a` at 4096, 1024 × `b` at 12288, 20000 long.
fn sparse_file() -> Vec<u8> {
    let mut file = vec![0; 20_000];
    file[4096..4608].fill(b'a');
    file[12288..13312].fill(b'b');
    file
}

fn stored_data() -> Vec<u8> {
    [vec![b'a'; 512], vec![b'b'; 1024]].concat()
}

#[test]
fn sparse_files_of_every_gnu_format_read_as_their_dense_form() {
    let mut old = header(b'S', 1536);
    raw_name(&mut old, b"f");
    let gnu = old.as_gnu_mut().unwrap();
    gnu.set_real_size(20_000);
    // Split over the header and a block behind it, which only holds the end mark.
    for (entry, (offset, len)) in
        gnu.sparse.iter_mut().zip([(4096, 512), (12288, 512), (12800, 256), (13056, 0)])
    {
        entry.set_offset(offset);
        entry.set_length(len);
    }
    gnu.sparse[2].set_length(512);
    gnu.set_is_extended(true);
    let mut ext = GnuExtSparseHeader::new();
    ext.sparse_mut()[0].set_offset(20_000);
    ext.sparse_mut()[0].set_length(0);
    let old_data = [&ext.as_bytes()[..], &stored_data()].concat();

    let mut map = b"2\n4096\n512\n12288\n1024\n".to_vec();
    map.resize(512, 0);
    let archives = [
        Archive::new().raw(old, &old_data),
        Archive::new()
            .pax(
                b'x',
                &[
                    ("GNU.sparse.size", b"20000"),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.offset", b"4096"),
                    ("GNU.sparse.numbytes", b"512"),
                    ("GNU.sparse.offset", b"12288"),
                    ("GNU.sparse.numbytes", b"1024"),
                ],
            )
            .file("f", &stored_data()),
        Archive::new()
            .pax(
                b'x',
                &[
                    ("GNU.sparse.size", b"20000"),
                    ("GNU.sparse.name", b"f"),
                    ("GNU.sparse.map", b"4096,512,12288,1024,20000,0"),
                ],
            )
            .file("GNUSparseFile.1/f", &stored_data()),
        Archive::new()
            .pax(
                b'x',
                &[
                    ("GNU.sparse.major", b"1"),
                    ("GNU.sparse.minor", b"0"),
                    ("GNU.sparse.name", b"f"),
                    ("GNU.sparse.realsize", b"20000"),
                ],
            )
            .file("GNUSparseFile.1/f", &[map, stored_data()].concat()),
    ];
    for (number, archive) in archives.into_iter().enumerate() {
        let read =
            read(&archive.file("after", b"ok").end()).unwrap_or_else(|e| panic!("format {number}: {e}"));
        assert!(read.data("f") == sparse_file(), "format {number}");
        assert_eq!(read.data("after"), b"ok");
    }
}

/// GNU tar itself writes every format with a file that has holes, a long name and odd owners.
#[test]
fn archives_of_gnu_tar_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let name = "long-".repeat(40);
    let mut file = std::fs::File::create(dir.path().join(&name)).unwrap();
    let mut want = vec![0; 3 << 20];
    for at in (0..40).map(|i| i * 70_001) {
        std::os::unix::fs::FileExt::write_all_at(&file, b"some data", at).unwrap();
        want[at as usize..][..9].copy_from_slice(b"some data");
    }
    file.set_len(3 << 20).unwrap();
    file.flush().unwrap();
    std::os::unix::fs::symlink("t".repeat(300), dir.path().join("sym")).unwrap();
    std::fs::hard_link(dir.path().join(&name), dir.path().join("z-link")).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
        &["--format=posix", "--sparse-version=1.0", "--gzip"],
    ] {
        let run = std::process::Command::new("tar")
            .args(["--sparse", "--sort=name", "--owner=o:4294967294", "--group=g:3000000", "--mtime=@-5.25"])
            .args(format)
            .args(["-cf", "-", "-C"])
            .arg(dir.path())
            .arg(".")
            .output();
        let run = match run {
            Ok(run) if run.status.success() => run,
            other => {
                eprintln!("skipped {format:?}: no GNU tar that does this: {other:?}");
                continue;
            }
        };
        assert!(run.stdout.len() < 1 << 20, "{format:?}: holes are not stored");
        let read = read(&run.stdout).unwrap_or_else(|e| panic!("{format:?}: {e}"));
        assert!(read.data(&name) == want, "{format:?}");
        assert_eq!(read.tree.lookup(b"z-link"), read.tree.lookup(name.as_bytes()));
        assert_eq!(read.inode("sym").content, Content::Symlink("t".repeat(300).into_bytes().into()));
        let meta = &read.inode("sym").metadata;
        assert_eq!((meta.uid, meta.gid), (4_294_967_294, 3_000_000));
        let time = if format[0] == "--format=gnu" { (-6, 0) } else { (-6, 750_000_000) };
        assert_eq!((meta.mtime, meta.mtime_nsec), time, "{format:?}");
    }
}

#[test]
fn bad_sparse_maps_are_refused() {
    let version = |major: &'static [u8], extra: &[(&str, &[u8])], data: &[u8]| {
        let mut records =
            vec![("GNU.sparse.major", major), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"20000")];
        records.extend_from_slice(extra);
        refused(&Archive::new().pax(b'x', &records).file("f", data).end()).0
    };
    assert_eq!(version(b"2", &[], b""), ErrorKind::Unsupported);
    for map in ["", "x\n", "2\n1\n", "99999999999999999999999\n", "1\n0\n511\n", "1\n-1\n512\n"] {
        let mut data = map.as_bytes().to_vec();
        data.resize(1024, 0);
        assert_eq!(version(b"1", &[], &data), ErrorKind::Corrupt, "{map:?}");
    }
    let mut data = b"9999999\n".to_vec();
    data.resize(1024, 0);
    assert_eq!(version(b"1", &[], &data), ErrorKind::Limit);
    // Overlaps, passes the end, has an offset too many.
    for map in [&b"512,512,0,512"[..], b"19999,1024", b"0,1024,5", b"0,512,1", b"18446744073709551615,1024"] {
        assert_eq!(version(b"0", &[("GNU.sparse.map", map)], &[1; 1024]), ErrorKind::Corrupt, "{map:?}");
    }
}
