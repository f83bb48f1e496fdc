//! What a daemon's refusal means. Clients match its messages by name, so these are nested names in the manner of
//! `Outer(Inner("a sentence"))`; people get the sentence.

/// The sentence in a message of the API, or what the name in it means. What is neither is answered as it is.
pub fn sentence(message: &str) -> String {
    let mut inner = message;
    while let Some((name, rest)) = inner.split_once('(') {
        let Some(rest) = rest.strip_suffix(')').filter(|_| is_name(name)) else { break };
        inner = rest;
    }
    if let Some(text) = inner.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
        return unescaped(text).unwrap_or_else(|| text.to_owned());
    }
    match inner {
        "NoCounter" => {
            "there is no such mount, or several and none was named; see `nydusctl mounts`, and name one \
             with --id"
        }
        "NoTrace" => "no start of that image was recorded yet, or `trace` is off in its configuration",
        "ResponsePayloadType" => "no such value; levels of the log are trace, debug, info, warn and error",
        "NotReady" => "the daemon is not ready yet; ask again when `nydusctl info` says RUNNING",
        "Unsupported" => "this kind of daemon does not do that",
        "NoRoute" | "BadRequest" => {
            "the daemon does not know this request: it is of another release than nydusctl, or no nydusd"
        }
        // A name that is new is better told with what is around it.
        name if is_name(name) => message,
        text => text,
    }
    .to_owned()
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// Text as it was before Rust's `{:?}`.
fn unescaped(text: &str) -> Option<String> {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(next) = rest.next() {
        if next != '\\' {
            plain.push(next);
            continue;
        }
        plain.push(match rest.next()? {
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            '0' => '\0',
            'u' => {
                let (code, behind) = rest.as_str().strip_prefix('{')?.split_once('}')?;
                rest = behind.chars();
                char::from_u32(u32::from_str_radix(code, 16).ok()?)?
            }
            other => other,
        });
    }
    // Whatever the daemon repeats of others stays on its line.
    Some(
        plain
            .chars()
            .flat_map(|c| if c.is_control() { c.escape_debug().collect() } else { vec![c] })
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_get_the_sentence() {
        for (message, told) in [
            (r#"Mount(MountFilesystem(Other("already exists: /x (twice)")))"#, "already exists: /x (twice)"),
            (
                r#"Mount(MountFilesystem(Other("no \"config\" in 'it' \\ \u{e9}\u{1b}\n")))"#,
                "no \"config\" in 'it' \\ é\\u{1b}\\n",
            ),
            (r#"QueryString("want UTF-8")"#, "want UTF-8"),
            (r#"ParseBody(Error("missing field `config`"))"#, "missing field `config`"),
            ("Trace(push: connect to registry (down))", "push: connect to registry (down)"),
            ("Later(Unknown)", "Later(Unknown)"),
            ("no wrapping (at all)", "no wrapping (at all)"),
            ("", ""),
        ] {
            assert_eq!(sentence(message), told, "{message}");
        }
        for (message, words) in [
            ("Configure(ResponsePayloadType)", "trace, debug"),
            ("GlobalMetrics(Metrics(Stats(NoCounter)))", "--id"),
            ("Mount(DaemonAbnormal(NotReady))", "RUNNING"),
        ] {
            assert!(sentence(message).contains(words), "{message}");
        }
    }
}
