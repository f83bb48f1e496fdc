//! Sources: small layouts written by hand, and archives written by skopeo where it is installed.

use std::fs;
use std::io::Read;
use std::process::Command;

use serde_json::json;

use super::*;
use crate::oci::testing::{Layout, TAR};

fn first_layer(source: &ImageSource) -> String {
    let mut text = String::new();
    source.open_layer(0, |r| r).unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn an_image_is_chosen_by_tag_and_platform() {
    let mut layout = Layout::new();
    let one = layout.image(&[(TAR, b"one")]);
    layout.add(one.clone(), "one");
    assert_eq!(first_layer(&layout.open("", None).unwrap()), "one");

    let mut arm = layout.image(&[(TAR, b"arm")]);
    arm["platform"] = json!({"os": "linux", "architecture": "arm64", "variant": "v8"});
    let mut other = one;
    other["platform"] = json!({"os": "linux", "architecture": "s390x"});
    let index = json!({"schemaVersion": 2, "manifests": [arm, other]});
    let index = layout.blob(media::OCI_INDEX, index.to_string().as_bytes());
    layout.add(index, "many");

    assert_eq!(first_layer(&layout.open(":many", Some("linux/arm64")).unwrap()), "arm");
    for (tag, platform, kind, hint) in [
        ("", None, ErrorKind::Invalid, "one, many"),
        (":none", None, ErrorKind::NotFound, "one, many"),
        (":one", Some("linux/mips"), ErrorKind::NotFound, "the image is for linux/amd64"),
        (":many", Some("linux/mips"), ErrorKind::NotFound, "linux/arm64/v8, linux/s390x"),
    ] {
        let err = layout.open(tag, platform).err().unwrap();
        assert!(err.kind() == kind && err.to_string().contains(hint), "{err}");
    }
}

#[test]
fn what_cannot_be_converted_is_refused_by_name() {
    let mut layout = Layout::new();
    let foreign =
        layout.image(&[(TAR, b"a"), ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", b"b")]);
    layout.add(foreign, "foreign");
    let secret = layout.image(&[("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", b"a")]);
    layout.add(secret, "encrypted");
    let nydus = layout.image(&[(media::NYDUS_BLOB, b"a")]);
    layout.add(nydus, "nydus");
    let odd = layout.image(&[("application/x-thing", b"a")]);
    layout.add(odd, "odd");
    let chart = json!({"schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "layers": [],
        "config": layout.blob("application/vnd.cncf.helm.config.v1+json", b"{}")});
    let chart = layout.blob(media::OCI_MANIFEST, chart.to_string().as_bytes());
    layout.add(chart, "chart");
    let old = layout.blob(media::OCI_MANIFEST, br#"{"schemaVersion":1,"name":"x"}"#);
    layout.add(old, "schema1");
    for (tag, hint) in [
        ("foreign", "layer 2 of 2"),
        ("encrypted", "is encrypted"),
        ("nydus", "already"),
        ("odd", "application/x-thing"),
        ("chart", "artifact"),
        ("schema1", "schema version 2"),
    ] {
        let err = layout.open(&format!(":{tag}"), None).err().unwrap();
        assert!(err.kind() == ErrorKind::Unsupported && err.to_string().contains(hint), "{tag}: {err}");
    }
}

#[test]
fn damaged_metadata_is_noticed() {
    let mut layout = Layout::new();
    let image = layout.image(&[(TAR, b"data")]);
    layout.add(image.clone(), "a");
    let name = image["digest"].as_str().unwrap()[7..].to_owned();
    let path = layout.path().join("blobs/sha256").join(name);
    let good = fs::read(&path).unwrap();
    fs::write(&path, [&good[..], b" "].concat()).unwrap();
    assert_eq!(layout.open("", None).err().unwrap().kind(), ErrorKind::Mismatch);
    fs::write(&path, &good).unwrap();
    layout.open("", None).unwrap();
    for (file, kind) in [("index.json", ErrorKind::Corrupt), ("oci-layout", ErrorKind::Unsupported)] {
        let saved = fs::read(layout.path().join(file)).unwrap();
        fs::write(layout.path().join(file), "[]").unwrap();
        assert!([kind, ErrorKind::Unsupported].contains(&layout.open("", None).err().unwrap().kind()));
        fs::write(layout.path().join(file), saved).unwrap();
    }
    fs::remove_file(layout.path().join("oci-layout")).unwrap();
    assert!(layout.open("", None).err().unwrap().to_string().contains("not an OCI layout"));
}

#[test]
fn archives_by_skopeo_are_read() {
    if Command::new("skopeo").arg("--version").output().is_err() {
        println!("skipped: skopeo is not installed");
        return;
    }
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    tar.append_data(&mut header, "hello", &b"hello"[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let mut layout = Layout::new();
    let image = layout.image(&[(TAR, &tar)]);
    layout.add(image, "t");
    let from = format!("oci:{}:t", layout.path().display());
    for (scheme, tag, again) in [("docker-archive", ":r/x:1", ":r/x:1"), ("oci-archive", ":t", "")] {
        let to = layout.path().join(format!("{scheme}.tar"));
        let done = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", &from, &format!("{scheme}:{}{tag}", to.display())])
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let text = format!("{scheme}:{}{again}", to.display());
        let source = ImageSource::open(&text.parse().unwrap(), None, &RegistryOptions::default()).unwrap();
        let mut bytes = Vec::new();
        source.open_layer(0, |r| r).unwrap().read_to_end(&mut bytes).unwrap();
        assert!(bytes == tar, "{scheme}: layer differs");
    }
    let archive = layout.path().join("docker-archive.tar");
    let wrong = format!("docker-archive:{}:r/y:1", archive.display());
    let err = ImageSource::open(&wrong.parse().unwrap(), None, &RegistryOptions::default()).err().unwrap();
    assert!(err.kind() == ErrorKind::NotFound && err.to_string().contains("r/x:1"), "{err}");
}
