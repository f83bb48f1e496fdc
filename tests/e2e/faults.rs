//! Every way in which a registry misbehaves, one test each: what the reader sees, that no byte is
//! ever wrong, and what the fault may cost in bytes. All but what is said to end with EIO is
//! survived within the read that meets it, and after every fault all reads well.

use std::fs;
use std::net::SocketAddr;
use std::ops::Deref;
use std::time::Duration;

use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::journey::within;
use tests::recipes::noise;
use tests::relay::{Bearer, Relay, Rule};
use tests::scene::Scene;
use tests::{Context, Error, Result, bail, ensure, needs_mounts, needs_programs};

/// Bytes of the only file: five chunks of noise, which does not compress.
const SIZE: u64 = 300_000;
/// What answers cost beside file data: the ends of blobs that are no chunks, heads of parts.
const SLACK: u64 = 16 << 10;
/// A reader that overtakes a fetch which began without one asks for its chunk again.
const AGAIN: u64 = 64 << 10;
/// Far above any deadline set here: only a read that hangs takes so long.
const HANGS: Duration = Duration::from_secs(90);
/// `--read-timeout` where a fault lasts: seconds until the reader sees EIO.
const SHORT: &str = "3";
/// `--read-timeout` where a fault passes: never reached.
const LONG: &str = "60";

/// A scene with one file.
struct OneFile {
    scene: Scene,
    bytes: Vec<u8>,
}

/// What is not about the file is the scene's.
impl Deref for OneFile {
    type Target = Scene;

    fn deref(&self) -> &Scene {
        &self.scene
    }
}

impl OneFile {
    fn set(seed: u64, launch: impl FnOnce(SocketAddr) -> Result<Relay>) -> Result<Self> {
        Self::of_size(seed, SIZE, launch)
    }

    fn of_size(seed: u64, size: u64, launch: impl FnOnce(SocketAddr) -> Result<Relay>) -> Result<Self> {
        let bytes = noise(seed, usize::try_from(size)?);
        let image = Image::new(vec![vec![Entry::dir("./"), Entry::file("file", bytes.as_slice())]]);
        Ok(Self { scene: Scene::behind(&image, &["--chunk-size", "0x10000"], launch)?, bytes })
    }

    fn daemon(&self, read_timeout: &str) -> Result<Daemon> {
        self.daemon_with(read_timeout, |options| options)
    }

    fn daemon_with(
        &self,
        read_timeout: &str,
        more: impl FnOnce(DaemonOptions) -> DaemonOptions,
    ) -> Result<Daemon> {
        let daemon = more(self.options().flag("--read-timeout", read_timeout)).start()?;
        // What a mount costs is not what a fault costs.
        self.relay.forget();
        Ok(daemon)
    }

    /// Reads the file well, within the fault, for at most `extra` bytes more than it has.
    fn survives(&self, daemon: &Daemon, extra: u64) -> Result<()> {
        let found = read(daemon)?.map_err(|error| {
            Error::msg(format!("the read should survive the fault: {error}\n{}", daemon.log()))
        })?;
        ensure!(found == self.bytes, "wrong bytes");
        let (got, most) = (self.relay.bytes(), self.bytes.len() as u64 + extra + AGAIN + SLACK);
        ensure!(
            got <= most,
            "{got} bytes were fetched, at most {most} would do: {:#?}",
            self.relay.fetches()
        );
        Ok(())
    }

    /// Reads EIO for at most `most` bytes, and well once the fault is gone.
    fn fails_then_recovers(&self, daemon: &Daemon, most: u64) -> Result<()> {
        let error = read(daemon)?.err().context("the read should fail")?;
        ensure!(error.raw_os_error() == Some(libc::EIO), "{error}");
        let got = self.relay.bytes();
        ensure!(got <= most, "{got} bytes were fetched for nothing, {most} may be");
        self.relay.set(Rule::Pass);
        // A fetch ahead that began before may still be failing, and who joins it fails with it.
        let found = match read(daemon)? {
            Err(_) => read(daemon)?,
            found => found,
        };
        let found = found
            .map_err(|error| Error::msg(format!("the read after the fault: {error}\n{}", daemon.log())))?;
        ensure!(found == self.bytes, "wrong bytes after the fault");
        Ok(())
    }
}

/// Reads the file whole; the outer error is a read that hangs.
fn read(daemon: &Daemon) -> Result<std::io::Result<Vec<u8>>> {
    let path = daemon.root().join("file");
    within(HANGS, "a read", move || Ok(fs::read(path)))
}

macro_rules! needs {
    () => {
        needs_mounts!();
        needs_programs!("docker-registry");
    };
}

/// 401 without a challenge that could be met: EIO at once, and the log says how to log in.
#[test]
fn unauthorized() -> Result<()> {
    needs!();
    let scene = OneFile::set(101, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set(Rule::Refuse(401));
    scene.fails_then_recovers(&daemon, SLACK)?;
    ensure!(daemon.log().contains("docker login"), "no remedy in the log:\n{}", daemon.log());
    Ok(())
}

/// 403 from the target of a redirect, as when a signed link has expired: the registry is asked for
/// another link within the read, and no byte comes twice.
#[test]
fn forbidden_by_the_target_of_a_redirect() -> Result<()> {
    needs!();
    let scene = OneFile::set(102, Relay::with_links)?;
    let daemon = scene.daemon_with(LONG, |options| options.flag("--prefer", "bytes"))?;
    // The first byte brings a link and not all of the file.
    let mut head = [0; 10];
    let file = fs::File::open(daemon.root().join("file"))?;
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut head, 0)?;
    ensure!(head == scene.bytes[..10], "wrong bytes before the fault");
    ensure!(scene.relay.bytes() < SIZE, "all was fetched before the fault");
    let given = scene.relay.links_given();
    scene.relay.expire_links();
    scene.survives(&daemon, 0)?;
    ensure!(scene.relay.links_given() > given, "the dead link was not replaced");
    Ok(())
}

/// 404: the blob is not there, which waiting does not change. EIO at once.
#[test]
fn not_found() -> Result<()> {
    needs!();
    let scene = OneFile::set(103, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set(Rule::Refuse(404));
    scene.fails_then_recovers(&daemon, SLACK)
}

/// 429 with `Retry-After`: the same bytes are not asked for before that time is over; then the read
/// ends well.
#[test]
fn too_many_requests() -> Result<()> {
    needs!();
    let scene = OneFile::set(104, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set_for(1, Rule::RetryLater(429, 2));
    scene.survives(&daemon, 0)?;
    let asked: Vec<_> = scene.relay.fetches().into_iter().zip(scene.relay.arrivals()).collect();
    let Some(((refused, at), later)) = asked.split_first() else { bail!("nothing was asked for") };
    let (first, last) = refused.range.context("the first request has no range")?;
    for (fetch, again) in later {
        let same = fetch.range.is_some_and(|(start, end)| start <= last && first <= end);
        ensure!(!same || *again - *at >= Duration::from_secs(2), "asked again too early: {asked:#?}");
    }
    Ok(())
}

/// 500 three times: asked again, right bytes, none of them twice.
#[test]
fn internal_server_error() -> Result<()> {
    needs!();
    let scene = OneFile::set(105, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set_for(3, Rule::Refuse(500));
    scene.survives(&daemon, 0)
}

/// 503 for as long as the reader waits: EIO at its deadline, no bytes spent.
#[test]
fn service_unavailable() -> Result<()> {
    needs!();
    let scene = OneFile::set(106, Relay::start)?;
    let daemon = scene.daemon(SHORT)?;
    scene.relay.set(Rule::Refuse(503));
    scene.fails_then_recovers(&daemon, SLACK)
}

/// Reset in the middle of two bodies: what has come is kept, and the rest is asked for.
#[test]
fn reset_in_the_middle_of_a_body() -> Result<()> {
    needs!();
    let scene = OneFile::set(107, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set_for(2, Rule::ResetAfter(10_000));
    // A reset may take bytes with it that the relay has counted.
    scene.survives(&daemon, 20_000)
}

/// A body that ends before its `Content-Length`, twice: as a reset.
#[test]
fn truncated_body() -> Result<()> {
    needs!();
    let scene = OneFile::set(108, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set_for(2, Rule::CutAfter(10_000));
    scene.survives(&daemon, 20_000)
}

/// A body that stops in the middle, once: given up after the request's own timeout of silence, or
/// overtaken by a second request; the read ends well before its deadline.
#[test]
fn stalled_body() -> Result<()> {
    needs!();
    let scene = OneFile::set(109, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set_for(1, Rule::StallAfter(10_000));
    scene.survives(&daemon, SIZE)
}

/// Bodies that all stop in the middle: EIO at the deadline. That is above the silence of 5 seconds
/// after which a request is given up, so that the next reader does not wait for one of the dead.
#[test]
fn every_body_stalled() -> Result<()> {
    needs!();
    let scene = OneFile::set(110, Relay::start)?;
    let daemon = scene.daemon("8")?;
    scene.relay.set(Rule::StallAfter(10_000));
    scene.fails_then_recovers(&daemon, SIZE)
}

/// A `Content-Range` that is not what was asked for: not one byte of that answer is believed. EIO.
#[test]
fn wrong_content_range() -> Result<()> {
    needs!();
    let scene = OneFile::set(111, Relay::start)?;
    let daemon = scene.daemon(SHORT)?;
    scene.relay.set(Rule::ShiftContentRange);
    scene.fails_then_recovers(&daemon, 8 * SIZE)
}

/// `Range` ignored: the blob is read once from front to end. Other requests that were on their way
/// when that showed are given up: the blob is larger than what buffers may swallow of those.
#[test]
fn range_ignored() -> Result<()> {
    needs!();
    let scene = OneFile::of_size(112, 24 << 20, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set(Rule::IgnoreRange);
    scene.survives(&daemon, scene.bytes.len() as u64 / 2)
}

/// Wrong bytes once: the digest tells, the chunk is fetched again, the reader notices nothing.
#[test]
fn wrong_bytes_once() -> Result<()> {
    needs!();
    let scene = OneFile::set(113, Relay::start)?;
    let daemon = scene.daemon(LONG)?;
    scene.relay.set_for(1, Rule::FlipFirstBit);
    scene.survives(&daemon, SIZE)
}

/// Wrong bytes always: EIO, a log line, and not the same wrong bytes over and over.
#[test]
fn wrong_bytes_always() -> Result<()> {
    needs!();
    let scene = OneFile::set(114, Relay::start)?;
    let daemon = scene.daemon(SHORT)?;
    scene.relay.set(Rule::FlipFirstBit);
    scene.fails_then_recovers(&daemon, 8 * SIZE)
}

/// A token that dies in mid-run: another is asked for within the read, and no byte comes twice.
#[test]
fn token_expired() -> Result<()> {
    needs!();
    let bearer = Bearer { credentials: None };
    let scene = OneFile::set(115, |upstream| Relay::with_tokens(upstream, bearer))?;
    let daemon = scene.daemon(LONG)?;
    let given = scene.relay.tokens_given();
    scene.relay.expire_tokens();
    scene.survives(&daemon, 0)?;
    ensure!(scene.relay.tokens_given() > given, "the dead token was not replaced");
    Ok(())
}

/// The host that blobs are redirected to stops resolving: EIO at the deadline, and the log names
/// the host; back again, all reads well.
#[test]
fn name_not_resolved() -> Result<()> {
    needs!();
    let scene = OneFile::set(116, Relay::with_links)?;
    let daemon = scene.daemon(SHORT)?;
    scene.relay.expire_links();
    scene.relay.set(Rule::LoseHost);
    scene.fails_then_recovers(&daemon, SLACK)?;
    ensure!(daemon.log().contains("gone.invalid"), "the log does not name the host:\n{}", daemon.log());
    Ok(())
}

/// Heads that come byte by byte: not silence, and yet no answer. EIO at the deadline.
#[test]
fn dripping_heads() -> Result<()> {
    needs!();
    let scene = OneFile::set(117, Relay::start)?;
    let daemon = scene.daemon(SHORT)?;
    scene.relay.set(Rule::Drip);
    // The relay takes bytes from the registry that it never hands on.
    scene.fails_then_recovers(&daemon, 8 * SIZE)
}

/// A mirror that answers 503, and then nothing at all: the registry serves, within the read; nothing of
/// it before. The bytes of a file are fetched once.
#[test]
fn mirror_down() -> Result<()> {
    needs!();
    let files: Vec<(&str, Vec<u8>)> = ["up", "failing", "gone"]
        .into_iter()
        .zip([1, 2, 3])
        .map(|(name, seed)| (name, noise(seed, 200_000)))
        .collect();
    let mut entries = vec![Entry::dir("./")];
    entries.extend(files.iter().map(|(name, bytes)| Entry::file(*name, bytes.as_slice())));
    let image = Image::new(vec![entries]);
    let flags = ["--chunk-size", "0x10000"];
    let scene = Scene::set(&image, &flags)?;
    let mirror = Relay::start(scene.registry.address())?;
    let (bootstrap, config) = (scene.journey.path("image.boot"), scene.journey.path("config.json"));
    let nydus = scene.journey.convert("nydus", &flags)?;
    nydus.save_bootstrap(&bootstrap)?;
    let text = serde_json::json!({
        "version": 2,
        "backend": { "type": "registry", "registry": {
            "scheme": "http", "host": scene.relay.address().to_string(), "repo": "scene",
            "mirrors": [{ "host": format!("http://{}", mirror.address()) }],
        } },
        "cache": { "type": "filecache", "filecache": { "work_dir": scene.cache() } },
        "rafs": { "batch_size": 0, "read_timeout": 20 },
    });
    fs::write(&config, text.to_string())?;
    let daemon = DaemonOptions::bootstrap(&bootstrap, &config).start()?;
    let read = |place: usize| {
        let (name, expected) = files[place].clone();
        let path = daemon.root().join(name);
        let found = within(HANGS, "a read", move || Ok(fs::read(path)?))?;
        ensure!(found == expected, "{name}: wrong bytes");
        Ok(())
    };
    read(0)?;
    ensure!(scene.relay.bytes() == 0, "the registry was asked although the mirror answers");
    mirror.set(Rule::Refuse(503));
    read(1)?;
    drop(mirror);
    read(2)?;
    let (got, most) = (scene.relay.bytes(), 400_000 + SLACK);
    ensure!((400_000..=most).contains(&got), "{got} bytes from the registry, want at most {most}");
    Ok(())
}
