//! Logins: the files of docker and podman, and the helpers they name.
//!
//! Nothing here writes, prints or logs a secret: [`Secret`] has no `Display` and its
//! `Debug` is blank.

use std::collections::HashMap;
use std::fmt;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::reference::DEFAULT_HOST;
use crate::{Error, ErrorKind, Result};

/// The server's name that docker uses for docker.io in files and helpers.
const DOCKER_SERVER: &str = "https://index.docker.io/v1/";
/// A login file longer than this is not one.
const MAX_FILE_SIZE: u64 = 4 << 20;
/// A credential helper's answer is a few hundred bytes.
const MAX_ANSWER_SIZE: u64 = 1 << 20;
/// A helper may ask a key ring or a cloud; longer than this it hangs.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// Between looks whether a helper that has answered is gone, which it is at once.
const HELPER_PAUSE: Duration = Duration::from_millis(5);

/// A password, token or header value that never shows.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    /// Hides `value`.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value, for the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What to log in with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing: public images.
    #[default]
    Anonymous,
    /// User and password (or access token in its place).
    Basic {
        /// The user's name.
        user: String,
        /// The password.
        password: Secret,
    },
    /// An OAuth2 refresh token, exchanged for bearer tokens.
    IdentityToken(Secret),
    /// A bearer token, sent as it is.
    RegistryToken(Secret),
}

impl Credentials {
    /// Reads base64 of `user:password`, as in login files and the backend's `auth` key.
    /// An empty string is anonymous.
    ///
    /// # Errors
    /// `Invalid`: not base64, not UTF-8, or no colon. The text is not repeated.
    pub fn from_base64(auth: &str) -> Result<Self> {
        let auth = auth.trim();
        if auth.is_empty() {
            return Ok(Self::Anonymous);
        }
        STANDARD
            .decode(auth)
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .and_then(|text| {
                let (user, password) = text.trim_end_matches('\0').split_once(':')?;
                Some(Self::Basic { user: user.to_owned(), password: Secret::new(password) })
            })
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "`auth`: want base64 of USER:PASSWORD"))
    }

    /// The value of an `Authorization: Basic` header, for a user and password.
    pub fn basic_header(&self) -> Option<Secret> {
        match self {
            Self::Basic { user, password } => {
                Some(Secret(format!("Basic {}", STANDARD.encode(format!("{user}:{}", password.0)))))
            }
            _ => None,
        }
    }
}

/// Login files in the order they are asked.
#[derive(Clone, Debug, Default)]
pub struct AuthFiles {
    files: Vec<PathBuf>,
}

impl AuthFiles {
    /// Only these files.
    pub fn new(files: Vec<PathBuf>) -> Self {
        Self { files }
    }

    /// The files that docker and podman use, found through the environment:
    /// `REGISTRY_AUTH_FILE` alone if set, else `DOCKER_CONFIG/config.json`,
    /// `XDG_RUNTIME_DIR/containers/auth.json` (or `/run/containers/UID/auth.json`),
    /// `XDG_CONFIG_HOME/containers/auth.json` and `HOME/.docker/config.json`.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name).map(PathBuf::from))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<PathBuf>) -> Self {
        let set = |name| variable(name).filter(|value| !value.as_os_str().is_empty());
        if let Some(only) = set("REGISTRY_AUTH_FILE") {
            return Self { files: vec![only] };
        }
        let home = set("HOME");
        let config = set("XDG_CONFIG_HOME").or_else(|| home.as_ref().map(|home| home.join(".config")));
        let runtime = match set("XDG_RUNTIME_DIR") {
            Some(dir) => dir.join("containers"),
            None => Path::new("/run/containers").join(nix::unistd::geteuid().to_string()),
        };
        let files = [
            set("DOCKER_CONFIG").map(|dir| dir.join("config.json")),
            Some(runtime.join("auth.json")),
            config.map(|dir| dir.join("containers/auth.json")),
            home.map(|home| home.join(".docker/config.json")),
        ];
        Self { files: files.into_iter().flatten().collect() }
    }

    /// The login for `repository` at `host`; blocks while a helper runs.
    ///
    /// The first file with an answer decides. In a file a helper of this host comes first,
    /// then the most specific entry (podman allows `host/namespace/repository`), then the
    /// default helper.
    ///
    /// # Errors
    /// `Invalid`: a file is malformed; `Io`, `Denied`: it can not be read, or a helper
    /// failed. Missing files are no errors.
    pub fn lookup(&self, host: &str, repository: &str) -> Result<Credentials> {
        for path in &self.files {
            let Some(file) = read_file(path)? else { continue };
            let found = file
                .lookup(host, repository)
                .map_err(|e| e.context(format_args!("login file {}", path.display())))?;
            if let Some(found) = found {
                return Ok(found);
            }
        }
        Ok(Credentials::Anonymous)
    }
}

/// The part of docker's `config.json` and podman's `auth.json` read here.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: HashMap<String, AuthEntry>,
    creds_store: String,
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

fn read_file(path: &Path) -> Result<Option<AuthFile>> {
    let what = || format!("login file {}", path.display());
    let file = match crate::outside::open(path) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(Error::io(what(), e)),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE_SIZE + 1).read_to_end(&mut text).map_err(|e| Error::io(what(), e))?;
    if text.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    // serde_json's errors repeat offending values, and those may be secrets: keep the place only.
    let parsed = serde_json::from_slice(&text).map_err(|e| {
        Error::new(
            ErrorKind::Invalid,
            format!("{}: not valid JSON at line {} column {}", what(), e.line(), e.column()),
        )
    })?;
    Ok(Some(parsed))
}

/// A server's name as files write it, without scheme, API version and docker.io's aliases.
fn plain_key(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    match key {
        "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => DEFAULT_HOST,
        other => other,
    }
}

impl AuthFile {
    fn lookup(&self, host: &str, repository: &str) -> Result<Option<Credentials>> {
        let host = plain_key(host);
        let server = if host == DEFAULT_HOST { DOCKER_SERVER } else { host };
        let helper = self.cred_helpers.iter().find(|(key, _)| plain_key(key) == host).map(|(_, name)| name);
        if let Some(name) = helper
            && let Some(found) = ask_helper(name, server)?
        {
            return Ok(Some(found));
        }
        // host/a/b, host/a, host: the longest name with an entry wins.
        let whole = format!("{host}/{repository}");
        let mut name = whole.as_str();
        loop {
            for entry in self.auths.iter().filter(|(key, _)| plain_key(key) == name).map(|(_, entry)| entry) {
                if let Some(found) = entry.credentials()? {
                    return Ok(Some(found));
                }
            }
            match name.rfind('/') {
                Some(slash) => name = &name[..slash],
                None => break,
            }
        }
        match self.creds_store.as_str() {
            "" => Ok(None),
            name => ask_helper(name, server),
        }
    }
}

impl AuthEntry {
    /// `None` for the empty entries that docker leaves where a helper has the secret.
    fn credentials(&self) -> Result<Option<Credentials>> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Credentials::IdentityToken(Secret::new(&self.identitytoken))));
        }
        if !self.registrytoken.is_empty() {
            return Ok(Some(Credentials::RegistryToken(Secret::new(&self.registrytoken))));
        }
        if !self.auth.is_empty() {
            return Credentials::from_base64(&self.auth).map(Some);
        }
        if !self.username.is_empty() {
            let password = Secret::new(&self.password);
            return Ok(Some(Credentials::Basic { user: self.username.clone(), password }));
        }
        Ok(None)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    secret: String,
}

/// What `docker-credential-NAME` knows; `None` if that is no login for `server`.
fn ask_helper(name: &str, server: &str) -> Result<Option<Credentials>> {
    check_helper_name(name)?;
    let answer = match crate::outside::get() {
        Some(outside) => {
            let what = || format!("credential helper docker-credential-{name} for {server}");
            outside.login(name, server).map_err(|e| Error::io(what(), e))?
        }
        None => run_credential_helper(name, server)?,
    };
    answer.map(|answer| read_answer(name, server, &answer)).transpose()
}

/// A helper's name becomes that of a program, which is looked for in `PATH` only.
fn check_helper_name(name: &str) -> Result<()> {
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Err(Error::new(ErrorKind::Invalid, format!("credential helper {name:?}: want a plain name")));
    }
    Ok(())
}

/// Runs `docker-credential-NAME get` and answers what it prints, a secret; `None` if it knows no login for `server`.
///
/// # Errors
/// `Invalid`: the name is no plain one. `Io`, `Denied`, `TimedOut`: it can not be run, fails or hangs.
pub fn run_credential_helper(name: &str, server: &str) -> Result<Option<String>> {
    check_helper_name(name)?;
    run_helper(Command::new(format!("docker-credential-{name}")), name, server, HELPER_TIMEOUT)
}

fn run_helper(mut command: Command, name: &str, server: &str, timeout: Duration) -> Result<Option<String>> {
    let give_up = Instant::now() + timeout;
    let what = |why: &str| format!("credential helper docker-credential-{name} for {server}: {why}");
    let mut child = command
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| Error::io(what("can not be started; is it installed?"), e))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that reads nothing closes the pipe; its answer tells then.
        let _ = stdin.write_all(server.as_bytes());
    }
    let stdout = child.stdout.take();
    let (sender, receiver) = mpsc::sync_channel(1);
    let reader = std::thread::spawn(move || {
        let mut answer = Vec::new();
        let read = stdout.map_or(Ok(0), |out| out.take(MAX_ANSWER_SIZE).read_to_end(&mut answer));
        // The receiver may have timed out.
        let _ = sender.send(read.map(|_| answer));
    });
    let late = || Error::new(ErrorKind::TimedOut, what(&format!("not done in {} s", timeout.as_secs_f32())));
    let answer = match receiver.recv_timeout(timeout) {
        Ok(answer) => answer.map_err(|e| Error::io(what("its answer"), e)),
        Err(_) => Err(late()),
    };
    // It may close its output and go on.
    let ended = loop {
        match child.try_wait() {
            Ok(None) if answer.is_ok() && Instant::now() < give_up => std::thread::sleep(HELPER_PAUSE),
            Ok(Some(_)) => break true,
            _ => break false,
        }
    };
    if !ended {
        // Gone meanwhile is as good.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| Error::io(what("wait"), e))?;
    let answer = answer?;
    if !ended {
        return Err(late());
    }
    // On success the reader has sent its answer and is at its end.
    let _ = reader.join();
    if !status.success() {
        if String::from_utf8_lossy(&answer).contains("credentials not found") {
            return Ok(None);
        }
        return Err(Error::new(ErrorKind::Denied, what(&format!("it failed ({status})"))));
    }
    let text = String::from_utf8(answer);
    text.map(Some).map_err(|_| Error::new(ErrorKind::Invalid, what("its answer is not the expected JSON")))
}

fn read_answer(name: &str, server: &str, answer: &str) -> Result<Credentials> {
    let answer: HelperAnswer = serde_json::from_str(answer).map_err(|_| {
        let why = format!(
            "credential helper docker-credential-{name} for {server}: its answer is not the expected JSON"
        );
        Error::new(ErrorKind::Invalid, why)
    })?;
    let secret = Secret(answer.secret);
    Ok(match answer.username.as_str() {
        "<token>" => Credentials::IdentityToken(secret),
        _ => Credentials::Basic { user: answer.username, password: secret },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(user: &str, password: &str) -> Credentials {
        Credentials::Basic { user: user.into(), password: Secret::new(password) }
    }

    #[test]
    fn secrets_do_not_show() {
        let shown = format!(
            "{:?} {:?} {:?}",
            basic("u", "hunter2"),
            Credentials::IdentityToken(Secret::new("hunter2")),
            basic("u", "hunter2").basic_header(),
        );
        assert!(!shown.contains("hunter2") && !shown.contains(&STANDARD.encode("u:hunter2")), "{shown}");
        let err = Credentials::from_base64("aHVudGVyMg==").unwrap_err();
        assert!(!err.to_string().contains("hunter2"));
        assert!(Credentials::from_base64("not base64!").is_err());
        assert_eq!(Credentials::from_base64("dTpwOnE=").unwrap(), basic("u", "p:q"));
    }

    #[test]
    fn the_most_specific_entry_of_the_first_file_wins() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("auth.json"), dir.path().join("config.json"));
        let entry = |s: &str| format!(r#"{{"auth":"{}"}}"#, STANDARD.encode(s));
        std::fs::write(
            &first,
            format!(
                r#"{{"auths":{{"r.io":{},"r.io/team":{},"https://index.docker.io/v1/":{},"tok.io":{{"identitytoken":"it"}},"empty.io":{{}}}}}}"#,
                entry("host:1"),
                entry("team:2"),
                entry("hub:3"),
            ),
        )
        .unwrap();
        std::fs::write(
            &second,
            format!(r#"{{"auths":{{"http://other.io:5000":{},"r.io":{}}}}}"#, entry("o:4"), entry("x:5")),
        )
        .unwrap();
        let files = AuthFiles::new(vec![dir.path().join("missing.json"), first, second.clone()]);
        assert_eq!(files.lookup("r.io", "team/app").unwrap(), basic("team", "2"));
        assert_eq!(files.lookup("r.io", "teammates/app").unwrap(), basic("host", "1"));
        assert_eq!(files.lookup("docker.io", "library/debian").unwrap(), basic("hub", "3"));
        assert_eq!(files.lookup("registry-1.docker.io", "library/debian").unwrap(), basic("hub", "3"));
        assert_eq!(files.lookup("other.io:5000", "a").unwrap(), basic("o", "4"));
        assert_eq!(files.lookup("tok.io", "a").unwrap(), Credentials::IdentityToken(Secret::new("it")));
        assert_eq!(files.lookup("empty.io", "a").unwrap(), Credentials::Anonymous);
        assert_eq!(files.lookup("none.io", "a").unwrap(), Credentials::Anonymous);

        std::fs::write(&second, r#"{"auths":{"r.io":{"auth":7}}}"#).unwrap();
        let err = AuthFiles::new(vec![second]).lookup("r.io", "a").unwrap_err();
        assert!(err.kind() == ErrorKind::Invalid && err.to_string().contains("config.json"), "{err}");
    }

    #[test]
    fn files_are_found_as_docker_and_podman_find_them() {
        let files = |set: &[(&str, &str)]| {
            AuthFiles::from_variables(|name| {
                set.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v))
            })
            .files
        };
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(files(&[("REGISTRY_AUTH_FILE", "/x"), ("HOME", "/h")]), paths(&["/x"]));
        assert_eq!(
            files(&[("DOCKER_CONFIG", "/d"), ("HOME", "/h"), ("XDG_RUNTIME_DIR", "/r")]),
            paths(&[
                "/d/config.json",
                "/r/containers/auth.json",
                "/h/.config/containers/auth.json",
                "/h/.docker/config.json"
            ])
        );
    }

    #[test]
    fn helpers_answer_refuse_or_fail() {
        let run = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.arg("-c").arg(script);
            let answer = run_helper(command, "test", "r.io", HELPER_TIMEOUT)?;
            answer.map(|answer| read_answer("test", "r.io", &answer)).transpose()
        };
        let found =
            run(r#"read s; echo "{\"ServerURL\":\"$s\",\"Username\":\"u\",\"Secret\":\"$s!\"}""#).unwrap();
        assert_eq!(found, Some(basic("u", "r.io!")));
        let token = run(r#"echo '{"Username":"<token>","Secret":"t"}'"#).unwrap();
        assert_eq!(token, Some(Credentials::IdentityToken(Secret::new("t"))));
        assert_eq!(run("echo 'credentials not found in native keychain'; exit 1").unwrap(), None);
        assert_eq!(run("exit 3").unwrap_err().kind(), ErrorKind::Denied);
        assert_eq!(run("echo hello").unwrap_err().kind(), ErrorKind::Invalid);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exec >&-; exec sleep 1000"]);
        let hangs = run_helper(command, "test", "r.io", Duration::from_millis(20));
        assert_eq!(hangs.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(ask_helper("../evil", "r.io").unwrap_err().kind(), ErrorKind::Invalid);
    }
}
