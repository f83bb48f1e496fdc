//! Who may have blobs, and where from: bearer tokens, and links that expire.

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode, header};

use super::{Body, Rule, Shared, blob_fetch, text};

/// Where blobs are redirected to links: the redirect, or the refusal of a link that has expired.
/// A good link becomes the path of the blob again.
pub(super) fn linked(shared: &Shared, request: &mut Request<Incoming>) -> Result<Option<Response<Body>>> {
    let Some(signature) = &shared.signature else { return Ok(None) };
    let signature = *signature.borrow();
    if let Some(rest) = request.uri().path().strip_prefix("/signed/") {
        let (number, path) = rest.split_once('/').context("a link without a path")?;
        if number.parse() != Ok(signature) {
            let mut response = Response::new(text("the link has expired".into()));
            *response.status_mut() = StatusCode::FORBIDDEN;
            return Ok(Some(response));
        }
        *request.uri_mut() = format!("/{path}").parse()?;
        return Ok(None);
    }
    if blob_fetch(request).is_none() {
        return Ok(None);
    }
    shared.log().links_given += 1;
    let host = match *shared.rule.borrow() {
        Rule::LoseHost => format!("gone.invalid:{}", shared.address.port()),
        _ => shared.address.to_string(),
    };
    let link = format!("http://{host}/signed/{signature}{}", request.uri().path());
    let mut response = Response::new(text(String::new()));
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    response.headers_mut().insert(header::LOCATION, link.parse()?);
    Ok(Some(response))
}

/// The 401 with a bearer challenge, unless the request carries a token of ours.
pub(super) fn refused(shared: &Shared, request: &Request<Incoming>) -> Option<Response<Body>> {
    shared.bearer.as_ref()?;
    let token = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    if token.is_some_and(|token| shared.log().tokens.contains(token)) {
        return None;
    }
    let repository = request
        .uri()
        .path()
        .strip_prefix("/v2/")
        .and_then(|rest| {
            let end = ["/blobs/", "/manifests/"].iter().filter_map(|part| rest.find(part)).min()?;
            Some(&rest[..end])
        })
        .unwrap_or("");
    let mut challenge = format!(r#"Bearer realm="http://{}/token",service="tests""#, shared.address);
    if !repository.is_empty() {
        challenge += &format!(r#",scope="repository:{repository}:pull,push""#);
    }
    let mut response = Response::new(text(r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#.into()));
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.parse().ok()?);
    Some(response)
}

/// `/token`: GET with Basic credentials or none. A POSTed form is answered 404, as most servers do,
/// so that clients fall back.
pub(super) fn token(shared: &Shared, request: &Request<Incoming>) -> Result<Response<Body>> {
    let refuse = |status| {
        let mut response = Response::new(text("{}".into()));
        *response.status_mut() = status;
        response
    };
    if request.method() != hyper::Method::GET {
        return Ok(refuse(StatusCode::NOT_FOUND));
    }
    let Some(bearer) = &shared.bearer else { return Ok(refuse(StatusCode::NOT_FOUND)) };
    if let Some((user, password)) = &bearer.credentials {
        let wanted = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        if request
            .headers()
            .get(header::AUTHORIZATION)
            .is_none_or(|given| given.as_bytes() != wanted.as_bytes())
        {
            return Ok(refuse(StatusCode::UNAUTHORIZED));
        }
    }
    let mut log = shared.log();
    log.tokens_given += 1;
    let token = format!("token-{}", log.tokens_given);
    log.tokens.insert(token.clone());
    let mut response = Response::new(text(format!(r#"{{"token":"{token}","expires_in":300}}"#)));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    Ok(response)
}
