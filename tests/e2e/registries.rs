//! Every kind of registry that an image can come from, and go to.

use std::fs;
use std::path::Path;
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tests::command::{Finished, finish};
use tests::daemon::DaemonOptions;
use tests::journey::{Journey, nydus_image};
use tests::registry::{PASSWORD, Registry, RegistryOptions, USER};
use tests::relay::{Bearer, Relay};
use tests::tree::{Overlook, assert_same, scan};
use tests::{Result, ensure, needs_mounts, needs_programs, recipes};

/// A docker configuration that knows USER and PASSWORD for `host`.
fn login(directory: &Path, host: &str) -> Result<()> {
    fs::create_dir_all(directory)?;
    let auth = STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let text = serde_json::json!({ "auths": { host: { "auth": auth } } });
    fs::write(directory.join("config.json"), text.to_string())?;
    Ok(())
}

fn push(journey: &Journey, reference: &str, configure: impl Fn(&mut Command)) -> Result<Finished> {
    let mut program = nydus_image("convert", [journey.source.reference().as_str(), reference]);
    configure(&mut program);
    finish(&mut program)
}

/// htpasswd: refused without a login with a message that names the registry, served with one.
#[test]
fn basic_authentication() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry", "htpasswd");
    let journey = Journey::start(&recipes::tiny())?;
    let registry = Registry::start(RegistryOptions { basic: true, ..Default::default() })?;
    let host = registry.address().to_string();
    let reference = registry.reference("guarded");
    let (stranger, reader) = (journey.path("stranger"), journey.path("reader"));
    fs::create_dir_all(&stranger)?;
    login(&reader, &host)?;

    let refused = push(&journey, &reference, |program| _ = program.env("DOCKER_CONFIG", &stranger))?;
    ensure!(refused.code == Some(1) && refused.stderr.contains(&host), "{refused:?}");
    let pushed = push(&journey, &reference, |program| _ = program.env("DOCKER_CONFIG", &reader))?;
    ensure!(pushed.code == Some(0), "{pushed:?}");

    let options = DaemonOptions::image(&reference, &journey.path("cache"));
    let (code, log) = options.clone().environment("DOCKER_CONFIG", &stranger).refused()?;
    ensure!(code == Some(1) && log.contains(&host), "{log}");
    ensure!(!log.contains(PASSWORD), "a password is in the log");
    let daemon = options.environment("DOCKER_CONFIG", &reader).start()?;
    assert_same(&journey.reference()?, daemon.root(), Overlook::default())
}

/// Bearer tokens, with a login and for anybody; a token that dies in the middle is replaced.
#[test]
fn bearer_authentication() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let credentials = Some((USER.to_owned(), PASSWORD.to_owned()));
    for credentials in [None, credentials] {
        let journey = Journey::start(&recipes::tiny())?;
        let registry = Registry::open()?;
        let relay = Relay::with_tokens(registry.address(), Bearer { credentials: credentials.clone() })?;
        let config = journey.path("docker");
        fs::create_dir_all(&config)?;
        let reference = relay.reference("some/repository");
        if credentials.is_some() {
            let refused = push(&journey, &reference, |program| _ = program.env("DOCKER_CONFIG", &config))?;
            ensure!(refused.code == Some(1), "{refused:?}");
            login(&config, &relay.address().to_string())?;
        }
        let pushed = push(&journey, &reference, |program| _ = program.env("DOCKER_CONFIG", &config))?;
        ensure!(pushed.code == Some(0), "{pushed:?}");

        let options =
            DaemonOptions::image(&reference, &journey.path("cache")).environment("DOCKER_CONFIG", &config);
        let daemon = options.start()?;
        fs::read(daemon.root().join("data/noise-a"))?;
        let given = relay.tokens_given();
        relay.expire_tokens();
        scan(daemon.root())?;
        ensure!(relay.tokens_given() > given, "the daemon never asked for another token");
    }
    Ok(())
}

/// https with a private authority: refused without its certificate, served with it.
#[test]
fn private_authority() -> Result<()> {
    needs_mounts!();
    needs_programs!("umoci", "docker-registry", "openssl");
    let journey = Journey::start(&recipes::tiny())?;
    let registry = Registry::start(RegistryOptions { tls: true, ..Default::default() })?;
    let reference = registry.reference("secret");
    let refused = push(&journey, &reference, |_| ())?;
    ensure!(refused.code == Some(1), "{refused:?}");
    let pushed =
        push(&journey, &reference, |program| _ = program.arg("--ca-file").arg(registry.authority()))?;
    ensure!(pushed.code == Some(0), "{pushed:?}");

    let options = DaemonOptions::image(&reference, &journey.path("cache"));
    let (code, log) = options.refused()?;
    ensure!(code == Some(1), "{log}");
    let daemon = options.environment("SSL_CERT_FILE", registry.authority()).start()?;
    assert_same(&journey.reference()?, daemon.root(), Overlook::default())
}
