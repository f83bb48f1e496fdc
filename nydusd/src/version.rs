//! Who this binary is: the text of `--version` and the `version` object of the API.

use serde::Serialize;

/// Identity of this build. A supervisor compares [`GIT_COMMIT`] with the text of
/// `--version` to decide on a hot upgrade, so both come from here.
pub const GIT_COMMIT: &str = env!("NYDUS_COMMIT");

/// What clap prints after the program's name for `--version`.
pub const TEXT: &str = concat!(
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
);

/// The `version` member of daemon info.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BuildInfo {
    /// Nearest tag, or the package version.
    pub package_ver: &'static str,
    /// Commit of the source tree; never empty.
    pub git_commit: &'static str,
    /// Time of that commit, RFC 3339.
    pub build_time: &'static str,
    /// Cargo profile.
    pub profile: &'static str,
    /// Compiler.
    pub rustc: &'static str,
}

/// This build.
pub const BUILD: BuildInfo = BuildInfo {
    package_ver: env!("NYDUS_DESCRIBE"),
    git_commit: GIT_COMMIT,
    build_time: env!("NYDUS_BUILD_TIME"),
    profile: env!("NYDUS_PROFILE"),
    rustc: env!("NYDUS_RUSTC"),
};
