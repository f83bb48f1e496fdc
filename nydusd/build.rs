//! Puts the build's identity into the binary: `--version` and the API must name the
//! same commit, and never an empty one.

use std::process::Command;

/// Standard output of a command that succeeded, trimmed.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}

fn main() {
    let package = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let commit = output("git", &["rev-parse", "HEAD"]).unwrap_or_else(|| format!("v{package}"));
    let describe = output("git", &["describe", "--tags", "--always", "--dirty"])
        .filter(|text| text.starts_with('v'))
        .unwrap_or_else(|| format!("v{package}"));
    // The commit's date, not the clock's: the same commit builds the same binary.
    let time = output("git", &["show", "-s", "--format=%cI", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let profile = std::env::var("PROFILE").unwrap_or_default();
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let rustc = output(&rustc, &["--version"]).unwrap_or_else(|| "unknown".into());
    for (name, value) in [
        ("NYDUS_COMMIT", &commit),
        ("NYDUS_DESCRIBE", &describe),
        ("NYDUS_BUILD_TIME", &time),
        ("NYDUS_PROFILE", &profile),
        ("NYDUS_RUSTC", &rustc),
    ] {
        println!("cargo:rustc-env={name}={value}");
    }
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = output("git", &["rev-parse", "--git-path", name]) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    println!("cargo:rerun-if-changed=build.rs");
}
