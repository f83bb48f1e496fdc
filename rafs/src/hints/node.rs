//! Which modules a Node.js program loads when it starts: `require("x")` and `import … from "x"`
//! with literal names, resolved as Node does (nodejs.org/api/modules.html, api/packages.html).
//!
//! The text is not parsed: strings and comments are told from code, and what stands before a
//! string decides. A name that is computed is not seen; one in a function that is never called
//! is.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde_json::Value;

use super::elf::{self, Elf, split_paths};
use super::finder::{Finder, Parsed, size_of_all};
use super::names;
use super::paths::{base_name, join, parent};

/// Largest `package.json` that is looked into: values take many times the memory of their text.
const MAX_DOCUMENT: u64 = 128 << 10;
/// Modules that one text loads at most, and the longest name.
const MAX_MODULES: usize = 4096;
const MAX_NAME: usize = 512;
/// Bytes of paths that are remembered at most, and what one takes beside its bytes. A program with ten thousand modules
/// takes some 2 MB.
const MAX_KNOWN: usize = 16 << 20;
const NAME_SIZE: usize = 64;
/// Modules are followed this deep.
const MAX_DEPTH: usize = 100;

/// Part of Node.js itself, with or without `node:`.
const CORE: [&str; 41] = [
    "assert",
    "async_hooks",
    "buffer",
    "child_process",
    "cluster",
    "console",
    "constants",
    "crypto",
    "dgram",
    "diagnostics_channel",
    "dns",
    "domain",
    "events",
    "fs",
    "http",
    "http2",
    "https",
    "inspector",
    "module",
    "net",
    "os",
    "path",
    "perf_hooks",
    "process",
    "punycode",
    "querystring",
    "readline",
    "repl",
    "stream",
    "string_decoder",
    "sys",
    "timers",
    "tls",
    "trace_events",
    "tty",
    "url",
    "util",
    "v8",
    "vm",
    "worker_threads",
    "zlib",
];

/// Where Debian's Node.js looks without being told.
const GLOBAL_DIRS: [&[u8]; 3] = [b"/usr/lib/nodejs", b"/usr/share/nodejs", b"/usr/lib/node_modules"];

/// Adds modules of Node.js itself that a distribution keeps in files: it reads all of them first,
/// by paths that are constants of the program or its library.
pub(super) fn built_in(finder: &mut Finder<'_>, loaded: &[(Vec<u8>, Arc<Elf>)]) {
    for (path, elf) in loaded.iter().filter(|(path, _)| is_node(base_name(path))) {
        let Some(place) = finder.regular(path) else { continue };
        for range in &elf.constants {
            let scripts = finder.part(place.inode, range.clone(), |bytes| {
                Scripts(names::scripts(bytes).into_iter().map(<[u8]>::to_vec).collect())
            });
            for script in scripts.iter().flat_map(|scripts| &scripts.0) {
                finder.add(script);
            }
        }
    }
}

/// Adds what `node ARGUMENTS` loads.
pub(super) fn follow(finder: &mut Finder<'_>, arguments: &[Vec<u8>], directory: &[u8]) {
    let mut node = finder.node.take().unwrap_or_else(|| Box::new(Node::new(finder)));
    node.start(finder, arguments, directory);
    finder.node = Some(node);
}

/// Adds what the module at `path` loads; false if no Node.js was started yet, of which it could be.
pub(super) fn opened(finder: &mut Finder<'_>, path: &[u8]) -> bool {
    let Some(mut node) = finder.node.take() else { return false };
    node.load(finder, path, 0);
    finder.node = Some(node);
    true
}

fn is_node(file: &[u8]) -> bool {
    file.strip_prefix(b"lib").unwrap_or(file).starts_with(b"node")
}

/// The paths of scripts in the constants of a library.
struct Scripts(Vec<Vec<u8>>);

/// The names of modules that a text loads.
struct Modules(Vec<String>);

impl Parsed for Scripts {
    fn size(&self) -> usize {
        size_of_all(&self.0)
    }
}

impl Parsed for Modules {
    fn size(&self) -> usize {
        size_of_all(&self.0)
    }
}

/// The modules of a program.
#[derive(Debug)]
pub(super) struct Node {
    /// `NODE_PATH` and the global directories.
    dirs: Vec<Vec<u8>>,
    /// Files looked into.
    seen: HashSet<Vec<u8>>,
    /// What they take.
    known: usize,
}

impl Node {
    fn new(finder: &Finder<'_>) -> Self {
        let mut dirs = finder.variable("NODE_PATH").map(split_paths).unwrap_or_default();
        dirs.extend(GLOBAL_DIRS.map(<[u8]>::to_vec));
        Self { dirs, seen: HashSet::new(), known: 0 }
    }

    /// Adds what `node ARGUMENTS` loads.
    fn start(&mut self, finder: &mut Finder<'_>, arguments: &[Vec<u8>], directory: &[u8]) {
        let mut rest = arguments;
        while let Some((first, behind)) = rest.split_first() {
            rest = behind;
            match first.as_slice() {
                b"-r" | b"--require" | b"--import" => {
                    let name = behind.first().map(|name| String::from_utf8_lossy(name).into_owned());
                    self.load_name(finder, &name.unwrap_or_default(), directory, 0);
                    rest = behind.get(1..).unwrap_or_default();
                }
                b"-e" | b"--eval" | b"-p" | b"--print" => {
                    let names = behind.first().map(|code| modules(code)).unwrap_or_default();
                    self.load_names(finder, &names, directory, 0);
                    return;
                }
                option if option.starts_with(b"-") => {}
                script => {
                    if let Some(path) = self.file_or_dir(finder, &join(directory, script)) {
                        self.load(finder, &path, 0);
                    }
                    return;
                }
            }
        }
    }

    /// Adds a module and what it loads in its turn.
    fn load(&mut self, finder: &mut Finder<'_>, path: &[u8], depth: usize) {
        // Node resolves links first: a module has one identity.
        let Some(place) = finder.add(path) else { return };
        let size = place.path.len() + NAME_SIZE;
        if depth > MAX_DEPTH || self.known + size > MAX_KNOWN || !self.seen.insert(place.path.clone()) {
            return;
        }
        self.known += size;
        add_package(finder, &place.path);
        if place.path.ends_with(b".node") {
            if let Some(elf) = finder.elf(place.inode) {
                elf::closure(finder, &place.path, elf);
            }
        } else if !place.path.ends_with(b".json")
            && let Some(names) = finder.text(&place.path, |text| Modules(modules(text)))
        {
            self.load_names(finder, &names.0, &parent(&place.path), depth);
        }
    }

    fn load_names(&mut self, finder: &mut Finder<'_>, names: &[String], dir: &[u8], depth: usize) {
        for name in finder.each(names) {
            // Those of Node.js itself are looked for nowhere.
            if !finder.spend(1) {
                return;
            }
            self.load_name(finder, name, dir, depth + 1);
        }
    }

    fn load_name(&mut self, finder: &mut Finder<'_>, name: &str, dir: &[u8], depth: usize) {
        if let Some(path) = self.resolve(finder, name, dir) {
            self.load(finder, &path, depth);
        }
    }

    /// The file that `name` means in a module of `dir`.
    fn resolve(&self, finder: &mut Finder<'_>, name: &str, dir: &[u8]) -> Option<Vec<u8>> {
        let core = name.split('/').next().unwrap_or_default();
        if name.is_empty() || name.starts_with("node:") || name.starts_with('#') || CORE.contains(&core) {
            return None;
        }
        if name.starts_with(['.', '/']) {
            return self.file_or_dir(finder, &join(dir, name.as_bytes()));
        }
        let mut places = Vec::new();
        let mut above = dir.to_vec();
        loop {
            if base_name(&above) != b"node_modules" {
                places.push(join(&above, b"node_modules"));
            }
            if above == b"/" || places.len() > MAX_DEPTH {
                break;
            }
            above = parent(&above);
        }
        places.extend(self.dirs.iter().cloned());
        places.iter().find_map(|place| self.package(finder, place, name))
    }

    /// The file of package `name`, or of a path in it, below `dir`.
    fn package(&self, finder: &mut Finder<'_>, dir: &[u8], name: &str) -> Option<Vec<u8>> {
        if !finder.is_dir(dir) {
            return None;
        }
        // "@scope/package/path" and "package/path".
        let slashes = usize::from(name.starts_with('@'));
        let end = name.match_indices('/').nth(slashes).map_or(name.len(), |(at, _)| at);
        let (package, path) = (join(dir, &name.as_bytes()[..end]), name[end..].trim_start_matches('/'));
        let document = document(finder, &package);
        if let Some(exports) = document.as_ref().and_then(|document| document.exports.as_ref()) {
            let wanted = if path.is_empty() { ".".to_owned() } else { format!("./{path}") };
            let target = exports.get(&wanted)?;
            return finder.regular(&join(&package, target.as_bytes())).map(|place| place.path);
        }
        self.file_or_dir(finder, &join(dir, name.as_bytes()))
    }

    /// A path with or without its ending, or a directory with `main` or `index.js`.
    fn file_or_dir(&self, finder: &mut Finder<'_>, path: &[u8]) -> Option<Vec<u8>> {
        let file = |finder: &Finder<'_>, path: &[u8]| {
            let endings = [&b""[..], b".js", b".json", b".node"];
            endings.iter().map(|end| [path, end].concat()).find(|path| finder.regular(path).is_some())
        };
        if let Some(found) = file(finder, path) {
            return Some(found);
        }
        if !finder.is_dir(path) {
            return None;
        }
        let document = document(finder, path);
        let main = document.as_ref().and_then(|document| document.main.as_deref());
        let main = main.map(|main| join(path, main.as_bytes()));
        main.and_then(|main| file(finder, &main).or_else(|| file(finder, &join(&main, b"index"))))
            .or_else(|| file(finder, &join(path, b"index")))
    }
}

/// Adds the `package.json` that governs the module at `path`: Node reads it for the module's type.
fn add_package(finder: &mut Finder<'_>, path: &[u8]) {
    let mut dir = parent(path);
    while dir != b"/" && base_name(&dir) != b"node_modules" {
        if finder.add(&join(&dir, b"package.json")).is_some() {
            return;
        }
        dir = parent(&dir);
    }
}

/// What matters of a `package.json`.
#[derive(Default)]
struct Document {
    main: Option<String>,
    /// Targets by `.` or `./path`, if it says what it exports.
    exports: Option<HashMap<String, String>>,
}

impl Document {
    fn parse(text: &[u8]) -> Self {
        /// The rest is not built.
        #[derive(serde::Deserialize)]
        struct Raw {
            main: Option<Value>,
            exports: Option<Value>,
        }
        let Ok(Raw { main, exports }) = serde_json::from_slice(text) else { return Self::default() };
        let main = main.and_then(|main| Some(main.as_str()?.to_owned()));
        Self { main, exports: exports.map(|exports| exported(&exports)) }
    }
}

impl Parsed for Document {
    fn size(&self) -> usize {
        let exports = self.exports.iter().flatten();
        let exports = exports.map(|(path, target)| 2 * size_of::<String>() + 16 + path.len() + target.len());
        self.main.as_ref().map_or(0, String::len) + exports.sum::<usize>()
    }
}

/// The `package.json` in `dir`.
fn document(finder: &mut Finder<'_>, dir: &[u8]) -> Option<Arc<Document>> {
    let path = join(dir, b"package.json");
    let document = finder.small_text(&path, MAX_DOCUMENT, Document::parse)?;
    finder.add(&path);
    Some(document)
}

/// What `exports` gives for `.` and each `./path`, by the conditions of `require`.
fn exported(exports: &Value) -> HashMap<String, String> {
    let paths = exports.as_object().filter(|map| map.keys().any(|key| key.starts_with('.')));
    let target = |path: &str, value: &Value| Some((path.to_owned(), conditional(value)?.to_owned()));
    match paths {
        Some(paths) => paths.iter().filter_map(|(path, value)| target(path, value)).collect(),
        None => target(".", exports).into_iter().collect(),
    }
}

/// The first target whose conditions hold. JSON is nested at most 128 deep.
fn conditional(target: &Value) -> Option<&str> {
    match target {
        Value::String(path) => Some(path),
        Value::Array(targets) => targets.iter().find_map(conditional),
        // The order in the file is lost in parsing; this is the one that packages write.
        Value::Object(conditions) => ["node", "require", "module-sync", "import", "default"]
            .iter()
            .find_map(|name| conditional(conditions.get(*name)?)),
        _ => None,
    }
}

/// The literal names of `require(…)`, `import …` and `… from …`.
fn modules(text: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    // Where the code before the present string begins to matter: behind the last one.
    let mut code_start = 0;
    let mut at = 0;
    while at < text.len() && found.len() < MAX_MODULES {
        match text[at] {
            b'/' if text.get(at + 1) == Some(&b'/') => {
                at += text[at..].iter().position(|&b| b == b'\n').unwrap_or(text.len() - at);
            }
            b'/' if text.get(at + 1) == Some(&b'*') => {
                let end = text[at + 2..].windows(2).position(|pair| pair == b"*/");
                at = end.map_or(text.len(), |end| at + 2 + end + 2);
            }
            quote @ (b'"' | b'\'' | b'`') => {
                let end = string_end(text, at, quote);
                if quote != b'`' && loads(&text[code_start..at]) {
                    let name = text.get(at + 1..end.saturating_sub(1)).unwrap_or_default();
                    let name = std::str::from_utf8(name).ok().filter(|name| name.len() <= MAX_NAME);
                    found.extend(name.map(str::to_owned));
                }
                at = end;
                code_start = end;
            }
            _ => at += 1,
        }
    }
    found
}

/// One behind the string that begins at `start`. Only a template spans lines: what looks like a
/// string that never ends, as in a regular expression, ends with its line.
fn string_end(text: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while let Some(&byte) = text.get(at) {
        match byte {
            b'\\' => at += 1,
            b'\n' if quote != b'`' => return at,
            byte if byte == quote => return at + 1,
            _ => {}
        }
        at += 1;
    }
    text.len()
}

/// True if code that ends so loads the module named next.
fn loads(before: &[u8]) -> bool {
    let before = before.trim_ascii_end();
    let word = |text: &[u8], word: &[u8]| {
        text.strip_suffix(word)
            .is_some_and(|rest| rest.last().is_none_or(|b| !b.is_ascii_alphanumeric() && !b"_$.".contains(b)))
    };
    match before.strip_suffix(b"(") {
        Some(call) => word(call.trim_ascii_end(), b"require"),
        None => word(before, b"from") || word(before, b"import"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_names_are_found() {
        let text = br#"
            // require("no")
            /* import "no" */
            const a = require("a"), b = require ( 'b/c' );
            var r = /["']/;
            import d from 'd';
            import { e } from "./e.mjs"; import "f";
            x.require("no"); mark_from "no"; `require("no")`; require(name + "no");
            export * from '../g';
            import("no");
            s = "it's"; require('h')
        "#;
        assert_eq!(modules(text), ["a", "b/c", "d", "./e.mjs", "f", "../g", "h"]);
        assert!(modules(b"require('never ends").is_empty() || modules(b"'").is_empty());
    }

    #[test]
    fn exports_are_read() {
        for (exports, wanted, target) in [
            (r#""./a.js""#, ".", Some("./a.js")),
            (r#""./a.js""#, "./b", None),
            (r#"{"browser":"./no.js","require":"./a.cjs","default":"./a.js"}"#, ".", Some("./a.cjs")),
            (r#"{".":{"node":{"default":"./n.js"}},"./x":"./x.js"}"#, ".", Some("./n.js")),
            (r#"{".":{"node":{"default":"./n.js"}},"./x":"./x.js"}"#, "./x", Some("./x.js")),
            (r#"{".":null}"#, ".", None),
            ("[]", ".", None),
        ] {
            let found = exported(&serde_json::from_str(exports).unwrap());
            assert_eq!(found.get(wanted).map(String::as_str), target, "{exports}");
        }
    }
}
