//! QEMU with Debian's kernel, which runs a script and powers off.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::journey::within;

/// What `misc/guest/make-guest` has made.
const GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../misc/.cache/guest");

/// How long a guest may take from its start to its end. A processor that is emulated is slow.
const LIFE: Duration = Duration::from_secs(240);

/// Ends the test with its reason printed unless this machine can run a guest.
#[macro_export]
macro_rules! needs_guest {
    () => {
        $crate::needs_programs!("qemu-system-x86_64", "cpio");
        if let Some(reason) = $crate::guest::machine::missing() {
            eprintln!("skipped {}: {reason}", module_path!());
            return Ok(());
        }
    };
}

/// Why there is no guest; `None` if there is one.
pub fn missing() -> Option<String> {
    let there = Path::new(GUEST).join("recipe").exists();
    (!there).then(|| "there is no guest in misc/.cache/guest (see misc/setup.sh)".to_owned())
}

/// A guest that is running. Dropped, it is killed.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    console: Option<BufReader<ChildStdout>>,
    /// What it has printed.
    printed: String,
    _directory: TempDir,
}

impl Machine {
    /// Starts a guest that runs `job`, a script of busybox's shell, with these devices: arguments of QEMU.
    ///
    /// # Errors
    /// It can not be started.
    pub fn start(job: &str, devices: &[String]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = |name: &str| directory.path().join(name);
        fs::write(path("job"), job)?;
        let mut cpio = Command::new("cpio");
        cpio.current_dir(directory.path()).args(["--quiet", "-o", "-H", "newc", "-F", "job.cpio"]);
        let mut child = cpio.stdin(Stdio::piped()).spawn().context("start cpio")?;
        child.stdin.take().context("no input")?.write_all(b"job\n")?;
        ensure!(child.wait()?.success(), "cpio failed");
        let mut initrd = fs::read(Path::new(GUEST).join("initrd"))?;
        initrd.extend(fs::read(path("job.cpio"))?);
        fs::write(path("initrd"), initrd)?;
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512", "-smp", "1"])
            .args(["-nographic", "-nodefaults", "-serial", "stdio", "-no-reboot"])
            .arg("-kernel")
            .arg(Path::new(GUEST).join("vmlinuz"))
            .arg("-initrd")
            .arg(path("initrd"))
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on", "-numa", "node,memdev=mem"])
            .args(devices)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start qemu")?;
        let console = child.stdout.take().map(BufReader::new);
        Ok(Self { child, console, printed: String::new(), _directory: directory })
    }

    /// Waits for a line that begins with `marker`, and answers what is behind it.
    ///
    /// # Errors
    /// The guest ends before, or takes too long.
    pub fn wait_for(&mut self, marker: &str) -> Result<String> {
        let mut console = self.console.take().context("the console has ended")?;
        let wanted = marker.to_owned();
        let (console, lines, found) = within(LIFE, marker, move || {
            let mut lines = String::new();
            loop {
                let mut line = Vec::new();
                if console.read_until(b'\n', &mut line)? == 0 {
                    return Ok((None, lines, None));
                }
                let line = String::from_utf8_lossy(&line);
                lines.push_str(&line);
                if let Some(rest) = line.trim_end().strip_prefix(&wanted) {
                    let rest = rest.trim().to_owned();
                    return Ok((Some(console), lines, Some(rest)));
                }
            }
        })?;
        self.console = console;
        self.printed.push_str(&lines);
        found.with_context(|| format!("the guest ended without {marker:?}:\n{}", self.printed))
    }

    /// Waits for the end of the job, which must be a success, and of the guest; all that it printed.
    ///
    /// # Errors
    /// The job failed, or takes too long.
    pub fn end(mut self) -> Result<String> {
        let code = self.wait_for("guest: end")?;
        if code != "0" {
            bail!("the job ended with {code}:\n{}", self.printed);
        }
        // Without a reader it might wait to print.
        drop(self.console.take());
        Ok(std::mem::take(&mut self.printed))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Arguments for a file system that guests mount by the name `myfs`.
pub fn virtiofs(socket: &Path) -> Vec<String> {
    vec![
        "-chardev".into(),
        format!("socket,id=fs,path={}", socket.display()),
        "-device".into(),
        "vhost-user-fs-pci,chardev=fs,tag=myfs,queue-size=1024".into(),
    ]
}

/// Arguments for a disk.
pub fn disk(number: usize, socket: &Path) -> Vec<String> {
    vec![
        "-chardev".into(),
        format!("socket,id=disk{number},path={}", socket.display()),
        "-device".into(),
        format!("vhost-user-blk-pci,chardev=disk{number},num-queues=1"),
    ]
}

/// What a tree is, line by line: names, modes, links, owners, sizes, times, devices, targets, digests of contents. The same
/// program says it here and in guests.
pub const LISTING: &str = r#"
listing() {
    cd "$1"
    {
        find . ! -type d -exec stat -c '%n|%f|%h|%u|%g|%s|%Y|%t:%T|%N' {} +
        find . -type d -exec stat -c '%n|%f|%u|%g|%Y' {} +
        find . -type f -exec md5sum {} +
    } | LC_ALL=C sort
}
"#;

/// The listing of a tree here.
///
/// # Errors
/// busybox is not there, or fails.
pub fn listing(root: &Path) -> Result<Vec<u8>> {
    let script = format!("{LISTING}\nlisting \"$1\"");
    let output = Command::new("busybox").args(["sh", "-ec", &script, "listing"]).arg(root).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Tells two listings apart.
///
/// # Errors
/// The lines that only one of them has, as far as they fit.
pub fn same_listing(wanted: &[u8], found: &[u8]) -> Result<()> {
    let lines = |bytes: &[u8]| -> BTreeSet<String> {
        bytes.split(|byte| *byte == b'\n').map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    };
    let (wanted, found) = (lines(wanted), lines(found));
    let differing: Vec<_> = wanted.symmetric_difference(&found).take(20).collect();
    ensure!(differing.is_empty() && wanted.len() > 1, "of {} lines: {differing:#?}", wanted.len());
    Ok(())
}
