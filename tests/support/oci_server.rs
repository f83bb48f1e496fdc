//! A registry in memory that has the referrers API (OCI distribution specification 1.1), which
//! Debian's `docker-registry` has not: blobs, manifests, referrers, no logins.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, LOCATION, RANGE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The registry; it ends when dropped.
#[derive(Debug)]
pub struct OciServer {
    address: SocketAddr,
    store: Arc<Mutex<Store>>,
    runtime: Option<Runtime>,
}

#[derive(Debug, Default)]
struct Store {
    blobs: HashMap<String, Bytes>,
    uploads: HashMap<u64, Vec<u8>>,
    /// Media type and bytes, by `REPOSITORY/TAG` and `REPOSITORY/DIGEST`.
    manifests: HashMap<String, (String, Bytes)>,
    /// Descriptors by `REPOSITORY/DIGEST` of their subject.
    referrers: BTreeMap<String, Vec<Value>>,
    /// Method and path of each request.
    asked: Vec<String>,
}

impl OciServer {
    /// Starts on a free loopback port.
    ///
    /// # Errors
    /// There is none.
    pub fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0)))?;
        let address = listener.local_addr()?;
        let store = Arc::<Mutex<Store>>::default();
        let shared = Arc::clone(&store);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let store = Arc::clone(&shared);
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&store), request));
                    // A client that hangs up is its own affair.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok(Self { address, store, runtime: Some(runtime) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `docker://127.0.0.1:PORT/NAME`.
    pub fn reference(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.address)
    }

    /// Puts `document` in the place of the one layer of every artifact that refers to an image.
    ///
    /// # Errors
    /// An artifact is not of that shape.
    pub fn replace_referrer(&self, document: &[u8]) -> Result<()> {
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let store = &mut *store;
        for (subject, descriptors) in &mut store.referrers {
            let repository = subject.split("/sha256:").next().context("no repository")?;
            for descriptor in descriptors {
                let old = descriptor["digest"].as_str().context("no digest")?.to_owned();
                let (media_type, manifest) =
                    store.manifests.remove(&format!("{repository}/{old}")).context("no manifest")?;
                let mut manifest: Value = serde_json::from_slice(&manifest)?;
                manifest["layers"][0]["digest"] = digest(document).into();
                manifest["layers"][0]["size"] = document.len().into();
                store.blobs.insert(digest(document), document.to_vec().into());
                let manifest = Bytes::from(manifest.to_string());
                descriptor["digest"] = digest(&manifest).into();
                descriptor["size"] = manifest.len().into();
                store.manifests.insert(format!("{repository}/{}", digest(&manifest)), (media_type, manifest));
            }
        }
        Ok(())
    }

    /// Method and path of each request so far.
    pub fn asked(&self) -> Vec<String> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner).asked.clone()
    }
}

impl Drop for OciServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

type Reply = Response<Full<Bytes>>;

async fn answer(store: Arc<Mutex<Store>>, request: Request<Incoming>) -> Result<Reply, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
    store.asked.push(format!("{} {}", head.method, head.uri.path()));
    let query = head.uri.query().unwrap_or_default();
    let reply = store.answer(&head.method, head.uri.path(), query, &head.headers, body);
    Ok(reply.unwrap_or_else(|_| status(StatusCode::NOT_FOUND)))
}

fn status(status: StatusCode) -> Reply {
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = status;
    reply
}

fn with(mut reply: Reply, headers: &[(hyper::header::HeaderName, &str)]) -> Result<Reply> {
    for (name, value) in headers {
        reply.headers_mut().insert(name, value.parse()?);
    }
    Ok(reply)
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

impl Store {
    fn answer(
        &mut self,
        method: &Method,
        path: &str,
        query: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Reply> {
        let path = path.strip_prefix("/v2/").context("not the API")?;
        if path.is_empty() {
            return Ok(status(StatusCode::OK));
        }
        if let Some((repository, session)) = path.split_once("/blobs/uploads/") {
            return self.upload(method, repository, session, query, &body);
        }
        if let Some((_, name)) = path.split_once("/blobs/") {
            let bytes = self.blobs.get(name).context("no such blob")?;
            return blob(method, bytes, headers);
        }
        if let Some((repository, subject)) = path.split_once("/referrers/") {
            let found = self.referrers.get(&format!("{repository}/{subject}"));
            let index =
                json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": found.unwrap_or(&Vec::new()) });
            let reply = Response::new(Full::from(index.to_string()));
            return with(reply, &[(CONTENT_TYPE, INDEX)]);
        }
        let (repository, name) = path.split_once("/manifests/").context("no such path")?;
        if method == Method::PUT {
            return self.put_manifest(repository, name, headers, body);
        }
        let (media_type, bytes) =
            self.manifests.get(&format!("{repository}/{name}")).context("no manifest")?;
        let reply =
            Response::new(Full::from(if method == Method::HEAD { Bytes::new() } else { bytes.clone() }));
        let headers =
            [(CONTENT_TYPE, media_type.as_str()), ("docker-content-digest".parse()?, &digest(bytes))];
        with(reply, &headers)
    }

    fn upload(
        &mut self,
        method: &Method,
        repository: &str,
        session: &str,
        query: &str,
        body: &[u8],
    ) -> Result<Reply> {
        let number = match method {
            &Method::POST => self.asked.len() as u64,
            _ => session.parse()?,
        };
        let bytes = self.uploads.entry(number).or_default();
        bytes.extend_from_slice(body);
        if method == Method::PUT {
            let bytes = self.uploads.remove(&number).unwrap_or_default();
            let wanted = query.split("digest=").nth(1).context("no digest")?.replace("%3A", ":");
            if digest(&bytes) != wanted {
                return Ok(status(StatusCode::BAD_REQUEST));
            }
            self.blobs.insert(wanted, bytes.into());
            return Ok(status(StatusCode::CREATED));
        }
        let range = format!("0-{}", bytes.len().saturating_sub(1));
        let location = format!("/v2/{repository}/blobs/uploads/{number}");
        with(status(StatusCode::ACCEPTED), &[(LOCATION, &location), (RANGE, &range)])
    }

    fn put_manifest(
        &mut self,
        repository: &str,
        name: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Reply> {
        let manifest: Value = serde_json::from_slice(&body)?;
        let (digest, media_type) = (digest(&body), headers[CONTENT_TYPE].to_str()?.to_owned());
        let mut reply = with(status(StatusCode::CREATED), &[("docker-content-digest".parse()?, &digest)])?;
        if let Some(subject) = manifest["subject"]["digest"].as_str() {
            let descriptor = json!({
                "mediaType": media_type,
                "digest": digest,
                "size": body.len(),
                "artifactType": manifest["artifactType"],
                "annotations": manifest["annotations"],
            });
            self.referrers.entry(format!("{repository}/{subject}")).or_default().push(descriptor);
            reply = with(reply, &[("oci-subject".parse()?, subject)])?;
        }
        for name in [name, &digest] {
            self.manifests.insert(format!("{repository}/{name}"), (media_type.clone(), body.clone()));
        }
        Ok(reply)
    }
}

fn blob(method: &Method, bytes: &Bytes, headers: &HeaderMap) -> Result<Reply> {
    if method == Method::HEAD {
        return with(Response::default(), &[(CONTENT_LENGTH, &bytes.len().to_string())]);
    }
    let Some(range) = headers.get(RANGE) else { return Ok(Response::new(Full::from(bytes.clone()))) };
    let (first, last) =
        range.to_str()?.strip_prefix("bytes=").and_then(|r| r.split_once('-')).context("range")?;
    let (first, last): (usize, usize) = (first.parse()?, last.parse::<usize>()?.min(bytes.len() - 1));
    let mut reply = Response::new(Full::from(bytes.slice(first..=last)));
    *reply.status_mut() = StatusCode::PARTIAL_CONTENT;
    with(reply, &[(CONTENT_RANGE, &format!("bytes {first}-{last}/{}", bytes.len()))])
}
