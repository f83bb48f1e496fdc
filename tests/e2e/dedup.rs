//! Caches that share a dedup database: contract 2.8. The database is opened directly, as other
//! programs do.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};
use storage::digest::DigestAlgorithm;
use tests::daemon::{Daemon, DaemonOptions};
use tests::image::{Entry, Image};
use tests::journey::{Journey, convert};
use tests::recipes::{self, noise, prose};
use tests::registry::Registry;
use tests::relay::Relay;
use tests::tree::{self, Overlook, assert_same};
use tests::{Context, Result, ensure, needs_mounts, needs_programs};

const CHUNK: usize = 1 << 16;

/// Files that hold some chunks more than once; no run of zeros, which takes no chunk.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    let mut ends_as_noise = prose(7, CHUNK);
    ends_as_noise.extend(noise(1, CHUNK));
    vec![
        ("noise", noise(1, 4 * CHUNK + 17)),
        ("again", noise(1, 4 * CHUNK + 17)),
        ("prose", prose(7, CHUNK)),
        ("mixed", ends_as_noise),
        ("small", b"a few bytes\n".to_vec()),
        ("empty", Vec::new()),
    ]
}

/// An image of one layer with [`files`], and one more if that is not empty.
fn image(more: &str) -> Image {
    let mut entries = vec![Entry::dir("./").mode(0o755)];
    entries.extend(files().into_iter().map(|(name, bytes)| Entry::file(name, bytes)));
    if !more.is_empty() {
        entries.insert(2, Entry::file("more", noise(99, 3 * CHUNK)));
        entries.push(Entry::file("word", more));
    }
    Image::new(vec![entries])
}

/// The chunks of [`files`] by digest.
fn chunks() -> BTreeMap<String, Vec<u8>> {
    let files = files();
    let pieces = files.iter().flat_map(|(_, bytes)| bytes.chunks(CHUNK));
    pieces.map(|piece| (DigestAlgorithm::Sha256.digest(piece).to_string(), piece.to_vec())).collect()
}

/// What there is on disk to mount an image of, with a cache of its own.
struct Local {
    journey: Journey,
    bootstrap: PathBuf,
    cache: PathBuf,
}

impl Local {
    fn new(image: &Image) -> Result<Self> {
        let journey = Journey::start(image)?;
        let nydus = journey.convert("nydus", &["--chunk-size", "0x10000"])?;
        let (bootstrap, cache) = (journey.path("image.boot"), journey.path("cache"));
        nydus.save_bootstrap(&bootstrap)?;
        Ok(Self { journey, bootstrap, cache })
    }

    fn config(&self, prefetch: bool) -> Value {
        json!({
            "device": {
                "backend": { "type": "localfs", "config": { "dir": self.journey.path("nydus/blobs/sha256") } },
                "cache": { "type": "blobcache", "config": { "work_dir": self.cache } },
            },
            "mode": "direct",
            "fs_prefetch": { "enable": prefetch, "prefetch_all": true },
        })
    }

    fn mount(&self, daemon: &Daemon, mountpoint: &str) -> Result<()> {
        let command = json!({
            "fs_type": "rafs", "source": self.bootstrap, "config": self.config(false).to_string(),
        });
        call(daemon, "POST", mountpoint, &command)
    }

    /// Reads all files below `root`.
    fn verify(&self, root: &Path) -> Result<()> {
        for (name, bytes) in files() {
            ensure!(fs::read(root.join(name))? == bytes, "{name} has other bytes");
        }
        Ok(())
    }
}

fn call(daemon: &Daemon, method: &str, mountpoint: &str, body: &Value) -> Result<()> {
    let (status, answer) = daemon.request(method, &format!("/api/v1/mount?mountpoint={mountpoint}"), body)?;
    ensure!(status == 204, "{method} {mountpoint}: {status} {answer}");
    Ok(())
}

/// As another program looks: nothing is made, and nobody held up.
fn count(database: &Path, table: &str) -> Result<u64> {
    let sql = format!("SELECT COUNT(*) FROM {table}");
    let connection = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let count: u32 = connection.query_row(&sql, [], |row| row.get(0))?;
    Ok(count.into())
}

fn wait_for_rows(daemon: &Daemon, database: &Path, chunks: u64) -> Result<()> {
    daemon.wait_until("the chunks are in the tables", |_| {
        // There may be no file yet, or no tables.
        Ok(count(database, "Chunks").is_ok_and(|count| count == chunks).then_some(()))
    })
}

/// One row a file and one a chunk, whether it was read or fetched ahead; each leads to its bytes.
#[test]
fn each_chunk_of_an_image_has_one_row() -> Result<()> {
    needs_mounts!();
    for prefetch in [false, true] {
        let local = Local::new(&image(""))?;
        let (database, config) = (local.journey.path("cas.db"), local.journey.path("config.json"));
        fs::write(&config, local.config(prefetch).to_string())?;
        let daemon =
            DaemonOptions::bootstrap(&local.bootstrap, &config).flag("--dedup-db", &database).start()?;
        local.verify(daemon.root())?;
        let mut wanted = chunks();
        wait_for_rows(&daemon, &database, wanted.len() as u64)?;
        ensure!(count(&database, "Blobs")? == 1);
        let connection = Connection::open(&database)?;
        let sql = "SELECT ChunkId, ChunkOffset, FilePath FROM Chunks JOIN Blobs USING (BlobId)";
        let mut statement = connection.prepare(sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (id, offset, path): (String, u32, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let bytes = wanted.remove(&id).with_context(|| format!("{id} is no chunk of the image"))?;
            let mut found = vec![0; bytes.len()];
            File::open(&path)?.read_exact_at(&mut found, offset.into())?;
            ensure!(found == bytes, "{id} is not at {offset} of {path}");
        }
        let mode = fs::metadata(&database)
            .map(|found| std::os::unix::fs::PermissionsExt::mode(&found.permissions()))?;
        ensure!(mode & 0o777 == 0o600, "{mode:o}");
    }
    Ok(())
}

/// Unmounting removes the rows of files that are gone, and no others.
#[test]
fn an_unmount_removes_rows_of_files_that_are_gone() -> Result<()> {
    needs_mounts!();
    let (gone, kept) = (Local::new(&image(""))?, Local::new(&image("kept"))?);
    let database = gone.journey.path("cas.db");
    let daemon = DaemonOptions::empty().flag("--dedup-db", &database).start()?;
    gone.mount(&daemon, "/gone")?;
    gone.verify(&daemon.root().join("gone"))?;
    let own = chunks().len() as u64;
    wait_for_rows(&daemon, &database, own)?;
    fs::remove_dir_all(&gone.cache)?;
    call(&daemon, "DELETE", "/gone", &Value::Null)?;
    ensure!(count(&database, "Blobs")? == 0 && count(&database, "Chunks")? == 0);

    gone.mount(&daemon, "/gone")?;
    kept.mount(&daemon, "/kept")?;
    gone.verify(&daemon.root().join("gone"))?;
    kept.verify(&daemon.root().join("kept"))?;
    // What the other image has beyond that.
    fs::read(daemon.root().join("kept/more"))?;
    fs::read(daemon.root().join("kept/word"))?;
    let all = own + own + 4;
    wait_for_rows(&daemon, &database, all)?;
    call(&daemon, "DELETE", "/kept", &Value::Null)?;
    ensure!(
        count(&database, "Blobs")? == 2 && count(&database, "Chunks")? == all,
        "an unmount removed the rows of what is there"
    );
    fs::remove_dir_all(&gone.cache)?;
    call(&daemon, "DELETE", "/gone", &Value::Null)?;
    ensure!(count(&database, "Blobs")? == 1 && count(&database, "Chunks")? == own + 4);
    Ok(())
}

fn number(document: &Value, key: &str) -> Result<u64> {
    document[key].as_u64().with_context(|| format!("{key}: {document}"))
}

/// Two processes with caches of their own, one database: the second one asks the registry for
/// less, and shows the same bytes; also where its image is another one that shares chunks.
#[test]
fn what_another_daemon_has_is_not_asked_for() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry");
    let journey = Journey::start(&recipes::tiny())?;
    let wanted = journey.reference()?;
    let registry = Registry::open()?;
    let relay = Relay::start(registry.address())?;
    convert(&journey.source.reference(), &registry.reference("equal"), &["--chunk-size", "0x10000"])?;
    let database = journey.path("cas.db");
    let start = |name: &str, cache: &str| {
        DaemonOptions::image(&relay.reference(name), &journey.path(cache))
            .flag("--dedup-db", &database)
            .flag("--trace", "off")
            .start()
    };
    // Both read everything, and are asked when nothing is on its way any more.
    let spent = |daemon: &Daemon| -> Result<(Value, Value)> {
        daemon.wait_until("nothing is fetched", |daemon| {
            let cache = daemon.get("/api/v1/metrics/blobcache")?;
            let quiet = cache["prefetch_workers"] == 0 && cache["buffered_backend_size"] == 0;
            Ok(quiet.then_some((daemon.get("/api/v1/metrics/backend")?, cache)))
        })
    };
    let first = start("equal", "first")?;
    assert_same(&wanted, first.root(), Overlook::default())?;
    let (backend, cache) = spent(&first)?;
    ensure!(number(&cache, "deduplicated_chunks")? == 0, "{cache}");
    let chunks = number(&cache, "entries_count")?;
    wait_for_rows(&first, &database, chunks)?;

    let second = start("equal", "second")?;
    assert_same(&wanted, second.root(), Overlook::default())?;
    let (again, cache) = spent(&second)?;
    ensure!(number(&again, "read_count")? < number(&backend, "read_count")?, "{again} {backend}");
    ensure!(
        number(&again, "read_amount_total")? < number(&backend, "read_amount_total")?,
        "{again} {backend}"
    );
    // A lookup has a limit: on a busy machine some may be fetched all the same.
    let (copied, fetched) = (number(&cache, "deduplicated_chunks")?, number(&cache, "fetched_chunks")?);
    ensure!(again["read_errors"] == 0 && fetched < chunks && copied > 0, "{again} {cache}");
    ensure!(copied + fetched >= chunks && number(&cache, "misses")? > 0, "{cache}");
    wait_for_rows(&second, &database, 2 * chunks)?;
    let text = second.get("/api/v1/metrics/blobcache")?;
    ensure!(text["write_errors"] == 0 && text["read_errors"] == 0, "{text}");
    let (first_tree, second_tree) = (tree::scan(first.root())?, tree::scan(second.root())?);
    ensure!(tree::differences(&first_tree, &second_tree, Overlook::default()).is_empty());

    // Other blobs, in which most files are the same.
    let mut layers = recipes::tiny().layers;
    layers[0].insert(3, Entry::file("etc/inserted", noise(1234, 5 * CHUNK)));
    let other = Journey::start(&Image::new(layers))?;
    let wanted = other.reference()?;
    convert(&other.source.reference(), &registry.reference("other"), &["--chunk-size", "0x10000"])?;
    let third = start("other", "third")?;
    assert_same(&wanted, third.root(), Overlook::default())?;
    let (backend, cache) = spent(&third)?;
    let (copied, fetched) = (number(&cache, "deduplicated_chunks")?, number(&cache, "fetched_chunks")?);
    // What only this image has must be.
    ensure!((5..5 + chunks).contains(&fetched) && backend["read_errors"] == 0, "{cache} {backend}");
    ensure!(copied > 0 && copied + fetched >= 5 + chunks, "{cache}");
    Ok(())
}

/// A file that is no database is warned of once, and everything is served.
#[test]
fn a_broken_database_is_done_without() -> Result<()> {
    needs_mounts!();
    let local = Local::new(&image(""))?;
    let (database, config) = (local.journey.path("cas.db"), local.journey.path("config.json"));
    fs::write(&config, local.config(false).to_string())?;
    fs::write(&database, vec![b'?'; 10_000])?;
    let daemon = DaemonOptions::bootstrap(&local.bootstrap, &config).flag("--dedup-db", &database).start()?;
    local.verify(daemon.root())?;
    daemon.wait_for_log("the dedup database")?;
    ensure!(daemon.log().matches("the dedup database").count() == 1, "{}", daemon.log());
    ensure!(fs::read(&database)? == vec![b'?'; 10_000], "it was written to");
    Ok(())
}
