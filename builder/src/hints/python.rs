//! Which modules a Python program imports when it starts.
//!
//! Import statements that run at once are followed through the modules of the image: not those
//! in functions, nor those for type checkers only. What a program imports by other means is not
//! seen.

use std::collections::HashSet;

use super::elf;
use super::finder::Finder;
use super::paths::{base_name, join, parent};

/// Imports are followed this deep.
const MAX_DEPTH: usize = 100;

/// Part of the interpreter since 3.11, not read from files.
const FROZEN: [&str; 15] = [
    "abc",
    "codecs",
    "io",
    "_collections_abc",
    "_sitebuiltins",
    "genericpath",
    "ntpath",
    "posixpath",
    "importlib",
    "importlib.util",
    "importlib.machinery",
    "os",
    "site",
    "stat",
    "runpy",
];

/// Imported by the interpreter itself.
const STARTUP: [&str; 6] =
    ["encodings", "encodings.aliases", "encodings.utf_8", "site", "sitecustomize", "usercustomize"];

/// One import statement: `level` dots, the module, and the names taken from it.
#[derive(Debug, PartialEq, Eq)]
struct Import {
    level: usize,
    module: String,
    names: Vec<String>,
}

struct Python {
    /// Minor version of Python 3.
    minor: u32,
    /// `sys.path`.
    path: Vec<Vec<u8>>,
    /// Modules looked for.
    seen: HashSet<String>,
}

/// Where a module was found.
struct Found {
    /// Its source or library.
    file: Option<Vec<u8>>,
    /// Its directory, if it is a package.
    package: Option<Vec<u8>>,
}

/// Adds what `program ARGUMENTS` imports; `real` is the interpreter without links.
pub(super) fn follow(
    finder: &mut Finder<'_>,
    program: &[u8],
    real: &[u8],
    arguments: &[Vec<u8>],
    directory: &[u8],
) {
    let mut rest = arguments;
    let mut target = None;
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        match first.as_slice() {
            b"-m" | b"-c" => {
                target = Some((first.clone(), behind.first().cloned()));
                break;
            }
            b"-W" | b"-X" => rest = behind.get(1..).unwrap_or_default(),
            option if option.starts_with(b"-") => {}
            _ => {
                target = Some((b"script".to_vec(), Some(first.clone())));
                break;
            }
        }
    }
    let script = match &target {
        Some((kind, Some(script))) if kind == b"script" => Some(join(directory, script)),
        _ => None,
    };
    let first = script.as_ref().map_or_else(
        || directory.to_vec(),
        |script| finder.regular(script).map_or_else(|| parent(script), |place| parent(&place.path)),
    );
    let Some(mut python) = Python::new(finder, program, real) else { return };
    for module in STARTUP {
        python.import(finder, module, 0);
    }
    python.path.insert(0, first);
    match target {
        Some((kind, Some(name))) if kind == b"-m" => {
            let name = String::from_utf8_lossy(&name).into_owned();
            python.import(finder, &name, 0);
            python.import(finder, &format!("{name}.__main__"), 0);
        }
        Some((kind, Some(code))) if kind == b"-c" => python.scan(finder, &code, "", true, 0),
        _ => {
            if let Some(script) = script
                && finder.add(&script).is_some()
                && let Some(text) = finder.text(&script)
            {
                python.scan(finder, &text, "", true, 0);
            }
        }
    }
}

impl Python {
    /// The interpreter at `program`, before it has a script.
    fn new(finder: &mut Finder<'_>, program: &[u8], real: &[u8]) -> Option<Self> {
        let prefix = parent(&parent(real));
        let lib = join(&prefix, b"lib");
        let minor = |name: &[u8]| -> Option<u32> {
            std::str::from_utf8(name.strip_prefix(b"python3.")?).ok()?.parse().ok()
        };
        let minor = minor(base_name(real))
            .or_else(|| finder.names(&lib).iter().filter_map(|name| minor(name)).max())?;
        let version = format!("python3.{minor}").into_bytes();
        let stdlib = join(&lib, &version);
        let mut path = Vec::new();
        if let Some(list) = finder.variable("PYTHONPATH") {
            path.extend(elf::split_paths(list));
        }
        path.extend([stdlib.clone(), join(&stdlib, b"lib-dynload")]);
        let mut sites = Vec::new();
        // A virtual environment has its configuration beside or above the program.
        for home in [parent(program), parent(&parent(program))] {
            if finder.add(&join(&home, b"pyvenv.cfg")).is_some() {
                sites.push(join(&join(&join(&home, b"lib"), &version), b"site-packages"));
            }
        }
        sites.extend([
            join(b"/usr/local/lib", &[version.as_slice(), b"/dist-packages"].concat()),
            b"/usr/lib/python3/dist-packages".to_vec(),
            join(&stdlib, b"site-packages"),
            join(&stdlib, b"dist-packages"),
        ]);
        let mut python = Self { minor, path, seen: HashSet::new() };
        for site in sites.into_iter().filter(|site| finder.is_dir(site)).collect::<Vec<_>>() {
            python.site(finder, site);
        }
        Some(python)
    }

    /// Adds a directory of packages with its `.pth` files, whose lines are further directories.
    fn site(&mut self, finder: &mut Finder<'_>, site: Vec<u8>) {
        if self.path.contains(&site) {
            return;
        }
        self.path.push(site.clone());
        for name in finder.names(&site).into_iter().filter(|name| name.ends_with(b".pth")) {
            let file = join(&site, &name);
            finder.add(&file);
            for line in finder.text(&file).unwrap_or_default().split(|&b| b == b'\n') {
                let line = line.trim_ascii();
                let dir = join(&site, line);
                if !line.is_empty() && !line.starts_with(b"import ") && finder.is_dir(&dir) {
                    self.path.push(dir);
                }
            }
        }
    }

    /// Adds a module with its packages and what they import.
    fn import(&mut self, finder: &mut Finder<'_>, name: &str, depth: usize) {
        let ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
        for end in ends.collect::<Vec<_>>() {
            self.load(finder, &name[..end], depth);
        }
    }

    fn load(&mut self, finder: &mut Finder<'_>, name: &str, depth: usize) {
        if depth > MAX_DEPTH || name.is_empty() || !self.seen.insert(name.to_owned()) {
            return;
        }
        let Some(Found { file: Some(file), package }) = self.find(finder, name) else { return };
        if !file.ends_with(b".py") {
            if let Some(place) = finder.add(&file)
                && let Some(elf) = finder.open(place.inode).and_then(elf::parse)
            {
                elf::closure(finder, &place.path, elf);
            }
            return;
        }
        if self.minor < 11 || !FROZEN.contains(&name) {
            self.add_source(finder, &file);
        }
        let Some(text) = finder.text(&file) else { return };
        let own = match (package, name.rsplit_once('.')) {
            (Some(_), _) => name,
            (None, Some((package, _))) => package,
            (None, None) => "",
        };
        self.scan(finder, &text, own, false, depth);
    }

    /// Adds the compiled form of a source file if the image has it, else the source.
    fn add_source(&self, finder: &mut Finder<'_>, file: &[u8]) {
        let stem = base_name(file).strip_suffix(b".py").unwrap_or_default();
        let compiled = [stem, format!(".cpython-3{}.pyc", self.minor).as_bytes()].concat();
        let compiled = join(&join(&parent(file), b"__pycache__"), &compiled);
        if finder.add(&compiled).is_none() {
            finder.add(file);
        }
    }

    /// Adds what a text imports at once; `package` is the one that dots begin at.
    fn scan(&mut self, finder: &mut Finder<'_>, text: &[u8], package: &str, is_main: bool, depth: usize) {
        for import in imports(&String::from_utf8_lossy(text), is_main) {
            let Import { level, module, names } = import;
            let mut base = package;
            for _ in 1..level {
                base = base.rsplit_once('.').map_or("", |(above, _)| above);
            }
            let module = match (level, base.is_empty(), module.is_empty()) {
                (0, _, _) | (_, true, _) => module,
                (_, _, true) => base.to_owned(),
                _ => format!("{base}.{module}"),
            };
            self.import(finder, &module, depth + 1);
            for name in names {
                // Most names are no modules; those that are not found cost nothing.
                self.load(finder, &format!("{module}.{name}"), depth + 1);
            }
        }
    }

    /// Looks for a module as the interpreter does: package, library, source.
    fn find(&self, finder: &Finder<'_>, name: &str) -> Option<Found> {
        let (dirs, last) = match name.rsplit_once('.') {
            None => (self.path.clone(), name),
            Some((package, last)) => (vec![self.find(finder, package)?.package?], last),
        };
        let mut namespace = None;
        for dir in dirs {
            let package = join(&dir, last.as_bytes());
            let init = join(&package, b"__init__.py");
            if finder.regular(&init).is_some() {
                return Some(Found { file: Some(init), package: Some(package) });
            }
            let library = format!("{last}.cpython-3{}", self.minor);
            let library = finder.libraries(&dir, library.as_bytes());
            let files = [
                library.unwrap_or_default(),
                format!("{last}.abi3.so").into_bytes(),
                format!("{last}.so").into_bytes(),
                format!("{last}.py").into_bytes(),
            ];
            for file in files.iter().filter(|file| !file.is_empty()).map(|file| join(&dir, file)) {
                if finder.regular(&file).is_some() {
                    return Some(Found { file: Some(file), package: None });
                }
            }
            if namespace.is_none() && finder.is_dir(&package) {
                namespace = Some(Found { file: None, package: Some(package) });
            }
        }
        namespace
    }
}

/// The import statements of a text that run when it is loaded.
fn imports(text: &str, is_main: bool) -> Vec<Import> {
    let mut found = Vec::new();
    // Lines indented deeper than this do not run now.
    let mut skipped: Option<usize> = None;
    let mut quote: Option<&str> = None;
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(mark) = quote {
            if line.matches(mark).count() % 2 == 1 {
                quote = None;
            }
            continue;
        }
        let code = line.trim_start();
        if code.is_empty() || code.starts_with('#') {
            continue;
        }
        let indent = line.len() - code.len();
        quote = ["\"\"\"", "'''"].into_iter().find(|mark| line.matches(mark).count() % 2 == 1);
        if skipped.is_some_and(|limit| indent > limit) {
            continue;
        }
        skipped = None;
        let later = code.starts_with("def ")
            || code.starts_with("async def ")
            || (code.starts_with("if ") && code.contains("TYPE_CHECKING") && !code.contains("not "))
            || (!is_main && code.starts_with("if __name__"));
        if later {
            skipped = Some(indent);
        } else if let Some(rest) = code.strip_prefix("import ") {
            for module in rest.split('#').next().unwrap_or_default().split([',', ';']) {
                // Behind a semicolon is a statement of its own.
                let module = module.trim_start().trim_start_matches("import ");
                let module = module.split_whitespace().next().unwrap_or_default();
                found.extend(identifier(module).map(|module| Import { level: 0, module, names: Vec::new() }));
            }
        } else if let Some((module, names)) =
            code.strip_prefix("from ").and_then(|r| r.split_once(" import "))
        {
            let mut names = names.split('#').next().unwrap_or_default().to_owned();
            if names.contains('(') {
                while !names.contains(')') {
                    let Some(line) = lines.next() else { break };
                    names.push_str(line.split('#').next().unwrap_or_default());
                    names.push(' ');
                }
            }
            let module = module.trim();
            let level = module.len() - module.trim_start_matches('.').len();
            let module = module.trim_start_matches('.');
            if level == 0 && identifier(module).is_none() {
                continue;
            }
            let names =
                names.split([',', ';', '(', ')']).filter_map(|n| identifier(n.split_whitespace().next()?));
            found.push(Import { level, module: module.to_owned(), names: names.collect() });
        }
    }
    found
}

/// A dotted name, or none.
fn identifier(text: &str) -> Option<String> {
    let ok = !text.is_empty()
        && text
            .split('.')
            .all(|part| !part.is_empty() && part.chars().all(|c| c.is_alphanumeric() || c == '_'));
    ok.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_that_run_at_once_are_found() {
        let text = r#"
"""A text with
import nothing
"""
import os, sys as system; import json  # import no
from a.b import (c,  # why
    d as e,
    f)
from . import g
from ..h import i
try:
    import j
except ImportError:
    import k
def later():
    import no
    if x:
        import no
class L:
    import m
if TYPE_CHECKING:
    import no
if __name__ == "__main__":
    import main_only
important = 1
from importlib import *
import n.
"#;
        let shown = |is_main| -> Vec<String> {
            let one = |i: &Import| format!("{}{}:{}", ".".repeat(i.level), i.module, i.names.join(","));
            imports(text, is_main).iter().map(one).collect()
        };
        let expected = [
            "os:",
            "sys:",
            "json:",
            "a.b:c,d,f",
            ".:g",
            "..h:i",
            "j:",
            "k:",
            "m:",
            "main_only:",
            "importlib:",
        ];
        assert_eq!(shown(true), expected);
        assert!(!shown(false).contains(&"main_only:".to_owned()));
    }
}
