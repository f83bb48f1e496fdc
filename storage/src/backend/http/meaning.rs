//! What an unwelcome answer, or none, means: its kind, whether it may pass, and the remedy.

use std::io;
use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use rustls::AlertDescription;

use crate::backend::retry::Failure;
use crate::{Error, ErrorKind};

/// A server's own words are shown this far.
const MAX_ERROR_TEXT: usize = 200;

/// What helps whom a server refuses.
#[derive(Clone, Copy, Debug)]
pub enum Help<'a> {
    /// A login for the server of this name.
    Login(&'a str),
    /// This.
    Text(&'a str),
}

impl<'a> From<&'a str> for Help<'a> {
    fn from(server: &'a str) -> Self {
        Self::Login(server)
    }
}

impl<'a> From<&'a String> for Help<'a> {
    fn from(server: &'a String) -> Self {
        Self::Login(server)
    }
}

/// Kind, whether it may pass, and the remedy of an unwelcome status.
pub(super) fn judge(status: StatusCode, help: Help<'_>) -> (ErrorKind, bool, String) {
    match status.as_u16() {
        code @ (401 | 403) => {
            let remedy = match help {
                Help::Text(text) => text.to_owned(),
                Help::Login(server) if code == 401 => {
                    format!("log in with `docker login {server}` or set `auth`")
                }
                Help::Login(server) => format!("the login used for {server} does not allow this"),
            };
            (ErrorKind::Denied, false, remedy)
        }
        404 | 410 => (ErrorKind::NotFound, false, String::new()),
        407 => {
            (ErrorKind::Denied, false, "the proxy wants a login: put USER:PASSWORD@ in its URL".to_owned())
        }
        408 | 425 | 429 | 500 | 502..=504 | 506..=599 => (ErrorKind::Unavailable, true, String::new()),
        416 => (ErrorKind::OutOfRange, false, "the object ends before the range asked for".to_owned()),
        405 | 501 | 505 => {
            (ErrorKind::Unsupported, false, "the server does not support this request".to_owned())
        }
        _ => (ErrorKind::Invalid, false, String::new()),
    }
}

/// The message in a registry's error page, or the code in an object store's, without control
/// characters, cut short.
pub(super) fn error_text(page: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Page {
        errors: Vec<Item>,
    }
    #[derive(serde::Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Page>(page) {
        Ok(page) => {
            page.errors.iter().map(|e| format!("{}: {}", e.code, e.message)).collect::<Vec<_>>().join(", ")
        }
        Err(_) => xml_code(page).unwrap_or_default(),
    };
    text.chars().filter(|c| !c.is_control()).take(MAX_ERROR_TEXT).collect()
}

/// How long the server wants to be left alone.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    parse_retry_after(headers.get(RETRY_AFTER)?.to_str().ok()?, SystemTime::now())
}

/// The one element of an object store's error page that is never a secret.
fn xml_code(page: &[u8]) -> Option<String> {
    let page = std::str::from_utf8(page).ok()?;
    let (code, _) = page.split_once("<Code>")?.1.split_once("</Code>")?;
    code.bytes().all(|b| b.is_ascii_alphanumeric()).then(|| code.to_owned())
}

/// `Retry-After`: seconds or a date.
fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    match value.trim().parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(httpdate::parse_http_date(value.trim()).ok()?.duration_since(now).unwrap_or_default()),
    }
}

/// What broke below HTTP.
#[derive(Debug)]
pub(super) enum Broken {
    /// On the network.
    Network(reqwest::Error),
    /// At a unix socket.
    Unix(hyper_util::client::legacy::Error),
    /// On the way to either.
    Io(io::Error),
}

impl From<reqwest::Error> for Broken {
    fn from(error: reqwest::Error) -> Self {
        Self::Network(error)
    }
}

impl From<hyper_util::client::legacy::Error> for Broken {
    fn from(error: hyper_util::client::legacy::Error) -> Self {
        Self::Unix(error)
    }
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A failure below HTTP.
pub(super) fn transport_failure(what: &str, broken: Broken) -> Failure {
    let (certificate, is_builder, is_connect) = match &broken {
        Broken::Network(error) => (certificate_error(error), error.is_builder(), error.is_connect()),
        Broken::Unix(error) => (None, false, error.is_connect()),
        Broken::Io(_) => (None, false, false),
    };
    let (kind, passing, why) = if let Some(remedy) = certificate {
        (ErrorKind::Denied, false, remedy)
    } else if is_builder {
        (ErrorKind::Invalid, false, "not a valid request")
    } else if is_connect {
        (ErrorKind::Unavailable, true, "no connection")
    } else {
        (ErrorKind::Unavailable, true, "the connection broke")
    };
    let error = Error::new(kind, format!("{what}: {why}"));
    let error = match broken {
        Broken::Network(source) => error.with_source(source.without_url()),
        Broken::Unix(source) => error.with_source(source),
        Broken::Io(source) => error.with_source(source),
    };
    Failure { error, passing, retry_after: None }
}

/// True if there is a server, and it does not speak TLS.
pub(crate) fn is_tls_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    if error.is::<rustls::Error>() {
        return true;
    }
    let io = error.downcast_ref::<std::io::Error>();
    // A connection that was refused says so otherwise.
    io.is_some_and(|io| matches!(io.kind(), BrokenPipe | ConnectionReset | UnexpectedEof))
        || match io.and_then(std::io::Error::get_ref) {
            Some(inner) => is_tls_refused(inner),
            None => error.source().is_some_and(is_tls_refused),
        }
}

/// Alerts of servers that do not accept a client's certificate, or miss it.
const CLIENT_REFUSED: [AlertDescription; 8] = [
    AlertDescription::CertificateRequired,
    AlertDescription::BadCertificate,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::CertificateRevoked,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateUnknown,
    AlertDescription::UnknownCA,
    AlertDescription::AccessDenied,
];

/// What to do if a cause of `error` is a certificate that was not accepted, theirs or ours.
fn certificate_error(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    const OURS: &str =
        "it wants a client certificate that it trusts; set `client_cert_file` and `client_key_file`";
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return match tls {
            rustls::Error::InvalidCertificate(_) => {
                Some("its certificate is not trusted; add its CA to `ca_cert_files`, or set `skip_verify`")
            }
            rustls::Error::AlertReceived(alert) if CLIENT_REFUSED.contains(alert) => Some(OURS),
            _ => None,
        };
    }
    // HTTP/2 keeps nothing but the text of what broke its connection.
    let text = error.to_string();
    let is_named =
        |alert: &AlertDescription| text.contains(&rustls::Error::AlertReceived(*alert).to_string());
    if CLIENT_REFUSED.iter().any(is_named) {
        return Some(OURS);
    }
    // An io::Error does not name what it wraps as its source.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    match wrapped {
        Some(inner) => certificate_error(inner),
        None => error.source().and_then(certificate_error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_certificate_is_not_accepted_is_told_apart() {
        let ours = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
        let theirs = rustls::Error::InvalidCertificate(rustls::CertificateError::Expired);
        let other = rustls::Error::AlertReceived(AlertDescription::InternalError);
        let told = |error: &rustls::Error| {
            let wrapped = std::io::Error::other(error.clone());
            certificate_error(&wrapped).or_else(|| certificate_error(error))
        };
        assert!(told(&ours).is_some_and(|text| text.contains("client_cert_file")));
        assert!(told(&theirs).is_some_and(|text| text.contains("ca_cert_files")));
        assert_eq!(told(&other), None);
        // As HTTP/2 hands it on.
        let text = std::io::Error::other(ours.to_string());
        assert!(certificate_error(&text).is_some_and(|text| text.contains("client_cert_file")));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2026 07:28:00 GMT").unwrap();
        let cases = [
            ("3", Some(3)),
            ("Wed, 21 Oct 2026 07:28:30 GMT", Some(30)),
            ("Wed, 21 Oct 2026 07:00:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ];
        for (value, seconds) in cases {
            assert_eq!(parse_retry_after(value, now), seconds.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn statuses_have_kinds_and_only_some_pass() {
        for (code, kind, passing) in [
            (401, ErrorKind::Denied, false),
            (403, ErrorKind::Denied, false),
            (404, ErrorKind::NotFound, false),
            (416, ErrorKind::OutOfRange, false),
            (429, ErrorKind::Unavailable, true),
            (500, ErrorKind::Unavailable, true),
            (501, ErrorKind::Unsupported, false),
            (503, ErrorKind::Unavailable, true),
        ] {
            let (k, p, _) = judge(StatusCode::from_u16(code).unwrap(), "h".into());
            assert_eq!((k, p), (kind, passing), "{code}");
        }
        assert_eq!(
            error_text(b"{\"errors\":[{\"code\":\"DENIED\",\"message\":\"no\\u001b[31m\"}]}"),
            "DENIED: no[31m"
        );
        assert_eq!(error_text(b"<html>"), "");
        let page = b"<?xml?><Error><Code>SlowDown</Code><AWSAccessKeyId>AK</AWSAccessKeyId></Error>";
        assert_eq!(error_text(page), "SlowDown");
        assert_eq!(error_text(b"<Code>a key: s3cret</Code>"), "");
    }
}
