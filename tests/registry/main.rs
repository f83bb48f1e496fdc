//! The client of `storage` against Debian's docker-registry: http, https, logins, uploads.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use storage::ErrorKind;
use storage::backend::http::{Answer, HttpOptions, Version};
use storage::backend::registry::{RegistrySource, Rewrite};
use storage::backend::retry::RetryPolicy;
use storage::backend::{BlobSource, ReadContext};
use storage::digest::{DigestAlgorithm, TaggedDigest};
use storage::ids::{BlobId, ByteRange};
use storage::oci::auth::Credentials;
use storage::oci::client::{Call, RegistryClient, RegistryOptions, Scheme};
use storage::oci::manifest::OCI_MANIFEST;
use storage::oci::token::{Access, Login};
use tests::needs_programs;
use tests::registry::{PASSWORD, Registry, USER};

const REPOSITORY: &str = "team/app";

fn sha256(bytes: &[u8]) -> TaggedDigest {
    let algorithm = DigestAlgorithm::Sha256;
    TaggedDigest { algorithm, digest: algorithm.digest(bytes) }
}

fn user(password: &str) -> Result<Credentials> {
    Ok(Credentials::from_base64(&STANDARD.encode(format!("{USER}:{password}")))?)
}

fn client(registry: &Registry, login: Credentials, http: HttpOptions) -> Result<RegistryClient> {
    client_of(registry, Scheme::Auto, login, http)
}

fn client_of(
    registry: &Registry,
    scheme: Scheme,
    login: Credentials,
    http: HttpOptions,
) -> Result<RegistryClient> {
    let retry = RetryPolicy { on_demand: 0, ..RetryPolicy::COMMANDS };
    let options = RegistryOptions { http, scheme, login: Login::Fixed(login), token: None, retry };
    Ok(RegistryClient::new(&registry.address().to_string(), options)?)
}

fn trusting(registry: &Registry) -> HttpOptions {
    HttpOptions { ca_files: vec![registry.authority()], ..HttpOptions::default() }
}

async fn send(client: &RegistryClient, call: Call, status: u16) -> Result<Answer> {
    let context = ReadContext::on_demand(None);
    let answer = client.send(call, &context).await.map_err(|failure| failure.error)?;
    if answer.status() != status {
        return Err(answer.into_failure(client.host(), &context).await.error.into());
    }
    Ok(answer)
}

/// Uploads `bytes` in one piece, as the builder's push does.
async fn put_blob(client: &RegistryClient, bytes: &[u8]) -> Result<TaggedDigest> {
    let access = Access::push(REPOSITORY);
    let start = client.url(&format!("{REPOSITORY}/blobs/uploads/"))?;
    let started = send(client, Call::new("POST".parse()?, start, access.clone()), 202).await?;
    let mut url = RegistryClient::location(&started)?;
    url.query_pairs_mut().append_pair("digest", &sha256(bytes).to_string());
    let mut put = Call::new("PUT".parse()?, url, access);
    put.headers.insert("content-type", "application/octet-stream".parse()?);
    put.body = Some(bytes.to_vec().into());
    send(client, put, 201).await?;
    Ok(sha256(bytes))
}

/// Pushes a small image and reads it back in every way the client can.
async fn round_trip(client: &RegistryClient) -> Result<()> {
    let context = ReadContext::on_demand(None);
    let blob: Vec<u8> = (0..700_000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
    let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let (blob_digest, config_digest) = (put_blob(client, &blob).await?, put_blob(client, config).await?);
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}",
            "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":{}}},
            "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{blob_digest}","size":{}}}]}}"#,
        config.len(),
        blob.len()
    );
    let url = client.url(&format!("{REPOSITORY}/manifests/v1"))?;
    let mut put = Call::new("PUT".parse()?, url, Access::push(REPOSITORY));
    put.headers.insert("content-type", OCI_MANIFEST.parse()?);
    put.body = Some(manifest.clone().into());
    send(client, put, 201).await?;

    let reference = format!("{}/{REPOSITORY}:v1", client.host()).parse()?;
    let document = client.get_manifest(&reference, &context).await?;
    ensure!(document.bytes == manifest.as_bytes() && document.media_type == OCI_MANIFEST);
    document.parse()?;
    ensure!(client.manifest_digest(&reference, &context).await? == Some(document.digest));
    ensure!(client.blob_size(REPOSITORY, blob_digest, &context).await? == Some(blob.len() as u64));
    ensure!(client.blob_size(REPOSITORY, sha256(b"none"), &context).await?.is_none());

    let source = RegistrySource::new(client.clone(), REPOSITORY, Rewrite::default(), RetryPolicy::READS)?;
    let backend = source.blob(&BlobId::new(&blob_digest.digest.to_string())?)?;
    ensure!(backend.size(&context).await? == blob.len() as u64);
    for (start, len) in [(0, 1), (1_000_001, 999_999), (2_799_999, 1), (0, 2_800_000)] {
        let bytes = storage::engine::fetch(&*backend, ByteRange::new(start, len)?, &context).await?;
        ensure!(bytes == blob[start as usize..(start + len) as usize], "wrong bytes at {start}");
    }
    // Debian's registry answers several ranges with one multipart body.
    let ranges: Vec<_> = (0..200).map(|i| ByteRange::new(i * 13_000, 1 + i)).collect::<Result<_, _>>()?;
    let Some(mut stream) = backend.open_many(&ranges, &context).await? else {
        anyhow::bail!("no answer to several ranges");
    };
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?);
    }
    let wanted: Vec<u8> =
        ranges.iter().flat_map(|r| &blob[r.start() as usize..r.end() as usize]).copied().collect();
    ensure!(bytes == wanted, "wrong bytes of several ranges");
    let beyond = storage::engine::fetch(&*backend, ByteRange::new(2_800_000, 1)?, &context).await;
    ensure!(beyond.is_err_and(|e| e.kind() == ErrorKind::OutOfRange));
    Ok(())
}

#[tokio::test]
async fn an_open_registry_over_http() -> Result<()> {
    needs_programs!("docker-registry");
    let registry = Registry::open()?;
    let client = client(&registry, Credentials::Anonymous, HttpOptions::default())?;
    round_trip(&client).await?;
    let missing = format!("{}/{REPOSITORY}:v2", registry.address()).parse()?;
    let error = client.get_manifest(&missing, &ReadContext::on_demand(None)).await.err();
    ensure!(error.is_some_and(|e| e.kind() == ErrorKind::NotFound && e.to_string().contains("v2")));
    Ok(())
}

#[tokio::test]
async fn a_guarded_registry_over_https() -> Result<()> {
    needs_programs!("docker-registry", "htpasswd", "openssl");
    let registry =
        Registry::start(tests::registry::RegistryOptions { basic: true, tls: true, ..Default::default() })?;
    let trusted = client(&registry, user(PASSWORD)?, trusting(&registry))?;
    round_trip(&trusted).await?;
    // The registry offers HTTP/2, and it is used.
    let root = Call::new("GET".parse()?, trusted.url("")?, Access::pull(REPOSITORY));
    ensure!(send(&trusted, root, 200).await?.version() == Version::HTTP_2);
    let careless = HttpOptions { skip_verify: true, ..HttpOptions::default() };
    round_trip(&client(&registry, user(PASSWORD)?, careless)?).await?;

    let context = ReadContext::on_demand(None);
    let reference = format!("{}/{REPOSITORY}:v1", registry.address()).parse()?;
    let refused = [
        (Credentials::Anonymous, trusting(&registry), "docker login"),
        (user("wrong")?, trusting(&registry), "docker login"),
        (user(PASSWORD)?, HttpOptions::default(), "ca_cert_files"),
    ];
    for (login, http, remedy) in refused {
        let error = client(&registry, login, http)?.get_manifest(&reference, &context).await.err();
        let Some(error) = error else { anyhow::bail!("not refused, want {remedy}") };
        ensure!(error.kind() == ErrorKind::Denied && error.to_string().contains(remedy), "{remedy}: {error}");
        ensure!(!format!("{error:?}").contains(PASSWORD));
    }
    let nowhere =
        HttpOptions { ca_files: vec![PathBuf::from("/nonexistent/ca.crt")], ..HttpOptions::default() };
    ensure!(client(&registry, Credentials::Anonymous, nowhere).is_err());
    Ok(())
}

#[tokio::test]
async fn a_registry_that_wants_certificates_of_its_clients() -> Result<()> {
    needs_programs!("docker-registry", "openssl");
    let options = tests::registry::RegistryOptions { tls: true, clients: true, ..Default::default() };
    let registry = Registry::start(options)?;
    let known =
        HttpOptions { client_certificate: Some(registry.client_certificate()), ..trusting(&registry) };
    round_trip(&client(&registry, Credentials::Anonymous, known)?).await?;

    let context = ReadContext::on_demand(None);
    let reference = format!("{}/{REPOSITORY}:v1", registry.address()).parse()?;
    let unknown = client_of(&registry, Scheme::Https, Credentials::Anonymous, trusting(&registry))?;
    let Some(error) = unknown.get_manifest(&reference, &context).await.err() else {
        anyhow::bail!("served without a certificate")
    };
    // TLS 1.3 lets clients speak before they are refused: what breaks first is chance.
    ensure!(matches!(error.kind(), ErrorKind::Denied | ErrorKind::Unavailable), "{error:?}");
    Ok(())
}
