//! What a successor must know to go on where this daemon ends.
//!
//! ```text
//! nydusd-state 1 <SHA-256 of what follows the line, in hex>\n
//! {"release": …, "connection": …, "negotiated": …, "vfs": {"mounts": […], "next_index": …, …}, "settings": …}
//! ```
//!
//! Node ids are a pure function of bootstrap and mount index, so naming those two for every mount
//! is all it takes to keep every node id valid that the kernel holds. An image is named by the
//! digest of its bootstrap: a tag that moved, or a registry that is down, changes nothing. What the
//! command line says is not repeated here, since a successor is started with the same one.
//!
//! The number in the first line rises when an older release could not read the state rightly. Members
//! are only ever added otherwise: a reader passes over those it does not know, and those it misses
//! have defaults. `tests/golden/state` holds one state of each release.
//!
//! The bytes go from a daemon to its supervisor and from there to the next daemon, through unix
//! sockets and memory only.

use std::collections::HashSet;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use storage::digest::{Digest, DigestAlgorithm};

use crate::api::Settings;
use crate::node::MAX_INDEX;
use crate::transport::Negotiated;
use crate::vfs::command::{FsType, SavedMount, SavedVfs};
use crate::vfs::path::VfsPath;

/// Version of the encoding.
const VERSION: u32 = 1;
/// First word of every state.
const MAGIC: &str = "nydusd-state";
/// Longest first line: two words, a number and 64 hex digits.
const MAX_HEAD: usize = 128;
/// Largest state: a thousand mounts with long configurations take a few MiB.
pub const MAX_STATE: usize = 64 << 20;

/// The state of one daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// The release that wrote it; for people.
    #[serde(default)]
    pub release: String,
    /// The kernel's number of the FUSE connection: the device of the mount, major << 20 | minor.
    pub connection: u64,
    /// What FUSE_INIT agreed on.
    pub negotiated: Negotiated,
    /// The mounts and the directories between them.
    pub vfs: SavedVfs,
    /// What was set through the API since.
    #[serde(default)]
    pub settings: Settings,
}

impl SavedState {
    /// The bytes for a supervisor.
    ///
    /// # Errors
    /// More than [`MAX_STATE`].
    pub fn encode(&self) -> anyhow::Result<Vec<u8>> {
        let body = serde_json::to_vec(self).context("encode the daemon's state")?;
        let digest = DigestAlgorithm::Sha256.digest(&body);
        let mut bytes = format!("{MAGIC} {VERSION} {digest}\n").into_bytes();
        bytes.extend(body);
        ensure!(bytes.len() <= MAX_STATE, "the daemon's state has {} bytes; too many mounts", bytes.len());
        Ok(bytes)
    }

    /// The state in `bytes`, which may be anything.
    ///
    /// # Errors
    /// Not a state, one of a later release, damaged, or one that can not be.
    pub fn decode(bytes: &[u8]) -> anyhow::Result<Self> {
        let parts = Parts::of(bytes).context("what the supervisor holds")?;
        let version = parts.version;
        ensure!(
            version.parse() == Ok(VERSION),
            "the saved state has version {version}, this nydusd ({}) reads {VERSION}; start the release \
             that saved it, or a later one",
            crate::version::DESCRIBE
        );
        parts.verify()?;
        let state: Self = serde_json::from_slice(parts.body).context("the saved state")?;
        state.check().context("the saved state")?;
        Ok(state)
    }

    /// What the types do not say.
    fn check(&self) -> anyhow::Result<()> {
        let SavedVfs { mounts, next_index, directories, shared_dir, .. } = &self.vfs;
        ensure!(*next_index <= MAX_INDEX + 1, "{next_index} is no mount index");
        let (mut indexes, mut mountpoints) = (HashSet::new(), HashSet::new());
        for SavedMount { index, mountpoint, bootstrap, command, host, .. } in mounts {
            if let Some(path) = host.as_ref().map(|host| &host.path).or(shared_dir.as_ref()) {
                ensure!(path.is_absolute(), "the directory {} is not absolute", path.display());
            }
            ensure!((1..*next_index).contains(index), "{index} is no index of a mount");
            ensure!(indexes.insert(index), "two mounts have index {index}");
            check_path(mountpoint)?;
            ensure!(mountpoints.insert(mountpoint), "two mounts are at {mountpoint}");
            // Directories of the host have none.
            if !bootstrap.is_empty() || command.as_ref().is_some_and(|one| one.fs_type == FsType::Rafs) {
                Digest::from_hex(bootstrap).with_context(|| format!("the bootstrap of {mountpoint}"))?;
            }
        }
        let mut numbers = HashSet::new();
        for (path, number) in directories {
            check_path(path)?;
            ensure!(numbers.insert(number), "two directories have number {number}");
        }
        Ok(())
    }
}

/// Checks that `bytes` are a state of some release, whole and undamaged. Of what is in it only the number of the
/// connection is looked for, which a later release may say otherwise.
///
/// # Errors
/// They are none, or not all of one.
pub(super) fn verify(bytes: &[u8]) -> anyhow::Result<Option<u64>> {
    #[derive(Deserialize)]
    struct Of {
        connection: u64,
    }
    let parts = Parts::of(bytes)?;
    parts.verify()?;
    Ok(serde_json::from_slice(parts.body).ok().map(|Of { connection }| connection))
}

/// What every release agrees on.
struct Parts<'a> {
    version: &'a str,
    /// In hex.
    digest: &'a str,
    body: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(bytes: &'a [u8]) -> anyhow::Result<Self> {
        let head = bytes.iter().take(MAX_HEAD).position(|byte| *byte == b'\n');
        let (head, body) = head.map_or((bytes, &[][..]), |end| (&bytes[..end], &bytes[end + 1..]));
        let words: Vec<&str> = std::str::from_utf8(head).unwrap_or_default().splitn(3, ' ').collect();
        let [MAGIC, version, digest] = words[..] else {
            bail!("{} bytes that are no state of nydusd", bytes.len());
        };
        Ok(Self { version, digest, body })
    }

    fn verify(&self) -> anyhow::Result<()> {
        let found = DigestAlgorithm::Sha256.digest(self.body).to_string();
        ensure!(
            self.digest == found,
            "the saved state is damaged: {} bytes with digest {found} came",
            self.body.len()
        );
        Ok(())
    }
}

/// Paths are saved as they are shown, and others would not be found again.
fn check_path(text: &str) -> anyhow::Result<()> {
    let path = VfsPath::parse(text)?;
    ensure!(path.to_string() == text, "{text:?} is not how {path} is written");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    use std::path::{Path, PathBuf};

    use proptest::prelude::*;

    use super::*;
    use crate::node::MountIndex;
    use crate::passthrough::OwnDevice;
    use crate::vfs::command::{MountCommand, SavedHost};
    use crate::vfs::place::Place;

    fn state() -> SavedState {
        let mount = |index, generation, mountpoint: &str, command, digest: &str| SavedMount {
            mountpoint: mountpoint.to_owned(),
            command,
            index,
            generation,
            bootstrap: digest.repeat(32),
            work_dir: "/var/lib/nydus/cache".into(),
            host: None,
        };
        let command = MountCommand {
            mountpoint: "/images/ä".to_owned(),
            fs_type: FsType::Rafs,
            source: "/snapshots/7/image.boot".into(),
            config: r#"{"version":2}"#.to_owned(),
            prefetch_files: Some(vec!["/usr/bin".to_owned()]),
        };
        SavedState {
            release: "v0.1.0".to_owned(),
            connection: 52,
            negotiated: Negotiated {
                minor: 45,
                flags: 0x80_4180_20f9,
                max_readahead: 131_072,
                max_write: 1 << 20,
                max_pages: 256,
            },
            vfs: SavedVfs {
                mounts: vec![mount(1, 0, "/", None, "ab"), mount(3, 7, "/images/ä", Some(command), "cd")],
                next_index: 4,
                directories: vec![("/images".to_owned(), 1 << 39)],
                next_directory: (1 << 39) + 2,
                outdated: Vec::new(),
                shares_xattrs: false,
                shared_dir: None,
            },
            settings: serde_json::from_str(r#"{"/":{"registry_auth":"bm9ib2R5OnNlY3JldA=="}}"#).unwrap(),
        }
    }

    /// Puts a right head before `body`.
    fn signed(body: &str) -> Vec<u8> {
        format!("{MAGIC} {VERSION} {}\n{body}", DigestAlgorithm::Sha256.digest(body.as_bytes())).into_bytes()
    }

    #[test]
    fn what_is_saved_comes_back() {
        assert_eq!(SavedState::decode(&state().encode().unwrap()).unwrap(), state());
        assert!(!format!("{:?}", state()).contains("bm9ib2R5"), "a secret is shown");
    }

    #[test]
    fn directories_of_the_host_come_back() {
        let mut state = state();
        let directory = SavedHost { path: "/d".into(), device: (8, 1), ino: 7, born: (9, 10), plain: true };
        let host = SavedMount {
            bootstrap: String::new(),
            work_dir: "".into(),
            host: Some(directory),
            ..state.vfs.mounts[1].clone()
        };
        state.vfs.mounts[1] = host.clone();
        let error = SavedState::decode(&state.encode().unwrap()).unwrap_err();
        assert!(format!("{error:#}").contains("the bootstrap of /images"), "{error:#}");
        let command = host.command.map(|command| MountCommand { fs_type: FsType::Passthrough, ..command });
        state.vfs.mounts[1].command = command;
        assert_eq!(SavedState::decode(&state.encode().unwrap()).unwrap(), state);
        // Names of directories are bytes.
        let path = PathBuf::from(OsStr::from_bytes(b"/d\xff"));
        state.vfs.mounts[1].host.as_mut().unwrap().path = path;
        assert_eq!(SavedState::decode(&state.encode().unwrap()).unwrap(), state);
    }

    fn golden(name: &str) -> SavedState {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/state").join(name);
        SavedState::decode(&std::fs::read(path).unwrap()).unwrap()
    }

    /// `tests/golden/state/N` was written by release N and is never changed.
    #[test]
    fn states_of_earlier_releases_are_read() {
        assert_eq!(golden("1"), state());
    }

    /// Which directories they are was not saved once, and their files had no generations.
    #[test]
    fn directories_in_early_states_are_read() {
        let found = golden("1-hosts");
        assert_eq!(found.vfs.shared_dir.as_deref(), Some(Path::new("/srv/shared")));
        let [shared, named] = &found.vfs.mounts[..] else { panic!("{found:?}") };
        assert!(shared.command.is_none() && named.command.is_some());
        for mount in [shared, named] {
            let spec = mount.host_spec("/".into());
            assert!(spec.plain && spec.expected.is_none(), "{mount:?}");
            let opened = crate::passthrough::open(spec, &OwnDevice::default()).unwrap();
            let place = Place { index: MountIndex(mount.index), ..Place::unseen() };
            let again = opened.at(place).saved();
            assert!(again.host_spec("/".into()).plain, "for the next successor");
        }
    }

    #[test]
    fn later_members_are_passed_over() {
        let mut document = serde_json::to_value(state()).unwrap();
        document["colour"] = "blue".into();
        document["vfs"]["mounts"][0]["weight"] = 7.into();
        assert_eq!(SavedState::decode(&signed(&document.to_string())).unwrap(), state());
    }

    #[test]
    fn what_is_no_state_is_refused_with_a_reason() {
        let good = state().encode().unwrap();
        let mut later = good.clone();
        later[MAGIC.len() + 1] = b'2';
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let with = |change: &dyn Fn(&mut SavedVfs)| {
            let mut state = state();
            change(&mut state.vfs);
            state.encode().unwrap()
        };
        let relative = SavedHost { path: "data".into(), device: (0, 0), ino: 0, born: (0, 0), plain: false };
        for (bytes, text) in [
            (Vec::new(), "no state of nydusd"),
            (b"HTTP/1.1 200\n".to_vec(), "no state of nydusd"),
            (vec![b'x'; 1 << 20], "no state of nydusd"),
            (good[..good.len() - 1].to_vec(), "damaged"),
            (flipped, "damaged"),
            (later, "version 2"),
            (signed("{}"), "connection"),
            (signed("[1"), "the saved state"),
            (with(&|vfs| vfs.mounts[1].index = 1), "two mounts have index 1"),
            (with(&|vfs| vfs.mounts[1].mountpoint = "/".to_owned()), "two mounts are at /"),
            (with(&|vfs| vfs.mounts[0].index = 0), "0 is no index"),
            (with(&|vfs| vfs.mounts[1].index = 4), "4 is no index"),
            (with(&|vfs| vfs.mounts[1].mountpoint = "a".to_owned()), "absolute"),
            (
                with(&|vfs| vfs.mounts[1].bootstrap = "../../etc/passwd".to_owned()),
                "the bootstrap of /images",
            ),
            (with(&|vfs| vfs.mounts[0].host = Some(relative.clone())), "data is not absolute"),
            (with(&|vfs| vfs.next_index = MAX_INDEX + 2), "no mount index"),
            (with(&|vfs| vfs.directories.push(("/b".to_owned(), 1 << 39))), "two directories have number"),
            (with(&|vfs| vfs.directories[0].0 = "images".to_owned()), "absolute"),
            // As a path they are right.
            (with(&|vfs| vfs.directories[0].0 = "/é//".to_owned()), "is not how /é is written"),
            (with(&|vfs| vfs.mounts[0].mountpoint = "//".to_owned()), "is not how / is written"),
        ] {
            let error = format!("{:#}", SavedState::decode(&bytes).unwrap_err());
            assert!(error.contains(text), "{text}: {error}");
        }
    }

    /// Whoever holds states need not understand them, and tells whole ones from others.
    #[test]
    fn states_of_any_release_are_known_to_be_whole() {
        let good = state().encode().unwrap();
        assert_eq!(verify(&good).unwrap(), Some(52));
        let later = String::from_utf8(signed("not even JSON")).unwrap().replacen(" 1 ", " 2 ", 1);
        assert_eq!(verify(later.as_bytes()).unwrap(), None);
        for len in 0..good.len() {
            assert!(verify(&good[..len]).is_err(), "{len} of {} bytes", good.len());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = SavedState::decode(&bytes);
        }

        #[test]
        fn no_document_panics(text in ".{0,300}") {
            let _ = SavedState::decode(&signed(&text));
        }

        /// A damaged state is never taken for another one.
        #[test]
        fn no_damage_goes_unseen(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = state().encode().unwrap();
            let at = at.index(bytes.len());
            let differs = bytes[at] != byte;
            bytes[at] = byte;
            prop_assert_eq!(SavedState::decode(&bytes).is_err(), differs);
        }
    }
}
