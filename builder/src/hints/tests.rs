//! Small images whose start is known.

use std::fs::File;

use serde_json::{Value, json};
use storage::codec::Codec;
use storage::digest::DigestAlgorithm;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::oci::read::{ReadOptions, read_layers};
use crate::oci::testing::{Item, Layout, TAR, tar_of};
use crate::overlay::{self, WhiteoutSpec};
use crate::pipeline::DataOptions;
use crate::progress::Silent;
use crate::sink::BlobSink;

const CHUNK_SIZE: u32 = 4096;

/// A 64-bit ELF file for x86-64, in as many chunks as `padding` makes it.
fn elf(interpreter: &str, needed: &[&str], runpath: &str, padding: usize) -> Vec<u8> {
    let mut strings = vec![0u8];
    let mut name = |text: &str| {
        let at = strings.len() as u64;
        strings.extend([text.as_bytes(), b"\0"].concat());
        at
    };
    let mut dynamic: Vec<(u64, u64)> = needed.iter().map(|needed| (1, name(needed))).collect();
    if !runpath.is_empty() {
        dynamic.push((29, name(runpath)));
    }
    let interp_at = 64 + 3 * 56;
    let dynamic_at = (interp_at + interpreter.len() + 1 + padding).next_multiple_of(8);
    let strings_at = dynamic_at + 16 * (dynamic.len() + 2);
    dynamic.extend([(5, strings_at as u64), (0, 0)]);
    let end = strings_at + strings.len();

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for (value, size) in
        [(3u64, 2), (62, 2), (1, 4), (0, 8), (64, 8), (0, 8), (0, 4), (64, 2), (56, 2), (3, 2)]
    {
        file.extend_from_slice(&value.to_le_bytes()[..size]);
    }
    file.resize(64, 0);
    let segments =
        [(3u64, interp_at, interpreter.len() + 1), (1, 0, end), (2, dynamic_at, 16 * dynamic.len())];
    for (kind, at, len) in segments {
        let (at, len) = (at as u64, len as u64);
        // A segment without an interpreter is no interpreter.
        let kind = if kind == 3 && interpreter.is_empty() { 0 } else { kind };
        for value in [kind | 4 << 32, at, at, at, len, len, 8] {
            file.extend_from_slice(&value.to_le_bytes());
        }
    }
    file.extend_from_slice(interpreter.as_bytes());
    file.resize(dynamic_at, 0);
    for (tag, value) in dynamic {
        file.extend_from_slice(&tag.to_le_bytes());
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&strings);
    file
}

/// A 64-bit ELF file for x86-64 that has constants and nothing else.
fn library(constants: &[u8]) -> Vec<u8> {
    let mut file = elf("", &[], "", 0);
    // Its interpreter becomes a segment that is read only.
    let (at, len) = (file.len() as u64, constants.len() as u64);
    for (field, value) in [1 | 4 << 32, at, at, at, len, len, 8].into_iter().enumerate() {
        let place = 64 + 8 * field;
        file[place..place + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    file.extend_from_slice(constants);
    file
}

/// The paths of the files that an image of one layer hints at.
fn hints(entries: &[(&str, u32, Item<'_>)], config: Value) -> Vec<String> {
    let mut layout = Layout::new();
    let image = layout.image(&[(TAR, &tar_of(entries))]);
    layout.add(image, "src");
    let source = layout.open("", None).unwrap();
    let data = DataOptions {
        codec: Codec::Zstd,
        digester: DigestAlgorithm::Sha256,
        chunk_size: CHUNK_SIZE,
        threads: 1,
    };
    let options = ReadOptions { data, jobs: 1, observer: &Silent, cancel: &CancellationToken::new() };
    let mut files: Vec<File> = Vec::new();
    let content = read_layers(&source, &options, |_| {
        let file = tempfile::tempfile().unwrap();
        files.push(file.try_clone().unwrap());
        Ok(BlobSink::new("blob", file))
    })
    .unwrap();
    let mut tree = Tree::new();
    for layer in content.trees {
        overlay::apply(&mut tree, layer, WhiteoutSpec::Oci).unwrap();
    }
    let contents = Contents::new(&content.output.content, files, data.codec, CHUNK_SIZE);
    let config = json!({ "config": config });
    let found = find(&tree, config.as_object().unwrap(), &contents);
    found.into_iter().map(|id| path_of(&tree, tree.root(), id).unwrap()).collect()
}

fn path_of(tree: &Tree, dir: InodeId, wanted: InodeId) -> Option<String> {
    tree.inode(dir).children()?.iter().find_map(|(name, &id)| {
        let name = String::from_utf8_lossy(name);
        if id == wanted {
            return Some(format!("/{name}"));
        }
        path_of(tree, id, wanted).map(|rest| format!("/{name}{rest}"))
    })
}

#[test]
fn a_program_needs_its_interpreter_and_libraries() {
    let program =
        elf("/lib64/ld.so", &["liba.so", "libmissing.so"], "$ORIGIN/../own", 3 * CHUNK_SIZE as usize);
    let (a, b, c) =
        (elf("", &["libb.so"], "", 10), elf("", &["liba.so", "libc.so"], "", 0), elf("", &[], "", 0));
    let mut foreign = c.clone();
    foreign[18] = 183;
    let entries = [
        ("usr/bin/tool", 0o755, Item::File(&program)),
        ("usr/own/liba.so", 0o644, Item::Symlink("liba.so.1")),
        ("usr/own/liba.so.1", 0o644, Item::File(&a)),
        ("usr/lib/ld.so", 0o755, Item::File(&c)),
        ("lib64", 0o777, Item::Symlink("usr/lib")),
        ("opt/libs/libc.so", 0o644, Item::File(&foreign)),
        ("opt/libs/libb.so", 0o644, Item::File(&b)),
        ("usr/lib/libc.so", 0o644, Item::File(&[&c[..], b"x"].concat())),
        ("opt/unused", 0o644, Item::File(b"unused")),
        ("etc/ld.so.conf", 0o644, Item::File(b"# comment\ninclude /etc/ld.so.conf.d/*.conf\n")),
        ("etc/ld.so.conf.d/opt.conf", 0o644, Item::File(b"/opt/libs\n")),
        ("etc/ld.so.conf.d/other", 0o644, Item::File(b"/opt/other\n")),
        ("etc/ld.so.cache", 0o644, Item::File(b"cache")),
    ];
    let expected = [
        "/usr/bin/tool",
        "/usr/lib/ld.so",
        "/etc/ld.so.cache",
        "/usr/own/liba.so.1",
        "/opt/libs/libb.so",
        "/usr/lib/libc.so",
    ];
    for command in [json!({"Entrypoint": ["tool"]}), json!({"Cmd": ["bin/tool"], "WorkingDir": "/usr"})] {
        assert_eq!(hints(&entries, command), expected);
    }
    assert_eq!(hints(&entries, json!({"Cmd": ["tool"], "Env": ["PATH=/bin"]})), Vec::<String>::new());
}

#[test]
fn libraries_that_are_not_added_may_need_each_other() {
    let program = elf("/lib/ld.so", &["liba.so"], "", 0);
    let table = |needed| elf("", &[needed, "libc.so"], "", 1 << 20);
    let (a, b, c) = (table("libb.so"), table("liba.so"), elf("", &[], "", 0));
    let entries = [
        ("bin/tool", 0o755, Item::File(&program[..])),
        ("lib/liba.so", 0o644, Item::File(&a)),
        ("lib/libb.so", 0o644, Item::File(&b)),
        ("lib/libc.so", 0o644, Item::File(&c)),
    ];
    assert_eq!(hints(&entries, json!({"Cmd": ["tool"]})), ["/bin/tool", "/lib/libc.so"]);
}

#[test]
fn a_python_program_needs_its_modules() {
    let python = elf("", &[], "", 0);
    let main = b"#!/usr/bin/env python3\nimport used\nfrom pkg import sub, name\nimport ext\n\
                 def later():\n    import unused\n";
    let entries = [
        ("usr/bin/env", 0o755, Item::File(&[&python[..], b"e"].concat())),
        ("usr/bin/python3", 0o777, Item::Symlink("python3.11")),
        ("usr/bin/python3.11", 0o755, Item::File(&python)),
        ("usr/lib/python3.11/encodings/__init__.py", 0o644, Item::File(b"from . import aliases\n")),
        ("usr/lib/python3.11/encodings/aliases.py", 0o644, Item::File(b"#\n")),
        ("usr/lib/python3.11/encodings/utf_8.py", 0o644, Item::File(b"import codecs\n")),
        ("usr/lib/python3.11/encodings/__pycache__/utf_8.cpython-311.pyc", 0o644, Item::File(b"compiled")),
        ("usr/lib/python3.11/codecs.py", 0o644, Item::File(b"frozen")),
        ("usr/lib/python3.11/used.py", 0o644, Item::File(b"import loop\n")),
        ("usr/lib/python3.11/loop.py", 0o644, Item::File(b"import used\n")),
        ("usr/lib/python3.11/unused.py", 0o644, Item::File(b"never\n")),
        ("usr/lib/python3.11/lib-dynload/ext.cpython-311-x86_64-linux-gnu.so", 0o644, Item::File(b"no elf")),
        ("usr/lib/python3/dist-packages/pkg/__init__.py", 0o644, Item::File(b"from .deep.er import x\n")),
        ("usr/lib/python3/dist-packages/pkg/sub.py", 0o644, Item::File(b"'sub'\n")),
        ("usr/lib/python3/dist-packages/pkg/deep/er.py", 0o644, Item::File(b"from .. import sub\n#e\n")),
        ("srv/main.py", 0o755, Item::File(main)),
        ("usr/lib/python3/dist-packages/sitecustomize.py", 0o644, Item::File(b"# of the site\n")),
    ];
    let modules = [
        "/usr/bin/python3.11",
        "/usr/lib/python3.11/encodings/__init__.py",
        "/usr/lib/python3.11/encodings/aliases.py",
        "/usr/lib/python3.11/encodings/__pycache__/utf_8.cpython-311.pyc",
        "/usr/lib/python3/dist-packages/sitecustomize.py",
        "/srv/main.py",
        "/usr/lib/python3.11/used.py",
        "/usr/lib/python3.11/loop.py",
        "/usr/lib/python3/dist-packages/pkg/__init__.py",
        "/usr/lib/python3/dist-packages/pkg/deep/er.py",
        "/usr/lib/python3/dist-packages/pkg/sub.py",
        "/usr/lib/python3.11/lib-dynload/ext.cpython-311-x86_64-linux-gnu.so",
    ];
    assert_eq!(hints(&entries, json!({"Cmd": ["python3", "-u", "/srv/main.py"]})), modules);
    let mut script: Vec<&str> = vec!["/srv/main.py", "/usr/bin/env"];
    script.extend(modules.iter().filter(|path| **path != "/srv/main.py"));
    assert_eq!(hints(&entries, json!({"Entrypoint": ["/srv/main.py"]})), script);
    let module = hints(&entries, json!({"Cmd": ["python3", "-m", "loop"]}));
    assert!(
        module.contains(&modules[7].to_owned()) && !module.contains(&modules[8].to_owned()),
        "{module:?}"
    );
}

#[test]
fn a_node_program_needs_its_modules() {
    let node = elf("", &[], "", 0);
    let entries = [
        ("usr/bin/node", 0o755, Item::File(&node)),
        ("srv/app/package.json", 0o644, Item::File(br#"{"type":"commonjs"}"#)),
        (
            "srv/app/main.js",
            0o644,
            Item::File(b"require('./lib'); require('a'); require('@s/b/c'); require('fs')"),
        ),
        ("srv/app/lib/index.js", 0o644, Item::File(b"module.exports = require('../data.json')")),
        ("srv/app/data.json", 0o644, Item::File(b"{}")),
        ("srv/app/unused.js", 0o644, Item::File(b"//")),
        ("srv/app/node_modules/a/package.json", 0o644, Item::File(br#"{"main":"dist/a"}"#)),
        ("srv/app/node_modules/a/dist/a.js", 0o644, Item::File(b"require('g')")),
        ("global/@s/b/package.json", 0o644, Item::File(br#"{"exports":{"./c":{"require":"./x.cjs"}}}"#)),
        ("global/@s/b/x.cjs", 0o644, Item::File(b"'c'")),
        ("global/g.js", 0o644, Item::File(b"'g'")),
    ];
    let config = json!({"Cmd": ["node", "main.js"], "WorkingDir": "/srv/app", "Env": ["NODE_PATH=/global"]});
    let expected = [
        "/usr/bin/node",
        "/srv/app/main.js",
        "/srv/app/package.json",
        "/srv/app/lib/index.js",
        "/srv/app/data.json",
        "/srv/app/node_modules/a/package.json",
        "/srv/app/node_modules/a/dist/a.js",
        "/global/g.js",
        "/global/@s/b/package.json",
        "/global/@s/b/x.cjs",
    ];
    assert_eq!(hints(&entries, config), expected);
}

#[test]
fn a_python_program_needs_modules_that_are_not_in_its_import_statements() {
    let python = elf("", &[], "", 0);
    let main = b"import lazy, ext\nfrom lazy import Late, plain\nx = lazy.sub.y\ny = plain.no\n";
    let lazy = b"def __getattr__(name):\n    if name == 'Late':\n        from .late import Late\n    \
                 import unasked\n";
    let ext = library(b"\0named.by.ext\0named.by.nobody\0in text named.never\0");
    let site = "usr/lib/python3/dist-packages";
    let at = |name: &str| format!("{site}/{name}");
    let in_site = [
        "hook.py",
        "lazy/late.py",
        "lazy/sub.py",
        "lazy/other.py",
        "named/by/ext.py",
        "named/never.py",
        "plain/__init__.py",
        "plain/no.py",
        "unasked.py",
    ]
    .map(at);
    let (pth, package, ext_path) = (at("a.pth"), at("lazy/__init__.py"), at("ext.abi3.so"));
    let mut entries = vec![
        ("usr/bin/python3.11", 0o755, Item::File(&python[..])),
        ("usr/lib/python3.11/encodings/__init__.py", 0o644, Item::File(b"import sysconfig\n")),
        ("usr/lib/python3.11/importlib/__init__.py", 0o644, Item::File(b"# not frozen\n")),
        ("usr/lib/python3.11/importlib/util.py", 0o644, Item::File(b"# frozen\n")),
        ("usr/lib/python3.11/sysconfig.py", 0o644, Item::File(b"import importlib.util\n")),
        ("usr/lib/python3.11/_sysconfigdata__x.py", 0o644, Item::File(b"# built\n")),
        (&pth, 0o644, Item::File(b"import os; ok and __import__('hook').add()\nnowhere\n")),
        (&package, 0o644, Item::File(lazy)),
        (&ext_path, 0o644, Item::File(&ext)),
        ("srv/main.py", 0o644, Item::File(main)),
    ];
    entries.extend(in_site.iter().map(|path| (path.as_str(), 0o644, Item::File(path.as_bytes()))));
    let expected = [
        "/usr/bin/python3.11",
        "/usr/lib/python3/dist-packages/a.pth",
        "/usr/lib/python3.11/encodings/__init__.py",
        "/usr/lib/python3.11/sysconfig.py",
        "/usr/lib/python3.11/importlib/__init__.py",
        "/usr/lib/python3.11/_sysconfigdata__x.py",
        "/usr/lib/python3/dist-packages/hook.py",
        "/srv/main.py",
        "/usr/lib/python3/dist-packages/lazy/__init__.py",
        "/usr/lib/python3/dist-packages/ext.abi3.so",
        "/usr/lib/python3/dist-packages/named/by/ext.py",
        "/usr/lib/python3/dist-packages/lazy/late.py",
        "/usr/lib/python3/dist-packages/lazy/sub.py",
    ];
    assert_eq!(hints(&entries, json!({"Cmd": ["python3.11", "/srv/main.py"]})), expected);
}

#[test]
fn a_program_needs_files_of_the_system() {
    let program = elf("/lib/ld.so", &["libcrypto.so.3"], "", 0);
    let library = elf("", &[], "", 0);
    let large = vec![b'l'; (4 << 20) + 1];
    let entries = [
        ("bin/tool", 0o755, Item::File(&program[..])),
        ("bin/node", 0o755, Item::File(&program)),
        ("bin/python3.9", 0o755, Item::File(&program)),
        ("lib/libcrypto.so.3", 0o644, Item::File(&library)),
        ("lib/gconv/gconv-modules.cache", 0o644, Item::File(b"gconv")),
        ("etc/passwd", 0o644, Item::File(b"passwd")),
        ("etc/localtime", 0o777, Item::Symlink("/usr/share/zoneinfo/Etc/UTC")),
        ("usr/share/zoneinfo/Etc/UTC", 0o644, Item::File(b"utc")),
        ("usr/share/zoneinfo/Asia/Tokyo", 0o644, Item::File(b"tokyo")),
        ("usr/lib/ssl/openssl.cnf", 0o777, Item::Symlink("/etc/ssl/openssl.cnf")),
        ("etc/ssl/openssl.cnf", 0o644, Item::File(b"openssl")),
        ("usr/lib/locale/locale-archive", 0o644, Item::File(&large)),
        ("usr/lib/locale/C.utf8/LC_CTYPE", 0o644, Item::File(b"ctype")),
        ("usr/lib/locale/C.utf8/LC_TIME", 0o644, Item::File(b"time")),
        ("usr/lib/locale/C.utf8/LC_MESSAGES/SYS_LC_MESSAGES", 0o644, Item::File(b"messages")),
    ];
    let system = |command: &str, environment: &[&str]| {
        let all = hints(&entries, json!({"Cmd": [command], "Env": environment}));
        // The program and its library come first.
        assert_eq!(all[1], "/lib/libcrypto.so.3");
        all[2..].to_vec()
    };
    let (ssl, gconv) = ("/etc/ssl/openssl.cnf", "/lib/gconv/gconv-modules.cache");
    let (ctype, time) = ("/usr/lib/locale/C.utf8/LC_CTYPE", "/usr/lib/locale/C.utf8/LC_TIME");
    let (zone, accounts) = ("/usr/share/zoneinfo/Etc/UTC", "/etc/passwd");
    assert_eq!(system("tool", &["LANG=POSIX"]), [ssl, zone, accounts]);
    assert_eq!(system("node", &["LANG=C.UTF-8"]), [ssl, zone, accounts]);
    assert_eq!(system("python3.9", &[]), [ssl, ctype, gconv, zone, accounts]);
    let messages = "/usr/lib/locale/C.utf8/LC_MESSAGES/SYS_LC_MESSAGES";
    let tokyo = "/usr/share/zoneinfo/Asia/Tokyo";
    assert_eq!(
        system("tool", &["LC_ALL=C.UTF-8", "TZ=:Asia/Tokyo"]),
        [ssl, ctype, time, messages, gconv, tokyo, accounts]
    );
    assert_eq!(system("tool", &["OPENSSL_CONF=/etc/passwd", "TZ=None"]), [accounts]);
}

#[test]
fn node_needs_modules_that_its_library_names() {
    let node = library(b"\0/usr/share/nodejs/a.js\0/usr/share/nodejs/gone.js\0/usr/share/nodejs/c.js x\0");
    let entries = [
        ("bin/node", 0o755, Item::File(&node[..])),
        ("usr/share/nodejs/a.js", 0o644, Item::File(b"require('b')")),
        ("usr/share/nodejs/b.js", 0o644, Item::File(b"'not read at once'")),
        ("usr/share/nodejs/c.js", 0o644, Item::File(b"'in a text'")),
        ("srv/main.js", 0o644, Item::File(b"'main'")),
    ];
    let expected = ["/bin/node", "/usr/share/nodejs/a.js", "/srv/main.js"];
    assert_eq!(hints(&entries, json!({"Cmd": ["node", "/srv/main.js"]})), expected);
}

/// Loops, garbage and what leads out of the tree end in fewer hints.
#[test]
fn hostile_images_give_fewer_hints() {
    let mut broken = elf("/lib/ld.so", &["liba.so"], "", 0);
    let len = broken.len();
    broken.truncate(len - 20);
    let mut huge = elf("/lib/ld.so", &[], "", 0);
    // The dynamic section claims most of the address space.
    let at = 64 + 2 * 56 + 32;
    huge[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    let entries = [
        ("bin/loop", 0o755, Item::File(b"#!/bin/loop\n")),
        ("bin/link", 0o777, Item::Symlink("/bin/link")),
        ("bin/up", 0o777, Item::Symlink("../../../../etc/passwd")),
        ("bin/broken", 0o755, Item::File(&broken)),
        ("bin/huge", 0o755, Item::File(&huge)),
        ("bin/empty", 0o755, Item::File(b"")),
        ("bin/garbage", 0o755, Item::File(b"\x7fELF\x02garbage")),
        ("bin/dir/", 0o755, Item::Dir),
        ("etc/ld.so.conf", 0o644, Item::File(b"include /etc/*.conf\n")),
    ];
    for (command, expected) in [
        ("loop", &["/bin/loop"][..]),
        ("link", &[]),
        ("up", &[]),
        ("broken", &["/bin/broken"]),
        ("huge", &["/bin/huge"]),
        ("empty", &[]),
        ("garbage", &["/bin/garbage"]),
        ("dir", &[]),
        ("", &[]),
        ("../bin/loop", &["/bin/loop"]),
    ] {
        assert_eq!(hints(&entries, json!({"Cmd": [command]})), expected, "{command}");
    }
}
