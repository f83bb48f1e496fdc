//! Build script of every crate with a binary: writes `identity.rs`, constants that name this build.
//!
//! `--version` and the API must name the same commit, and never an empty one. A release build asks
//! git again whenever the commit changes. Other profiles keep the commit of their first build:
//! naming each new one would compile these crates anew after every commit.

use std::path::Path;
use std::process::Command;

/// Standard output of a command that succeeded, trimmed.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}

/// The profile by its own name: cargo tells scripts only what it inherits from. They write to
/// `<target>/<profile>/build/<package>/out`.
fn profile(out: &Path) -> Option<&str> {
    let build = out.ancestors().find(|path| path.ends_with("build"))?;
    build.parent()?.file_name()?.to_str()
}

fn main() {
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let package = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let commit = output("git", &["rev-parse", "HEAD"]).unwrap_or_else(|| format!("v{package}"));
    let describe = output("git", &["describe", "--tags", "--always", "--dirty"])
        .filter(|text| text.starts_with('v'))
        .unwrap_or_else(|| format!("v{package}"));
    // The commit's date, not the clock's: the same commit builds the same binary.
    let time = output("git", &["show", "-s", "--format=%cI", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let profile = profile(&out).unwrap_or("unknown");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let rustc = output(&rustc, &["--version"]).unwrap_or_else(|| "unknown".into());
    // After the program's name: labels and values separated by tabs, the name overwritten.
    let block = format!(
        "\rVersion: \t{describe}\nGit Commit: \t{commit}\nBuild Time: \t{time}\nProfile: \t{profile}\nRustc: \t{rustc}\n"
    );
    let constants = [
        ("DESCRIBE", "Nearest tag, or the package version", &*describe),
        ("GIT_COMMIT", "Commit of the source tree; never empty", &commit),
        ("BUILD_TIME", "Time of that commit, RFC 3339", &time),
        ("PROFILE", "Cargo profile", profile),
        ("RUSTC", "Compiler", &rustc),
        ("BLOCK", "The text of `--version` after the program's name", &block),
    ]
    .map(|(name, what, value)| format!("/// {what}.\npub const {name}: &str = {value:?};\n"));
    std::fs::write(out.join("identity.rs"), constants.concat()).expect("cargo makes OUT_DIR");

    println!("cargo:rerun-if-changed=Cargo.toml");
    if profile == "release" {
        for name in ["HEAD", "logs/HEAD"] {
            if let Some(path) = output("git", &["rev-parse", "--git-path", name]) {
                println!("cargo:rerun-if-changed={path}");
            }
        }
    }
}
