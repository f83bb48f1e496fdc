//! The server is held to its own description: each path, method and status of `misc/openapi.json`
//! is asked for, and each answer has the shape that is promised.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use tests::daemon::Daemon;
use tests::relay::Rule;
use tests::scene::Scene;
use tests::{Result, needs_mounts, needs_programs, recipes};

use super::{Answer, Site, ask, get, header};

/// Answers that need several mounts, a supervisor or a take-over: asked for where those are tested.
const ELSEWHERE: [(&str, &str, u16); 15] = [
    ("POST", "/api/v1/mount", 204),
    ("POST", "/api/v1/mount", 500),
    ("POST", "/api/v1/mount", 503),
    ("PUT", "/api/v1/mount", 204),
    ("PUT", "/api/v1/mount", 500),
    ("PUT", "/api/v1/mount", 503),
    ("DELETE", "/api/v1/mount", 204),
    ("DELETE", "/api/v1/mount", 500),
    ("DELETE", "/api/v1/mount", 503),
    ("PUT", "/api/v1/daemon/start", 204),
    ("PUT", "/api/v1/daemon/fuse/sendfd", 204),
    ("PUT", "/api/v1/daemon/fuse/sendfd", 503),
    ("PUT", "/api/v1/daemon/fuse/takeover", 204),
    ("PUT", "/api/v1/daemon/fuse/takeover", 500),
    ("POST", "/api/v1/trace/push", 404),
];

/// Checks `value` against the part of JSON Schema that the description uses. Another keyword is an
/// error: what is not checked must not look as if it were.
fn check(document: &Value, schema: &Value, value: &Value, place: &str) -> Result<()> {
    let wrong = |what: &str| format!("{place}: {what}: {value}");
    for (keyword, rule) in schema.as_object().context("a schema is an object")? {
        let list = || rule.as_array().with_context(|| format!("{place}: {keyword}"));
        let count = || rule.as_u64().with_context(|| format!("{place}: {keyword}"));
        match keyword.as_str() {
            "description" => {}
            "$ref" => check(document, resolve(document, rule)?, value, place)?,
            "anyOf" => {
                let fits = |schema: &Value| check(document, schema, value, place).is_ok();
                ensure!(list()?.iter().any(fits), wrong("none of the shapes"));
            }
            "const" => ensure!(value == rule, wrong("not the constant")),
            "enum" => ensure!(list()?.contains(value), wrong("none of the words")),
            "type" => {
                let is = match rule.as_str() {
                    Some("object") => value.is_object(),
                    Some("array") => value.is_array(),
                    Some("string") => value.is_string(),
                    Some("integer") => value.is_i64() || value.is_u64(),
                    Some("number") => value.is_number(),
                    Some("boolean") => value.is_boolean(),
                    Some("null") => value.is_null(),
                    other => bail!("{place}: type {other:?}"),
                };
                ensure!(is, wrong(&rule.to_string()));
            }
            "minimum" => ensure!(value.as_f64() >= rule.as_f64(), wrong("too small")),
            "maximum" => ensure!(value.as_f64() <= rule.as_f64(), wrong("too large")),
            "minItems" => ensure!(
                value.as_array().is_none_or(|v| v.len() as u64 >= count().unwrap_or(0)),
                wrong("too short")
            ),
            "maxItems" => ensure!(
                value.as_array().is_none_or(|v| v.len() as u64 <= count().unwrap_or(0)),
                wrong("too long")
            ),
            "items" => {
                for (at, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(document, rule, item, &format!("{place}[{at}]"))?;
                }
            }
            "required" => {
                for name in list()?.iter().filter_map(Value::as_str) {
                    ensure!(value.get(name).is_some(), wrong(&format!("no {name}")));
                }
            }
            "properties" => {
                for (name, schema) in rule.as_object().context("properties")? {
                    if let Some(member) = value.get(name) {
                        check(document, schema, member, &format!("{place}.{name}"))?;
                    }
                }
            }
            "additionalProperties" => {
                let known = |name: &str| schema["properties"].get(name).is_some();
                let others = value.as_object().into_iter().flatten().filter(|(name, _)| !known(name));
                for (name, member) in others {
                    match rule {
                        Value::Bool(allowed) => ensure!(*allowed, wrong(&format!("{name} is not described"))),
                        schema => check(document, schema, member, &format!("{place}.{name}"))?,
                    }
                }
            }
            other => bail!("{place}: this test does not know {other}"),
        }
    }
    Ok(())
}

/// What `#/a/b` points to.
fn resolve<'a>(document: &'a Value, reference: &Value) -> Result<&'a Value> {
    let pointer = reference.as_str().and_then(|text| text.strip_prefix('#')).context("no local reference")?;
    document.pointer(pointer).with_context(|| format!("{reference} leads nowhere"))
}

/// The description, and what has been asked of it.
struct Description {
    document: Value,
    asked: BTreeSet<(String, String, u16)>,
}

impl Description {
    /// Notes an answer and checks that it is one of those described.
    fn hold(&mut self, method: &str, path: &str, answer: &Answer) -> Result<()> {
        let place = format!("{method} {path}");
        let path = path.split('?').next().unwrap_or(path);
        let operation = &self.document["paths"][path][method.to_lowercase()];
        let mut described = &operation["responses"][answer.status.to_string()];
        ensure!(described.is_object(), "{place}: {} is not described: {answer:?}", answer.status);
        if let Some(reference) = described.get("$ref") {
            described = resolve(&self.document, reference)?;
        }
        match described["content"].as_object().and_then(|content| content.iter().next()) {
            None => ensure!(answer.body.is_empty() && answer.status == 204, "{place}: {answer:?}"),
            Some((kind, content)) => {
                let found = header(&answer.head, "content-type").with_context(|| format!("{answer:?}"))?;
                ensure!(found.split(';').next() == Some(kind), "{place}: {found}");
                let value = match kind.as_str() {
                    "application/json" => answer.json()?,
                    _ => Value::String(String::from_utf8(answer.body.clone())?),
                };
                check(&self.document, &content["schema"], &value, &place)?;
            }
        }
        self.asked.insert((method.to_owned(), path.to_owned(), answer.status));
        Ok(())
    }

    fn ask(&mut self, daemon: &Daemon, method: &str, path: &str, body: &str, status: u16) -> Result<Answer> {
        let answer = ask(daemon, method, path, body)?;
        ensure!(answer.status == status, "{method} {path}: {answer:?}");
        self.hold(method, path, &answer)?;
        Ok(answer)
    }
}

#[test]
fn the_server_keeps_to_its_description() -> Result<()> {
    needs_mounts!();
    needs_programs!("docker-registry");
    let text = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../misc/openapi.json"))?;
    let mut description = Description { document: serde_json::from_slice(&text)?, asked: BTreeSet::new() };
    local_image(&mut description)?;
    remote_image(&mut description)?;

    let mut described = BTreeSet::new();
    for (path, item) in description.document["paths"].as_object().context("no paths")? {
        for (method, operation) in item.as_object().context("no methods")? {
            for status in operation["responses"].as_object().context("no responses")?.keys() {
                described.insert((method.to_uppercase(), path.clone(), status.parse()?));
            }
        }
    }
    let mut asked = description.asked;
    for (method, path, status) in ELSEWHERE {
        ensure!(
            asked.insert((method.to_owned(), path.to_owned(), status)),
            "{method} {path} {status} was asked"
        );
    }
    let missing: Vec<_> = described.difference(&asked).collect();
    let unknown: Vec<_> = asked.difference(&described).collect();
    ensure!(missing.is_empty() && unknown.is_empty(), "never asked: {missing:?}; not described: {unknown:?}");
    Ok(())
}

/// What a daemon with one image of this host answers.
fn local_image(description: &mut Description) -> Result<()> {
    let site = Site::new()?;
    let daemon = site.options().start()?;
    let served = description.ask(&daemon, "GET", "/api/v1/openapi", "", 200)?.json()?;
    ensure!(served == description.document, "another description is served");
    // Nothing is served that is not described.
    for (path, item) in served["paths"].as_object().context("no paths")? {
        for method in ["GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"] {
            if item.get(method.to_lowercase()).is_none() {
                let answer = ask(&daemon, method, path, "")?;
                ensure!(
                    answer.status == 400 && answer.message()? == "BadRequest",
                    "{method} {path}: {answer:?}"
                );
            }
        }
    }

    description.ask(&daemon, "GET", "/api/v1/trace", "", 404)?;
    fs::read(daemon.root().join("data/one-chunk"))?;
    let level = r#"{"log_level":"info"}"#;
    for (method, path, body, status) in [
        ("GET", "/api/v1/daemon", "", 200),
        ("GET", "/api/v2/daemon", "", 200),
        ("PUT", "/api/v1/daemon", level, 204),
        ("PUT", "/api/v1/daemon", "", 400),
        ("PUT", "/api/v1/daemon", r#"{"log_level":"?"}"#, 500),
        ("PUT", "/api/v2/daemon", level, 204),
        ("PUT", "/api/v2/daemon", "{", 400),
        ("PUT", "/api/v2/daemon", r#"{"log_level":""}"#, 500),
        ("GET", "/api/v1/daemon/events", "", 200),
        ("PUT", "/api/v1/daemon/start", "", 400),
        ("PUT", "/api/v1/daemon/fuse/sendfd", "", 500),
        ("PUT", "/api/v1/daemon/fuse/takeover", "", 400),
        ("GET", "/api/v1/daemon/backend?mountpoint=/", "", 200),
        ("GET", "/api/v1/daemon/backend", "", 400),
        ("GET", "/api/v1/daemon/backend?mountpoint=/none", "", 500),
        ("POST", "/api/v1/mount", "{}", 400),
        ("PUT", "/api/v1/mount", "{}", 400),
        ("DELETE", "/api/v1/mount", "", 400),
        ("PUT", "/api/v1/config?id=/", r#"{"registry_auth":"x"}"#, 204),
        ("PUT", "/api/v1/config?id=/", "[]", 400),
        ("PUT", "/api/v1/config?id=/", r#"{"log":"x"}"#, 500),
        ("GET", "/api/v1/config?id=/", "", 200),
        ("GET", "/api/v1/config", "", 200),
        ("GET", "/api/v1/metrics", "", 200),
        ("GET", "/api/v1/metrics?id=/none", "", 404),
        ("GET", "/api/v1/metrics/files", "", 200),
        ("GET", "/api/v1/metrics/files?latest=true", "", 200),
        ("GET", "/api/v1/metrics/files?id=/none", "", 404),
        ("GET", "/api/v1/metrics/pattern", "", 200),
        ("GET", "/api/v1/metrics/pattern?id=/none", "", 404),
        ("GET", "/api/v1/metrics/backend", "", 200),
        ("GET", "/api/v1/metrics/backend?id=/none", "", 404),
        ("GET", "/api/v1/metrics/blobcache", "", 200),
        ("GET", "/api/v1/metrics/blobcache?id=/none", "", 404),
        ("GET", "/api/v1/metrics/inflight", "", 204),
        ("GET", "/metrics", "", 200),
        ("GET", "/api/v1/why", "", 200),
        ("GET", "/api/v1/why?id=/none", "", 404),
        ("GET", "/api/v1/trace", "", 200),
        ("GET", "/api/v1/trace?format=optimize", "", 200),
        ("GET", "/api/v1/trace?format=other", "", 400),
        ("POST", "/api/v1/trace/push", "", 500),
        ("GET", "/api/v1/prefetch", "", 200),
        ("GET", "/api/v1/prefetch?id=x", "", 400),
        ("GET", "/api/v1/prefetch?id=99", "", 404),
        ("POST", "/api/v1/prefetch", "{}", 400),
        ("POST", "/api/v1/prefetch", r#"{"mountpoint":"/none","all":true}"#, 404),
        ("DELETE", "/api/v1/prefetch", "", 400),
        ("DELETE", "/api/v1/prefetch?id=99", "", 404),
        ("GET", "/api/v2/blobs", "", 400),
        ("GET", "/api/v2/blobs?domain_id=d", "", 501),
        ("PUT", "/api/v2/blobs", "", 400),
        ("PUT", "/api/v2/blobs", "{}", 501),
        ("DELETE", "/api/v2/blobs?blob_id=b", "", 204),
        ("DELETE", "/api/v2/blobs", "", 400),
        ("DELETE", "/api/v2/blobs?domain_id=d&blob_id=b", "", 501),
    ] {
        description.ask(&daemon, method, path, body, status)?;
    }
    let job = description.ask(&daemon, "POST", "/api/v1/prefetch", r#"{"all":true}"#, 200)?.json()?;
    let path = format!("/api/v1/prefetch?id={}", job["id"]);
    description.ask(&daemon, "GET", &path, "", 200)?;
    description.ask(&daemon, "GET", "/api/v1/prefetch", "", 200)?;
    description.ask(&daemon, "DELETE", &path, "", 204)?;
    description.ask(&daemon, "PUT", "/api/v1/daemon/exit", "", 204)?;
    Ok(())
}

/// What only a daemon with an image of a registry answers.
fn remote_image(description: &mut Description) -> Result<()> {
    let scene = Scene::set(&recipes::tiny(), &[])?;
    let daemon = scene.options().start()?;
    // Before any read: what is read is widened to what follows it.
    daemon.wait_until("nothing is fetched ahead", |daemon| {
        Ok((get(daemon, "/api/v1/metrics/blobcache")?["prefetch_workers"] == 0).then_some(()))
    })?;
    scene.relay.set(Rule::Stall);
    let path = daemon.root().join("data/one-chunk");
    let reader = std::thread::spawn(move || fs::read(path));
    let waiting = daemon.wait_until("a read is in flight", |daemon| {
        let answer = ask(daemon, "GET", "/api/v1/metrics/inflight", "")?;
        Ok((answer.status == 200).then_some(answer))
    })?;
    description.hold("GET", "/api/v1/metrics/inflight", &waiting)?;
    scene.relay.set(Rule::Pass);
    ensure!(reader.join().is_ok_and(|read| read.is_ok()), "the read failed");
    description.ask(&daemon, "POST", "/api/v1/trace/push", "", 200)?;
    description.ask(&daemon, "GET", "/api/v1/metrics/backend", "", 200).map(drop)
}

/// The test's own judge refuses what it should.
#[test]
fn answers_of_another_shape_are_refused() -> Result<()> {
    let text = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../misc/openapi.json"))?;
    let document: Value = serde_json::from_slice(&text)?;
    let error = json!({ "$ref": "#/components/schemas/Error" });
    check(&document, &error, &json!({ "code": "UNDEFINED", "message": "x" }), "it")?;
    for wrong in [
        json!({ "code": "UNDEFINED" }),
        json!({ "code": "OTHER", "message": "x" }),
        json!({ "code": "UNDEFINED", "message": 7 }),
        json!({ "code": "UNDEFINED", "message": "x", "more": 1 }),
        json!([]),
    ] {
        ensure!(check(&document, &error, &wrong, "it").is_err(), "{wrong}");
    }
    let inflight = json!({ "$ref": "#/components/schemas/Inflight" });
    ensure!(check(&document, &inflight, &json!([]), "it").is_err(), "an empty list is a 204");
    ensure!(check(&document, &json!({ "patternProperties": {} }), &json!({}), "it").is_err(), "not checked");
    Ok(())
}
