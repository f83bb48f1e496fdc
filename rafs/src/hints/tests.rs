//! Small images whose start is known.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;

use serde_json::{Value, json};

use super::*;

mod following;
mod hostile;

/// A 64-bit ELF file for x86-64, `padding` bytes longer than need be.
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

/// An entry of an image.
#[derive(Clone, Copy)]
enum Item<'a> {
    File(&'a [u8]),
    Symlink(&'a str),
    Dir,
}

/// An image in memory, some files of which can not be read.
#[derive(Default)]
struct Image<'a> {
    nodes: Vec<Node<'a>>,
    away: Vec<Inode>,
}

struct Node<'a> {
    path: String,
    children: BTreeMap<Vec<u8>, Inode>,
    item: Item<'a>,
}

impl<'a> Image<'a> {
    fn new(entries: &[(&str, Item<'a>)]) -> Self {
        let mut image = Self::default();
        image.nodes.push(Node { path: String::new(), children: BTreeMap::new(), item: Item::Dir });
        for (path, item) in entries {
            let mut dir = 0;
            for (at, name) in path.trim_end_matches('/').split('/').enumerate() {
                let is_last = at + 1 == path.trim_end_matches('/').split('/').count();
                let known = image.nodes[dir].children.get(name.as_bytes()).map(|inode| inode.0 as usize);
                dir = known.unwrap_or_else(|| {
                    let inode = image.nodes.len();
                    let path = format!("{}/{name}", image.nodes[dir].path);
                    let item = if is_last { *item } else { Item::Dir };
                    image.nodes.push(Node { path, children: BTreeMap::new(), item });
                    image.nodes[dir].children.insert(name.as_bytes().to_vec(), Inode(inode as u64));
                    inode
                });
            }
        }
        image
    }

    fn node(&self, inode: Inode) -> &Node<'a> {
        &self.nodes[inode.0 as usize]
    }

    fn paths(&self, found: Vec<Inode>) -> Vec<String> {
        found.into_iter().map(|inode| self.node(inode).path.clone()).collect()
    }
}

impl Files for Image<'_> {
    fn root(&self) -> Inode {
        Inode(0)
    }

    fn kind(&self, inode: Inode) -> Kind {
        match self.node(inode).item {
            Item::File(bytes) => Kind::Regular(bytes.len() as u64),
            Item::Symlink(target) => Kind::Symlink(target.into()),
            Item::Dir => Kind::Directory,
        }
    }

    fn lookup(&self, dir: Inode, name: &[u8]) -> Option<Inode> {
        self.node(dir).children.get(name).copied()
    }

    fn names(&self, dir: Inode, from: &[u8], visit: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) {
        let names = self.node(dir).children.keys().skip_while(|name| name.as_slice() < from);
        let _ = names.into_iter().try_for_each(|name| visit(name));
    }

    /// A few bytes at a time.
    fn read_at(&self, inode: Inode, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let Item::File(bytes) = self.node(inode).item else { return Err(io::ErrorKind::InvalidInput.into()) };
        if self.away.contains(&inode) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let n = rest.len().min(into.len()).min(4096);
        into[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
}

/// The paths of the files that an image hints at.
fn hints(entries: &[(&str, Item<'_>)], config: Value) -> Vec<String> {
    let image = Image::new(entries);
    let config = json!({ "config": config });
    let command = Command::of(config.as_object().unwrap());
    let found = find(&image, &command);
    assert_eq!(found, look(&image, &command, None), "a scout changes nothing");
    let exchange = Exchange::new();
    look(&image, &command, Some((&exchange, true)));
    assert_eq!(found, look(&image, &command, Some((&exchange, false))), "nor does one that was faster");
    image.paths(found)
}

#[test]
fn a_program_needs_its_interpreter_and_libraries() {
    let program = elf("/lib64/ld.so", &["liba.so", "libmissing.so"], "$ORIGIN/../own", 3 * 4096);
    let (a, b, c) =
        (elf("", &["libb.so"], "", 10), elf("", &["liba.so", "libc.so"], "", 0), elf("", &[], "", 0));
    let mut foreign = c.clone();
    foreign[18] = 183;
    let entries = [
        ("usr/bin/tool", Item::File(&program)),
        ("usr/own/liba.so", Item::Symlink("liba.so.1")),
        ("usr/own/liba.so.1", Item::File(&a)),
        ("usr/lib/ld.so", Item::File(&c)),
        ("lib64", Item::Symlink("usr/lib")),
        ("opt/libs/libc.so", Item::File(&foreign)),
        ("opt/libs/libb.so", Item::File(&b)),
        ("usr/lib/libc.so", Item::File(&[&c[..], b"x"].concat())),
        ("opt/unused", Item::File(b"unused")),
        ("etc/ld.so.conf", Item::File(b"# comment\ninclude /etc/ld.so.conf.d/*.conf\n")),
        ("etc/ld.so.conf.d/opt.conf", Item::File(b"/opt/libs\n")),
        ("etc/ld.so.conf.d/other", Item::File(b"/opt/other\n")),
        ("etc/ld.so.cache", Item::File(b"cache")),
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
        ("bin/tool", Item::File(&program[..])),
        ("lib/liba.so", Item::File(&a)),
        ("lib/libb.so", Item::File(&b)),
        ("lib/libc.so", Item::File(&c)),
    ];
    assert_eq!(hints(&entries, json!({"Cmd": ["tool"]})), ["/bin/tool", "/lib/libc.so"]);
}

#[test]
fn a_python_program_needs_its_modules() {
    let python = elf("", &[], "", 0);
    let main = b"#!/usr/bin/env python3\nimport used\nfrom pkg import sub, name\nimport ext\n\
                 def later():\n    import unused\n";
    let entries = [
        ("usr/bin/env", Item::File(&[&python[..], b"e"].concat())),
        ("usr/bin/python3", Item::Symlink("python3.11")),
        ("usr/bin/python3.11", Item::File(&python)),
        ("usr/lib/python3.11/encodings/__init__.py", Item::File(b"from . import aliases\n")),
        ("usr/lib/python3.11/encodings/aliases.py", Item::File(b"#\n")),
        ("usr/lib/python3.11/encodings/utf_8.py", Item::File(b"import codecs\n")),
        ("usr/lib/python3.11/encodings/__pycache__/utf_8.cpython-311.pyc", Item::File(b"compiled")),
        ("usr/lib/python3.11/codecs.py", Item::File(b"frozen")),
        ("usr/lib/python3.11/used.py", Item::File(b"import loop\n")),
        ("usr/lib/python3.11/loop.py", Item::File(b"import used\n")),
        ("usr/lib/python3.11/unused.py", Item::File(b"never\n")),
        ("usr/lib/python3.11/lib-dynload/ext.cpython-311-x86_64-linux-gnu.so", Item::File(b"no elf")),
        ("usr/lib/python3/dist-packages/pkg/__init__.py", Item::File(b"from .deep.er import x\n")),
        ("usr/lib/python3/dist-packages/pkg/sub.py", Item::File(b"'sub'\n")),
        ("usr/lib/python3/dist-packages/pkg/deep/er.py", Item::File(b"from .. import sub\n#e\n")),
        ("srv/main.py", Item::File(main)),
        ("usr/lib/python3/dist-packages/sitecustomize.py", Item::File(b"# of the site\n")),
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
        ("usr/bin/node", Item::File(&node)),
        ("srv/app/package.json", Item::File(br#"{"type":"commonjs"}"#)),
        ("srv/app/main.js", Item::File(b"require('./lib'); require('a'); require('@s/b/c'); require('fs')")),
        ("srv/app/lib/index.js", Item::File(b"module.exports = require('../data.json')")),
        ("srv/app/data.json", Item::File(b"{}")),
        ("srv/app/unused.js", Item::File(b"//")),
        ("srv/app/node_modules/a/package.json", Item::File(br#"{"main":"dist/a"}"#)),
        ("srv/app/node_modules/a/dist/a.js", Item::File(b"require('g')")),
        ("global/@s/b/package.json", Item::File(br#"{"exports":{"./c":{"require":"./x.cjs"}}}"#)),
        ("global/@s/b/x.cjs", Item::File(b"'c'")),
        ("global/g.js", Item::File(b"'g'")),
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
        ("usr/bin/python3.11", Item::File(&python[..])),
        ("usr/lib/python3.11/encodings/__init__.py", Item::File(b"import sysconfig\n")),
        ("usr/lib/python3.11/importlib/__init__.py", Item::File(b"# not frozen\n")),
        ("usr/lib/python3.11/importlib/util.py", Item::File(b"# frozen\n")),
        ("usr/lib/python3.11/sysconfig.py", Item::File(b"import importlib.util\n")),
        ("usr/lib/python3.11/_sysconfigdata__x.py", Item::File(b"# built\n")),
        (&pth, Item::File(b"import os; ok and __import__('hook').add()\nnowhere\n")),
        (&package, Item::File(lazy)),
        (&ext_path, Item::File(&ext)),
        ("srv/main.py", Item::File(main)),
    ];
    entries.extend(in_site.iter().map(|path| (path.as_str(), Item::File(path.as_bytes()))));
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
        ("bin/tool", Item::File(&program[..])),
        ("bin/node", Item::File(&program)),
        ("bin/python3.9", Item::File(&program)),
        ("lib/libcrypto.so.3", Item::File(&library)),
        ("lib/gconv/gconv-modules.cache", Item::File(b"gconv")),
        ("etc/passwd", Item::File(b"passwd")),
        ("etc/localtime", Item::Symlink("/usr/share/zoneinfo/Etc/UTC")),
        ("usr/share/zoneinfo/Etc/UTC", Item::File(b"utc")),
        ("usr/share/zoneinfo/Asia/Tokyo", Item::File(b"tokyo")),
        ("usr/lib/ssl/openssl.cnf", Item::Symlink("/etc/ssl/openssl.cnf")),
        ("etc/ssl/openssl.cnf", Item::File(b"openssl")),
        ("usr/lib/locale/locale-archive", Item::File(&large)),
        ("usr/lib/locale/C.utf8/LC_CTYPE", Item::File(b"ctype")),
        ("usr/lib/locale/C.utf8/LC_TIME", Item::File(b"time")),
        ("usr/lib/locale/C.utf8/LC_MESSAGES/SYS_LC_MESSAGES", Item::File(b"messages")),
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
        ("bin/node", Item::File(&node[..])),
        ("usr/share/nodejs/a.js", Item::File(b"require('b')")),
        ("usr/share/nodejs/b.js", Item::File(b"'not read at once'")),
        ("usr/share/nodejs/c.js", Item::File(b"'in a text'")),
        ("srv/main.js", Item::File(b"'main'")),
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
        ("bin/loop", Item::File(b"#!/bin/loop\n")),
        ("bin/link", Item::Symlink("/bin/link")),
        ("bin/up", Item::Symlink("../../../../etc/passwd")),
        ("bin/broken", Item::File(&broken)),
        ("bin/huge", Item::File(&huge)),
        ("bin/empty", Item::File(b"")),
        ("bin/garbage", Item::File(b"\x7fELF\x02garbage")),
        ("bin/dir/", Item::Dir),
        ("etc/ld.so.conf", Item::File(b"include /etc/*.conf\n")),
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
