//! Query strings: `name=value`, percent-encoded or not, `+` for a space (contract 3.1).

/// The parameters of a request, decoded.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// `None` if a value is not UTF-8: two mountpoints must not become one.
    pub fn parse(query: &str) -> Option<Self> {
        let pairs = query.split('&').map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((name.to_owned(), decode(value)?))
        });
        Some(Self(pairs.collect::<Option<_>>()?))
    }

    /// The first value of `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |b: &u8| char::from(*b).to_digit(16);
        let byte;
        (rest, byte) = match (first, tail) {
            (b'%', [high, low, after @ ..]) if hex(high).zip(hex(low)).is_some() => {
                let value = hex(high).zip(hex(low)).map_or(0, |(high, low)| high << 4 | low);
                // Two hex digits make one byte.
                (after, value as u8)
            }
            (b'+', _) => (tail, b' '),
            (other, _) => (tail, *other),
        };
        bytes.push(byte);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_decoded() {
        for (query, value) in [
            ("mountpoint=%2Fabc", Some("/abc")),
            ("a=b&mountpoint=/x+y", Some("/x y")),
            ("mountpoint=%zz%2", Some("%zz%2")),
            ("mountpoint=%C3%A4", Some("ä")),
            ("mountpoint", Some("")),
            ("mountpoint=/a&mountpoint=/b", Some("/a")),
            ("mountpoints=/a", None),
            ("", None),
        ] {
            assert_eq!(Query::parse(query).unwrap().get("mountpoint"), value, "{query}");
        }
        for query in ["mountpoint=%FF", "mountpoint=/a&id=%C3"] {
            assert!(Query::parse(query).is_none(), "{query}");
        }
    }
}
