//! Layers made, merged and unpacked with the command itself, in one directory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rafs::bootstrap::Bootstrap;
use serde_json::Value;

use crate::random::Dice;

/// Bytes of the pieces that files are made of.
const PIECE: usize = 0x1000;

/// Runs `nydus-image`.
pub fn nydus_image(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    command.args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// Runs it; it must succeed. Answers stdout.
pub fn done(arguments: &[&str]) -> Vec<u8> {
    let output = nydus_image(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Runs it; it must fail with exit 1. Answers stderr.
pub fn refused(arguments: &[&str]) -> String {
    let output = nydus_image(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    said
}

/// One entry of a layer: its path, and the bytes of a file.
pub type File = (String, Vec<u8>);

/// `files` as a tar.
pub fn tar_of(files: &[File]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1);
        tar.append_data(&mut header, path, &bytes[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

/// A piece of file data, the same for the same number: some compress, some do not.
pub fn piece(number: u32) -> Vec<u8> {
    let mut dice = Dice::new(number.into());
    let below = if number.is_multiple_of(3) { 256 } else { 4 };
    (0..PIECE).map(|_| dice.roll(below) as u8).collect()
}

/// A layer of files that are made of a few pieces, so that layers share chunks, and of marks that
/// remove files of layers below.
pub fn random_layer(dice: &mut Dice) -> Vec<File> {
    let mut files: Vec<File> = Vec::new();
    for _ in 0..=dice.roll(30) {
        let path = format!("d{}/f{}", dice.roll(4), dice.roll(20));
        if files.iter().any(|(known, _)| *known == path) {
            continue;
        }
        let mut bytes: Vec<u8> = (0..dice.roll(5)).flat_map(|_| piece(dice.roll(60))).collect();
        let tail = dice.roll(600) as usize;
        bytes.extend_from_slice(&piece(dice.roll(90))[..tail]);
        files.push((path, bytes));
    }
    if dice.roll(3) == 0 {
        files.push((format!("d{}/.wh.f{}", dice.roll(4), dice.roll(20)), Vec::new()));
    }
    files
}

/// A directory with layers, blobs and images.
pub struct Workshop(tempfile::TempDir);

impl Workshop {
    /// An empty one, not in /tmp: the kernel wants a file system that can read files for it.
    pub fn open() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A path in it as text.
    pub fn at(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Builds a layer into `blobs`; its bootstrap is called `name`.
    pub fn layer(&self, name: &str, files: &[File], flags: &[&str]) {
        let (tar, boot, blobs) = (self.at(&format!("{name}.tar")), self.at(name), self.at("blobs"));
        std::fs::write(&tar, tar_of(files)).unwrap();
        let fixed = ["create", "--log-level", "warn", "--whiteout-spec", "none", "--type", "tar-rafs"];
        let places = ["--bootstrap", &boot, "--blob-dir", &blobs, &tar];
        done(&[&fixed[..], flags, &places].concat());
    }

    /// Merges bootstraps into one called `name`.
    pub fn merge(&self, name: &str, layers: &[&str], flags: &[&str]) {
        let layers: Vec<String> = layers.iter().map(|layer| self.at(layer)).collect();
        let layers: Vec<&str> = layers.iter().map(String::as_str).collect();
        let boot = self.at(name);
        done(&[&["merge", "--log-level", "warn", "--bootstrap", &boot], flags, &layers].concat());
    }

    /// Builds and merges `layers`.
    pub fn image(&self, name: &str, layers: &[Vec<File>], flags: &[&str]) {
        let names: Vec<String> = (0..layers.len()).map(|n| format!("{name}-{n}")).collect();
        for (name, files) in names.iter().zip(layers) {
            self.layer(name, files, flags);
        }
        self.merge(name, &names.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    }

    /// The bootstrap called `name`.
    pub fn opened(&self, name: &str) -> std::sync::Arc<dyn Bootstrap> {
        builder::image::open(&self.path(name)).unwrap().bootstrap
    }

    /// Names of the blobs of an image in the order of its table.
    pub fn blobs(&self, name: &str) -> Vec<String> {
        self.opened(name).blobs().iter().map(|blob| blob.id.to_string()).collect()
    }

    /// Number of files in a directory.
    pub fn count(&self, name: &str) -> usize {
        std::fs::read_dir(self.path(name)).unwrap().count()
    }

    /// A JSON file.
    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// The archive of an image, made from a directory with no other blobs than its own; they are
    /// all verified.
    pub fn archive(&self, name: &str) -> Vec<u8> {
        let own = tempfile::tempdir_in(self.0.path()).unwrap();
        for blob in self.blobs(name) {
            std::fs::hard_link(self.path("blobs").join(&blob), own.path().join(&blob)).unwrap();
        }
        let (boot, own) = (self.at(name), own.path().to_str().unwrap().to_owned());
        done(&["check", "--log-level", "warn", "--blob-dir", &own, &boot]);
        done(&["unpack", "--log-level", "warn", "--blob-dir", &own, "--output", "-", &boot])
    }

    /// What the kernel reads of `paths` in an image, exported as a disk; `None` where it mounts no file.
    pub fn kernel_reads(&self, name: &str, paths: &[String]) -> Option<Vec<Vec<u8>>> {
        let (boot, blobs, disk) = (self.at(name), self.at("blobs"), self.at("disk"));
        done(&["export", "--block", "--log-level", "warn", "-B", &boot, "-D", &blobs, "-O", &disk]);
        let target = self.path("mnt");
        std::fs::create_dir(&target).unwrap();
        let flags = MsFlags::MS_RDONLY;
        if let Err(error) = mount(Some(Path::new(&disk)), &target, Some("erofs"), flags, None::<&str>) {
            eprintln!("mount skipped: {error}; it needs erofs with file-backed mounts (Linux 6.12)");
            return None;
        }
        let read: Vec<_> = paths.iter().map(|path| std::fs::read(target.join(path))).collect();
        umount2(&target, MntFlags::MNT_DETACH).unwrap();
        Some(read.into_iter().map(Result::unwrap).collect())
    }
}
