//! Configuration that changes under a mount: contract 3.7.

use std::fs;

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use serde_json::{Value, json};
use tests::daemon::{Daemon, DaemonOptions};
use tests::journey::Journey;
use tests::registry::Registry;
use tests::relay::{Bearer, Relay};
use tests::{Result, command, needs_mounts, needs_programs, recipes};

use super::{Site, ask, get};

const USER: &str = "reader";
const PASSWORD: &str = "correct-horse-battery";

fn put(daemon: &Daemon, id: &str, document: &Value) -> Result<u16> {
    Ok(ask(daemon, "PUT", &format!("/api/v1/config{id}"), &document.to_string())?.status)
}

/// What is set is given back, by id and for all; an id need not be mounted; nothing else is taken.
#[test]
fn what_is_set_is_given_back() -> Result<()> {
    needs_mounts!();
    let site = Site::new()?;
    let daemon = site.options().start()?;
    ensure!(get(&daemon, "/api/v1/config?id=/")? == json!({}), "something was set");
    ensure!(get(&daemon, "/api/v1/config")? == json!({}), "something was set");
    for value in ["first", "c2Vjb25kOnNlY29uZA=="] {
        ensure!(put(&daemon, "?id=/", &json!({ "registry_auth": value }))? == 204, "{value}");
        ensure!(get(&daemon, "/api/v1/config?id=%2F")? == json!({ "registry_auth": value }), "{value}");
    }
    ensure!(put(&daemon, "?id=/not-there", &json!({ "proxy_url": "http://proxy:3128" }))? == 204, "refused");
    ensure!(
        put(&daemon, "?id=/", &json!({ "dragonfly_scheduler_endpoint": "http://d:8002" }))? == 204,
        "refused"
    );
    ensure!(put(&daemon, "?id=/", &json!({ "registry_auth": "x", "unknown": "y" }))? == 500, "taken");
    let all = json!({
        "/:dragonfly_scheduler_endpoint": "http://d:8002",
        "/:registry_auth": "c2Vjb25kOnNlY29uZA==",
        "/not-there:proxy_url": "http://proxy:3128",
    });
    let found = get(&daemon, "/api/v1/config")?;
    ensure!(found == all, "{found}");
    Ok(())
}

/// A login that is renewed holds from the next request on, in both directions, and appears nowhere.
#[test]
fn a_renewed_login_is_used_by_the_next_request() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let journey = Journey::start(&recipes::tiny())?;
    let registry = Registry::open()?;
    let login = Bearer { credentials: Some((USER.to_owned(), PASSWORD.to_owned())) };
    let relay = Relay::with_tokens(registry.address(), login)?;
    let host = relay.address().to_string();
    let encode =
        |password: &str| base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{password}"));
    let (right, wrong) = (encode(PASSWORD), encode("of-last-week"));

    let docker = journey.path("docker");
    fs::create_dir_all(&docker)?;
    fs::write(
        docker.join("config.json"),
        json!({ "auths": { host.as_str(): { "auth": right } } }).to_string(),
    )?;
    let reference = relay.reference("some/repository");
    let source = journey.source.reference();
    let arguments = [source.as_str(), &reference, "--batch-size", "0"];
    let mut convert = tests::journey::nydus_image("convert", arguments);
    command::run(convert.env("DOCKER_CONFIG", &docker))?;
    // The same image once more, for its bootstrap.
    let bootstrap = journey.path("image.boot");
    journey.convert("nydus", &[])?.save_bootstrap(&bootstrap)?;

    let config = journey.path("config.json");
    let document = json!({
        "device": {
            "id": "/renewed",
            "backend": { "type": "registry", "config": {
                "scheme": "http", "host": host, "repo": "some/repository", "auth": wrong, "proxy": { "url": "" },
            } },
            "cache": { "type": "blobcache", "config": { "work_dir": journey.path("cache") } },
        },
        "mode": "direct", "read_timeout": 20, "amplify_io": 0, "fs_prefetch": { "enable": false }, "trace": "off",
    });
    fs::write(&config, document.to_string())?;
    let daemon = DaemonOptions::bootstrap(&bootstrap, &config).start()?;
    let reads = |file: &str| fs::read(daemon.root().join(file)).is_ok();

    ensure!(!reads("data/noise-a"), "the wrong login was good enough");
    ensure!(put(&daemon, "?id=/", &json!({ "registry_auth": right }))? == 204, "refused");
    ensure!(reads("data/noise-a"), "the right login was not used: {}", daemon.log());
    let given = relay.tokens_given();
    ensure!(given > 0, "no token was given");
    // The token of the good login would still be good: it is dropped with its login.
    ensure!(put(&daemon, "?id=/renewed", &json!({ "registry_auth": wrong }))? == 204, "refused");
    ensure!(!reads("data/noise-b"), "the token of an old login was used");
    ensure!(put(&daemon, "?id=/renewed", &json!({ "registry_auth": right }))? == 204, "refused");
    ensure!(reads("data/noise-b"), "the right login was not used again");
    ensure!(relay.tokens_given() > given, "the old token came back");
    ensure!(put(&daemon, "?id=/", &json!({ "registry_auth": "no base64" }))? == 400, "taken");
    let kept = get(&daemon, "/api/v1/config?id=/")?;
    ensure!(kept == json!({ "registry_auth": right }), "{kept}");

    let mut told = daemon.log();
    for path in
        ["/api/v1/daemon", "/api/v1/daemon/events", "/api/v1/metrics/backend", "/api/v1/why", "/metrics"]
    {
        let answer = ask(&daemon, "GET", path, "")?;
        told.push_str(&String::from_utf8(answer.body).context("no text")?);
    }
    for secret in [PASSWORD, "of-last-week", &right, &wrong, "no base64"] {
        ensure!(!told.contains(secret), "{secret} is told:\n{told}");
    }
    Ok(())
}
