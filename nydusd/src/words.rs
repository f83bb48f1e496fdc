//! Words in messages for people.

/// A number of things: `1 chunk`, `2 chunks`.
pub fn counted(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_is_no_plural() {
        assert_eq!(
            [0, 1, 2].map(|number| super::counted(number, "chunk")),
            ["0 chunks", "1 chunk", "2 chunks"]
        );
    }
}
