//! The binaries under test: those of this build, from the same target directory.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// `nydusd`.
pub fn nydusd() -> &'static Path {
    &binaries().nydusd
}

/// `nydusctl`.
pub fn nydusctl() -> &'static Path {
    &binaries().nydusctl
}

/// `nydus-image`.
pub fn nydus_image() -> &'static Path {
    &binaries().nydus_image
}

struct Binaries {
    nydusd: PathBuf,
    nydusctl: PathBuf,
    nydus_image: PathBuf,
}

fn binaries() -> &'static Binaries {
    static BINARIES: OnceLock<Binaries> = OnceLock::new();
    BINARIES.get_or_init(|| {
        // <target>/<profile directory>/deps/<this test>
        let test = std::env::current_exe().expect("a running program has a path");
        let directory = test.ancestors().nth(2).expect("cargo runs tests from <target>/<profile>/deps");
        build(directory);
        let find = |name: &str| {
            let path = directory.join(name);
            assert!(path.exists(), "{} is missing: run `cargo build --workspace --bins`", path.display());
            path
        };
        Binaries { nydusd: find("nydusd"), nydusctl: find("nydusctl"), nydus_image: find("nydus-image") }
    })
}

/// Brings the binaries up to date, so that a bare `cargo test` never judges yesterday's daemon.
/// Under `make test` they are, and this costs one look at time stamps: the same targets as there,
/// because other targets mean other features, and the environment without what cargo tells a test,
/// because build scripts (ring's) depend on it. Either would mean building everything twice.
fn build(directory: &Path) {
    let Some(cargo) = std::env::var_os("CARGO") else { return };
    let profile = match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let told = |name: &OsStr| {
        let name = name.to_string_lossy();
        ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_EXE_", "CARGO_CRATE_"]
            .iter()
            .any(|p| name.starts_with(p))
    };
    let mut command = Command::new(cargo);
    std::env::vars_os().filter(|(name, _)| told(name)).for_each(|(name, _)| {
        command.env_remove(name);
    });
    let status = command
        .args(["build", "--quiet", "--workspace", "--bins", "--tests", "--profile", profile])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .expect("cargo ran this test, so it starts");
    assert!(status.success(), "the binaries under test do not build");
}
