//! What a test needs of the machine. A test that cannot run says why, and only then is skipped.

use std::path::Path;

/// Ends the test with its reason printed unless this machine can mount FUSE file systems.
#[macro_export]
macro_rules! needs_mounts {
    () => {
        if let Some(reason) = $crate::need::mounts() {
            eprintln!("skipped {}: {reason}", module_path!());
            return Ok(());
        }
    };
}

/// Ends the test with its reason printed unless every named program is installed.
#[macro_export]
macro_rules! needs_programs {
    ($($program:expr),+ $(,)?) => {
        if let Some(reason) = $crate::need::programs(&[$($program),+]) {
            eprintln!("skipped {}: {reason}", module_path!());
            return Ok(());
        }
    };
}

/// Why this machine cannot mount FUSE file systems; `None` when it can.
pub fn mounts() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("mounting needs root".into());
    }
    (!Path::new("/dev/fuse").exists()).then(|| "there is no /dev/fuse (load the fuse module)".into())
}

/// Which of `names` is not installed; `None` when all are.
pub fn programs(names: &[&str]) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: &str| {
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|directory| directory.join(name).exists())
    };
    let missing: Vec<&str> = names.iter().copied().filter(|name| !found(name)).collect();
    (!missing.is_empty()).then(|| format!("not installed: {} (see misc/setup.sh)", missing.join(", ")))
}
