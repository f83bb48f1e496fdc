//! Which file is which, and what is told of it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::Entry;
use rafs::bootstrap::Nid;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};

use super::{OwnDevice, ROOT};

/// Major and minor number of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device(pub u32, pub u32);

impl Device {
    /// From the kernel's number of a mount: major << 20 | minor.
    pub(crate) fn of(number: u64) -> Self {
        Self((number >> 20) as u32, (number & 0xf_ffff) as u32)
    }
}

/// What tells a file from all others that there are now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    pub device: Device,
    /// The mount through which it was reached: below another one, other things may be mounted.
    pub mount: u64,
    pub ino: u64,
    /// When it came to be, if the file system knows: inode numbers are given again.
    pub born: (i64, u32),
}

/// A file that was looked at.
#[derive(Debug)]
pub(super) struct Found {
    /// It can only name the file (`O_PATH`).
    pub file: OwnedFd,
    pub id: FileId,
    pub kind: FileType,
}

/// Bits of a node's number.
const NUMBER: u64 = (1 << 40) - 1;
/// Bits of [`FileId::generation`], beside those of the number.
pub(super) const GENERATION_BITS: u32 = 24;

impl FileId {
    /// The number that its node gets unless another file has it. The same for the same file whoever asks and
    /// whenever; `home` is the mount of the directory that is served.
    pub fn number(&self, home: u64) -> Nid {
        Nid((self.mixed(home) & NUMBER).max(ROOT.0 + 1))
    }

    /// Tells two files of one number apart, but for one pair in 2^24.
    pub fn generation(&self, home: u64) -> u64 {
        self.mixed(home) >> 40
    }

    fn mixed(&self, home: u64) -> u64 {
        let Device(major, minor) = self.device;
        let mount = if self.mount == home { 0 } else { self.mount };
        let parts = [
            u64::from(major) << 32 | u64::from(minor),
            mount,
            self.ino,
            self.born.0.cast_unsigned(),
            u64::from(self.born.1),
        ];
        parts.iter().fold(0, |sum, part| mix(sum ^ part))
    }
}

/// The number to try after `nid`.
pub(super) fn next(nid: Nid) -> Nid {
    Nid(((nid.0 + 1) & NUMBER).max(ROOT.0 + 1))
}

/// One round of SplitMix64: every bit of the input moves every bit of the result.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// Looks at what `file` stands for. Refuses what this daemon serves itself, without asking it: the thread
/// would wait for its own answer.
pub(super) fn look(file: OwnedFd, own: &OwnDevice) -> io::Result<Found> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::BTIME | StatxFlags::MNT_ID;
    let st = rustix::fs::statx(&file, "", flags, wanted)?;
    let device = Device(st.stx_dev_major, st.stx_dev_minor);
    if own.get() == Some(&device) {
        return Err(io::Error::from_raw_os_error(libc::ELOOP));
    }
    let has = |flag: StatxFlags| StatxFlags::from_bits_retain(st.stx_mask).contains(flag);
    let born = match has(StatxFlags::BTIME) {
        true => (st.stx_btime.tv_sec, st.stx_btime.tv_nsec),
        false => (0, 0),
    };
    let id = FileId {
        device,
        mount: if has(StatxFlags::MNT_ID) { st.stx_mnt_id } else { 0 },
        ino: st.stx_ino,
        born,
    };
    Ok(Found { file, id, kind: FileType::from_raw_mode(st.stx_mode.into()) })
}

/// The device numbers of what `file` stands for, without asking whoever serves it.
///
/// # Errors
/// The system's.
pub(crate) fn device_of(file: impl AsFd) -> io::Result<Device> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let st = rustix::fs::statx(file, "", flags, StatxFlags::TYPE)?;
    Ok(Device(st.stx_dev_major, st.stx_dev_minor))
}

/// Attributes of what `file` stands for, under inode number `ino`.
pub(super) fn stat(file: impl AsFd, ino: u64) -> io::Result<stat64> {
    let st = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    Ok(convert(&st, ino))
}

fn convert(st: &Statx, ino: u64) -> stat64 {
    // The one constructor of a zeroed stat64 that needs no unsafe code of ours.
    let mut out = Entry::default().attr;
    out.st_ino = ino;
    out.st_mode = st.stx_mode.into();
    out.st_nlink = st.stx_nlink.into();
    out.st_uid = st.stx_uid;
    out.st_gid = st.stx_gid;
    // Its low 32 bits are the encoding that FUSE carries.
    out.st_rdev = libc::makedev(st.stx_rdev_major, st.stx_rdev_minor);
    out.st_size = st.stx_size.cast_signed();
    out.st_blksize = st.stx_blksize.into();
    out.st_blocks = st.stx_blocks.cast_signed();
    for (seconds, nanoseconds, time) in [
        (&mut out.st_atime, &mut out.st_atime_nsec, &st.stx_atime),
        (&mut out.st_mtime, &mut out.st_mtime_nsec, &st.stx_mtime),
        (&mut out.st_ctime, &mut out.st_ctime_nsec, &st.stx_ctime),
    ] {
        *seconds = time.tv_sec;
        *nanoseconds = time.tv_nsec.into();
    }
    out
}
