//! Debian's `docker-registry` on a free loopback port, with its storage in a directory of the test.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::command::run;

/// Who may come in.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegistryOptions {
    /// Asks for a user and password ([`USER`], [`PASSWORD`]) by htpasswd.
    pub basic: bool,
    /// Speaks https with a certificate of the test's own authority.
    pub tls: bool,
    /// Over https, wants a certificate of that authority from its clients, too.
    pub clients: bool,
}

/// The user that a guarded registry knows.
pub const USER: &str = "reader";
/// Their password.
pub const PASSWORD: &str = "correct horse";

/// Puts a file into a repository as a blob.
const PUSH: &str = r#"
import hashlib, http.client, sys
host, repository, path = sys.argv[1:]
data = open(path, "rb").read()
digest = hashlib.sha256(data).hexdigest()
connection = http.client.HTTPConnection(host)
connection.request("POST", f"/v2/{repository}/blobs/uploads/", b"")
answer = connection.getresponse()
answer.read()
place = answer.headers["Location"]
place += ("&" if "?" in place else "?") + "digest=sha256:" + digest
connection.request("PUT", place, data, {"Content-Type": "application/octet-stream"})
answer = connection.getresponse()
answer.read()
assert answer.status == 201, answer.status
print(digest)
"#;

/// A running registry; killed when dropped.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    address: SocketAddr,
    directory: TempDir,
}

impl Registry {
    /// An open registry over http.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn open() -> Result<Self> {
        Self::start(RegistryOptions::default())
    }

    /// Starts a registry and waits until it listens.
    ///
    /// # Errors
    /// A program is missing, or the registry ended before it listened.
    pub fn start(options: RegistryOptions) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let storage = directory.path().join("storage");
        fs::create_dir(&storage)?;
        let config = directory.path().join("config.yml");
        fs::write(&config, configuration(&storage, options, directory.path())?)?;
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start docker-registry")?;
        let log = child.stderr.take().context("the registry has no stderr")?;
        let (sender, receiver) = mpsc::channel();
        // Reads to the end, so that the registry never blocks on a full pipe.
        thread::spawn(move || {
            let mut lines = Vec::new();
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                if let Some(address) = listening(&line) {
                    let _ = sender.send(Ok(address));
                } else if lines.len() < 50 {
                    lines.push(line);
                }
            }
            let _ = sender.send(Err(lines.join("\n")));
        });
        let address = match receiver.recv_timeout(Duration::from_secs(30)) {
            Ok(Ok(address)) => address,
            other => {
                let _ = child.kill();
                let _ = child.wait();
                anyhow::bail!("docker-registry does not listen: {other:?}");
            }
        };
        Ok(Self { child, address, directory })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `docker://127.0.0.1:PORT/NAME`.
    pub fn reference(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.address)
    }

    /// The certificate of the authority that signed the registry's own.
    pub fn authority(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    /// A certificate that the authority gave to a client, and its key.
    pub fn client_certificate(&self) -> (PathBuf, PathBuf) {
        (self.directory.path().join("client.crt"), self.directory.path().join("client.key"))
    }

    /// Puts `file` into `repository` as a blob; its SHA-256 in hexadecimal.
    ///
    /// # Errors
    /// The registry refuses.
    pub fn push(&self, repository: &str, file: &Path) -> Result<String> {
        let mut program = Command::new("python3");
        program.args(["-c", PUSH, &self.address.to_string(), repository]).arg(file);
        Ok(run(&mut program)?.trim().to_owned())
    }

    /// Where the registry keeps the bytes of `digest` (`sha256:…`): to be damaged.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
        self.directory
            .path()
            .join("storage/docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `… msg="listening on 127.0.0.1:41234" …`, with `, tls` behind the port over https.
fn listening(line: &str) -> Option<SocketAddr> {
    let (_, rest) = line.split_once("listening on ")?;
    let end = rest.find(|c: char| c != '.' && c != ':' && !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

fn configuration(storage: &Path, options: RegistryOptions, directory: &Path) -> Result<String> {
    let mut text = format!(
        "version: 0.1\nlog:\n  level: info\n  accesslog:\n    disabled: true\nstorage:\n  delete:\n    enabled: true\n  filesystem:\n    rootdirectory: {}\n\
         http:\n  addr: 127.0.0.1:0\n",
        storage.display()
    );
    if options.tls {
        certificates(directory)?;
        let path = |name: &str| directory.join(name).display().to_string();
        text +=
            &format!("  tls:\n    certificate: {}\n    key: {}\n", path("server.crt"), path("server.key"));
        if options.clients {
            text += &format!("    clientcas: [{}]\n", path("ca.crt"));
        }
    }
    if options.basic {
        let entry = run(Command::new("htpasswd").args(["-Bbn", USER, PASSWORD]))?;
        let file = directory.join("htpasswd");
        fs::write(&file, entry)?;
        text += &format!("auth:\n  htpasswd:\n    realm: tests\n    path: {}\n", file.display());
    }
    Ok(text)
}

/// An authority of our own (`ca.crt`), and certificates that it gave to a server at 127.0.0.1 and to a
/// client.
fn certificates(directory: &Path) -> Result<()> {
    let openssl = |line: &str| {
        let arguments = line.split_whitespace();
        run(Command::new("openssl").current_dir(directory).args(arguments)).map(drop)
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!("req -x509 -days 2 -subj /CN=authority {key} -keyout ca.key -out ca.crt"))?;
    fs::write(directory.join("san"), "subjectAltName=IP:127.0.0.1\n")?;
    for name in ["server", "client"] {
        openssl(&format!("req -subj /CN={name} {key} -keyout {name}.key -out {name}.csr"))?;
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile san -out {name}.crt"
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::listening;

    #[test]
    fn the_port_is_found_in_the_log() {
        let line = r#"time="…" level=info msg="listening on 127.0.0.1:41234" go.version=go1.19"#;
        assert_eq!(listening(line), Some(([127, 0, 0, 1], 41234).into()));
        let line = r#"msg="listening on 127.0.0.1:9, tls""#;
        assert_eq!(listening(line), Some(([127, 0, 0, 1], 9).into()));
        assert_eq!(listening("msg=hello"), None);
    }
}
