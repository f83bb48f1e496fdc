//! The judges nobody here wrote: the kernel's EROFS and Debian's fsck.erofs.

use std::path::Path;
use std::process::Command;

use crate::common::{build, options, unpacked};
use builder::create::{LayerSource, read_layers};
use builder::overlay::WhiteoutSpec;
use builder::root::{RootOptions, image_root};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rafs::bootstrap::{Bootstrap, OpenOptions};
use storage::codec::{Codec, decompress};
use storage::digest::TaggedDigest;
use storage::ids::ChunkIndex;

/// The blob's decoded space: what the kernel sees as a device.
fn decoded(bootstrap: &dyn Bootstrap, blob: &[u8]) -> Vec<u8> {
    let info = &bootstrap.blobs()[0];
    let mut out = vec![0; info.decoded_size as usize];
    for index in (0..info.chunk_count).map(ChunkIndex) {
        let Some(chunk) = bootstrap.chunk_info(0, index) else { continue };
        let stored = &blob[chunk.compressed_offset.get() as usize..][..chunk.compressed_size.get() as usize];
        let codec = if chunk.flags.get() & 1 == 1 { info.codec } else { Codec::None };
        let to =
            &mut out[chunk.uncompressed_offset.get() as usize..][..chunk.uncompressed_size.get() as usize];
        decompress(codec, stored, to).unwrap();
    }
    out
}

/// A mount that ends with the test.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        umount2(self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

fn root_of(dir: &Path, chunk_size: u32) -> TaggedDigest {
    let data = options(Codec::None, chunk_size).data;
    let (tree, content) = read_layers(vec![LayerSource::Directory(dir)], data, WhiteoutSpec::None).unwrap();
    image_root(&tree, &content, RootOptions { digester: data.digester, chunk_size, explicit_ids: true })
        .unwrap()
}

#[test]
fn the_kernel_and_fsck_read_what_was_built() {
    let Some(tree) = unpacked("tree") else { return };
    for (codec, chunk_size) in [(Codec::None, 0x1000), (Codec::Zstd, 0x10_0000)] {
        let (built, blob) = build(LayerSource::Directory(tree.path()), &options(codec, chunk_size));
        let opened = rafs::bootstrap::from_bytes(built.bootstrap.clone(), &OpenOptions::default()).unwrap();
        // Not in /tmp: the kernel wants a file system that can read files for it.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (boot, device) = (dir.path().join("image.boot"), dir.path().join("device"));
        std::fs::write(&boot, &built.bootstrap).unwrap();
        std::fs::write(&device, decoded(&*opened, &blob)).unwrap();

        let fsck =
            Command::new("fsck.erofs").arg(format!("--device={}", device.display())).arg(&boot).output();
        match fsck {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => eprintln!("fsck.erofs skipped: {error}"),
        }

        let target = dir.path().join("mnt");
        std::fs::create_dir(&target).unwrap();
        let devices = format!("device={}", device.display());
        let flags = MsFlags::MS_RDONLY;
        match mount(Some(&boot), &target, Some("erofs"), flags, Some(devices.as_str())) {
            Ok(()) => {}
            Err(error) => {
                eprintln!("mount skipped: {error}; it needs erofs with file-backed mounts (Linux 6.12)");
                continue;
            }
        }
        let mounted = Mounted(&target);
        // Names, modes, owners, times, xattrs, hard links, devices and every byte.
        assert_eq!(root_of(&target, chunk_size), built.root);
        drop(mounted);
    }
}
