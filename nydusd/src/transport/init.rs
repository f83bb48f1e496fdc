//! FUSE_INIT: what the kernel may do by itself, so that it need not ask.
//!
//! fuse-backend-rs has an answer of its own, which knows half of the flags of today's kernels.
//! The kernel asks once in a connection's life: a successor that takes the connection over must be
//! told what was agreed, see [`Negotiated`].

use std::io;

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use fuse_backend_rs::api::filesystem::FileSystem as _;
use serde::{Deserialize, Serialize};
use zerocopy::FromBytes as _;

use super::message::{InitIn, InitIn2, InitOut};
use crate::adapter::Adapter;

/// The protocol's version.
const MAJOR: u32 = 7;
/// Its newest revision that this daemon knows: that of Linux 6.18.
const MINOR: u32 = 45;
/// Its oldest revision that is served (Linux 3.15): the answer had another size before.
const OLDEST_MINOR: u32 = 23;

/// First revision with `FUSE_NOTIFY_INC_EPOCH`.
const EPOCH_MINOR: u32 = 44;

/// `FUSE_SETXATTR_EXT`: the kernel says who may not keep set-group-id when an ACL is set.
pub(super) const SETXATTR_EXT: u64 = 1 << 29;
/// `FUSE_HAS_EXPIRE_ONLY`: names can be made to be asked for again without being dropped (Linux 6.2).
const HAS_EXPIRE_ONLY: u64 = 1 << 35;
/// `FUSE_HAS_RESEND`: requests that a dead daemon had taken can be asked for again.
const HAS_RESEND: u64 = 1 << 39;
/// `FUSE_ALLOW_IDMAP`: the mount may be seen through id-mapped mounts.
const ALLOW_IDMAP: u64 = 1 << 40;
/// `FUSE_OVER_IO_URING`: requests come through rings (Linux 6.14).
const OVER_IO_URING: u64 = 1 << 41;

/// Bytes of the largest read: 256 pages.
const MAX_TRANSFER: u32 = 1 << 20;
/// Size of a page in the protocol's count of them.
const PAGE: u32 = 4096;

/// What was agreed with the kernel for the life of one connection. A daemon that takes the
/// connection over gets no FUSE_INIT, and goes on under this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    /// Revision of the protocol, the lower one of the kernel's and the daemon's.
    pub minor: u32,
    /// `FUSE_*` flags of both words that both sides know and want.
    pub flags: u64,
    /// Bytes that the kernel reads ahead at most.
    pub max_readahead: u32,
    /// Bytes of the largest write.
    pub max_write: u32,
    /// Pages of the largest read.
    pub max_pages: u16,
}

/// What to answer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// This; it is agreed once the kernel has it.
    Agreed(Negotiated, InitOut),
    /// Our version: the kernel asks again.
    Retry(InitOut),
}

impl Negotiated {
    /// True if a name can be made to be asked for again without being dropped.
    pub fn expires(&self) -> bool {
        self.flags & HAS_EXPIRE_ONLY != 0
    }

    /// True if FUSE_SETXATTR has a second pair of words.
    pub(super) fn extends_setxattr(&self) -> bool {
        self.flags & SETXATTR_EXT != 0
    }

    /// True if all names can be made to be asked for again at once (Linux 6.16).
    pub fn has_epochs(&self) -> bool {
        self.minor >= EPOCH_MINOR
    }

    /// True if the kernel repeats requests that were taken and not answered.
    pub fn resends(&self) -> bool {
        self.flags & HAS_RESEND != 0
    }

    /// True if requests come through rings. The kernel holds them all back until there are rings.
    pub fn rings(&self) -> bool {
        self.flags & OVER_IO_URING != 0
    }
}

/// Whose kernel it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// This host's; rings are asked for only if they are prepared.
    Host {
        /// They are.
        rings: bool,
    },
    /// A virtual machine's, which nothing can be told unasked.
    Guest,
}

/// The answer to the body of FUSE_INIT.
///
/// # Errors
/// A kernel that is too old, or a message that is none.
pub(super) fn answer(adapter: &Adapter, body: &[u8], kernel: Kernel) -> io::Result<Answer> {
    let malformed = || io::Error::other("a FUSE_INIT of the wrong size");
    let (init, rest) = InitIn::read_from_prefix(body).map_err(|_| malformed())?;
    if init.major > MAJOR {
        return Ok(Answer::Retry(InitOut { major: MAJOR, minor: MINOR, ..InitOut::default() }));
    }
    if init.major < MAJOR || init.minor < OLDEST_MINOR {
        let what =
            format!("the kernel speaks FUSE {}.{}; 7.{OLDEST_MINOR} is needed", init.major, init.minor);
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    let mut offered = u64::from(init.flags);
    if offered & FsOptions::INIT_EXT.bits() != 0 {
        let (more, _) = InitIn2::read_from_prefix(rest).map_err(|_| malformed())?;
        offered |= u64::from(more.flags2) << 32;
    }
    let wanted = adapter.init(FsOptions::from_bits_truncate(offered))?.bits();
    let wanted = wanted
        | SETXATTR_EXT
        | ALLOW_IDMAP
        | match kernel {
            Kernel::Host { rings: true } => HAS_EXPIRE_ONLY | HAS_RESEND | OVER_IO_URING,
            Kernel::Host { rings: false } => HAS_EXPIRE_ONLY | HAS_RESEND,
            Kernel::Guest => 0,
        };
    let mut flags = offered & wanted;
    if flags & OVER_IO_URING != 0 {
        // With rings a read must not outlive its reader: see `uring::serve`.
        flags &= !FsOptions::ASYNC_READ.bits();
    }
    let large = flags & FsOptions::MAX_PAGES.bits() != 0;
    let negotiated = Negotiated {
        minor: init.minor.min(MINOR),
        flags,
        max_readahead: init.max_readahead.min(MAX_TRANSFER),
        // Without larger ones the kernel sends 32 pages at most.
        max_write: if large { MAX_TRANSFER } else { 32 * PAGE },
        max_pages: if large { (MAX_TRANSFER / PAGE) as u16 } else { 32 },
    };
    let out = InitOut {
        major: MAJOR,
        minor: MINOR,
        max_readahead: negotiated.max_readahead,
        flags: flags as u32,
        // Reads ahead are never refused for their number: whoever reads decides.
        max_background: u16::MAX,
        congestion_threshold: u16::MAX / 4 * 3,
        max_write: negotiated.max_write,
        time_gran: 1,
        max_pages: negotiated.max_pages,
        flags2: (flags >> 32) as u32,
        ..InitOut::default()
    };
    Ok(Answer::Agreed(negotiated, out))
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes as _;

    use super::*;

    const HOST: Kernel = Kernel::Host { rings: false };
    const RINGS: Kernel = Kernel::Host { rings: true };

    /// FUSE_INIT of Linux 6.18, as it was read.
    fn request(major: u32, minor: u32, flags: u64) -> Vec<u8> {
        let init = InitIn { major, minor, max_readahead: 128 << 10, flags: flags as u32 };
        let more = InitIn2 { flags2: (flags >> 32) as u32, unused: [0; 11] };
        [init.as_bytes(), more.as_bytes()].concat()
    }

    #[test]
    fn only_what_is_offered_is_agreed() {
        let adapter = Adapter::default();
        let all = request(7, 45, 0x7fd_73ff_fffb);
        let Answer::Agreed(agreed, out) = answer(&adapter, &all, HOST).unwrap() else {
            panic!("asked again")
        };
        assert!(agreed.resends() && agreed.expires() && agreed.flags & 1 == 1);
        assert_eq!((out.flags2 >> 7) & 3, 3, "resend and id-mapped mounts");
        assert_eq!(u64::from(out.flags) | u64::from(out.flags2) << 32, agreed.flags);
        assert_eq!((agreed.max_pages, agreed.max_write, agreed.max_readahead), (256, 1 << 20, 128 << 10));
        // Written back, shared locks, passthrough and rings are for others.
        for bit in [1, 10, 16, 37, 41, 42] {
            assert_eq!(agreed.flags >> bit & 1, 0, "flag {bit}");
        }
        let Answer::Agreed(agreed, out) = answer(&adapter, &all, RINGS).unwrap() else {
            panic!("asked again")
        };
        assert!(agreed.rings() && out.flags2 & 1 << 9 != 0, "they are taken where they are offered");
        assert_eq!(agreed.flags & 1, 0, "no reads behind a reader's back");
        let Ok(Answer::Agreed(guest, _)) = answer(&adapter, &all, Kernel::Guest) else {
            panic!("asked again")
        };
        assert!(!guest.resends() && !guest.expires() && !guest.rings() && guest.flags & 1 == 1);
        // Directories of the host may come, unless one image is all there will be.
        let changes_of = |flags: u64| ((flags >> 6) & 1, (flags >> 12) & 1, (flags >> 25) & 1);
        assert_eq!(changes_of(agreed.flags), (1, 1, 0), "masks left to us, changed files looked at");
        adapter.table().dedicate();
        let Answer::Agreed(agreed, _) = answer(&adapter, &all, HOST).unwrap() else { panic!("asked again") };
        assert_eq!(changes_of(agreed.flags), (0, 0, 1), "nothing changes unless the kernel is told");

        let Answer::Agreed(agreed, out) = answer(&adapter, &request(7, 26, 0), RINGS).unwrap() else {
            panic!("asked again")
        };
        assert_eq!((agreed.flags, out.flags, agreed.max_pages, agreed.minor), (0, 0, 32, 26));
        assert!(!agreed.resends() && !agreed.expires() && !agreed.rings());
    }

    #[test]
    fn other_versions_and_short_messages_are_refused() {
        let adapter = Adapter::default();
        assert!(
            matches!(answer(&adapter, &request(8, 0, 0), HOST), Ok(Answer::Retry(out)) if out.major == 7)
        );
        assert!(answer(&adapter, &request(7, 22, 0), HOST).unwrap_err().to_string().contains("7.22"));
        assert!(answer(&adapter, &request(6, 50, 0), HOST).is_err());
        assert!(answer(&adapter, &[0; 15], HOST).is_err());
        let extended = request(7, 45, 1 << 30);
        assert!(answer(&adapter, &extended[..20], HOST).is_err());
    }

    #[test]
    fn it_can_be_kept() {
        let kept = Negotiated { minor: 45, flags: 5 << 38, max_readahead: 1, max_write: 2, max_pages: 3 };
        let text = serde_json::to_string(&kept).unwrap();
        assert_eq!(serde_json::from_str::<Negotiated>(&text).unwrap(), kept);
    }
}
