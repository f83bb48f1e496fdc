//! The broker: what it may wait for without others waiting, and what is left when it, or its daemon, ends.

use super::*;

/// Neither goes on without the other, and readers do not notice what their daemon has lost.
#[test]
fn a_broker_ends_with_its_daemon_and_readers_outlive_it() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci");
    let scene = Scene::new()?;
    let cache = scene.journey.path("cache");
    let mut daemon = DaemonOptions::empty().start()?;
    ensure!(scene.post(&daemon, "/tiny", &cache)?.0 == 204);
    let first = broker(&daemon)?.context("no broker")?;
    daemon.kill()?;
    gone(first)?;

    let daemon = DaemonOptions::empty().start()?;
    ensure!(scene.post(&daemon, "/tiny", &cache)?.0 == 204);
    let shared = scene.journey.path("shared");
    fs::create_dir(&shared)?;
    fs::write(shared.join("file"), "shared")?;
    xattr::set(shared.join("file"), "user.kept", b"yes")?;
    ensure!(post_directory(&daemon, "/shared", &shared)?.0 == 204);
    let second = broker(&daemon)?.context("no broker")?;
    kill(second, Signal::SIGTERM)?;
    ensure!(broker(&daemon)? == Some(second), "who ends it is its daemon");
    let reference = scene.journey.reference()?;
    let blobs: Vec<_> = fs::read_dir(scene.journey.path("nydus").join("blobs/sha256"))?.collect();
    ensure!(!blobs.is_empty());
    let root = daemon.root().join("tiny");
    tree::assert_same(&reference, &root, Overlook::default())?;
    kill(second, Signal::SIGKILL)?;
    gone(second)?;
    daemon.drop_pages(&root.join("data/noise-a"))?;
    tree::assert_same(&reference, &root, Overlook::default())?;
    let names: Vec<_> = xattr::list(daemon.root().join("shared/file"))?.collect();
    ensure!(names.contains(&"user.kept".into()), "{names:?}");
    let (code, answer) = scene.post(&daemon, "/other", &scene.journey.path("other"))?;
    ensure!(code == 500 && answer.to_string().contains("the broker has ended"), "{code} {answer}");
    ensure!(daemon.get("/api/v1/daemon")?["state"] == "RUNNING");
    Ok(())
}

/// A file server that does not answer holds up those who asked for its files, and not the end.
#[test]
fn files_that_hang_do_not_delay_the_end() -> Result<()> {
    needs_mounts!();
    let shown = tempfile::tempdir()?;
    let server = DaemonOptions::empty().start()?;
    let (code, answer) = post_directory(&server, "/shown", shown.path())?;
    ensure!(code == 204, "{answer}");
    let mut daemon = DaemonOptions::empty().start()?;
    let broker = broker(&daemon)?.context("no broker")?;
    server.freeze()?;
    let hanging = server.root().join("shown");
    std::thread::scope(|scope| -> Result<()> {
        let asked: Vec<_> = (0..70)
            .map(|number| {
                let (daemon, source) = (&daemon, hanging.join(format!("none-{number}")));
                scope.spawn(move || post_directory(daemon, &format!("/hangs-{number}"), &source))
            })
            .collect();
        // As many as it works on at once, and the one that takes requests.
        let threads = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{broker}/task"))?.count()) };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while threads()? < 65 {
            ensure!(std::time::Instant::now() < deadline, "{} threads", threads()?);
            // The threads of another process are only to be counted.
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        kill(daemon.pid(), Signal::SIGTERM)?;
        // Their connections end with it.
        let answers = asked.into_iter().map(|thread| thread.join());
        ensure!(answers.flatten().all(|answer| !answer.is_ok_and(|(code, _)| code == 204)));
        Ok(())
    })?;
    let root = daemon.root().to_owned();
    ensure!(daemon.wait_ended()?.code() == Some(0), "{}", daemon.log());
    ensure!(!mounted(&root) && !daemon.socket().exists(), "{}", daemon.log());
    gone(broker)?;
    kill(server.pid(), Signal::SIGCONT)?;
    ensure!(fs::read_dir(&hanging)?.count() == 0);
    Ok(())
}

/// Who has to wait for a file server keeps nobody else waiting.
#[test]
fn files_that_hang_delay_nobody_else() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "python3");
    let scene = Scene::new()?;
    let (shown, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let server = DaemonOptions::empty().start()?;
    ensure!(post_directory(&server, "/shown", shown.path())?.0 == 204);
    let daemon = DaemonOptions::empty().start()?;
    let broker = broker(&daemon)?.context("no broker")?;
    let hanging = server.root().join("shown");
    ensure!(post_directory(&daemon, "/below", &hanging)?.0 == 204);
    server.freeze()?;
    let waits = |process: u32| -> Result<()> {
        let is_there = |task: std::io::Result<fs::DirEntry>| {
            task.is_ok_and(|task| {
                fs::read_to_string(task.path().join("wchan")).is_ok_and(|at| at == "request_wait_answer")
            })
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !fs::read_dir(format!("/proc/{process}/task"))?.any(is_there) {
            ensure!(std::time::Instant::now() < deadline, "process {process} does not wait");
            // The threads of another process are only to be looked at.
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(())
    };
    // For a second the kernel answers from what it knows.
    let asks = "import os,sys\nwhile True: os.stat(sys.argv[1])";
    let mut asking = Command::new("python3").args(["-c", asks]).arg(&hanging).spawn()?;
    let asked = waits(asking.id());
    let answered = std::thread::scope(|scope| -> Result<_> {
        // What is admitted below it has to be found again.
        let above = server.root().parent().context("a parent")?;
        let first = scope.spawn(|| scene.post(&daemon, "/tiny", above));
        let answered = asked.and_then(|()| waits(broker.as_raw().cast_unsigned())).and_then(|()| {
            let (daemon, other) = (&daemon, other.path());
            post_directory(daemon, "/other", other)
        });
        kill(server.pid(), Signal::SIGCONT)?;
        let (code, answer) = first.join().expect("no panic")?;
        ensure!(code == 204, "{answer}");
        answered
    });
    asking.kill()?;
    asking.wait()?;
    let (code, answer) = answered?;
    ensure!(code == 204, "{answer}");
    Ok(())
}

/// A broker that may open nothing more says so, and goes on when it may again.
#[test]
fn a_broker_without_descriptors_goes_on() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "prlimit");
    let scene = Scene::new()?;
    let mut daemon = DaemonOptions::empty().start()?;
    let broker = broker(&daemon)?.context("no broker")?;
    let limit = |files: &str| {
        let mut command = Command::new("prlimit");
        tests::command::run(command.args(["--pid", &broker.to_string(), &format!("--nofile={files}")]))
    };
    limit("6:4096")?;
    for _ in 0..20 {
        let (code, answer) = scene.post(&daemon, "/tiny", &scene.journey.path("cache"))?;
        ensure!(code == 500, "{answer}");
    }
    limit("4096:4096")?;
    let (code, answer) = scene.post(&daemon, "/tiny", &scene.journey.path("cache"))?;
    ensure!(code == 204, "{answer}");
    ensure!(daemon.terminate()?.code() == Some(0));
    gone(broker)
}

/// In a container whose first process waits for nobody's children: what is left there when a daemon has ended.
#[test]
fn nothing_is_left_where_nobody_waits_for_it() -> Result<()> {
    const FIRST: &str = "\
import os,signal,subprocess,sys,time
program,mountpoint,socket=sys.argv[1:]
daemon=subprocess.Popen([program,'fuse','--mountpoint',mountpoint,'--apisock',socket],stdout=sys.stderr)
while daemon.poll() is None and not os.path.exists(socket): time.sleep(0.01)
helper=open(f'/proc/{daemon.pid}/task/{daemon.pid}/children').read()
assert helper.strip()
daemon.send_signal(signal.SIGTERM)
print(daemon.wait(),*[pid for pid in os.listdir('/proc') if pid.isdigit()])
";
    needs_mounts!();
    needs_programs!("unshare", "python3");
    let directory = tempfile::tempdir()?;
    let mountpoint = tests::mount::Mount::guard(directory.path().join("mount"));
    fs::create_dir(mountpoint.path())?;
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "--propagation=slave", "python3", "-c", FIRST]);
    command.arg(tests::binaries::nydusd()).arg(mountpoint.path()).arg(directory.path().join("api.sock"));
    let left = tests::command::run(&mut command)?;
    ensure!(left.trim() == "0 1", "{left}");
    Ok(())
}
