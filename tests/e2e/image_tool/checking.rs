//! `check` with the data of an image, wherever a command line says that it is.

use std::fs;

use serde_json::json;
use tests::{Context, Result, ensure};

use super::client::{Input, Place};

/// An image of several chunks, and all ways to say where its blob is.
fn places(place: &Place, version: &str) -> Result<(String, Vec<String>)> {
    place.quiet(
        &format!(
            "create -l warn -v {version} --compressor none --chunk-size 0x1000 -B boot -D blobs -J j src"
        ),
        Input::Closed,
    )?;
    let id = place.json("j")?["blobs"][0].as_str().context("no blob")?.to_owned();
    let dir = place.path("blobs");
    let backend = json!({ "type": "localfs", "config": { "dir": dir } });
    fs::write(place.path("v1.json"), json!({ "device": { "backend": backend } }).to_string())?;
    let v2 = format!("version = 2\n[backend]\ntype = \"localfs\"\n[backend.localfs]\ndir = {dir:?}\n");
    fs::write(place.path("v2.toml"), v2)?;
    let entry = json!({ "type": "bootstrap", "config": { "backend_type": "localfs", "backend_config": { "dir": dir } } });
    fs::write(place.path("entry.json"), entry.to_string())?;
    fs::write(place.path("fields.json"), json!({ "dir": dir }).to_string())?;
    Ok((
        format!("blobs/{id}"),
        vec![
            "-D blobs".to_owned(),
            format!("--blob blobs/{id}"),
            "-C v1.json".to_owned(),
            "-C v2.toml".to_owned(),
            "-C entry.json".to_owned(),
            "--backend-type localfs --backend-config-file fields.json".to_owned(),
        ],
    ))
}

#[test]
fn every_chunk_is_checked_wherever_it_is() -> Result<()> {
    for version in ["5", "6"] {
        let place = Place::new()?;
        let (blob, places) = places(&place, version)?;
        let whole = place.read(&blob)?;
        for at in &places {
            let said = place.quiet(&format!("check -l error boot {at}"), Input::Closed)?.stdout;
            ensure!(said.contains("chunks match their digests, 0 faults"), "{at}: {said}");
            let fails = |says: &[&str]| -> Result<()> {
                let words = format!("check -l error boot {at}");
                let finished = place.call(&words.split_whitespace().collect::<Vec<_>>(), Input::Closed)?;
                ensure!(finished.code == Some(1), "{at}: {finished:?}");
                ensure!(
                    says.iter().all(|says| finished.stderr.contains(says)),
                    "{at}, {says:?}: {finished:?}"
                );
                Ok(())
            };
            // Both, not the first alone.
            let mut damaged = whole.clone();
            damaged[1] ^= 1;
            damaged[5000] ^= 1;
            fs::write(place.path(&blob), &damaged)?;
            fails(&["chunk 0", "chunk 1"])?;
            // In v6 the context is at the end.
            fs::write(place.path(&blob), &whole[..whole.len() * 9 / 10])?;
            fails(if version == "5" { &["chunk", "not there"] } else { &["context"] })?;
            fs::remove_file(place.path(&blob))?;
            fails(&["Error: ", &blob["blobs/".len()..][..16]])?;
            // A context that is another, although no chunk needs it.
            if version == "6" {
                let mut other = whole.clone();
                let at = other.len() - 4096 - 3;
                other[at] ^= 1;
                fs::write(place.path(&blob), &other)?;
                fails(&["context"])?;
            }
            fs::write(place.path(&blob), &whole)?;
        }
    }
    Ok(())
}

#[test]
fn configurations_that_say_nothing_are_refused() -> Result<()> {
    let place = Place::new()?;
    places(&place, "6")?;
    for (text, says) in [
        ("", "is required"),
        ("{", "neither JSON"),
        (r#"{"device":{"backend":{"type":"localfs"}}}"#, "`config`"),
        (r#"{"device":{"backend":{"type":"what","config":{}}}}"#, "what"),
        (r#"{"backend":{"localfs":{"dir":"/"}}}"#, "`type`"),
        (r#"{"device":{"backend":{"type":"localfs","config":{}}}}"#, "blob_file"),
    ] {
        fs::write(place.path("c"), text)?;
        let finished = place.call(&["check", "-l", "error", "boot", "-C", "c"], Input::Closed)?;
        ensure!(finished.code == Some(1) && finished.stderr.contains(says), "{text}: {finished:?}");
    }
    let both = place.call(&["check", "boot", "-C", "v1.json", "-D", "blobs"], Input::Closed)?;
    ensure!(both.code == Some(2), "{both:?}");
    // A question about the bootstrap needs none, and takes it.
    place.quiet("inspect boot -C v1.json -R stats", Input::Closed)?;
    Ok(())
}
