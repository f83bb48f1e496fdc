//! Query strings: `name=value`, percent-encoded or not, `+` for a space (contract 3.1).

/// The decoded value of `name` in a query string.
pub(super) fn parameter(query: &str, name: &str) -> Option<String> {
    query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| decode(value))
}

fn decode(text: &str) -> String {
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
    String::from_utf8_lossy(&bytes).into_owned()
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
            ("mountpoint=%C3%A4%FF", Some("ä\u{fffd}")),
            ("mountpoint", Some("")),
            ("mountpoints=/a", None),
            ("", None),
        ] {
            assert_eq!(parameter(query, "mountpoint").as_deref(), value, "{query}");
        }
    }
}
