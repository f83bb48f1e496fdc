//! Who this binary is.

mod identity {
    #![expect(dead_code, reason = "a part of it is for the daemon's API")]
    include!(concat!(env!("OUT_DIR"), "/identity.rs"));
}

pub use identity::{BLOCK, DESCRIBE as NUMBER};

/// Version with the commit, as JSON output states it.
pub fn describe() -> String {
    format!("{}-{}", identity::DESCRIBE, identity::GIT_COMMIT)
}
