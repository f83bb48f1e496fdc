//! The image converter of containerd, replayed: pack, merge and unpack with its command lines, named
//! pipes on both sides, blobs read from their end.

use std::fs;

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use std::io::Write as _;
use tests::image::{Entry, sha256_hex, tar_bytes};
use tests::plain::{self, Objects};
use tests::{Context, Result, ensure};

use super::client::{Input, Place, joined, lower, merged, upper, word};
use super::stream;

/// A packed layer.
struct Packed {
    digest: String,
    blob: Vec<u8>,
}

/// Packs `tar` as the converter does: the words of `flags` where it puts them.
fn pack(place: &Place, tar: &[u8], line: &str, input: Input) -> Result<Packed> {
    // A pair of pipes for each call, as it makes a directory for each.
    for name in ["tar", "blob"] {
        let _ = fs::remove_file(place.path(name));
    }
    let feeder = place.feed("tar", tar.to_vec())?;
    let drain = place.drain("blob")?;
    let (source, target) = (word(&place.path("tar")), word(&place.path("blob")));
    let line = line.replace("@blob", &target).replace("@tar", &source);
    place.quiet(&line, input)?;
    joined(feeder)?;
    let blob = joined(drain)?;
    Ok(Packed { digest: sha256_hex(&blob), blob })
}

fn pack_tar(
    place: &Place,
    entries: &[Entry],
    version: &str,
    more: &str,
    patterns: &'static str,
) -> Result<Packed> {
    let toc = if version == "6" { "--features blob-toc" } else { "" };
    let line = format!(
        "create --log-level warn --prefetch-policy fs --blob @blob --whiteout-spec none --fs-version {version} \
         --type tar-rafs --blob-inline-meta {toc} {more} @tar"
    );
    pack(place, &tar_bytes(entries)?, &line, Input::Text(patterns))
}

/// Writes the bootstrap out of a layer into a file named by the layer's digest.
fn unpacked_bootstrap(place: &Place, packed: &Packed) -> Result<String> {
    fs::write(place.path(&packed.digest), stream::bootstrap(&packed.blob)?)?;
    Ok(word(&place.path(&packed.digest)))
}

/// Whether the image `bootstrap`, its blobs in `blobs/`, is the tree of `entries`.
fn equals(place: &Place, bootstrap: &str, entries: &[Entry]) -> Result<()> {
    fs::write(place.path("wanted.tar"), tar_bytes(entries)?)?;
    place.quiet(
        &format!("check --log-level error -B {bootstrap} -D blobs --source wanted.tar"),
        Input::Closed,
    )?;
    Ok(())
}

fn keep(place: &Place, packed: &Packed) -> Result<()> {
    fs::create_dir_all(place.path("blobs"))?;
    Ok(fs::write(place.path("blobs").join(&packed.digest), &packed.blob)?)
}

#[test]
fn layers_are_packed_merged_and_unpacked() -> Result<()> {
    let rows = [
        ("6", ""),
        ("6", "--compressor lz4_block"),
        ("6", "--compressor none --chunk-size 0x1000"),
        ("6", "--chunk-size 0x100000 --batch-size 0x10000"),
        ("6", "--encrypt"),
        ("5", ""),
        ("5", "--compressor lz4_block --aligned-chunk"),
    ];
    for (version, more) in rows {
        let place = Place::empty()?;
        whole_way(&place, version, more).with_context(|| format!("version {version} {more}"))?;
    }
    Ok(())
}

fn whole_way(place: &Place, version: &str, more: &str) -> Result<()> {
    let low = pack_tar(place, &lower(), version, more, "/")?;
    let up = pack_tar(place, &upper(), version, more, "/data/prose\n/none\n")?;
    if !more.contains("--encrypt") {
        let again = pack_tar(place, &lower(), version, more, "/")?;
        ensure!(again.digest == low.digest, "another blob of the same layer");
    }
    let names = stream::names(&low.blob)?;
    match version {
        "6" => {
            ensure!(
                names == ["image.blob", "blob.meta", "blob.digest", "image.boot", "rafs.blob.toc"],
                "{names:?}"
            );
            let table: Vec<_> = stream::table(&low.blob)?.into_iter().map(|row| row.name).collect();
            ensure!(
                table == ["image.blob", "blob.meta", "blob.meta.header", "blob.digest", "image.boot"],
                "{table:?}"
            );
            // Those that it extracts are stored in ways that it knows, whatever the compressor.
            if !more.contains("--encrypt") {
                for name in ["blob.meta", "blob.meta.header", "blob.digest"] {
                    stream::extract(&low.blob, name)?;
                }
            }
        }
        _ => ensure!(names == ["image.blob", "image.boot"], "{names:?}"),
    }
    for packed in [&low, &up] {
        unpacked_bootstrap(place, packed)?;
        keep(place, packed)?;
    }
    // Their names become the blobs' ids.
    let sources = format!("{} {}", word(&place.path(&low.digest)), word(&place.path(&up.digest)));
    let line = format!(
        "merge --log-level warn --prefetch-policy fs --output-json out.json --bootstrap image.boot {sources}"
    );
    place.quiet(&line, Input::Text("/"))?;
    let blobs = place.json("out.json")?["blobs"].clone();
    // In the order of the merged tree, where what the upper layer has comes first.
    ensure!(blobs == serde_json::json!([up.digest, low.digest]), "{blobs}");
    equals(place, "image.boot", &merged())?;
    let patterns = place.quiet("inspect image.boot --request prefetch", Input::Closed)?;
    ensure!(patterns.stdout.contains(r#""path":["/"]"#), "{}", patterns.stdout);
    unpack(place, &low, &lower())
}

/// Unpacks one layer: from a file, and from a server behind a socket.
fn unpack(place: &Place, packed: &Packed, wanted: &[Entry]) -> Result<()> {
    let boot = place.path("layer.boot");
    place.quiet(
        &format!("merge --log-level warn --bootstrap layer.boot {}", word(&place.path(&packed.digest))),
        Input::Closed,
    )?;
    fs::write(place.path("layer.blob"), &packed.blob)?;
    let socket = place.path("sock");
    plain::serve_unix(&socket, Objects::from([(format!("/{}", packed.digest), packed.blob.clone())]))?;
    let config = serde_json::json!({ "addr": socket }).to_string();
    for (name, source) in [
        ("from-file", vec!["--blob".to_owned(), word(&place.path("layer.blob"))]),
        (
            "from-server",
            vec!["--backend-type".into(), "http-proxy".into(), "--backend-config".into(), config.clone()],
        ),
    ] {
        let drain = place.drain(name)?;
        let (boot, output) = (word(&boot), word(&place.path(name)));
        let mut words = vec!["unpack", "--log-level", "warn", "--bootstrap", &boot, "--output", &output];
        words.extend(source.iter().map(String::as_str));
        let finished = place.call(&words, Input::Closed)?;
        ensure!(finished.code == Some(0) && finished.stderr.is_empty(), "{name}: {finished:?}");
        let archive = joined(drain)?;
        ensure!(archive.len().is_multiple_of(512) && archive.ends_with(&[0; 1024]), "{name}: no end");
        in_order(&archive)?;
        fs::write(place.path("unpacked.tar"), archive)?;
        fs::write(place.path("wanted.tar"), tar_bytes(wanted)?)?;
        for source in ["unpacked.tar", "wanted.tar"] {
            place.quiet(&format!("check -l error {boot} --source {source}"), Input::Closed)?;
        }
    }
    Ok(())
}

/// Relative names, parents before children, siblings sorted, links behind what they name.
fn in_order(archive: &[u8]) -> Result<()> {
    let mut archive = tar::Archive::new(archive);
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for entry in archive.entries()? {
        let entry = entry?;
        let path = entry.path_bytes().trim_ascii().to_vec();
        let path = path.strip_suffix(b"/").unwrap_or(&path).to_vec();
        let shown = String::from_utf8_lossy(&path).into_owned();
        if path == b"." {
            continue;
        }
        ensure!(!path.starts_with(b"/") && !path.starts_with(b"./"), "{shown}");
        if let Some(slash) = path.iter().rposition(|&byte| byte == b'/') {
            ensure!(seen.iter().any(|earlier| *earlier == path[..slash]), "{shown} precedes its directory");
        }
        if let Some(link) = entry.link_name_bytes().filter(|_| entry.header().entry_type().is_hard_link()) {
            ensure!(seen.iter().any(|earlier| *earlier == *link), "{shown} precedes what it names");
        }
        let parent =
            |path: &[u8]| path.iter().rposition(|&b| b == b'/').map_or(Vec::new(), |at| path[..at].to_vec());
        let before = seen.iter().rfind(|earlier| parent(earlier) == parent(&path));
        ensure!(before.is_none_or(|before| *before < path), "{shown} is out of order");
        seen.push(path);
    }
    ensure!(!seen.is_empty(), "an empty archive");
    Ok(())
}

/// An older converter has no tar mode: a directory, flags by their other names.
#[test]
fn directories_are_packed_as_older_converters_do() -> Result<()> {
    let place = Place::new()?;
    for version in ["5", "6"] {
        let _ = fs::remove_file(place.path("out"));
        let drain = place.drain("out")?;
        let line = format!(
            "create --log-level warn --prefetch-policy fs --blob out --whiteout-spec none --fs-version {version} \
             --source-type directory --inline-bootstrap src"
        );
        place.quiet(&line, Input::Text("/"))?;
        let blob = joined(drain)?;
        let (names, digest) = (stream::names(&blob)?, sha256_hex(&blob));
        let wanted: &[&str] = if version == "6" {
            &["image.blob", "blob.meta", "image.boot"]
        } else {
            &["image.blob", "image.boot"]
        };
        ensure!(names == wanted, "{names:?}");
        let packed = Packed { digest, blob };
        let boot = unpacked_bootstrap(&place, &packed)?;
        keep(&place, &packed)?;
        place.quiet(&format!("merge -l warn -B merged {boot}"), Input::Closed)?;
        place.quiet("check -l error merged -D blobs --source src", Input::Closed)?;
    }
    Ok(())
}

/// A layer that stays as it is: the packed file is metadata, and merging names the original.
#[test]
fn references_are_packed_and_merged() -> Result<()> {
    let gzip = |bytes: &[u8]| -> Result<Vec<u8>> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
        encoder.write_all(bytes)?;
        Ok(encoder.finish()?)
    };
    let tar = tar_bytes(&lower())?;
    for layer in [gzip(&tar)?, tar] {
        let place = Place::empty()?;
        let line = "create --log-level warn --type targz-ref --blob-inline-meta --features blob-toc --blob @blob @tar";
        let packed = pack(&place, &layer, line, Input::Silent)?;
        let names = stream::names(&packed.blob)?;
        ensure!(names == ["blob.meta", "blob.digest", "image.boot", "rafs.blob.toc"], "{names:?}");
        let table: Vec<_> = stream::table(&packed.blob)?.into_iter().map(|row| row.name).collect();
        ensure!(table == ["blob.meta", "blob.meta.header", "blob.digest", "image.boot"], "{table:?}");
        let original = sha256_hex(&layer);
        // The file is named by the original layer, the flag names the metadata.
        let boot = word(&place.path(&original));
        fs::write(&boot, stream::bootstrap(&packed.blob)?)?;
        let line = format!(
            "merge --log-level warn --prefetch-policy fs --output-json out.json --bootstrap image.boot \
             --blob-digests {} {boot}",
            packed.digest
        );
        place.quiet(&line, Input::Text("/"))?;
        ensure!(place.json("out.json")?["blobs"] == serde_json::json!([original]), "another id");
        fs::create_dir(place.path("blobs"))?;
        fs::write(place.path("blobs").join(&original), &layer)?;
        keep(&place, &packed)?;
        equals(&place, "image.boot", &lower())?;
    }
    Ok(())
}

/// A dictionary, a parent, and blobs that nothing uses any more.
#[test]
fn merging_lists_the_blobs_in_use() -> Result<()> {
    for version in ["5", "6"] {
        let place = Place::empty()?;
        let dictionary =
            pack_tar(&place, &[Entry::file("known", tests::recipes::prose(4, 2 << 20))], version, "", "/")?;
        keep(&place, &dictionary)?;
        let boot = unpacked_bootstrap(&place, &dictionary)?;
        place.quiet(
            &format!("merge --log-level warn --output-json d.json --bootstrap dict.boot {boot}"),
            Input::Closed,
        )?;
        ensure!(place.json("d.json")?["blobs"] == serde_json::json!([dictionary.digest]), "no dictionary");
        // Packed twice, it is the same.
        let with = "--chunk-dict bootstrap=dict.boot";
        let low = pack_tar(&place, &lower(), version, with, "/")?;
        ensure!(pack_tar(&place, &lower(), version, with, "/")?.digest == low.digest, "another blob");
        keep(&place, &low)?;
        let lower_boot = unpacked_bootstrap(&place, &low)?;
        let line = format!(
            "merge --log-level warn --prefetch-policy fs --output-json out.json --bootstrap image.boot {with} {lower_boot}"
        );
        place.quiet(&line, Input::Text("/"))?;
        let blobs = place.json("out.json")?["blobs"].clone();
        ensure!(blobs == serde_json::json!([dictionary.digest, low.digest]), "{blobs}");
        equals(&place, "image.boot", &lower())?;

        // Upon a parent; then a layer that hides all of it.
        let up = pack_tar(&place, &upper(), version, "", "/")?;
        keep(&place, &up)?;
        let upper_boot = unpacked_bootstrap(&place, &up)?;
        let line = format!(
            "merge --log-level warn --output-json out.json --bootstrap top.boot --parent-bootstrap image.boot {upper_boot}"
        );
        place.quiet(&line, Input::Closed)?;
        equals(&place, "top.boot", &merged())?;
        let hiding = [Entry::dir("./"), Entry::file(".wh..wh..opq", ""), Entry::file("only", "only\n")];
        let hides = pack_tar(&place, &hiding, version, "", "/")?;
        keep(&place, &hides)?;
        let hiding_boot = unpacked_bootstrap(&place, &hides)?;
        let line = format!(
            "merge --log-level warn --output-json out.json --bootstrap last.boot --parent-bootstrap image.boot \
             {upper_boot} {hiding_boot}"
        );
        place.quiet(&line, Input::Closed)?;
        let blobs = place.json("out.json")?["blobs"].clone();
        ensure!(blobs == serde_json::json!([hides.digest]), "{blobs}");
        equals(&place, "last.boot", &[Entry::dir("./"), Entry::file("only", "only\n")])?;
        // The same source twice is one blob.
        let line = format!("merge -l warn -J out.json -B twice.boot {upper_boot} {upper_boot}");
        place.quiet(&line, Input::Closed)?;
        ensure!(place.json("out.json")?["blobs"] == serde_json::json!([up.digest]), "not one blob");
    }
    Ok(())
}

/// Sizes and tables of content that the caller states stand in the merged image.
#[test]
fn merging_records_what_the_caller_states() -> Result<()> {
    let place = Place::empty()?;
    let packed = pack_tar(&place, &lower(), "6", "", "/")?;
    keep(&place, &packed)?;
    // As its registry holds it.
    let (_, table) = stream::sections(&packed.blob)?.pop().context("no sections")?;
    let toc = &packed.blob[table.start..];
    let toc_digest = sha256_hex(toc);
    fs::write(place.path("layer.boot"), stream::bootstrap(&packed.blob)?)?;
    let line = format!(
        "merge --log-level warn --output-json out.json --bootstrap image.boot --original-blob-ids {} --blob-sizes {} \
         --blob-toc-digests {toc_digest} --blob-toc-sizes {} layer.boot",
        packed.digest,
        packed.blob.len(),
        toc.len()
    );
    place.quiet(&line, Input::Closed)?;
    ensure!(place.json("out.json")?["blobs"] == serde_json::json!([packed.digest]), "another id");
    let blobs = place.quiet("inspect image.boot -R blobs", Input::Closed)?;
    let blobs: serde_json::Value = serde_json::from_str(&blobs.stdout)?;
    ensure!(blobs[0]["compressed_size"] == packed.blob.len(), "{blobs}");
    let image = place.read("image.boot")?;
    let holds = |needle: &[u8]| image.windows(needle.len()).any(|window| window == needle);
    ensure!(holds(&Sha256::digest(toc)), "the table's digest is not recorded");
    equals(&place, "image.boot", &lower())
}
