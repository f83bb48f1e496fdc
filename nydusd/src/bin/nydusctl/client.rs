//! One HTTP request at a time over the API socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::time::error::Elapsed;

use crate::refusal::sentence;

/// A connection to a daemon. Each request opens its own: a daemon is asked rarely.
pub struct Client<'a> {
    socket: &'a Path,
    timeout: Duration,
    runtime: tokio::runtime::Runtime,
}

impl<'a> Client<'a> {
    /// For the daemon at `socket`, which has `timeout` for each answer. Connects with the first
    /// request.
    pub fn new(socket: &'a Path, timeout: Duration) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket, timeout, runtime })
    }

    /// The document at `path`.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        let body = self.request(Method::GET, path, String::new())?;
        serde_json::from_slice(&body).context("the daemon's answer is not JSON")
    }

    /// The document at `path`, if the daemon has one.
    ///
    /// # Errors
    /// It does not answer in time, so that it need not be asked for the next.
    pub fn get_any(&self, path: &str) -> anyhow::Result<Option<Value>> {
        match self.get(path) {
            Ok(document) => Ok(Some(document)),
            Err(e) if e.is::<Elapsed>() => Err(e),
            Err(_) => Ok(None),
        }
    }

    /// The text at `path`.
    pub fn get_text(&self, path: &str) -> anyhow::Result<String> {
        let body = self.request(Method::GET, path, String::new())?;
        String::from_utf8(body).context("the daemon's answer is not text")
    }

    /// Sends `document` to `path`.
    pub fn put(&self, path: &str, document: &Value) -> anyhow::Result<()> {
        self.request(Method::PUT, path, document.to_string()).map(drop)
    }

    /// Has the daemon mount what `command` says at `mountpoint`.
    pub fn mount(&self, mountpoint: &str, command: &Value) -> anyhow::Result<()> {
        let path = format!("/api/v1/mount?mountpoint={}", encode(mountpoint));
        self.request(Method::POST, &path, command.to_string()).map(drop)
    }

    /// Has the daemon take away what is mounted at `mountpoint`.
    pub fn umount(&self, mountpoint: &str) -> anyhow::Result<()> {
        let path = format!("/api/v1/mount?mountpoint={}", encode(mountpoint));
        self.request(Method::DELETE, &path, String::new()).map(drop)
    }

    /// Sends `document` to `path` and answers what comes back.
    pub fn post(&self, path: &str, document: &Value) -> anyhow::Result<Value> {
        let body = self.request(Method::POST, path, document.to_string())?;
        serde_json::from_slice(&body).context("the daemon's answer is not JSON")
    }

    fn request(&self, method: Method, path: &str, body: String) -> anyhow::Result<Vec<u8>> {
        let answer = async {
            let stream = tokio::net::UnixStream::connect(self.socket)
                .await
                .with_context(|| format!("connect to {}", self.socket.display()))?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(hyper::header::HOST, "nydusd")
                .body(Full::<bytes::Bytes>::from(body))?;
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            if status.is_client_error() || status.is_server_error() {
                let error = serde_json::from_slice::<Value>(&body).unwrap_or_default();
                match error["message"].as_str() {
                    Some(message) => bail!("nydusd refuses: {}", sentence(message)),
                    None => bail!("{path}: what listens there answers {status}, and not as nydusd does"),
                }
            }
            Ok(body.to_vec())
        };
        self.runtime.block_on(async { tokio::time::timeout(self.timeout, answer).await }).with_context(
            || format!("{path}: no answer within {} s; --timeout allows more", self.timeout.as_secs()),
        )?
    }
}

/// `path` of the mount that `id` names, or of the only one.
pub fn of_mount(path: &str, id: Option<&str>) -> String {
    id.map_or_else(|| path.to_owned(), |id| format!("{path}?id={}", encode(id)))
}

/// `text` for a query string.
pub fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_mount_is_named_where_one_was() {
        assert_eq!(super::of_mount("/p", None), "/p");
        assert_eq!(super::of_mount("/p", Some("/a&b")), "/p?id=/a%26b");
    }

    #[test]
    fn a_query_value_is_encoded() {
        assert_eq!(super::encode("/a b&c=%\u{fc}"), "/a%20b%26c%3D%25%C3%BC");
    }
}
