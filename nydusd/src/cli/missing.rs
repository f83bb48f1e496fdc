//! Services that this build does not have.

use std::ffi::OsString;

/// Services that clients know of and this build does not have, with what to use instead.
const NO_SERVICE: [(&str, &str); 3] = [
    (
        "singleton",
        "serves EROFS over fscache; `nydusd fuse` serves the same images (nydus-snapshotter: fs_driver = \"fusedev\")",
    ),
    ("nbd", "exports an image as a block device; `nydusd fuse --mountpoint DIR` serves its tree without one"),
    (
        "uffd",
        "serves page faults of virtual machines; `nydusd virtiofs --sock S` serves the same images to them",
    ),
];

/// Why nothing runs where `arguments` (the program's name first) ask for a service that this build
/// does not have, whatever else they say.
pub fn no_service(arguments: &[OsString]) -> Option<String> {
    let asked = arguments.get(1)?.to_str()?;
    let (name, instead) = NO_SERVICE.iter().find(|(name, _)| *name == asked)?;
    Some(format!("this build has no service `{name}`, which {instead}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_that_are_missing_name_another() {
        for (line, instead) in [
            ("nydusd singleton --fscache /d --apisock /a", "fusedev"),
            ("nydusd nbd /dev/nbd0", "nydusd fuse"),
            ("nydusd uffd --sock /s", "nydusd virtiofs"),
        ] {
            let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            assert!(no_service(&arguments).unwrap().contains(instead), "{line}");
        }
        for line in ["nydusd", "nydusd fuse -M /m", "nydusd --apisock singleton"] {
            let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            assert_eq!(no_service(&arguments), None, "{line}");
        }
    }
}
