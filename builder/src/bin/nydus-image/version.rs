//! Who this binary is.

/// Version with the commit, as JSON output states it.
pub const DESCRIBE: &str = concat!(env!("NYDUS_DESCRIBE"), "-", env!("NYDUS_COMMIT"));

/// The text of `--version`: labels and values separated by tabs, the place of the program's
/// name left empty.
pub fn block() -> &'static str {
    concat!(
        "\rVersion: \t",
        env!("NYDUS_DESCRIBE"),
        "\nGit Commit: \t",
        env!("NYDUS_COMMIT"),
        "\nBuild Time: \t",
        env!("NYDUS_BUILD_TIME"),
        "\nProfile: \t",
        env!("NYDUS_PROFILE"),
        "\nRustc: \t",
        env!("NYDUS_RUSTC"),
        "\n"
    )
}
