//! `nydusctl` with real daemons, caches and machines.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tests::command::{Finished, finish, run};
use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::journey::Journey;
use tests::recipes::{self, noise};
use tests::{Context, Result, binaries, ensure, needs_mounts, needs_programs};

use crate::mounts::Ready;

fn nydusctl(arguments: &[&str]) -> Result<Finished> {
    finish(Command::new(binaries::nydusctl()).args(arguments))
}

fn ask(daemon: &Daemon, arguments: &[&str]) -> Result<String> {
    run(Command::new(binaries::nydusctl()).arg("-S").arg(daemon.socket()).args(arguments))
}

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("no JSON: {text}"))
}

/// What every command tells of a mount, for people and for programs.
#[test]
fn commands_tell_of_a_real_mount() -> Result<()> {
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let daemon = DaemonOptions::image(&nydus.reference(), &journey.path("cache")).start()?;
    let (file, root) = (recipes::BIG_FILES[0], daemon.root().display().to_string());
    let length = fs::read(daemon.root().join(file))?.len();

    let info = ask(&daemon, &["info"])?;
    for words in
        ["Version:", "Status:           RUNNING", "Profile:", "Commit:", "Instance /:", "Mounted Time:"]
    {
        ensure!(info.contains(words), "{words:?} is not in:\n{info}");
    }
    // In either place, the same document.
    for arguments in [["--raw", "info"], ["info", "-r"]] {
        ensure!(json(&ask(&daemon, &arguments)?)?["state"] == "RUNNING", "{arguments:?}");
    }
    ask(&daemon, &["set", "log-level", "debug"])?;
    let refused = nydusctl(&["-S", &daemon.socket().to_string_lossy(), "set", "log-level", "loud"])?;
    ensure!(refused.code == Some(1) && refused.stderr.contains("trace, debug, info"), "{refused:?}");

    // One mount of several is named; what the daemon refuses is told in a sentence.
    for (family, counter) in
        [("backend", "read_amount_total"), ("cache", "entries_count"), ("fsstats", "data_read")]
    {
        let counters = json(&ask(&daemon, &["metrics", family, "--id", "/", "--raw"])?)?;
        ensure!(counters[counter].as_u64() > Some(0), "{family}: no {counter} in {counters}");
    }
    ask(&daemon, &["trace", "--json", "--id", "/"])?;
    let socket = daemon.socket().to_string_lossy().into_owned();
    for (arguments, words) in [
        (&["metrics", "fsstats", "--id", "/none"][..], "nydusd refuses: there is no such mount"),
        (&["trace", "--id", "/none"], "nydusd refuses: there is no such mount"),
        (&["trace", "push", "--id", "/none"], "nydusd refuses: there is no such mount"),
        (&["umount", "-m", "/none"], "nydusd refuses: not found: nothing is mounted at /none"),
        (
            &["mount", "-m", "/", "-s", "/", "-t", "passthrough_fs"],
            "something is mounted at /; take it away first",
        ),
    ] {
        let refused = nydusctl(&[&["-S", &socket][..], arguments].concat())?;
        ensure!(refused.code == Some(1) && refused.stderr.contains(words), "{arguments:?}: {refused:?}");
        ensure!(!refused.stderr.contains("Mount("), "{refused:?}");
    }

    let mounts = ask(&daemon, &["mounts"])?;
    let line = mounts.lines().find(|line| line.contains(&root)).context(mounts.clone())?;
    ensure!(line.starts_with(&daemon.pid().to_string()) && line.contains("oci-layout"), "{line}");
    let document = json(&ask(&daemon, &["-r", "mounts"])?)?;
    let cache = &document[0]["cache"];
    let (ready, all) = (cache["entries_count"].as_u64(), cache["chunks_total"].as_u64());
    ensure!(ready > Some(0) && ready < all, "a part of the image is local: {cache}");
    ensure!(line.contains(&format!("{} of {}", ready.unwrap_or(0), all.unwrap_or(0))), "{line}");

    // Who has seen enough goes: no complaint, no panic.
    let piped = r#""$CTL" -S "$SOCK" why | head -n 0; echo "${PIPESTATUS[0]}""#;
    let mut shell = Command::new("bash");
    shell.args(["-c", piped]).env("CTL", binaries::nydusctl()).env("SOCK", daemon.socket());
    let finished = finish(&mut shell)?;
    ensure!(finished.stdout.trim() == "0" && finished.stderr.is_empty(), "{finished:?}");

    let top = ask(&daemon, &["top", "--once"])?;
    ensure!(
        top.contains(&root) && top.contains(&format!("/{file}")) && top.contains("since the mount"),
        "{top}"
    );
    let document = json(&ask(&daemon, &["top", "--once", "--raw"])?)?;
    ensure!(document[0]["counters"]["data_read"] == length, "{document}");
    Ok(())
}

/// With an interval the first line is the state and the others are changes.
#[test]
fn metrics_repeat_with_changes() -> Result<()> {
    use std::io::BufRead;
    needs_mounts!();
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    let daemon = DaemonOptions::image(&nydus.reference(), &journey.path("cache")).start()?;
    for (family, change) in [("backend", "requests/s"), ("cache", "fetched"), ("fsstats", "operations/s")] {
        let mut ctl = Command::new(binaries::nydusctl())
            .arg("-S")
            .arg(daemon.socket())
            .args(["metrics", family, "-I", "1"])
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let lines = std::io::BufReader::new(ctl.stdout.take().context("its output")?).lines();
        let found = lines.map_while(Result::ok).find(|line| line.contains("/s") && line.contains(change));
        ctl.kill()?;
        ctl.wait()?;
        ensure!(found.is_some(), "{family}: no change was printed");
    }
    Ok(())
}

/// Without `-S` the only daemon is taken and named; of two, none is.
#[test]
fn the_daemon_is_found() -> Result<()> {
    needs_mounts!();
    needs_programs!("unshare");
    let journey = Journey::start(&recipes::tiny())?;
    let nydus = journey.convert("nydus", &[])?;
    // A world with no other processes; all in it ends with the script.
    let script = r#"
        cd "$SCRATCH" && mkdir one two
        "$CTL" info 2>none; echo "none $?"
        "$NYDUSD" fuse --image "$IMAGE" --cache-dir cache --mountpoint one -A one.sock &
        until "$CTL" -S one.sock info >/dev/null 2>&1; do sleep 0.05; done
        "$CTL" info >info 2>taken; echo "one $?"
        "$CTL" mounts >mounts 2>&1; echo "mounts $?"
        "$CTL" cache ls >cached 2>&1; echo "cached $?"
        "$NYDUSD" --image "$IMAGE" --cache-dir cache --mountpoint two --apisock="$SCRATCH/two.sock" &
        until "$CTL" -S two.sock info >/dev/null 2>&1; do sleep 0.05; done
        "$CTL" info 2>two-found; echo "two $?"
        "$CTL" mounts >all 2>&1; echo "all $?"
    "#;
    let scratch = journey.scratch();
    let said = run(Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script])
        .env("SCRATCH", scratch)
        .env("CTL", binaries::nydusctl())
        .env("NYDUSD", binaries::nydusd())
        .env("IMAGE", nydus.reference()))?;
    let read = |name: &str| fs::read_to_string(scratch.join(name)).with_context(|| name.to_owned());
    ensure!(said.split_whitespace().eq("none 1 one 0 mounts 0 cached 0 two 1 all 0".split(' ')), "{said}");
    ensure!(read("none")?.contains("no nydusd with an API socket"), "{}", read("none")?);
    ensure!(read("info")?.contains("RUNNING") && read("taken")?.contains("one.sock"), "{}", read("taken")?);
    // A relative mount point is one of the daemon's directory.
    let one = scratch.join("one").display().to_string();
    ensure!(read("mounts")?.contains(&one), "{}", read("mounts")?);
    let cache = format!("items of {}", scratch.join("cache").canonicalize()?.display());
    ensure!(read("cached")?.contains(&cache), "{}", read("cached")?);
    let two = read("two-found")?;
    ensure!(two.contains("2 daemons") && two.contains("one.sock") && two.contains("two.sock"), "{two}");
    ensure!(
        ["one", "two"].iter().all(|name| read("all").is_ok_and(|all| all.contains(name))),
        "{}",
        read("all")?
    );
    Ok(())
}

/// An image of one file of noise.
fn image(seed: u64) -> Result<Journey> {
    Journey::start(&Image::new(vec![vec![Entry::file("data", noise(seed, 3 << 20))]]))
}

/// Names of what `cache ls` lists.
fn listed(cache: &str) -> Result<Vec<Value>> {
    let finished = nydusctl(&["cache", "ls", "--raw", "--cache-dir", cache])?;
    ensure!(finished.code == Some(0), "{finished:?}");
    Ok(json(&finished.stdout)?.as_array().cloned().unwrap_or_default())
}

fn names(items: &[Value]) -> BTreeSet<String> {
    items.iter().map(|item| item["name"].as_str().unwrap_or_default().to_owned()).collect()
}

/// A cache is pruned around the daemon that uses it: what it serves stays and stays right, the rest
/// goes; once it has ended everything goes, and the next daemon fetches it again.
#[test]
fn a_cache_is_pruned_around_a_live_daemon() -> Result<()> {
    needs_mounts!();
    let (old, live) = (image(11)?, image(12)?);
    let (old_image, live_image) = (old.convert("nydus", &[])?, live.convert("nydus", &[])?);
    let directory = old.path("cache");
    let cache = directory.to_string_lossy().into_owned();
    let options = DaemonOptions::image(&old_image.reference(), &directory);
    let mut daemon = options.start()?;
    ensure!(fs::read(daemon.root().join("data"))? == noise(11, 3 << 20), "wrong bytes");
    daemon.terminate()?;
    let gone = names(&listed(&cache)?);

    let mut daemon = DaemonOptions::image(&live_image.reference(), &directory).start()?;
    ensure!(fs::read(daemon.root().join("data"))? == noise(12, 3 << 20), "wrong bytes");
    let all = listed(&cache)?;
    let pid = i64::from(daemon.pid().as_raw());
    for item in &all {
        let used = !gone.contains(item["name"].as_str().unwrap_or_default());
        ensure!(item["in_use"] == used, "{item}");
        ensure!(!used || item["used_by"] == serde_json::json!([pid]), "{item} is used by {pid}");
    }
    let blob =
        all.iter().find(|item| item["in_use"] == true && item["kind"] == "blob").context("no blob in use")?;
    // Of the daemon that has ended all is durable, and therefore ready.
    let old_blob = all.iter().find(|item| item["in_use"] == false && item["kind"] == "blob");
    ensure!(old_blob.is_some_and(|blob| blob["chunks_ready"] == blob["chunks_total"]), "{old_blob:?}");
    let text = nydusctl(&["cache", "ls", "--cache-dir", &cache])?.stdout;
    ensure!(text.contains(&format!("nydusd [{pid}]")), "{text}");

    let dry = nydusctl(&["cache", "prune", "--size", "0", "--dry-run", "--cache-dir", &cache])?;
    ensure!(dry.stdout.contains("would remove") && names(&listed(&cache)?) == names(&all), "{dry:?}");
    let used = blob["name"].as_str().context("a name")?;
    // The daemon tells where its cache is.
    let socket = daemon.socket().to_string_lossy().into_owned();
    let kept = nydusctl(&["-S", &socket, "cache", "rm", &used[..12]])?;
    ensure!(kept.code == Some(1) && kept.stderr.contains(&format!("nydusd [{pid}]")), "{kept:?}");
    // Everything fits: nothing goes.
    let room = nydusctl(&["cache", "prune", "--size", "1GiB", "--cache-dir", &cache])?;
    ensure!(room.code == Some(0) && names(&listed(&cache)?) == names(&all), "{room:?}");

    let pruned = nydusctl(&["cache", "prune", "--size", "0", "--cache-dir", &cache])?;
    ensure!(pruned.code == Some(1) && pruned.stderr.contains("in use"), "{pruned:?}");
    let left = names(&listed(&cache)?);
    ensure!(left == names(&all).difference(&gone).cloned().collect(), "{left:?} are left");
    daemon.drop_pages(&daemon.root().join("data"))?;
    ensure!(fs::read(daemon.root().join("data"))? == noise(12, 3 << 20), "wrong bytes after a prune");

    daemon.terminate()?;
    let pruned = nydusctl(&["cache", "prune", "--size", "0", "--raw", "--cache-dir", &cache])?;
    ensure!(pruned.code == Some(0) && json(&pruned.stdout)?["left"] == 0, "{pruned:?}");
    ensure!(listed(&cache)?.is_empty(), "{:?}", listed(&cache)?);
    let daemon = options.start()?;
    ensure!(fs::read(daemon.root().join("data"))? == noise(11, 3 << 20), "wrong bytes after a new start");
    Ok(())
}

/// The least recently used goes first, by the start that used it last.
#[test]
fn the_least_recently_used_goes_first() -> Result<()> {
    needs_mounts!();
    let journeys = [image(21)?, image(22)?];
    let directory = journeys[0].path("cache");
    let cache = directory.to_string_lossy().into_owned();
    let images = [journeys[0].convert("nydus", &[])?, journeys[1].convert("nydus", &[])?];
    let mut of = Vec::new();
    // The first one twice: it is the older by birth, and the younger by use.
    for image in [&images[0], &images[1], &images[0]] {
        let before = names(&listed(&cache).unwrap_or_default());
        let mut daemon = DaemonOptions::image(&image.reference(), &directory).start()?;
        fs::read(daemon.root().join("data"))?;
        daemon.terminate()?;
        of.push(names(&listed(&cache)?).difference(&before).cloned().collect::<BTreeSet<_>>());
    }
    ensure!(of[2].is_empty() && !of[0].is_empty() && !of[1].is_empty(), "{of:?}");
    let total: u64 = listed(&cache)?.iter().filter_map(|item| item["allocated_size"].as_u64()).sum();
    let pruned =
        nydusctl(&["cache", "prune", "--size", &(total - 1).to_string(), "--raw", "--cache-dir", &cache])?;
    let removed = names(json(&pruned.stdout)?["removed"].as_array().context(pruned.stdout.clone())?);
    ensure!(!removed.is_empty() && removed.is_subset(&of[1]), "{removed:?} went first, not {:?}", of[1]);
    Ok(())
}

/// An image and a directory are mounted and unmounted from the command line, by paths as they are seen from there.
#[test]
fn images_and_directories_are_mounted_by_hand() -> Result<()> {
    needs_mounts!();
    let image = Ready::saying("one")?;
    let scratch = tempfile::tempdir()?;
    let (config, shared) = (scratch.path().join("config.json"), scratch.path().join("shared"));
    fs::write(&config, &image.config)?;
    fs::create_dir(&shared)?;
    fs::write(shared.join("file"), "shared")?;
    let daemon = DaemonOptions::empty().start()?;
    let by_hand = |arguments: &[&str]| {
        let mut ctl = Command::new(binaries::nydusctl());
        run(ctl.arg("-S").arg(daemon.socket()).args(arguments).current_dir(scratch.path()))
    };
    let source = image.bootstrap.to_string_lossy();
    by_hand(&["mount", "-m", "/image", "-s", &source, "-c", "config.json"])?;
    by_hand(&["mount", "-m", "/dir", "-s", "shared", "-t", "passthrough_fs"])?;
    ensure!(fs::read_to_string(daemon.root().join("image/word"))? == "one", "another image");
    ensure!(fs::read_to_string(daemon.root().join("dir/file"))? == "shared", "another directory");
    let mounts = ask(&daemon, &["mounts"])?;
    ensure!(mounts.contains("/image") && mounts.contains("/dir"), "{mounts}");
    by_hand(&["umount", "-m", "/image"])?;
    by_hand(&["umount", "-m", "/dir"])?;
    ensure!(fs::read_dir(daemon.root())?.count() == 0, "something is left");
    Ok(())
}

/// A daemon that is named tells its cache directory; of several, none is taken.
#[test]
fn what_is_removed_is_in_the_cache_of_the_named_daemon() -> Result<()> {
    needs_mounts!();
    let daemon = DaemonOptions::empty().start()?;
    let socket = daemon.socket().to_string_lossy().into_owned();
    let tried = || nydusctl(&["-S", &socket, "cache", "prune", "--size", "1GiB"]);
    let none = tried()?;
    ensure!(none.code == Some(1) && none.stderr.contains("no image mounted"), "{none:?}");
    let (one, two) = (Ready::saying("one")?, Ready::saying("two")?);
    one.post(&daemon, "/one")?;
    let only = tried()?;
    ensure!(only.code == Some(0) && only.stdout.contains("removed 0 B"), "{only:?}");
    two.post(&daemon, "/two")?;
    let several = tried()?;
    let flags = several.stderr.matches("--cache-dir /").count();
    ensure!(
        several.code == Some(1) && several.stderr.contains("2 cache directories") && flags == 2,
        "{several:?}"
    );
    Ok(())
}

/// Mistakes about a cache remove nothing and say what is wrong.
#[test]
fn mistakes_about_a_cache_are_told() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let dir = scratch.path().to_string_lossy().into_owned();
    for (arguments, code, words) in [
        (&["cache", "ls", "--cache-dir", "/no/such/directory"][..], 1, "/no/such/directory"),
        (&["cache", "rm", "abc", "--cache-dir", &dir][..], 1, "nothing in"),
        (&["cache", "prune", "--cache-dir", &dir][..], 2, "--size"),
        (&["cache", "prune", "--size", "lots", "--cache-dir", &dir][..], 2, "10GiB"),
        (&["cache", "rm", "--cache-dir", &dir][..], 2, "NAME"),
        (&["mount", "-m", "/x", "-s", "/y"][..], 2, "--config"),
        (&["mount", "-m", "/x", "-s", "/y", "-t", "nfs"][..], 2, "passthrough_fs"),
        (&["-S", "/no/socket", "info"][..], 1, "/no/socket"),
        (&["metrics", "backend", "-I", "0"][..], 2, "--interval"),
        (&["frobnicate"][..], 2, "frobnicate"),
    ] {
        let finished = nydusctl(arguments)?;
        ensure!(finished.code == Some(code), "{arguments:?}: {finished:?}");
        ensure!(finished.stderr.contains(words), "{arguments:?}: {finished:?}");
    }
    Ok(())
}

/// `check` finds this machine ready, tells what is missing without a privilege, and leaves nothing.
#[test]
fn check_tells_what_is_missing() -> Result<()> {
    needs_mounts!();
    let scratch = tempfile::tempdir()?;
    let dir = scratch.path().to_string_lossy().into_owned();
    let ready = nydusctl(&["check", "--json", "--cache-dir", &dir])?;
    let document = json(&ready.stdout)?;
    ensure!(ready.code == Some(0) && document["ready"] == true, "{ready:?}");
    let named: BTreeSet<&str> =
        document["findings"].as_array().into_iter().flatten().filter_map(|f| f["name"].as_str()).collect();
    for name in
        ["kernel", "FUSE device", "privilege to mount", "open files", "locks", "sparse files", "free space"]
    {
        ensure!(named.contains(name), "{name} is not looked at: {named:?}");
    }
    ensure!(fs::read_dir(scratch.path())?.count() == 0, "something is left behind");

    needs_programs!("setpriv");
    let check = |drop: &[&str]| {
        let ctl = [binaries::nydusctl(), Path::new("check"), Path::new("--cache-dir"), scratch.path()];
        finish(Command::new("setpriv").args(drop).args(ctl))
    };
    // No program that it starts could mount, either.
    let poor = check(&["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])?;
    ensure!(poor.code == Some(1) && poor.stdout.contains("MISSING  privilege to mount"), "{poor:?}");
    ensure!(poor.stdout.contains("or run as root"), "no remedy: {poor:?}");
    // Whoever owns the directory has fusermount3.
    std::os::unix::fs::chown(scratch.path(), Some(65534), Some(65534))?;
    let user = check(&["--reuid", "65534", "--regid", "65534", "--clear-groups"])?;
    ensure!(user.stdout.contains("fusermount3 mounts for this user"), "{user:?}");
    Ok(())
}

/// Sub-commands that `--help` lists, and the long flags it explains.
fn grammar(program: &Path, commands: &[String]) -> Result<(Vec<String>, BTreeSet<String>)> {
    let help = run(Command::new(program).args(commands).arg("--help"))?;
    let listed = help.split("Commands:\n").nth(1).unwrap_or_default();
    let names = listed.lines().take_while(|line| !line.is_empty()).filter_map(|line| {
        line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?.split_whitespace().next()
    });
    let flags = help.lines().filter_map(|line| {
        let text = line.trim_start().strip_prefix('-')?;
        let long = text.strip_prefix('-').or_else(|| text.split_once(", --").map(|(_, long)| long))?;
        Some(long.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').next()?.to_owned())
    });
    Ok((names.filter(|name| *name != "help").map(str::to_owned).collect(), flags.collect()))
}

/// Man pages and completions know every command and every flag of `--help`.
#[test]
fn pages_are_complete() -> Result<()> {
    needs_programs!("bash");
    let scratch = tempfile::tempdir()?;
    for program in [binaries::nydusd(), binaries::nydusctl(), binaries::nydus_image()] {
        run(Command::new(program).arg("pages").arg(scratch.path()))?;
        let name = program.file_name().and_then(|name| name.to_str()).context("a name")?;
        let read = |path: String| fs::read_to_string(scratch.path().join(&path)).with_context(|| path);
        let completions = [
            read(format!("bash-completion/completions/{name}"))?,
            read(format!("zsh/site-functions/_{name}"))?,
            read(format!("fish/vendor_completions.d/{name}.fish"))?,
        ];
        let mut seen = (0, 0);
        let mut todo = vec![Vec::new()];
        while let Some(commands) = todo.pop() {
            let (below, flags) = grammar(program, &commands)?;
            let page =
                read(format!("man/man1/{}.1", [&[name.to_owned()], &commands[..]].concat().join("-")))?;
            for flag in &flags {
                ensure!(
                    page.contains(&format!("\\-\\-{}", flag.replace('-', "\\-"))),
                    "{name} {commands:?} --{flag}"
                );
                for text in &completions {
                    ensure!(text.contains(flag), "{name} {commands:?}: --{flag} is not completed");
                }
            }
            for command in &below {
                for text in &completions {
                    ensure!(text.contains(command), "{name} {commands:?}: {command} is not completed");
                }
            }
            seen = (seen.0 + below.len(), seen.1 + flags.len());
            todo.extend(below.into_iter().map(|command| [&commands[..], &[command]].concat()));
        }
        ensure!(seen.0 >= 2 && seen.1 >= 20, "{name}: only {seen:?} commands and flags in its help");
    }
    // The shell's own word on it.
    let script = scratch.path().join("bash-completion/completions/nydusctl");
    let asked = format!(
        "source {}; COMP_WORDS=(nydusctl cache pr); COMP_CWORD=2; _nydusctl nydusctl pr cache; echo ${{COMPREPLY[@]}}",
        script.display()
    );
    let completed = run(Command::new("bash").args(["-c", &asked]))?;
    ensure!(completed.trim() == "prune", "{completed}");
    Ok(())
}

/// systemd has nothing to say against the unit.
#[test]
fn the_unit_is_sound() -> Result<()> {
    needs_programs!("systemd-analyze");
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../misc/packaging/nydusd@.service");
    // It looks for the program, which is installed elsewhere here.
    let installed =
        fs::read_to_string(unit)?.replace("/usr/local/bin/nydusd", &binaries::nydusd().to_string_lossy());
    ensure!(installed.contains(&*binaries::nydusd().to_string_lossy()), "the unit starts another program");
    let scratch = tempfile::tempdir()?;
    let file = scratch.path().join("nydusd@app.service");
    fs::write(&file, installed)?;
    let finished = finish(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file))?;
    ensure!(finished.code == Some(0) && finished.stderr.trim().is_empty(), "{finished:?}");
    Ok(())
}
