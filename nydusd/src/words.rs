//! Words in messages for people.

/// A number of things: `1 chunk`, `2 chunks`.
pub fn counted(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// `text` from an image, a path or a client, for a terminal: it can not move the cursor or do worse.
pub fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_debug().collect() } else { vec![c] };
    text.chars().flat_map(shown).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_controls_a_terminal_is_escaped() {
        assert_eq!(super::printable("/a b's/\u{fc}\x1b[2J\n"), "/a b's/\u{fc}\\u{1b}[2J\\n");
    }

    #[test]
    fn one_is_no_plural() {
        assert_eq!(
            [0, 1, 2].map(|number| super::counted(number, "chunk")),
            ["0 chunks", "1 chunk", "2 chunks"]
        );
    }
}
