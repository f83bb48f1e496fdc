//! Who this binary is: the text of `--version` and the `version` object of the API.
//!
//! A supervisor compares the commit in the one with the commit in the other to decide on a
//! hot upgrade, so both come from here.

use serde::Serialize;

include!(concat!(env!("OUT_DIR"), "/identity.rs"));

/// The `version` member of daemon info.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BuildInfo {
    /// See [`DESCRIBE`].
    pub package_ver: &'static str,
    /// See [`GIT_COMMIT`].
    pub git_commit: &'static str,
    /// See [`BUILD_TIME`].
    pub build_time: &'static str,
    /// See [`PROFILE`].
    pub profile: &'static str,
    /// See [`RUSTC`].
    pub rustc: &'static str,
}

/// This build.
pub const BUILD: BuildInfo = BuildInfo {
    package_ver: DESCRIBE,
    git_commit: GIT_COMMIT,
    build_time: BUILD_TIME,
    profile: PROFILE,
    rustc: RUSTC,
};
