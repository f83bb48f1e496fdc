//! What clients rely on, a row each: command lines with their exit code and what they say.

use tests::image::{sha256_hex, tar_bytes};
use tests::{Result, ensure};

use super::client::{Input, Place, lower};

/// What a stream must hold.
enum Said {
    Anything,
    Nothing,
    /// All of these.
    Words(&'static [&'static str]),
    /// One JSON document and not a byte more.
    Json,
}
use Said::{Anything, Json, Nothing, Words};

/// A command line, what it finds on stdin, its exit code, stdout and stderr.
type Row = (&'static str, Input, i32, Said, Said);

const CACHE: &str = "cannot be used with '--blob-cache-dir <blob-cache-dir>'";

const ROWS: &[Row] = &[
    // Streams, codes, global flags on either side of the command.
    ("", Input::Closed, 0, Words(&["Usage:", "create", "merge", "unpack"]), Nothing),
    (
        "--version",
        Input::Closed,
        0,
        Words(&["Version:", "Git Commit:", "Build Time:", "Profile:", "Rustc:"]),
        Nothing,
    ),
    ("help", Input::Closed, 0, Words(&["create", "inspect"]), Nothing),
    ("check boot --log-level error", Input::Closed, 0, Words(&["RAFS v6"]), Nothing),
    ("--log-level error check boot", Input::Closed, 0, Words(&["RAFS v6"]), Nothing),
    ("check -l trace -B boot -v", Input::Closed, 0, Words(&["/sub/b"]), Anything),
    ("check -l whatever boot", Input::Closed, 2, Nothing, Words(&["--log-level"])),
    ("check boot --log-file log", Input::Closed, 0, Words(&["RAFS v6"]), Nothing),
    ("create -l info -B new -D blobs src", Input::Closed, 0, Nothing, Words(&["] INFO ", "built"])),
    ("check nowhere", Input::Closed, 1, Nothing, Words(&["Error: ", "nowhere"])),
    ("check layer.tar", Input::Closed, 1, Nothing, Words(&["layer.tar"])),
    ("nonsense", Input::Closed, 2, Nothing, Words(&["nonsense"])),
    ("create --nonsense -B x -b y src", Input::Closed, 2, Nothing, Words(&["--nonsense"])),
    ("merge -B x boot small", Input::Closed, 2, Nothing, Words(&["Error: ", "chunk size"])),
    // How the converter learns what this is.
    ("create -h", Input::Closed, 0, Words(&["--type", "tar-rafs", "--batch-size", "--encrypt"]), Nothing),
    ("create --help", Input::Closed, 0, Words(&["--type", "tar-rafs", "--batch-size", "--encrypt"]), Nothing),
    // Usage that is quoted.
    (
        "create --blob-dir d --blob-cache-dir c -B x src",
        Input::Closed,
        2,
        Nothing,
        Words(&["argument '--blob-dir <blob-dir>'", CACHE]),
    ),
    (
        "create --blob b --blob-cache-dir c -B x src",
        Input::Closed,
        2,
        Nothing,
        Words(&["argument '--blob <blob>'", CACHE]),
    ),
    (
        "create --blob-inline-meta --blob-cache-dir c src",
        Input::Closed,
        2,
        Nothing,
        Words(&["argument '--blob-inline-meta'", CACHE]),
    ),
    (
        "create --compressor zstd --blob-cache-dir c -B x src",
        Input::Closed,
        2,
        Nothing,
        Words(&["argument '--compressor <compressor>'", CACHE]),
    ),
    (
        "create --blob-cache-dir c --blob b -B x src",
        Input::Closed,
        2,
        Nothing,
        Words(&["argument '--blob-cache-dir <blob-cache-dir>' cannot be used with '--blob <blob>'"]),
    ),
    (
        "create --type tar-tarfs --blob-cache-dir c -B x layer.tar",
        Input::Closed,
        1,
        Nothing,
        Words(&["conversion type `tar-tarfs` conflicts with `--blob-cache-dir`"]),
    ),
    (
        "create --type estargztoc-ref --blob-id a --blob-cache-dir c -B x layer.tar",
        Input::Closed,
        1,
        Nothing,
        Words(&["conversion type `estargztoc-ref` conflicts with `--blob-cache-dir`"]),
    ),
    (
        "create --type estargz-rafs --blob-cache-dir c -B x layer.tar",
        Input::Closed,
        1,
        Nothing,
        Words(&["conversion type `estargz-rafs` conflicts with `--blob-cache-dir`"]),
    ),
    (
        "create --type estargz-ref --blob-cache-dir c -B x layer.tar",
        Input::Closed,
        1,
        Nothing,
        Words(&["conversion type `estargz-ref` conflicts with `--blob-cache-dir`"]),
    ),
    ("create src", Input::Closed, 2, Nothing, Words(&["--bootstrap"])),
    ("create -B x --blob-inline-meta -b y src", Input::Closed, 2, Nothing, Words(&["cannot be used with"])),
    (
        "create --blob-inline-meta --blob-id a -b y src",
        Input::Closed,
        2,
        Nothing,
        Words(&["cannot be used with"]),
    ),
    ("create", Input::Closed, 2, Nothing, Words(&["SOURCE"])),
    // Limits of values.
    ("create -l warn --chunk-size 0x1000 -B new -b y src", Input::Closed, 0, Nothing, Nothing),
    ("create -l warn --chunk-size 16777216 -B new -b y src", Input::Closed, 0, Nothing, Nothing),
    (
        "create --chunk-size 0x800 -B x -b y src",
        Input::Closed,
        1,
        Nothing,
        Words(&["--chunk-size", "power of two"]),
    ),
    ("create --chunk-size 0x2000000 -B x -b y src", Input::Closed, 1, Nothing, Words(&["--chunk-size"])),
    ("create --chunk-size 12288 -B x -b y src", Input::Closed, 1, Nothing, Words(&["power of two"])),
    ("create --batch-size 12288 -B x -b y src", Input::Closed, 1, Nothing, Words(&["--batch-size"])),
    ("create -v 4 -B x -b y src", Input::Closed, 2, Nothing, Words(&["--fs-version"])),
    ("create -v 5 --features blob-toc -B x -b y src", Input::Closed, 1, Nothing, Words(&["blob-toc"])),
    ("create --compressor gzip -B x -b y src", Input::Closed, 2, Nothing, Words(&["--compressor"])),
    (
        "create --type targz-ref --blob-id a -B x -D d layer.tar",
        Input::Closed,
        1,
        Nothing,
        Words(&["`--blob-id`"]),
    ),
    (
        "create --type targz-ref --encrypt -B x -D d layer.tar",
        Input::Closed,
        1,
        Nothing,
        Words(&["`--encrypt`"]),
    ),
    (
        "create --type targz-ref --prefetch-policy blob -B x -D d layer.tar",
        Input::Closed,
        1,
        Nothing,
        Words(&["`--prefetch-policy blob`"]),
    ),
    ("create --type tar-tarfs -b y -B x layer.tar", Input::Closed, 1, Nothing, Words(&["`--blob`"])),
    ("create --type estargztoc-ref -B x layer.tar", Input::Closed, 1, Nothing, Words(&["estargztoc-ref"])),
    // A full disk: nothing is left.
    ("create -l warn -B x -b /dev/full src", Input::Closed, 1, Nothing, Words(&["Error: ", "/dev/full"])),
    (
        "create -l warn -B /dev/full -b /dev/null src",
        Input::Closed,
        1,
        Nothing,
        Words(&["Error: ", "/dev/full"]),
    ),
    ("merge -l warn -B /dev/full boot", Input::Closed, 1, Nothing, Words(&["Error: ", "/dev/full"])),
    (
        "unpack -l warn -B boot -D blobs -o /dev/full",
        Input::Closed,
        1,
        Nothing,
        Words(&["Error: ", "/dev/full"]),
    ),
    // Spellings that clients use.
    ("create -l warn -t directory -B new --blob y src", Input::Closed, 0, Nothing, Nothing),
    (
        "create -l warn --source-type directory --inline-bootstrap --blob y src",
        Input::Closed,
        0,
        Nothing,
        Nothing,
    ),
    ("create -l warn -B new -b y --repeatable --disable-check src", Input::Closed, 0, Nothing, Nothing),
    ("create -l warn -v 5 --aligned-chunk -B new -b y src", Input::Closed, 0, Nothing, Nothing),
    // Standard input is read for a policy, and not without.
    ("create -l warn -B new -b y src", Input::Silent, 0, Nothing, Nothing),
    ("create -l warn --prefetch-policy none -B new -b y src", Input::Silent, 0, Nothing, Nothing),
    ("merge -l warn -B new boot", Input::Silent, 0, Nothing, Nothing),
    ("create -l warn --prefetch-policy fs -B new -b y src", Input::Text(""), 0, Nothing, Nothing),
    ("create -l warn --prefetch-policy fs -B new -b y src", Input::Text("/a\n/none\n"), 0, Nothing, Nothing),
    ("create -l warn --prefetch-policy blob -B new -b y src", Input::Text("/sub\n"), 0, Nothing, Nothing),
    (
        "create -l warn --prefetch-policy fs -B new -b y src",
        Input::Text("relative\n"),
        0,
        Nothing,
        Words(&["WARN", "relative"]),
    ),
    // Requests: JSON and nothing else.
    ("inspect boot --request blobs", Input::Closed, 0, Json, Nothing),
    ("inspect boot -R stats", Input::Closed, 0, Json, Nothing),
    ("inspect -B boot -R prefetch", Input::Closed, 0, Json, Nothing),
    ("inspect boot -R ls", Input::Closed, 0, Words(&["sub"]), Nothing),
    ("inspect boot -R whatever", Input::Closed, 1, Anything, Anything),
    // Lists of merge: one value for each source.
    ("merge -B x --blob-sizes 1,2 boot", Input::Closed, 1, Nothing, Words(&["--blob-sizes"])),
    ("merge -B x --blob-digests a,b boot", Input::Closed, 1, Nothing, Words(&["--blob-digests"])),
    ("merge -B x --blob-toc-sizes 1,2 boot", Input::Closed, 1, Nothing, Words(&["--blob-toc-sizes"])),
    ("merge -B x --blob-toc-digests a,b boot", Input::Closed, 1, Nothing, Words(&["--blob-toc-digests"])),
    ("merge -B x --original-blob-ids a,b boot", Input::Closed, 1, Nothing, Words(&["--original-blob-ids"])),
    ("merge -B x", Input::Closed, 2, Nothing, Words(&["SOURCE"])),
    ("export -B boot --localfs-dir d", Input::Closed, 2, Nothing, Words(&["--block"])),
];

#[test]
fn command_lines_say_and_do_what_clients_expect() -> Result<()> {
    let place = Place::new()?;
    place.quiet("create -l warn -B boot -D blobs src", Input::Closed)?;
    place.quiet("create -l warn -B small -D blobs --chunk-size 0x1000 src", Input::Closed)?;
    let kept = place.names("")?;
    for (line, input, code, stdout, stderr) in ROWS {
        let words: Vec<_> = line.split_whitespace().collect();
        let finished = place.call(&words, *input)?;
        ensure!(finished.code == Some(*code), "{line}: {finished:?}");
        for (said, text) in [(stdout, &finished.stdout), (stderr, &finished.stderr)] {
            let fits = match said {
                Anything => true,
                Nothing => text.is_empty(),
                Words(words) => words.iter().all(|word| text.contains(word)),
                Json => serde_json::from_str::<serde_json::Value>(text).is_ok() && !text.ends_with('\n'),
            };
            ensure!(fits, "{line}: {finished:?}");
        }
        for name in place.names("")?.iter().filter(|name| !kept.contains(name)) {
            let expected = match *code {
                0 => ["new", "y", "log"].contains(&name.as_str()),
                _ => false,
            };
            ensure!(expected, "{line}: {name} is left");
            std::fs::remove_file(place.path(name))?;
        }
    }
    // As one word, which a line can not hold.
    let glued = place.call(&["inspect", "-R blobs", "boot"], Input::Closed)?;
    let blobs: serde_json::Value = serde_json::from_str(&glued.stdout)?;
    ensure!(glued.code == Some(0) && glued.stderr.is_empty(), "{glued:?}");
    let row = &blobs[0];
    for member in ["compressed_size", "decompressed_size", "readahead_offset", "readahead_size"] {
        ensure!(row[member].is_u64(), "{member}: {row}");
    }
    let stored = place.names("blobs")?;
    ensure!(stored.iter().any(|name| row["blob_id"] == **name), "{row} is none of {stored:?}");
    Ok(())
}

/// The summary in JSON: who reads what of it.
#[test]
fn summaries_have_what_clients_read() -> Result<()> {
    let place = Place::new()?;
    for (version, compressor) in [("5", "lz4_block"), ("6", "zstd"), ("6", "none")] {
        place.quiet(
            &format!("create -l warn -v {version} --compressor {compressor} -B boot -D blobs -J made src"),
            Input::Closed,
        )?;
        place.quiet("check -l warn --bootstrap boot --output-json checked", Input::Closed)?;
        place.quiet("merge -l warn -B merged -J merged.json boot", Input::Closed)?;
        for name in ["made", "checked", "merged.json"] {
            let json = place.json(name)?;
            ensure!(json["fs_version"] == version && json["compressor"] == compressor, "{name}: {json}");
            let id = json["blobs"][0].as_str().unwrap_or_default();
            ensure!(sha256_hex(&place.read(&format!("blobs/{id}"))?) == id, "{name}: {json}");
            ensure!(json["version"].is_string() && json["bootstrap"].is_string(), "{name}: {json}");
            ensure!(json["external_bootstrap"] == "" && json["external_blobs"].is_array(), "{name}: {json}");
            ensure!(json["trace"]["consumed_time"].is_object(), "{name}: {json}");
            ensure!(json["trace"]["registered_events"].is_object(), "{name}: {json}");
        }
        ensure!(place.json("made")?["bootstrap"] == "boot", "the path is another");
    }
    Ok(())
}

/// What is stored where without `--blob`, and what is not stored.
#[test]
fn blob_directories_hold_files_named_by_their_digest() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new()?;
    // The bootstrap, too, if it has no place of its own.
    place.quiet("create -l warn -D both -J j src", Input::Closed)?;
    let names = place.names("both")?;
    ensure!(names.len() == 2, "{names:?}");
    for name in &names {
        ensure!(sha256_hex(&place.read(&format!("both/{name}"))?) == *name, "{name}");
        ensure!(place.json("j")?.to_string().contains(name), "{name} is not in the summary");
    }
    let blob = place.json("j")?["blobs"][0].as_str().unwrap_or_default().to_owned();
    let mode = std::fs::metadata(place.path(&format!("both/{blob}")))?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "mode {mode:o}");
    // Of a reference the recorded id is the source's digest, the file's name its own.
    place.quiet("create -l warn -t targz-ref -B ref -D refs -J ref.json layer.tar", Input::Closed)?;
    let source = sha256_hex(&tar_bytes(&lower())?);
    ensure!(place.json("ref.json")?["blobs"] == serde_json::json!([source]), "another id");
    let [meta] = &place.names("refs")?[..] else { tests::bail!("not one file") };
    ensure!(sha256_hex(&place.read(&format!("refs/{meta}"))?) == *meta && *meta != source, "{meta}");
    // Nothing to store: no file.
    std::fs::create_dir(place.path("nothing"))?;
    std::fs::write(place.path("old"), "old")?;
    place.quiet("create -l warn -B boot -b old -J none.json nothing", Input::Closed)?;
    ensure!(!place.path("old").exists(), "a blob of nothing");
    ensure!(place.json("none.json")?["blobs"] == serde_json::json!([]), "blobs of nothing");
    Ok(())
}

/// A blob that its caller puts into a larger file is read there.
#[test]
fn a_blob_may_lie_inside_a_file() -> Result<()> {
    let place = Place::new()?;
    for flags in ["", "-v 5", "--batch-size 0x4000", "--features blob-toc", "--encrypt"] {
        let line = format!("create {flags} --blob-offset 0x1234 -B boot -b blob src");
        let said = place.call(&line.split_whitespace().collect::<Vec<_>>(), Input::Closed)?;
        let size = place.read("blob")?.len();
        ensure!(said.stderr.contains(&format!("({size} bytes)")), "{flags}: {said:?}");
        let file = [vec![0xee; 0x1234], place.read("blob")?].concat();
        std::fs::write(place.path("file"), file)?;
        let said = place.quiet("check -l error boot --blob file --source src", Input::Closed)?.stdout;
        ensure!(said.contains("0 faults"), "{flags}: {said}");
    }
    Ok(())
}
