//! Images made to take a looker's time or memory: each would take hours, or all memory, without its bounds.

use super::*;

/// Each of these would take hours, or all memory.
#[test]
fn hostile_images_cost_what_they_may() {
    let program = elf("/lib/ld.so", &["liba.so"], "", 0);
    let includes = "include /big/*x\n".repeat(1 << 17);
    let names: Vec<String> = (0..4096).map(|at| format!("big/{at}")).collect();
    let far = format!("require('{}x')", "/srv/../".repeat(1 << 16));
    let many = "require('nowhere/x');".repeat(1 << 17);
    let values = [b"[".to_vec(), br#"{"":0},"#.repeat(1 << 18), b"0]".to_vec()].concat();
    let mut entries = vec![
        ("bin/node", Item::File(&program[..])),
        ("etc/ld.so.conf", Item::File(includes.as_bytes())),
        ("srv/far.js", Item::File(far.as_bytes())),
        ("srv/many.js", Item::File(many.as_bytes())),
        ("srv/values.js", Item::File(b"require('p')")),
        ("srv/node_modules/p/package.json", Item::File(&values)),
        ("srv/node_modules/p/index.js", Item::File(b"'p'")),
    ];
    entries.extend(names.iter().map(|name| (name.as_str(), Item::File(b"x"))));
    let image = Image::new(&entries);
    let mut follower = Follower::default();
    for path in ["bin/node", "srv/far.js", "srv/many.js", "srv/values.js"] {
        follower.opened(format!("/{path}").into_bytes());
        let found = image.paths(follower.find(&image));
        assert!(found.len() < 20 && !found.contains(&"/srv/x".to_owned()), "{found:?}");
    }
    let mut looks = 0;
    while !follower.is_exhausted() && looks < 1000 {
        follower.find(&image);
        looks += 1;
    }
    assert!(looks < 1000, "it never ends");
}

const LINKS: usize = 4096;

/// What starts with the files that are opened here costs no more than its steps, whatever the clock says.
fn look(entries: &[(&str, Item<'_>)], opened: &[&str]) -> Vec<String> {
    let image = Image::new(entries);
    let mut memory = Memory::new(Limits { time: None, ..SERVED });
    let mut finder = Finder::new(&image, &mut memory, Vec::new());
    for path in opened {
        follow(&mut finder, path.as_bytes());
    }
    image.paths(finder.into_found())
}

/// Entries with [`LINKS`] symbolic links to `target`, named by `name`.
fn links(name: impl Fn(usize) -> String) -> Vec<String> {
    (0..LINKS).map(name).collect()
}

/// One text under many names is read once, and must not be kept or run once a name.
#[test]
fn many_names_of_one_text_cost_each() {
    let python = elf("/lib/ld.so", &[], "", 0);
    let site = "usr/lib/python3/dist-packages";
    let code = format!("import {}\n", "a".repeat((4 << 20) - 10));
    let paths = links(|at| format!("{site}/a{at}.pth"));
    let mut entries = vec![
        ("usr/bin/python3.11", Item::File(&python[..])),
        ("srv/x.pth", Item::File(code.as_bytes())),
        ("usr/lib/python3.11/encodings/__init__.py", Item::File(b"#")),
    ];
    entries.extend(paths.iter().map(|path| (path.as_str(), Item::Symlink("/srv/x.pth"))));
    assert!(look(&entries, &["/usr/bin/python3.11"]).len() <= 4);

    // Modules that import on demand, and some that import what is known again and again.
    let names = links(|at| format!("m{at}"));
    let files = links(|at| format!("usr/lib/python3.11/m{at}.py"));
    let script: String = names.iter().map(|name| format!("import {name}\n")).collect();
    let deep = format!("import {}\n", "a.".repeat(120) + "a").repeat(8192);
    for module in ["def __getattr__(name):\n".to_owned() + &"    import a\n".repeat(8000), deep] {
        let mut entries = vec![
            ("usr/bin/python3.11", Item::File(&python[..])),
            ("srv/main.py", Item::File(script.as_bytes())),
            ("srv/m.py", Item::File(module.as_bytes())),
        ];
        entries.extend(files.iter().map(|path| (path.as_str(), Item::Symlink("/srv/m.py"))));
        let found = look(&entries, &["/usr/bin/python3.11", "/srv/main.py"]);
        assert!(found.contains(&"/srv/m.py".to_owned()), "{found:?}");
    }
}

/// Names of libraries that never end, and directories that all have to be searched for each.
#[test]
fn libraries_cost_what_they_name() {
    let long = "x".repeat(3000);
    let runpath: String = (0..200).map(|at| format!("/{long}{at}:")).collect();
    let needed: Vec<String> = (0..1000).map(|at| format!("lib{at}.so")).collect();
    let needed: Vec<&str> = needed.iter().map(String::as_str).collect();
    let library = elf("", &needed, &runpath[..4000], 0);
    let program = elf("/lib/ld.so", &needed, "", 0);
    let conf: String = (0..256).map(|at| format!("/{long}{at}\n")).collect();
    let files: Vec<String> = (0..1000).map(|at| format!("lib/lib{at}.so")).collect();
    let mut entries =
        vec![("bin/a", Item::File(&program[..])), ("etc/ld.so.conf", Item::File(conf.as_bytes()))];
    entries.extend(files.iter().map(|path| (path.as_str(), Item::File(&library[..]))));
    let found = look(&entries, &["/bin/a"]);
    assert!(found.len() <= 1001, "{}", found.len());

    // Links whose targets are long and lead nowhere.
    let target = "/nowhere".to_owned() + &"/a".repeat(2000);
    let links = links(|at| format!("lib/lib{at}.so"));
    let mut entries = vec![("bin/a", Item::File(&program[..]))];
    entries.extend(links.iter().map(|path| (path.as_str(), Item::Symlink(&target))));
    assert_eq!(look(&entries, &["/bin/a"]), ["/bin/a"]);
}

/// The clock ends a look whose steps take longer than steps should.
#[test]
fn a_look_ends_in_time() {
    let program = elf("/lib/ld.so", &["liba.so"], "", 0);
    let entries = [("bin/a", Item::File(&program[..])), ("lib/liba.so", Item::File(&program))];
    let image = Image::new(&entries);
    let mut memory = Memory::new(Limits { time: Some(Duration::ZERO), ..SERVED });
    let mut finder = Finder::new(&image, &mut memory, Vec::new());
    assert_eq!(follow(&mut finder, b"/bin/a"), Lead::Somewhere, "it is not given up");
    assert_eq!(finder.spent(), SERVED.steps, "it would be looked at again and again");
}
