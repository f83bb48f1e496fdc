//! An S3 server that nobody here wrote: moto, from PyPI, in a folder that misc/setup.sh fills.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Where misc/setup.sh puts it.
const MODULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../misc/.cache/moto");

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct S3Server {
    child: Child,
    address: SocketAddr,
}

/// An account that may read and write every bucket.
#[derive(Clone, Debug)]
pub struct Account {
    /// `access_key_id`.
    pub id: String,
    /// `access_key_secret`.
    pub secret: String,
}

impl S3Server {
    /// Why there is none; `None` when there is.
    pub fn missing() -> Option<String> {
        (!Path::new(MODULES).join("moto").exists())
            .then(|| "moto is not installed (see misc/setup.sh)".to_owned())
    }

    /// Starts a server that lets everybody in, and waits until it listens.
    ///
    /// # Errors
    /// It ended before it listened.
    pub fn start() -> Result<Self> {
        let mut child = Command::new("python3")
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"])
            .env("PYTHONPATH", MODULES)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start moto")?;
        let log = child.stderr.take().context("moto has no stderr")?;
        let (sender, receiver) = mpsc::channel();
        // Reads to the end, so that the server never blocks on a full pipe.
        thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                if let Some((_, address)) = line.split_once("Running on http://") {
                    let _ = sender.send(address.trim().parse());
                }
            }
        });
        match receiver.recv_timeout(Duration::from_secs(60)) {
            Ok(Ok(address)) => Ok(Self { child, address }),
            other => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("moto does not listen: {other:?}");
            }
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes an account.
    ///
    /// # Errors
    /// The server refuses.
    pub fn account(&self, name: &str) -> Result<Account> {
        self.iam(&format!("Action=CreateUser&UserName={name}"))?;
        let policy = "%7B%22Version%22%3A%222012-10-17%22%2C%22Statement%22%3A%5B%7B%22Effect%22%3A%22Allow%22%2C%22\
                      Action%22%3A%22s3%3A%2A%22%2C%22Resource%22%3A%22%2A%22%7D%5D%7D";
        self.iam(&format!("Action=PutUserPolicy&UserName={name}&PolicyName=all&PolicyDocument={policy}"))?;
        let page = self.iam(&format!("Action=CreateAccessKey&UserName={name}"))?;
        let element = |name: &str| -> Option<String> {
            let (_, rest) = page.split_once(&format!("<{name}>"))?;
            Some(rest.split_once('<')?.0.to_owned())
        };
        let keys = element("AccessKeyId").zip(element("SecretAccessKey"));
        let (id, secret) = keys.with_context(|| format!("an access key without keys: {page}"))?;
        Ok(Account { id, secret })
    }

    fn iam(&self, form: &str) -> Result<String> {
        // The server takes the service from here and, before `guard`, nothing else.
        let headers = "Content-Type: application/x-www-form-urlencoded\r\nAuthorization: AWS4-HMAC-SHA256 \
                       Credential=x/20260101/us-east-1/iam/aws4_request, SignedHeaders=host, Signature=x\r\n";
        self.request("POST", "/", headers, format!("Version=2010-05-08&{form}").as_bytes())
    }

    /// Makes a bucket, or puts an object into one: `/BUCKET` or `/BUCKET/KEY`.
    ///
    /// # Errors
    /// The server refuses.
    pub fn put(&self, path: &str, body: &[u8]) -> Result<()> {
        self.request("PUT", path, "", body).map(drop)
    }

    /// From now on requests need a signature, which the server checks.
    ///
    /// # Errors
    /// The server refuses.
    pub fn guard(&self) -> Result<()> {
        self.request("POST", "/moto-api/reset-auth", "", b"0").map(drop)
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
            self.address,
            body.len()
        )?;
        stream.write_all(body)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{method} {path}: {answer}");
        Ok(answer)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
