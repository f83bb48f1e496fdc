use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::*;
use crate::backend::fault_server::{FaultServer, Reply};
use crate::digest::DigestAlgorithm;
use crate::oci::client::RegistryOptions;
use crate::oci::token::Login;

const OURS: &str = "application/vnd.example.ours";

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", DigestAlgorithm::Sha256.digest(bytes))
}

/// What a registry holds, by path below `/v2/a/b/`.
type Pages = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

async fn registry(pages: &Pages) -> FaultServer {
    let pages = Arc::clone(pages);
    FaultServer::start(move |asked| {
        let path = asked.path.split('?').next().unwrap_or_default();
        let name = path.strip_prefix("/v2/a/b/").unwrap_or_default();
        match pages.lock().unwrap().get(name) {
            Some(page) if name.starts_with("blobs/") => Reply::ranged(asked, page),
            Some(page) => Reply::new(200, page.clone()),
            None => Reply::new(404, ""),
        }
    })
    .await
}

fn subject(server: &FaultServer) -> Subject {
    let options = RegistryOptions {
        login: Login::Fixed(crate::oci::auth::Credentials::from_base64("").unwrap()),
        ..RegistryOptions::default()
    };
    let client = RegistryClient::new(server.host(), options).unwrap();
    let reference: Reference = format!("{}/a/b:t", server.host()).parse().unwrap();
    let manifest = Document::new(Bytes::from_static(b"the image"), OCI_MANIFEST, None).unwrap();
    Subject::new(client, &reference, &manifest)
}

/// Stores an artifact with the document `text`; answers its descriptor.
fn artifact(pages: &Pages, kind: &str, of: &str, text: &str, created: &str) -> Value {
    let manifest = json!({
        "artifactType": kind,
        "subject": { "digest": of },
        "layers": [{ "digest": digest(text.as_bytes()), "size": text.len() }],
    });
    let manifest = manifest.to_string().into_bytes();
    let name = digest(&manifest);
    let mut pages = pages.lock().unwrap();
    pages.insert(format!("blobs/{}", digest(text.as_bytes())), text.as_bytes().to_vec());
    pages.insert(format!("manifests/{name}"), manifest);
    json!({ "digest": name, "artifactType": kind, "annotations": { CREATED: created } })
}

fn index(manifests: &[&Value]) -> Vec<u8> {
    json!({ "schemaVersion": 2, "manifests": manifests }).to_string().into_bytes()
}

/// The newest one of the type counts, listed by the API or under the tag.
#[tokio::test]
async fn the_newest_document_is_found_either_way() {
    let image = digest(b"the image");
    let places = [format!("referrers/{image}"), format!("manifests/{}", image.replace(':', "-"))];
    for place in places {
        let pages = Pages::default();
        let server = registry(&pages).await;
        let subject = subject(&server);
        let context = ReadContext::on_demand(None);
        assert_eq!(subject.fetch(OURS, 100, &context).await.unwrap(), None);
        let old = artifact(&pages, OURS, &image, "old", "2026-01-01T00:00:00Z");
        let new = artifact(&pages, OURS, &image, "new", "2026-01-02T00:00:00Z");
        let other = artifact(&pages, "application/vnd.example.other", &image, "other", "2027");
        let list = index(&[&new, &other, &old, &json!({}), &json!(7)]);
        pages.lock().unwrap().insert(place, list);
        assert_eq!(subject.fetch(OURS, 100, &context).await.unwrap().unwrap(), b"new");
        assert_eq!(subject.fetch(OURS, 2, &context).await.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn what_does_not_fit_is_refused() {
    let image = digest(b"the image");
    let pages = Pages::default();
    let server = registry(&pages).await;
    let subject = subject(&server);
    let context = ReadContext::on_demand(None);
    let set = |list: Vec<u8>| pages.lock().unwrap().insert(format!("referrers/{image}"), list);

    let foreign = artifact(&pages, OURS, &digest(b"another image"), "x", "");
    let mut disguised = artifact(&pages, "application/vnd.example.other", &image, "x", "");
    disguised["artifactType"] = OURS.into();
    let damaged = artifact(&pages, OURS, &image, "right", "");
    pages.lock().unwrap().insert(format!("blobs/{}", digest(b"right")), b"wrong".to_vec());
    let forged = artifact(&pages, OURS, &image, "y", "1");
    let name = forged["digest"].as_str().unwrap().to_owned();
    pages.lock().unwrap().insert(format!("manifests/{name}"), b"{}".to_vec());
    for bad in [&foreign, &disguised, &damaged, &forged, &json!({ "digest": "no", "artifactType": OURS })] {
        set(index(&[bad]));
        let error = subject.fetch(OURS, 100, &context).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid), "{bad}: {error}");
    }
    for bad in [&b"7"[..], b"{", b"{\"manifests\":7}"] {
        set(bad.to_vec());
        assert_eq!(subject.fetch(OURS, 100, &context).await.unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
