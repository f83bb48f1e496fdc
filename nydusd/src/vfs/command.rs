//! What to mount, as a client of the API says it and as saved state keeps it.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::{MountError, MountErrorKind};
use super::path::VfsPath;
use super::stale::Stale;
use crate::passthrough::HostSpec;

/// What a mount shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsType {
    /// An image.
    Rafs,
    /// A directory of the host.
    Passthrough,
}

impl FsType {
    /// The API's spellings, and no others (contract 3.5).
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "rafs" => Some(Self::Rafs),
            "passthrough" | "passthroughfs" | "passthrough_fs" => Some(Self::Passthrough),
            _ => None,
        }
    }
}

/// Body of `POST` and `PUT /api/v1/mount`. Members it does not name are ignored.
#[derive(Deserialize)]
pub struct MountRequest {
    /// Bootstrap file, or directory of the host.
    pub source: PathBuf,
    /// `rafs`, or a spelling of pass-through.
    #[serde(default)]
    pub fs_type: String,
    /// The configuration as a document; may be empty for pass-through.
    pub config: String,
    /// Absolute paths to fetch ahead, in place of the image's prefetch table.
    #[serde(default)]
    pub prefetch_files: Option<Vec<String>>,
}

impl MountRequest {
    /// The command for `mountpoint`.
    ///
    /// # Errors
    /// `InvalidArgument`: no such type of file system, or the mountpoint is not an absolute path.
    pub fn command(self, mountpoint: &str) -> Result<MountCommand, MountError> {
        let Some(fs_type) = FsType::from_name(&self.fs_type) else {
            return Err(MountError::new(
                MountErrorKind::InvalidArgument,
                format!("invalid argument: fs_type {:?}: want rafs or passthrough_fs", self.fs_type),
            ));
        };
        Ok(MountCommand {
            mountpoint: VfsPath::parse(mountpoint)?.to_string(),
            fs_type,
            source: self.source,
            config: self.config,
            prefetch_files: self.prefetch_files,
        })
    }
}

/// One mount to be made, with all that it takes to make it again.
///
/// Its configuration may hold logins: it is for saved state, never for logs or answers.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountCommand {
    /// Absolute path inside the daemon's tree, without `.`, `..` or a slash at its end; `/` for the root.
    pub mountpoint: String,
    /// What it is.
    pub fs_type: FsType,
    /// Bootstrap file, or directory of the host.
    pub source: PathBuf,
    /// The configuration as a document.
    pub config: String,
    /// Absolute paths to fetch ahead, in place of the image's prefetch table.
    #[serde(default)]
    pub prefetch_files: Option<Vec<String>>,
}

impl MountCommand {
    /// About how many bytes it takes in saved state, before they are escaped.
    pub fn size(&self) -> usize {
        let files: usize = self.prefetch_files.iter().flatten().map(String::len).sum();
        self.mountpoint.len() + self.source.as_os_str().len() + self.config.len() + files
    }
}

impl fmt::Debug for MountCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MountCommand")
            .field("mountpoint", &self.mountpoint)
            .field("fs_type", &self.fs_type)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

/// One mount in saved state: what it takes to show the kernel the same nodes again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMount {
    /// Where it is.
    pub mountpoint: String,
    /// How it was made; `None`: by the command line, which the successor has, too.
    pub command: Option<MountCommand>,
    /// Its place in every node id.
    pub index: u32,
    /// How many mounts had this index before.
    pub generation: u64,
    /// SHA-256 of its bootstrap in hex: another one would give the kernel's nodes other meanings. Empty for a
    /// directory of the host, whose files say themselves which nodes they are.
    pub bootstrap: String,
    /// Its cache directory, where `<bootstrap>.boot` is. Empty likewise.
    pub work_dir: PathBuf,
    /// Which directory of the host it is, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<SavedHost>,
}

impl SavedMount {
    /// What is needed to mount the directory `source` as this one was.
    pub fn host_spec(&self, source: PathBuf) -> HostSpec {
        HostSpec {
            mountpoint: self.mountpoint.clone(),
            command: self.command.clone(),
            source,
            expected: self.host.clone(),
            // Whoever did not save which directory it is did not tell its files apart, either.
            plain: self.host.as_ref().is_none_or(|host| host.plain),
        }
    }
}

/// A directory of the host in saved state, whatever the name means since that it was mounted by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedHost {
    /// Its absolute path without symbolic links.
    #[serde(with = "any_path")]
    pub path: PathBuf,
    /// Major and minor number of its file system.
    pub device: (u32, u32),
    /// Its inode number.
    pub ino: u64,
    /// When it came to be, in seconds and nanoseconds; zero where that is not known.
    pub born: (i64, u32),
    /// Its files have the generation of the mount and no bits of their own: an early release began it, and the kernel
    /// takes a file with another generation for another file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
}

/// A path as text, or as bytes if it is none.
mod any_path {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize as _, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Saved {
        Text(PathBuf),
        Bytes(Vec<u8>),
    }

    pub(super) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        match path.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => path.as_os_str().as_bytes().serialize(serializer),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        Ok(match Saved::deserialize(deserializer)? {
            Saved::Text(path) => path,
            Saved::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

/// The daemon's tree in saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVfs {
    /// All mounts.
    pub mounts: Vec<SavedMount>,
    /// Indexes from this on were never used. Lower ones that are not among `mounts` may still be
    /// known to the kernel.
    pub next_index: u32,
    /// The daemon's own directories with their inode numbers.
    pub directories: Vec<(String, u64)>,
    /// Numbers from this on were never used.
    pub next_directory: u64,
    /// What the last change made the kernel's knowledge outdated of: it may not have been told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outdated: Vec<Stale>,
    /// The kernel was asked for extended attributes of other images than the command line's, and so was never told
    /// that there are none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shares_xattrs: bool,
    /// What `--shared-dir` meant when the first daemon began, an absolute path without symbolic links, in states of
    /// releases that did not save it with the mount.
    #[serde(default, skip_serializing)]
    pub shared_dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(body: &str) -> Result<MountRequest, serde_json::Error> {
        serde_json::from_str(body)
    }

    #[test]
    fn bodies_of_clients_are_understood() {
        // As kata sends it: one member more than anybody knows.
        let body =
            r#"{"fs_type":"rafs","source":"/b/image.boot","config":"{}","overlay":"{\"upper_dir\":\"/u\"}"}"#;
        let command = request(body).unwrap().command("/containers/1//rootfs/").unwrap();
        assert_eq!(command.mountpoint, "/containers/1/rootfs");
        assert_eq!((command.fs_type, command.prefetch_files.as_deref()), (FsType::Rafs, None));
        let body = r#"{"fs_type":"passthrough_fs","source":"/d","config":"","prefetch_files":null}"#;
        assert_eq!(request(body).unwrap().command("/").unwrap().fs_type, FsType::Passthrough);
        assert!(request(r#"{"fs_type":"rafs","source":"/b"}"#).is_err(), "`config` is missing");
        for (fs_type, mountpoint) in
            [("Rafs", "/a"), ("", "/a"), ("rafs", "a"), ("rafs", "/a/../b"), ("rafs", "")]
        {
            let body = format!(r#"{{"fs_type":"{fs_type}","source":"/b","config":""}}"#);
            let error = request(&body).unwrap().command(mountpoint).unwrap_err();
            assert_eq!(error.kind(), MountErrorKind::InvalidArgument);
            assert!(error.to_string().starts_with("invalid argument: "), "{error}");
        }
    }

    #[test]
    fn commands_survive_saving_and_keep_their_secrets() {
        let body = r#"{"fs_type":"rafs","source":"/b","config":"{\"auth\":\"c2VjcmV0\"}"}"#;
        let command = request(body).unwrap().command("/a").unwrap();
        let text = serde_json::to_string(&command).unwrap();
        assert_eq!(serde_json::from_str::<MountCommand>(&text).unwrap(), command);
        assert!(!format!("{command:?}").contains("c2VjcmV0"));
    }
}
