//! The command of an image, down to the program that it ends in.

use serde_json::{Map, Value};

use super::finder::Finder;
use super::paths::{base_name, join};
use super::{elf, node, python, system};

/// Programs that start other programs: followed this deep.
const MAX_DEPTH: usize = 8;
/// `PATH` of an image that sets none.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container of the image runs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Entrypoint and arguments.
    pub arguments: Vec<Vec<u8>>,
    /// `NAME=VALUE`.
    pub environment: Vec<Vec<u8>>,
    /// Where it starts.
    pub directory: Vec<u8>,
}

impl Command {
    /// From an image's configuration (OCI image specification, config.md).
    pub fn of(config: &Map<String, Value>) -> Self {
        let config = config.get("config");
        let list = |key: &str| -> Vec<Vec<u8>> {
            let items = config.and_then(|config| config.get(key)).and_then(Value::as_array);
            items.into_iter().flatten().filter_map(|v| Some(v.as_str()?.as_bytes().to_vec())).collect()
        };
        let directory = config.and_then(|config| config.get("WorkingDir")).and_then(Value::as_str);
        Self {
            arguments: [list("Entrypoint"), list("Cmd")].concat(),
            environment: list("Env"),
            directory: join(b"/", directory.unwrap_or_default().as_bytes()),
        }
    }
}

/// Adds what starting `arguments` in `directory` reads.
pub(super) fn follow(finder: &mut Finder<'_>, arguments: &[Vec<u8>], directory: &[u8]) {
    let mut arguments = arguments.to_vec();
    for _ in 0..MAX_DEPTH {
        match step(finder, &arguments, directory) {
            Some(next) => arguments = next,
            None => return,
        }
    }
}

/// Adds the program of `arguments` and answers what it starts in its turn.
fn step(finder: &mut Finder<'_>, arguments: &[Vec<u8>], directory: &[u8]) -> Option<Vec<Vec<u8>>> {
    let (program, rest) = arguments.split_first()?;
    let path = find(finder, program, directory)?;
    let place = finder.add(&path)?;
    let head = finder.head(place.inode)?;
    if let Some(line) = head.strip_prefix(b"#!") {
        // One interpreter and at most one argument, as the kernel splits them.
        let line = line.split(|&b| b == b'\n').next().unwrap_or_default().trim_ascii();
        let (interpreter, argument) = cut(line);
        let mut next = vec![interpreter.to_vec()];
        next.extend((!argument.is_empty()).then(|| argument.to_vec()));
        next.push(path);
        next.extend_from_slice(rest);
        return Some(next);
    }
    let elf = finder.elf(place.inode)?;
    let is_dynamic = elf.interpreter.is_some();
    let loaded = elf::closure(finder, &place.path, elf);
    // By either name: `sh` may be a link to `busybox`, `python` one to `python3.11`.
    let names = [base_name(&path).to_vec(), base_name(&place.path).to_vec()];
    let is = |wanted: &[&[u8]]| names.iter().any(|name| wanted.contains(&name.as_slice()));
    let is_node = is(&[b"node", b"nodejs"]);
    let is_python = names.iter().any(|name| name.starts_with(b"python"));
    if is_python {
        // Of a locale Python uses the characters only, and UTF-8 if none is set (PEP 538).
        system::locale(finder, Some("C.UTF-8"), &["LC_CTYPE"]);
    } else if is_dynamic && !is_node {
        system::locale(finder, None, &[]);
    }
    system::common(finder);
    if is(&[b"env"]) {
        env(rest)
    } else if is(&[b"sh", b"bash", b"dash", b"ash", b"busybox"]) {
        shell(finder, rest, directory)
    } else if is(&[b"tini", b"tini-static", b"dumb-init", b"catatonit"]) {
        behind_options(rest).map(<[_]>::to_vec)
    } else if is(&[b"gosu", b"su-exec"]) {
        rest.get(1..).map(<[_]>::to_vec)
    } else if is_node {
        // Its OpenSSL may be built in.
        system::openssl(finder);
        node::built_in(finder, &loaded);
        node::follow(finder, rest, directory);
        None
    } else if is_python {
        python::follow(finder, &path, &place.path, rest, directory);
        None
    } else {
        None
    }
}

/// Where a program lies: with a slash as it is named, else the first in `PATH`.
fn find(finder: &Finder<'_>, program: &[u8], directory: &[u8]) -> Option<Vec<u8>> {
    if program.contains(&b'/') {
        let path = join(directory, program);
        return finder.regular(&path).map(|_| path);
    }
    let path = finder.variable("PATH").unwrap_or(DEFAULT_PATH);
    path.split(|&b| b == b':').map(|dir| join(dir, program)).find(|path| finder.regular(path).is_some())
}

/// What `env` starts: options and assignments are passed over.
fn env(arguments: &[Vec<u8>]) -> Option<Vec<Vec<u8>>> {
    let mut rest = arguments.to_vec();
    let mut splits = 0;
    loop {
        let at = rest
            .iter()
            .position(|word| word.starts_with(b"-S") || !(word.starts_with(b"-") || word.contains(&b'=')))?;
        let Some(line) = rest[at].strip_prefix(b"-S") else { return Some(rest.split_off(at)) };
        splits += 1;
        if splits > MAX_DEPTH {
            return None;
        }
        let mut split = words(line);
        split.extend(rest.drain(at + 1..));
        rest = split;
    }
}

/// The arguments behind `--`, or from the first that is no option.
fn behind_options(arguments: &[Vec<u8>]) -> Option<&[Vec<u8>]> {
    let end = arguments.iter().position(|argument| argument == b"--").map(|at| at + 1);
    let end = end.or_else(|| arguments.iter().position(|argument| !argument.starts_with(b"-")));
    arguments.get(end?..)
}

/// What a shell starts: the first command of `-c`, or for a script that ends in `exec "$@"`
/// its arguments.
fn shell(finder: &mut Finder<'_>, arguments: &[Vec<u8>], directory: &[u8]) -> Option<Vec<Vec<u8>>> {
    let at = arguments.iter().position(|argument| !argument.starts_with(b"-"))?;
    if arguments[..at].iter().any(|option| option.ends_with(b"c")) {
        let line = &arguments[at];
        let end = line.iter().position(|b| b";&|<>\n".contains(b)).unwrap_or(line.len());
        let words: Vec<Vec<u8>> = words(&line[..end])
            .into_iter()
            .skip_while(|word| word == b"exec" || word.contains(&b'='))
            .collect();
        return Some(words);
    }
    let script = join(directory, &arguments[at]);
    finder.add(&script)?;
    let text = finder.text(&script, <[u8]>::to_vec)?;
    let hands_over = text.windows(9).any(|window| window == b"exec \"$@\"");
    hands_over.then(|| arguments[at + 1..].to_vec())
}

/// Words separated by blanks, quotes taken off.
fn words(line: &[u8]) -> Vec<Vec<u8>> {
    let parts = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    parts.map(|word| word.iter().copied().filter(|b| !b"\"'".contains(b)).collect()).collect()
}

/// The first word and the rest.
fn cut(line: &[u8]) -> (&[u8], &[u8]) {
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    (&line[..end], line[end..].trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[&str]) -> Vec<Vec<u8>> {
        words.iter().map(|word| word.as_bytes().to_vec()).collect()
    }

    #[test]
    fn wrappers_are_seen_through() {
        assert_eq!(env(&bytes(&["-i", "A=b", "python3", "-u"])), Some(bytes(&["python3", "-u"])));
        assert_eq!(env(&bytes(&["-S node --flag", "x"])), Some(bytes(&["node", "--flag", "x"])));
        assert_eq!(env(&bytes(&["-i"])), None);
        assert_eq!(behind_options(&bytes(&["-g", "--", "a", "-b"])), Some(&bytes(&["a", "-b"])[..]));
        assert_eq!(behind_options(&bytes(&["-g", "a", "-b"])), Some(&bytes(&["a", "-b"])[..]));
        assert_eq!(words(b" exec 'a b' \"c\" "), bytes(&["exec", "a", "b", "c"]));
        assert_eq!(cut(b"/usr/bin/env python3 -u"), (&b"/usr/bin/env"[..], &b"python3 -u"[..]));
    }

    #[test]
    fn the_command_is_entrypoint_and_arguments() {
        let config = r#"{"config":{"Entrypoint":["/e"],"Cmd":["c",5],"Env":["A=b"],"WorkingDir":"srv"}}"#;
        let command = Command::of(&serde_json::from_str(config).unwrap());
        let expected = Command {
            arguments: bytes(&["/e", "c"]),
            environment: bytes(&["A=b"]),
            directory: b"/srv".to_vec(),
        };
        assert_eq!(command, expected);
        for none in ["{}", r#"{"config":null}"#, r#"{"config":{"Cmd":null}}"#] {
            assert!(Command::of(&serde_json::from_str(none).unwrap()).arguments.is_empty());
        }
    }
}
