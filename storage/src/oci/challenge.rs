//! The challenges of a `WWW-Authenticate` header (RFC 9110 section 11.6.1).

use reqwest::Url;

use crate::backend::http::parse_url;

/// A way to log in that a registry offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token from the server at `realm`.
    Bearer {
        /// The token server.
        realm: Url,
        /// The name of the registry as its token server knows it.
        service: Option<String>,
        /// What the refused request needs.
        scope: Option<String>,
    },
}

impl Challenge {
    /// The known challenges of one header value; others and malformed ones are left out.
    pub fn parse(value: &str) -> Vec<Self> {
        let mut found = Vec::new();
        let mut rest = value;
        let mut open: Option<(String, Vec<(String, String)>)> = None;
        loop {
            rest = rest.trim_start_matches([' ', '\t', ',']);
            let end = rest.find([' ', '\t', ',', '=', '"']).unwrap_or(rest.len());
            let (word, tail) = rest.split_at(end);
            if word.is_empty() {
                // The end, or a character that can not stand here: what follows is not understood.
                break;
            }
            let after = tail.trim_start_matches([' ', '\t']);
            match (after.strip_prefix('='), &mut open) {
                (Some(value), Some((_, parameters))) => {
                    let Some((value, tail)) = parameter_value(value.trim_start_matches([' ', '\t'])) else {
                        break;
                    };
                    parameters.push((word.to_ascii_lowercase(), value));
                    rest = tail;
                }
                (Some(_), None) => break,
                (None, _) => {
                    found.extend(open.take());
                    open = Some((word.to_ascii_lowercase(), Vec::new()));
                    rest = tail;
                }
            }
        }
        found.extend(open);
        found.into_iter().filter_map(|(scheme, parameters)| Self::known(&scheme, parameters)).collect()
    }

    fn known(scheme: &str, parameters: Vec<(String, String)>) -> Option<Self> {
        let get = |name: &str| parameters.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
        match scheme {
            "basic" => Some(Self::Basic),
            "bearer" => Some(Self::Bearer {
                realm: parse_url("realm", &get("realm")?).ok()?,
                service: get("service"),
                scope: get("scope"),
            }),
            _ => None,
        }
    }
}

/// A quoted string or a token, and what follows it; `None` if a quote is not closed.
fn parameter_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: Url::parse(realm).unwrap(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[test]
    fn challenges_are_read() {
        let table = [
            ("Basic realm=\"Registry\"", vec![Challenge::Basic]),
            ("basic", vec![Challenge::Basic]),
            (
                r#"Bearer realm="https://a.io/token",service="r.io",scope="repository:a/b:pull,push""#,
                vec![bearer("https://a.io/token", Some("r.io"), Some("repository:a/b:pull,push"))],
            ),
            (
                r#"Bearer realm = "http://a:1/t" , service=x, Basic realm="a \"b\", c""#,
                vec![bearer("http://a:1/t", Some("x"), None), Challenge::Basic],
            ),
            (r#"Negotiate, Bearer realm="ftp://x/""#, vec![]),
            (r#"Bearer service="x""#, vec![]),
            (r#"Bearer realm="unclosed"#, vec![]),
            ("=,=\"", vec![]),
            ("", vec![]),
        ];
        for (text, want) in table {
            assert_eq!(Challenge::parse(text), want, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_header_is_answered(text in ".*") {
            let _ = Challenge::parse(&text);
        }
    }
}
