//! Which modules a Python program imports when it starts.
//!
//! Followed through the modules of the image are
//!
//! - import statements that run at once: not those in functions, nor those for type checkers only;
//! - names taken from packages that import them when asked for, by a `__getattr__` of their own;
//! - names of modules in compiled extensions, which import by name.
//!
//! A name that is computed, or compressed in an extension, is not seen.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::finder::{Finder, Parsed, size_of_all};
use super::imports::{self, Import, Imports, MAX_LEN};
use super::paths::{MAX_PATH, base_name, join, parent};
use super::{elf, names};

/// Imports are followed this deep.
const MAX_DEPTH: usize = 100;
/// Names looked for at most.
const MAX_LOOKS: usize = 1 << 18;
/// Bytes of names and imports that are remembered at most, beside what was parsed: a program with a thousand modules
/// takes some 3 MB.
const MAX_KNOWN: usize = 16 << 20;
/// What a name that is remembered takes beside its bytes.
const NAME_SIZE: usize = 64;
/// Bytes of a line that are passed in a step.
const LINE: usize = 256;
/// Lines of `.pth` files that are run, in bytes.
const MAX_SITE_CODE: usize = 64 << 10;

/// Part of the interpreter since 3.11, not read from files.
const FROZEN: [&str; 17] = [
    "abc",
    "codecs",
    "io",
    "_collections_abc",
    "_sitebuiltins",
    "genericpath",
    "ntpath",
    "posixpath",
    "importlib._bootstrap",
    "importlib._bootstrap_external",
    "importlib.util",
    "importlib.machinery",
    "os",
    "site",
    "stat",
    "runpy",
    "zipimport",
];

/// Imported by the interpreter itself.
const STARTUP: [&str; 4] = ["encodings", "encodings.aliases", "encodings.utf_8", "site"];
/// Imported behind the code of `.pth` files.
const CUSTOM: [&str; 2] = ["sitecustomize", "usercustomize"];

/// What the text of a script imports: not the same as if it were a module.
struct Script(Imports);

/// Dotted names in the constants of a library.
struct Dotted(Vec<String>);

impl Parsed for Imports {
    fn size(&self) -> usize {
        let all = self.at_once.iter().chain(self.on_demand.iter().flatten());
        all.map(|import| size_of::<Import>() + import.module.len() + size_of_all(&import.names)).sum()
    }
}

impl Parsed for Script {
    fn size(&self) -> usize {
        self.0.size()
    }
}

impl Parsed for Dotted {
    fn size(&self) -> usize {
        size_of_all(&self.0)
    }
}

/// An interpreter and the modules that it has imported.
#[derive(Debug)]
pub(super) struct Python {
    /// Minor version of Python 3.
    minor: u32,
    /// `sys.path`.
    path: Arc<Vec<Vec<u8>>>,
    /// Modules looked for.
    seen: HashSet<String>,
    /// Names looked for.
    looks: usize,
    /// Bytes of what is remembered, and of what is being run.
    known: usize,
    /// Directories of packages looked for.
    packages: HashMap<String, Option<Vec<u8>>>,
    /// Modules that import when a name is asked for: their package, and what they may import.
    lazy: HashMap<String, (String, Arc<Imports>)>,
    /// Names asked of those.
    asked: HashSet<String>,
    /// Lines of `.pth` files that are run.
    site_code: Vec<u8>,
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
    if !finder.is_scout() {
        python.start(finder);
    }
    python.look_first(first);
    match target {
        Some((kind, Some(name))) if kind == b"-m" => {
            let name = String::from_utf8_lossy(&name).into_owned();
            python.import(finder, &name, 0);
            python.import(finder, &format!("{name}.__main__"), 0);
        }
        Some((kind, Some(code))) if kind == b"-c" => python.run_code(finder, &code),
        _ => {
            if let Some(script) = script {
                python.run_script(finder, &script);
            }
        }
    }
    finder.python = Some(Box::new(python));
}

/// Adds what the source at `path`, or the source that it was compiled from, imports in the interpreter that
/// was started last: as the module that it is by `sys.path`, else as a script. False if none was started yet.
pub(super) fn opened(finder: &mut Finder<'_>, path: &[u8]) -> bool {
    let Some(mut python) = finder.python.take() else { return false };
    match python.module_of(path) {
        Some(module) => python.import(finder, &module, 0),
        None if path.ends_with(b".py") => {
            python.look_first(parent(path));
            python.run_script(finder, path);
        }
        None => {}
    }
    finder.python = Some(python);
    true
}

impl Python {
    /// The interpreter at `program`, before it has a script.
    fn new(finder: &mut Finder<'_>, program: &[u8], real: &[u8]) -> Option<Self> {
        let prefix = parent(&parent(real));
        let lib = join(&prefix, b"lib");
        let minor = |name: &[u8]| -> Option<u32> {
            std::str::from_utf8(name.strip_prefix(b"python3.")?).ok()?.parse().ok()
        };
        let minor = minor(base_name(real)).or_else(|| {
            let versions = finder.names(&lib, |name| minor(name).is_some());
            versions.iter().filter_map(|name| minor(name)).max()
        })?;
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
        let mut python = Self {
            minor,
            path: Arc::new(path),
            seen: HashSet::new(),
            looks: 0,
            known: 0,
            packages: HashMap::new(),
            lazy: HashMap::new(),
            asked: HashSet::new(),
            site_code: Vec::new(),
        };
        for site in sites.into_iter().filter(|site| finder.is_dir(site)).collect::<Vec<_>>() {
            python.site(finder, site);
        }
        Some(python)
    }

    /// Adds what the interpreter imports whatever it runs.
    fn start(&mut self, finder: &mut Finder<'_>) {
        for module in STARTUP {
            self.import(finder, module, 0);
        }
        let site_code = std::mem::take(&mut self.site_code);
        self.run_code(finder, &site_code);
        for module in CUSTOM {
            self.import(finder, module, 0);
        }
    }

    /// Adds a directory of packages with its `.pth` files, whose lines are further directories, or
    /// code that begins with an import.
    fn site(&mut self, finder: &mut Finder<'_>, site: Vec<u8>) {
        if self.path.contains(&site) {
            return;
        }
        Arc::make_mut(&mut self.path).push(site.clone());
        for name in finder.names(&site, |name| name.ends_with(b".pth")) {
            let file = join(&site, &name);
            finder.add(&file);
            let Some(text) = finder.text(&file, <[u8]>::to_vec) else { continue };
            // Long lines take long as well.
            if !finder.spend(text.len() / LINE) {
                return;
            }
            for line in text.split(|&b| b == b'\n').map(<[u8]>::trim_ascii) {
                if !finder.spend(1) {
                    return;
                }
                if line.starts_with(b"import ") {
                    if self.site_code.len() + line.len() < MAX_SITE_CODE {
                        self.site_code.extend_from_slice(line);
                        self.site_code.push(b'\n');
                    }
                } else if !line.is_empty() && line.len() <= MAX_PATH && self.path.len() < elf::MAX_DIRS {
                    let dir = join(&site, line);
                    if !self.path.contains(&dir) && finder.is_dir(&dir) {
                        Arc::make_mut(&mut self.path).push(dir);
                    }
                }
            }
        }
    }

    /// Puts `dir` before all others of `sys.path`.
    fn look_first(&mut self, dir: Vec<u8>) {
        Arc::make_mut(&mut self.path).insert(0, dir);
        self.packages.clear();
    }

    /// Makes room for `bytes` more that are remembered; false if there is none.
    fn has_room(&mut self, bytes: usize) -> bool {
        let known = self.known + bytes;
        if known <= MAX_KNOWN {
            self.known = known;
        }
        known <= MAX_KNOWN
    }

    /// Adds a module with its packages and what they import.
    fn import(&mut self, finder: &mut Finder<'_>, name: &str, depth: usize) {
        if name.len() > MAX_LEN {
            return;
        }
        let ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
        for end in ends.collect::<Vec<_>>() {
            self.load(finder, &name[..end], depth);
        }
    }

    fn load(&mut self, finder: &mut Finder<'_>, name: &str, depth: usize) {
        if depth > MAX_DEPTH || name.is_empty() || name.len() > MAX_LEN || self.looks >= MAX_LOOKS {
            return;
        }
        // What is known costs time as well.
        if !finder.spend(1) || self.seen.contains(name) || !self.has_room(name.len() + NAME_SIZE) {
            return;
        }
        self.seen.insert(name.to_owned());
        let Some(Found { file: Some(file), package }) = self.find(finder, name) else { return };
        if !file.ends_with(b".py") {
            self.load_extension(finder, &file, depth);
            return;
        }
        if self.minor < 11 || !FROZEN.contains(&name) {
            self.add_source(finder, &file);
        }
        let Some(imports) = finder.text(&file, |text| read(text, false)) else { return };
        let own = match (package, name.rsplit_once('.')) {
            (Some(_), _) => name,
            (None, Some((package, _))) => package,
            (None, None) => "",
        };
        self.run_module(finder, &imports, name, own, depth);
        if name == "sysconfig" {
            // How the interpreter was built, in a module named by platform; other names are links.
            let dir = parent(&file);
            for data in finder.names(&dir, |name| name.starts_with(b"_sysconfigdata_")) {
                let stem = data.strip_suffix(b".py").and_then(|stem| std::str::from_utf8(stem).ok());
                let own = finder.regular(&join(&dir, &data)).filter(|own| base_name(&own.path) == data);
                if let (Some(stem), Some(_)) = (stem, own) {
                    self.load(finder, stem, depth + 1);
                }
            }
        }
    }

    /// Adds a compiled module with its libraries, and the modules that it names.
    fn load_extension(&mut self, finder: &mut Finder<'_>, file: &[u8], depth: usize) {
        let Some(place) = finder.add(file) else { return };
        let Some(elf) = finder.elf(place.inode) else { return };
        elf::closure(finder, &place.path, Arc::clone(&elf));
        for range in &elf.constants {
            let names = finder.part(place.inode, range.clone(), |bytes| {
                Dotted(names::dotted(bytes).into_iter().map(str::to_owned).collect())
            });
            for name in finder.each(names.as_ref().map_or(&[], |names| &names.0)) {
                // Most are names of classes and functions.
                let is_new = !self.seen.contains(name);
                if is_new && self.find(finder, name).is_some_and(|found| found.file.is_some()) {
                    self.import(finder, name, depth + 1);
                }
            }
        }
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

    /// Adds what code without a file imports.
    fn run_code(&mut self, finder: &mut Finder<'_>, code: &[u8]) {
        self.run_all(finder, &read(code, true), "", 0);
    }

    /// Adds the script at `path` and what it imports.
    fn run_script(&mut self, finder: &mut Finder<'_>, path: &[u8]) {
        finder.add(path);
        if let Some(script) = finder.text(path, |text| Script(read(text, true))) {
            self.run_all(finder, &script.0, "", 0);
        }
    }

    /// Adds what module `name` imports at once, and remembers what it imports on demand; `package` is the one that
    /// dots begin at.
    fn run_module(
        &mut self,
        finder: &mut Finder<'_>,
        imports: &Arc<Imports>,
        name: &str,
        package: &str,
        depth: usize,
    ) {
        let size = imports.size();
        if !self.has_room(size) {
            return;
        }
        if imports.on_demand.is_some() {
            self.lazy.insert(name.to_owned(), (package.to_owned(), Arc::clone(imports)));
        }
        self.run_all(finder, imports, package, depth);
        if imports.on_demand.is_none() {
            self.known -= size;
        }
    }

    /// Adds what `imports` of something in `package` name at once.
    fn run_all(&mut self, finder: &mut Finder<'_>, imports: &Imports, package: &str, depth: usize) {
        for import in finder.each(&imports.at_once) {
            if !finder.spend(1) {
                return;
            }
            self.run(finder, import, package, depth);
        }
    }

    /// The name of the module whose source, or compiled form, lies at `path`.
    fn module_of(&self, path: &[u8]) -> Option<String> {
        let (dir, name) = (parent(path), base_name(path));
        let (dir, stem) = match name.strip_suffix(b".py") {
            Some(stem) => (dir, stem),
            // Compiled forms lie one deeper: `__pycache__/name.cpython-311.pyc`.
            None if base_name(&dir) == b"__pycache__" => {
                (parent(&dir), name.split(|&b| b == b'.').next().unwrap_or_default())
            }
            None => return None,
        };
        let inside = |root: &Vec<u8>| Some(dir.strip_prefix(root.as_slice())?.to_vec());
        let inside =
            self.path.iter().filter_map(inside).filter(|rest| matches!(rest.first(), None | Some(b'/')));
        // Below the longest of the directories.
        let package = inside.min_by_key(Vec::len)?;
        let stem = (stem != b"__init__").then(|| stem.to_vec());
        let parts = package.split(|&b| b == b'/').filter(|part| !part.is_empty()).map(<[u8]>::to_vec);
        let parts: Vec<Vec<u8>> = parts.chain(stem).collect();
        String::from_utf8(parts.join(&b'.')).ok().filter(|name| !name.is_empty())
    }

    /// Adds what one statement of a module in `package` imports.
    fn run(&mut self, finder: &mut Finder<'_>, import: &Import, package: &str, depth: usize) {
        let Import { level, module, names, is_use } = import;
        let mut base = package;
        for _ in 1..*level {
            base = base.rsplit_once('.').map_or("", |(above, _)| above);
        }
        let module = match (level, base.is_empty(), module.is_empty()) {
            (0, _, _) | (_, true, _) => module.clone(),
            (_, _, true) => base.to_owned(),
            _ => format!("{base}.{module}"),
        };
        if *is_use && !self.lazy.contains_key(&module) {
            return;
        }
        self.import(finder, &module, depth + 1);
        for name in names {
            self.looks += 1;
            if self.looks >= MAX_LOOKS {
                break;
            }
            // Most names are no modules; those that are not found cost nothing.
            self.load(finder, &format!("{module}.{name}"), depth + 1);
            self.ask(finder, &module, name, depth + 1);
        }
    }

    /// Adds what `module` imports when `name` is asked of it.
    fn ask(&mut self, finder: &mut Finder<'_>, module: &str, name: &str, depth: usize) {
        let Some((package, imports)) = self.lazy.get(module) else { return };
        let (package, imports, asked) = (package.clone(), Arc::clone(imports), format!("{module}.{name}"));
        if depth > MAX_DEPTH || self.asked.contains(&asked) || !self.has_room(asked.len() + NAME_SIZE) {
            return;
        }
        self.asked.insert(asked);
        for import in imports.on_demand.iter().flatten() {
            if !finder.spend(1 + import.names.len()) {
                return;
            }
            if import.gives(name) {
                self.run(finder, import, &package, depth);
            }
        }
    }

    /// The directory of a package.
    fn package(&mut self, finder: &Finder<'_>, name: &str) -> Option<Vec<u8>> {
        if let Some(known) = self.packages.get(name) {
            return known.clone();
        }
        let found = self.find(finder, name).and_then(|found| found.package);
        if self.has_room(name.len() + found.as_ref().map_or(0, Vec::len) + NAME_SIZE) {
            self.packages.insert(name.to_owned(), found.clone());
        }
        found
    }

    /// Looks for a module as the interpreter does: package, library, source.
    fn find(&mut self, finder: &Finder<'_>, name: &str) -> Option<Found> {
        if self.looks >= MAX_LOOKS {
            return None;
        }
        self.looks += 1;
        let (dirs, last) = match name.rsplit_once('.') {
            None => (Arc::clone(&self.path), name),
            Some((package, last)) => (Arc::new(vec![self.package(finder, package)?]), last),
        };
        let mut namespace = None;
        for dir in dirs.iter().filter(|dir| finder.has_prefix(dir, last.as_bytes())) {
            let package = join(dir, last.as_bytes());
            let init = join(&package, b"__init__.py");
            if finder.regular(&init).is_some() {
                return Some(Found { file: Some(init), package: Some(package) });
            }
            let library = format!("{last}.cpython-3{}", self.minor);
            let library = finder.libraries(dir, library.as_bytes());
            let files = [
                library.unwrap_or_default(),
                format!("{last}.abi3.so").into_bytes(),
                format!("{last}.so").into_bytes(),
                format!("{last}.py").into_bytes(),
            ];
            for file in files.iter().filter(|file| !file.is_empty()).map(|file| join(dir, file)) {
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

fn read(text: &[u8], is_main: bool) -> Imports {
    match std::str::from_utf8(text) {
        Ok(text) => imports::read(text, is_main),
        Err(_) => imports::read(&String::from_utf8_lossy(text), is_main),
    }
}
