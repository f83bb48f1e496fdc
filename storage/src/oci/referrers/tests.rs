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
    let long = format!(r#"{{"manifests":[{}7]}}"#, "[],".repeat(90_000)).into_bytes();
    set(long);
    assert_eq!(subject.fetch(OURS, 100, &context).await.unwrap_err().kind(), ErrorKind::Invalid);
    for bad in [&b"7"[..], b"{", b"{\"manifests\":7}"] {
        set(bad.to_vec());
        assert_eq!(subject.fetch(OURS, 100, &context).await.unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

/// One document from the year 2999 hid all that were pushed after it.
#[tokio::test]
async fn times_to_come_make_nothing_newer() {
    let image = digest(b"the image");
    let pages = Pages::default();
    let server = registry(&pages).await;
    let subject = subject(&server);
    let future = artifact(&pages, OURS, &image, "future", "2999-01-01T00:00:00Z");
    let dateless = artifact(&pages, OURS, &image, "dateless", "yesterday");
    let early = artifact(&pages, OURS, &image, "early", "2026-01-01T03:00:00+02:00");
    let late = artifact(&pages, OURS, &image, "late", "2026-01-01T02:00:00Z");
    for (list, newest) in [
        (index(&[&future, &early, &late, &dateless]), &b"late"[..]),
        (index(&[&early, &future]), b"early"),
        (index(&[&future]), b"future"),
    ] {
        pages.lock().unwrap().insert(format!("referrers/{image}"), list);
        let found = subject.fetch(OURS, 100, &ReadContext::on_demand(None)).await.unwrap().unwrap();
        assert_eq!(found, newest, "{}", String::from_utf8_lossy(&found));
    }
}

/// Only the first page of a list was read.
#[tokio::test]
async fn lists_of_several_pages_are_read_and_end() {
    let image = digest(b"the image");
    let pages = Pages::default();
    let old = artifact(&pages, OURS, &image, "old", "2026-01-01T00:00:00Z");
    let new = artifact(&pages, OURS, &image, "new", "2026-01-02T00:00:00Z");
    let stored = Arc::clone(&pages);
    let server = FaultServer::start(move |asked| {
        let name = asked.path.strip_prefix("/v2/a/b/").unwrap_or_default();
        if !name.starts_with("referrers/") {
            return match stored.lock().unwrap().get(name) {
                Some(page) if name.starts_with("blobs/") => Reply::ranged(asked, page),
                Some(page) => Reply::new(200, page.clone()),
                None => Reply::new(404, ""),
            };
        }
        let listed = if name.contains("last=") { &new } else { &old };
        // A list without an end.
        Reply::new(200, index(&[listed])).header("link", "</v2/a/b/referrers/x?last=1&n=1>; rel=\"next\"")
    })
    .await;
    let subject = subject(&server);
    let found = subject.fetch(OURS, 100, &ReadContext::on_demand(None)).await.unwrap().unwrap();
    assert_eq!(found, b"new");
    let asked = server.asked();
    assert_eq!(asked.iter().filter(|asked| asked.path.contains("/referrers/")).count(), MAX_PAGES);

    for (link, next) in [
        ("</v2/x>; rel=\"next\"", Some("/v2/x")),
        ("<a>; rel=prev, <b?c=d>; title=x; rel=next", Some("b?c=d")),
        ("<a>; rel=prev", None),
        ("a; rel=next", None),
        ("", None),
    ] {
        assert_eq!(next_link(link), next, "{link}");
    }
}

/// What a node with a clock that is ahead pushed stayed the newest, and what was superseded stayed for ever.
#[tokio::test]
async fn what_is_pushed_is_the_newest_and_the_only_one() {
    let image = digest(b"the image");
    let pages = Pages::default();
    let ahead = (Utc::now() + TimeDelta::minutes(5)).to_rfc3339();
    let theirs = artifact(&pages, OURS, &image, "theirs", &ahead);
    let foreign = artifact(&pages, "application/vnd.example.other", &image, "other", "2026-01-01T00:00:00Z");
    pages.lock().unwrap().insert(format!("referrers/{image}"), index(&[&theirs, &foreign]));
    let stored = Arc::clone(&pages);
    let server = FaultServer::start(move |asked| {
        let path = asked.path.split('?').next().unwrap_or_default();
        let name = path.strip_prefix("/v2/a/b/").unwrap_or_default();
        let mut pages = stored.lock().unwrap();
        match asked.method.as_str() {
            "POST" => Reply::new(202, "").header("location", "/v2/a/b/upload"),
            "PUT" if name == "upload" => Reply::new(201, ""),
            "PUT" => {
                pages.insert(name.to_owned(), asked.body.to_vec());
                Reply::new(201, "").header("oci-subject", "x")
            }
            "DELETE" => Reply::new(if pages.remove(name).is_some() { 202 } else { 404 }, ""),
            _ => pages.get(name).map_or_else(|| Reply::new(404, ""), |page| Reply::new(200, page.clone())),
        }
    })
    .await;
    let pushed = subject(&server).push(OURS, b"ours".to_vec(), &ReadContext::on_demand(None)).await.unwrap();
    let pages = pages.lock().unwrap();
    let manifest: Value = serde_json::from_slice(&pages[&format!("manifests/{pushed}")]).unwrap();
    let created = |manifest: &Value| {
        DateTime::parse_from_rfc3339(manifest["annotations"][CREATED].as_str().unwrap()).unwrap()
    };
    assert!(created(&manifest) > created(&theirs));
    let kept =
        |listed: &Value| pages.contains_key(&format!("manifests/{}", listed["digest"].as_str().unwrap()));
    assert!(!kept(&theirs) && kept(&foreign));
}

/// Engine threads have stacks of 2 MiB, and a future that is moved about is on them several times.
#[tokio::test]
async fn futures_leave_room_on_the_stack() {
    let server = FaultServer::start(|_| Reply::new(404, "")).await;
    let (subject, context) = (subject(&server), ReadContext::on_demand(None));
    let call = Call::new(Method::GET, subject.client.url("x").unwrap(), Access::pull("x"));
    let sizes = [
        size_of_val(&subject.client.send(call, &context)),
        size_of_val(&subject.fetch("a/b", 1, &context)),
        size_of_val(&subject.push("a/b", Vec::new(), &context)),
    ];
    eprintln!("{sizes:?}");
    assert!(sizes.iter().all(|size| *size <= 32 << 10), "{sizes:?}");
}
