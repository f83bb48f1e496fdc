use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::oci::client::RegistryOptions;
use crate::oci::layout::REF_NAME;
use crate::oci::manifest::{NYDUS_ARTIFACT_TYPE, OCI_INDEX, OCI_MANIFEST};

/// A layout under construction.
struct Maker {
    dir: tempfile::TempDir,
}

impl Maker {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir }
    }

    fn blob(&self, media_type: &str, bytes: &[u8], extra: &str) -> String {
        let digest = DigestAlgorithm::Sha256.digest(bytes);
        std::fs::write(self.dir.path().join(format!("blobs/sha256/{digest}")), bytes).unwrap();
        format!(r#"{{"mediaType":"{media_type}","digest":"sha256:{digest}","size":{}{extra}}}"#, bytes.len())
    }

    /// A manifest with one blob layer and a bootstrap layer made of `tar`.
    fn manifest(&self, tar: &[u8], diff_id: &str, mark: &str) -> String {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(tar).unwrap();
        let config = format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["sha256:00","{diff_id}"]}}}}"#);
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{},"layers":[{},{}]}}"#,
            self.blob("application/vnd.oci.image.config.v1+json", config.as_bytes(), ""),
            self.blob("application/vnd.oci.image.layer.nydus.blob.v1", b"blob", ""),
            self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gz.finish().unwrap(), mark),
        )
    }

    fn index(&self, entry: &str) {
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{entry}]}}"#);
        std::fs::write(self.dir.path().join("index.json"), text).unwrap();
    }

    async fn fetch(&self) -> Result<NydusImage> {
        let name = format!("oci:{}", self.dir.path().display()).parse().unwrap();
        let image = Image::open(name, RegistryOptions::default())?;
        let options = FetchOptions {
            platform: "linux/amd64".parse().unwrap(),
            bootstrap: self.dir.path().join("out.boot"),
            rewrite: Rewrite::default(),
        };
        NydusImage::fetch(&image, options, &ReadContext::on_demand(None)).await
    }
}

fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o444);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", DigestAlgorithm::Sha256.digest(bytes))
}

const MARK: &str = r#","annotations":{"containerd.io/snapshot/nydus-bootstrap":"true"}"#;

#[tokio::test]
async fn a_bootstrap_is_found_through_an_index_and_verified() {
    let maker = Maker::new();
    let boot = vec![7u8; 300_000];
    let root = format!("blake3:{}", "ab".repeat(32));
    let tar = tar(&[("image/other", b"x"), ("image/image.boot", &boot), ("image/root.json", b"{}")]);
    let mark = format!(r#","annotations":{{"{BOOTSTRAP_ANNOTATION}":"true","{ROOT_ANNOTATION}":"{root}"}}"#);
    let nydus = maker.manifest(&tar, &sha256(&tar), &mark);
    let platform = r#","platform":{"os":"linux","architecture":"amd64"}"#;
    let plain = maker.blob(OCI_MANIFEST, b"{}", platform);
    let nydus = maker.blob(
        OCI_MANIFEST,
        nydus.as_bytes(),
        &format!(r#"{platform},"artifactType":"{NYDUS_ARTIFACT_TYPE}""#),
    );
    let inner = format!(r#"{{"schemaVersion":2,"manifests":[{plain},{nydus}]}}"#);
    let tag = format!(r#","annotations":{{"{REF_NAME}":"t"}}"#);
    maker.index(&maker.blob(OCI_INDEX, inner.as_bytes(), &tag));

    let image = maker.fetch().await.unwrap();
    assert_eq!(std::fs::read(&image.bootstrap).unwrap(), boot);
    assert_eq!(std::fs::metadata(&image.bootstrap).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(image.bootstrap_digest.to_string(), sha256(&boot));
    assert_eq!(image.root_json.as_deref(), Some(&b"{}"[..]));
    assert_eq!(image.root_digest.unwrap().to_string(), root);
    assert_eq!(image.source.kind(), "oci-layout");
    assert_eq!(image.manifest.layers().len(), 2);
}

#[tokio::test]
async fn what_is_wrong_leaves_no_bootstrap() {
    let good = tar(&[("image/image.boot", b"boot")]);
    let cases = [
        ("convert", good.clone(), None, "", ErrorKind::Unsupported),
        ("diff_id", good.clone(), Some(sha256(b"other")), MARK, ErrorKind::Corrupt),
        ("no image/image.boot", tar(&[("image/boot", b"x")]), None, MARK, ErrorKind::Corrupt),
        (
            "twice",
            tar(&[("image/image.boot", b"a"), ("image/image.boot", b"b")]),
            None,
            MARK,
            ErrorKind::Corrupt,
        ),
        ("tar", good[..1000].to_vec(), None, MARK, ErrorKind::Corrupt),
        ("tar", vec![b'x'; 2048], None, MARK, ErrorKind::Corrupt),
        ("root.json", tar(&[("image/root.json", &[0; 70_000])]), None, MARK, ErrorKind::Corrupt),
    ];
    for (word, tar, diff_id, mark, kind) in cases {
        let maker = Maker::new();
        let manifest = maker.manifest(&tar, &diff_id.unwrap_or_else(|| sha256(&tar)), mark);
        maker.index(&maker.blob(OCI_MANIFEST, manifest.as_bytes(), ""));
        let err = maker.fetch().await.unwrap_err();
        assert!(err.kind() == kind && err.to_string().contains(word), "{word}: {:?} {err}", err.kind());
        let left: Vec<_> = std::fs::read_dir(maker.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains("boot"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[tokio::test]
async fn a_changed_layer_is_noticed() {
    let maker = Maker::new();
    let tar = tar(&[("image/image.boot", b"boot")]);
    let manifest = maker.manifest(&tar, &sha256(&tar), MARK);
    maker.index(&maker.blob(OCI_MANIFEST, manifest.as_bytes(), ""));
    let parsed: ImageManifest = serde_json::from_str(&manifest).unwrap();
    let digest = parsed.layers()[1].digest().digest().to_owned();
    let path = maker.dir.path().join("blobs/sha256").join(digest);
    let mut bytes = std::fs::read(&path).unwrap();
    // The gzip header's time: the decoded bytes stay the same.
    bytes[4] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let err = maker.fetch().await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Corrupt);
    assert!(!maker.dir.path().join("out.boot").exists());
}

#[tokio::test]
async fn a_layer_of_impossible_size_is_refused_before_it_is_read() {
    let maker = Maker::new();
    let tar = tar(&[("image/image.boot", b"boot")]);
    let text = maker.manifest(&tar, &sha256(&tar), MARK);
    // Members of a gzip stream may decode to nothing: what is read is bounded as well.
    let (before, size) = text.rsplit_once(r#""size":"#).unwrap();
    let (_, behind) = size.split_once(',').unwrap();
    let text = format!(r#"{before}"size":{},{behind}"#, 1u64 << 40);
    maker.index(&maker.blob(OCI_MANIFEST, text.as_bytes(), ""));
    let err = maker.fetch().await.unwrap_err();
    assert!(err.kind() == ErrorKind::Invalid && err.to_string().contains("accepted"), "{err}");
}
