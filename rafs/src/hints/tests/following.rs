//! Starts of which only the opened files are known.

use super::*;

#[test]
fn what_a_program_opens_leads_on() {
    let python = elf("/lib/ld.so", &["liba.so"], "", 0);
    let library = elf("", &["libb.so"], "", 0);
    let last = elf("", &[], "", 0);
    let stdlib = "usr/lib/python3.11";
    let at = |name: &str| format!("{stdlib}/{name}");
    let (encodings, used, more, compiled) =
        (at("encodings/__init__.py"), at("used.py"), at("more.py"), at("__pycache__/late.cpython-311.pyc"));
    let late = at("late.py");
    let entries = [
        ("usr/bin/python3.11", Item::File(&python[..])),
        ("lib/liba.so", Item::File(&library)),
        ("lib/libb.so", Item::File(&last)),
        (&encodings, Item::File(b"#")),
        (&used, Item::File(b"#")),
        (&more, Item::File(b"#")),
        (&late, Item::File(b"import more")),
        (&compiled, Item::File(b"late")),
        ("srv/main.py", Item::File(b"import used")),
        ("srv/data", Item::File(b"data")),
        ("srv/start", Item::File(b"#!/bin/node\n")),
        ("srv/run.py", Item::File(b"#!/usr/bin/python3.11\nimport used")),
        ("bin/node", Item::File(&last)),
        ("srv/a.js", Item::File(b"require('./b')")),
        ("srv/b.js", Item::File(b"'b'")),
    ];
    let image = Image::new(&entries);
    let mut follower = Follower::default();
    let mut open = |path: &str| {
        follower.opened(path.as_bytes().to_vec());
        let before = image.paths(follower.find(&image));
        assert_eq!(image.paths(follower.find(&image)), before, "told twice");
        before
    };
    let mut expected = vec!["/usr/bin/python3.11", "/lib/liba.so", "/lib/libb.so"];
    let encodings = format!("/{encodings}");
    expected.push(&encodings);
    assert_eq!(open("/usr/bin/python3.11"), expected);
    assert_eq!(open("/srv/data"), expected);
    expected.extend(["/srv/main.py", "/usr/lib/python3.11/used.py"]);
    assert_eq!(open("/srv/main.py"), expected);
    // The module that was compiled, and what its source imports.
    expected.extend(["/usr/lib/python3.11/__pycache__/late.cpython-311.pyc", "/usr/lib/python3.11/more.py"]);
    assert_eq!(open(&format!("/{compiled}")), expected);
    // It says nothing without a program that runs it.
    assert_eq!(open("/srv/a.js"), expected);
    expected.extend(["/srv/start", "/bin/node", "/srv/a.js", "/srv/b.js"]);
    assert_eq!(open("/srv/start"), expected);
    assert_eq!(open("/nowhere"), expected);

    // The kernel opens a script before its interpreter.
    for script in ["/srv/main.py", "/srv/run.py"] {
        let mut follower = Follower::default();
        follower.opened(script.as_bytes().to_vec());
        follower.find(&image);
        follower.opened(b"/usr/bin/python3.11".to_vec());
        let found = image.paths(follower.find(&image));
        assert!(found.contains(&"/usr/lib/python3.11/used.py".to_owned()), "{found:?}");
    }
}

#[test]
fn what_can_not_be_read_yet_is_looked_at_again() {
    let node = elf("/lib/ld.so", &["liba.so"], "", 0);
    let (a, b) = (elf("", &["libb.so"], "", 0), elf("", &[], "", 0));
    let entries = [
        ("bin/node", Item::File(&node[..])),
        ("lib/liba.so", Item::File(&a)),
        ("lib/libb.so", Item::File(&b)),
        ("srv/main.js", Item::File(b"require('./b'); require('p')")),
        ("srv/b.js", Item::File(b"require('./c')")),
        ("srv/c.js", Item::File(b"'c'")),
        ("srv/node_modules/p/package.json", Item::File(br#"{"main":"m.js"}"#)),
        ("srv/node_modules/p/m.js", Item::File(b"'m'")),
    ];
    let mut image = Image::new(&entries);
    let mut follower = Follower::default();
    follower.opened(b"/bin/node".to_vec());
    follower.opened(b"/srv/main.js".to_vec());
    let whole = image.paths(follower.find(&image));
    assert_eq!(whole.len(), entries.len());

    let all: Vec<Inode> = (1..image.nodes.len() as u64).map(Inode).collect();
    image.away = all.into_iter().filter(|inode| matches!(image.node(*inode).item, Item::File(_))).collect();
    let mut follower = Follower::default();
    follower.opened(b"/bin/node".to_vec());
    follower.opened(b"/srv/main.js".to_vec());
    let mut rounds = 0;
    loop {
        let found = follower.find(&image);
        let paths = image.paths(found.clone());
        assert!(paths.iter().all(|path| whole.contains(path)), "{paths:?}");
        if image.away.is_empty() {
            assert_eq!(paths, whole);
            break;
        }
        // What was found comes, and whatever else is asked of it.
        let before = image.away.len();
        image.away.retain(|inode| !found.contains(inode));
        if image.away.len() == before {
            image.away.pop();
        }
        rounds += 1;
        assert!(rounds < 20);
    }
}

/// The threads that look at images have small stacks: chains of modules are followed only so deep.
#[test]
fn long_chains_do_not_exhaust_the_stack() {
    const LONG: usize = 400;
    let program = elf("/lib/ld.so", &[], "", 0);
    let chain = |make: &dyn Fn(usize) -> (String, String)| (0..LONG).map(make).collect::<Vec<_>>();
    // Each module is asked for what it imports on demand, which is the deepest way.
    let modules = chain(&|at| {
        let (next, ask) = (at + 1, at + 2);
        let text = format!("def __getattr__(name):\n    from m{ask} import x\nfrom m{next} import x\n");
        (format!("usr/lib/python3.11/m{at}.py"), text)
    });
    let scripts = chain(&|at| (format!("srv/s{at}.js"), format!("require('./s{}')", at + 1)));
    let mut entries = vec![
        ("usr/bin/python3.11", Item::File(&program[..])),
        ("usr/bin/node", Item::File(&program)),
        ("usr/lib/python3.11/encodings/__init__.py", Item::File(b"import m0\n")),
    ];
    entries.extend(
        modules.iter().chain(&scripts).map(|(path, text)| (path.as_str(), Item::File(text.as_bytes()))),
    );
    let image = Image::new(&entries);
    let look = || {
        let mut follower = Follower::default();
        for path in ["/usr/bin/python3.11", "/usr/bin/node", "/srv/s0.js"] {
            follower.opened(path.as_bytes().to_vec());
        }
        let found = image.paths(follower.find(&image));
        let of = |end: &str| found.iter().filter(|path| path.ends_with(end)).count();
        (of(".py"), of(".js"))
    };
    // A quarter of what the engine's threads have.
    let found = std::thread::scope(|scope| {
        std::thread::Builder::new().stack_size(512 << 10).spawn_scoped(scope, look).unwrap().join().unwrap()
    });
    assert!((100..LONG).contains(&found.0) && (100..LONG).contains(&found.1), "{found:?}");
}
