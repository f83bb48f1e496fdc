//! What a Python text imports, told from its lines.
//!
//! The text is not parsed: indentation and the first words of a line decide. A name that is
//! computed is not seen.

use std::collections::{HashMap, HashSet};

use memchr::{memchr, memmem};

/// Imports and names taken from one text, or one line, at most: what is behind them comes when it is
/// read.
const MAX_NAMES: usize = 8192;
/// What a call that imports begins with.
const CALLS: [&str; 2] = ["__import__(", "import_module("];
/// A mark, and its first character.
type Quote = (u8, &'static str);
/// What texts of several lines are put in.
const QUOTES: [Quote; 2] = [(b'"', "\"\"\""), (b'\'', "'''")];
/// Longest dotted name followed.
pub(super) const MAX_LEN: usize = 256;

/// One import statement: `level` dots, the module, and the names taken from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Import {
    pub level: usize,
    pub module: String,
    pub names: Vec<String>,
    /// No statement, but the use of a name of a module imported before: `np.random`.
    pub is_use: bool,
}

impl Import {
    fn of(module: String) -> Self {
        Self { level: 0, module, names: Vec::new(), is_use: false }
    }

    /// True if the statement binds `name`, or the module that it is the last part of.
    pub fn gives(&self, name: &str) -> bool {
        if self.names.is_empty() {
            self.module.rsplit('.').next() == Some(name)
        } else {
            self.names.iter().any(|own| own == name)
        }
    }
}

/// The imports of one text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Imports {
    /// Run when the text is, in order.
    pub at_once: Vec<Import>,
    /// In the module's `__getattr__` (PEP 562): run when a name is asked for. None without it.
    pub on_demand: Option<Vec<Import>>,
}

/// Reads a text; `is_main` if it is that of a script.
pub(super) fn read(text: &str, is_main: bool) -> Imports {
    let mut found = Imports::default();
    let mut names = Names::default();
    // Lines indented deeper than this do not run now.
    let mut skipped: Option<usize> = None;
    let mut in_getattr = false;
    let mut quote: Option<Quote> = None;
    // Once for the text, as most have none of either.
    let has = |what: &str| memmem::find(text.as_bytes(), what.as_bytes()).is_some();
    let has_calls = CALLS.into_iter().any(has);
    let quotes: Vec<_> = QUOTES.into_iter().filter(|(_, mark)| has(mark)).collect();
    let mut lines = Lines(text);
    let mut left = MAX_NAMES;
    while left > 0
        && let Some(line) = lines.next()
    {
        if let Some(open) = quote {
            if turns(open, line) {
                quote = None;
            }
            continue;
        }
        let code = line.trim_ascii_start();
        if code.is_empty() || code.starts_with('#') {
            continue;
        }
        let indent = line.len() - code.len();
        quote = quotes.iter().copied().find(|&quote| turns(quote, line));
        // A bracket closes the parameters of a function, whose body is still to come.
        let closes = code.starts_with([')', ']']);
        if skipped.is_some_and(|limit| indent > limit || (indent == limit && closes)) {
            if in_getattr && let Some(imports) = &mut found.on_demand {
                let more = statement(code, &mut lines, &mut Names::default()).unwrap_or_default();
                keep(imports, more, &mut left);
            }
            continue;
        }
        skipped = None;
        in_getattr = code.starts_with("def __getattr__(") && !code.contains("self");
        if in_getattr {
            found.on_demand.get_or_insert_default();
        }
        let later = code.starts_with("def ")
            || code.starts_with("async def ")
            || (code.starts_with("if ") && code.contains("TYPE_CHECKING") && !code.contains("not "))
            || (!is_main && code.starts_with("if __name__"));
        if later {
            skipped = Some(indent);
            continue;
        }
        let code = if contains(code, b'#') { code.split(" #").next().unwrap_or_default() } else { code };
        match statement(code, &mut lines, &mut names) {
            Some(imports) => keep(&mut found.at_once, imports, &mut left),
            None => keep(&mut found.at_once, names.uses(code), &mut left),
        }
        if has_calls {
            keep(&mut found.at_once, calls(code).map(Import::of), &mut left);
        }
    }
    found
}

/// What is left of a text, by lines: most of a program's text is only passed.
struct Lines<'a>(&'a str);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        if self.0.is_empty() {
            return None;
        }
        let (line, rest) = match memchr(b'\n', self.0.as_bytes()) {
            Some(end) => (&self.0[..end], &self.0[end + 1..]),
            None => (self.0, ""),
        };
        self.0 = rest;
        Some(line.strip_suffix('\r').unwrap_or(line))
    }
}

fn contains(line: &str, byte: u8) -> bool {
    memchr(byte, line.as_bytes()).is_some()
}

/// True if a text between quotes begins in `line` and goes on behind it, or ends there.
fn turns((first, mark): Quote, line: &str) -> bool {
    // A single character is looked for much faster.
    contains(line, first) && line.matches(mark).count() % 2 == 1
}

/// Adds imports as long as names are `left`.
fn keep(imports: &mut Vec<Import>, more: impl IntoIterator<Item = Import>, left: &mut usize) {
    for import in more {
        if *left == 0 {
            break;
        }
        *left = left.saturating_sub(1 + import.names.len());
        imports.push(import);
    }
}

/// The imports of a line that is an import statement; names in brackets may go on in the next.
fn statement<'a>(
    code: &str,
    lines: &mut impl Iterator<Item = &'a str>,
    bound: &mut Names,
) -> Option<Vec<Import>> {
    if let Some(rest) = code.strip_prefix("import ") {
        let mut found = Vec::new();
        for module in rest.split('#').next().unwrap_or_default().split([',', ';']).take(MAX_NAMES) {
            // Behind a semicolon is a statement of its own.
            let mut words = module.trim_start().trim_start_matches("import ").split_whitespace();
            let Some(module) = words.next().and_then(identifier) else { continue };
            let first = module.split('.').next().unwrap_or_default();
            match (words.next(), words.next()) {
                (Some("as"), Some(alias)) => bound.bind(alias, &module),
                _ => bound.bind(first, first),
            }
            found.push(Import::of(module));
        }
        return Some(found);
    }
    let (module, names) = code.strip_prefix("from ").and_then(|rest| rest.split_once(" import "))?;
    let mut names = names.split('#').next().unwrap_or_default().to_owned();
    let mut open = names.contains('(') && !names.contains(')');
    while open && let Some(line) = lines.next() {
        let line = line.split('#').next().unwrap_or_default();
        open = !line.contains(')');
        names.push_str(line);
        names.push(' ');
    }
    let module = module.trim();
    let level = module.len() - module.trim_start_matches('.').len();
    let module = module.trim_start_matches('.');
    if !(level > 0 && module.is_empty()) && identifier(module).is_none() {
        return Some(Vec::new());
    }
    let mut taken = Vec::new();
    for name in names.split([',', ';', '(', ')']).take(MAX_NAMES) {
        let mut words = name.split_whitespace();
        let Some(name) = words.next().and_then(identifier) else { continue };
        if level == 0 {
            let alias = words.nth(1).unwrap_or(&name).to_owned();
            bound.bind(&alias, &format!("{module}.{name}"));
        }
        taken.push(name);
    }
    Some(vec![Import { level, module: module.to_owned(), names: taken, is_use: false }])
}

/// Names that stand for what was imported.
#[derive(Default)]
struct Names {
    modules: HashMap<String, String>,
    used: HashSet<(String, String)>,
}

impl Names {
    fn bind(&mut self, name: &str, module: &str) {
        self.modules.insert(name.to_owned(), module.to_owned());
    }

    /// The names of imported modules in a line, each once in the text.
    fn uses(&mut self, code: &str) -> Vec<Import> {
        let mut found = Vec::new();
        if self.modules.is_empty() || !contains(code, b'.') {
            return found;
        }
        let is_inside = |c: char| match u8::try_from(c) {
            Ok(byte) if byte.is_ascii() => byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.',
            _ => c.is_alphanumeric(),
        };
        for word in code.split(|c: char| !is_inside(c)) {
            let mut parts = word.split('.');
            let (Some(first), Some(name)) = (parts.next(), parts.next()) else { continue };
            let Some(module) = self.modules.get(first).filter(|_| !name.is_empty()) else { continue };
            if self.used.insert((module.clone(), name.to_owned())) {
                let names = vec![name.to_owned()];
                found.push(Import { level: 0, module: module.clone(), names, is_use: true });
            }
            if found.len() >= MAX_NAMES {
                break;
            }
        }
        found
    }
}

/// The literal names that a line imports by call.
fn calls(code: &str) -> impl Iterator<Item = String> {
    let calls = CALLS.into_iter().flat_map(|call| code.split(call).skip(1));
    calls.filter_map(|rest| {
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        identifier(rest[1..].split(quote).next()?)
    })
}

/// A dotted name of at most [`MAX_LEN`] bytes, or none.
fn identifier(text: &str) -> Option<String> {
    let ok = !text.is_empty()
        && text.len() <= MAX_LEN
        && text
            .split('.')
            .all(|part| !part.is_empty() && part.chars().all(|c| c.is_alphanumeric() || c == '_'));
    ok.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(imports: &[Import]) -> Vec<String> {
        let one = |i: &Import| {
            let mark = if i.is_use { "use " } else { "" };
            format!("{mark}{}{}:{}", ".".repeat(i.level), i.module, i.names.join(","))
        };
        imports.iter().map(one).collect()
    }

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
def long(
    one,
) -> str:
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
        let main = read(text, true);
        assert_eq!(shown(&main.at_once), expected);
        assert_eq!(main.on_demand, None);
        assert!(!shown(&read(text, false).at_once).contains(&"main_only:".to_owned()));
    }

    #[test]
    fn names_of_modules_and_calls_are_found() {
        let text = r#"
import numpy as np, os.path
from a import b as c, d
x = np.random.Generator | np.random.RandomState  # np.no
y = [os.sep, c.e(d.f), unknown.g, 1.5, "...", self.np.h]
def later():
    np.linalg
z = __import__('m.n') or importlib.import_module("o") or import_module(p) or __import__("q r")
"#;
        let expected = [
            "numpy:",
            "os.path:",
            "a:b,d",
            "use numpy:random",
            "use os:sep",
            "use a.b:e",
            "use a.d:f",
            "m.n:",
            "o:",
        ];
        assert_eq!(shown(&read(text, false).at_once), expected);
    }

    #[test]
    fn what_is_taken_is_bounded() {
        let names = |text: &str| {
            let found = read(text, false);
            let all = found.at_once.iter().chain(found.on_demand.iter().flatten());
            all.map(|import| 1 + import.names.len()).sum::<usize>()
        };
        let list: String = (0..4 * MAX_NAMES).map(|at| format!("n{at},")).collect();
        let uses: String = (0..4 * MAX_NAMES).map(|at| format!("m.n{at} ")).collect();
        for text in [
            "import a\n".repeat(4 * MAX_NAMES),
            format!("import {list}"),
            format!("from a import {list}\n").repeat(2),
            format!("def __getattr__(n):\n{}", " from a import b\n".repeat(4 * MAX_NAMES)),
            format!("import m\n{uses}"),
            "__import__('a');".repeat(4 * MAX_NAMES),
        ] {
            let taken = names(&text);
            assert!((MAX_NAMES..=2 * MAX_NAMES).contains(&taken), "{taken}: {:.40}", text);
        }
        // Each line is looked at once, whatever stays open.
        assert_eq!(names(&format!("from a import (b,\n{}", "\n".repeat(2 << 20))), 2);
        let long = "a.".repeat(MAX_LEN) + "a";
        assert_eq!(names(&format!("import {long}\nfrom {long} import b\nfrom .{long} import b")), 0);
    }

    #[test]
    fn imports_on_demand_are_kept_apart() {
        let text = "
def __getattr__(name):
    if name == 'Thread':
        from .thread import (
            Thread as t,
        )
        return t
    import pkg.late as late
def other():
    import no
class C:
    def __getattr__(self, name):
        import no
";
        let found = read(text, false);
        assert_eq!(found.at_once, []);
        let on_demand = found.on_demand.unwrap();
        assert_eq!(shown(&on_demand), [".thread:Thread", "pkg.late:"]);
        let gives = |name| on_demand.iter().map(|import| import.gives(name)).collect::<Vec<_>>();
        assert_eq!(gives("Thread"), [true, false]);
        assert_eq!(gives("late"), [false, true]);
        assert_eq!(gives("thread"), [false, false]);
    }
}
