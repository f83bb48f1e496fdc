//! A virtual machine monitor without a virtual machine: a guest's memory, its rings, and a driver that puts requests
//! there, well-formed or not.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where in the guest the memory begins: not at 0, so that a device that forgets to add it is found out.
const BASE: u64 = 0x10_0000;
/// Bytes of memory.
const SIZE: u64 = 16 << 20;
/// Bytes of memory for each ring's own tables.
const RING: u64 = 64 << 10;
/// Entries of each ring.
pub const ENTRIES: u16 = 64;

/// In a descriptor: another one follows.
pub const NEXT: u16 = 1;
/// In a descriptor: the device writes.
pub const WRITE: u16 = 2;
/// In a descriptor: it is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// How long a device may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The memory and what the driver knows of the rings: what outlives a connection.
pub struct Guest {
    /// The memory.
    pub memory: GuestMemoryMmap,
    rings: Vec<Ring>,
}

struct Ring {
    tables: u64,
    kick: EventFd,
    call: EventFd,
    /// Entries made available, and seen to be used.
    available: u16,
    used: u16,
}

/// A connection to a device.
pub struct Monitor {
    frontend: Frontend,
    /// Agreed features.
    pub features: u64,
}

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Where it is in the guest.
    pub address: u64,
    /// Its bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next one, if there is one.
    pub next: u16,
}

impl Descriptor {
    /// As it is in memory.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

impl Guest {
    /// A guest with so many rings.
    pub fn new(rings: usize) -> Result<Self> {
        let file = std::fs::File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(SIZE)?;
        let range = (GuestAddress(BASE), usize::try_from(SIZE)?, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range])?;
        let ring = |number| {
            let event = || EventFd::new(EFD_NONBLOCK);
            Ok(Ring {
                tables: BASE + number as u64 * RING,
                kick: event()?,
                call: event()?,
                available: 0,
                used: 0,
            })
        };
        Ok(Self { memory, rings: (0..rings).map(ring).collect::<Result<_>>()? })
    }

    /// Address of memory behind the rings.
    pub fn heap(&self) -> u64 {
        BASE + self.rings.len() as u64 * RING
    }

    /// Writes a descriptor of ring `ring`.
    pub fn describe(&self, ring: usize, index: u16, descriptor: Descriptor) -> Result<()> {
        let address = self.rings[ring].tables + u64::from(index) * 16;
        Ok(self.memory.write_slice(&descriptor.bytes(), GuestAddress(address))?)
    }

    /// Makes the chain that begins at descriptor `head` available; the device does not hear of it before it is kicked.
    pub fn offer(&mut self, ring: usize, head: u16) -> Result<()> {
        let ring = &mut self.rings[ring];
        let available = ring.tables + AVAILABLE;
        let slot = available + 4 + u64::from(ring.available % ENTRIES) * 2;
        self.memory.write_obj(head.to_le(), GuestAddress(slot))?;
        ring.available = ring.available.wrapping_add(1);
        let index = ring.available;
        self.set_available(ring_index(available), index)
    }

    fn set_available(&self, address: GuestAddress, index: u16) -> Result<()> {
        Ok(self.memory.store(index.to_le(), address, Ordering::Release)?)
    }

    /// Says that the ring has so many entries available, whatever is there.
    pub fn claim(&self, ring: usize, available: u16) -> Result<()> {
        self.set_available(ring_index(self.rings[ring].tables + AVAILABLE), available)
    }

    /// Tells the device.
    pub fn kick(&self, ring: usize) -> Result<()> {
        Ok(self.rings[ring].kick.write(1)?)
    }

    /// The next chain that was given back, and the bytes that were written; `None` if there is none now.
    pub fn try_take(&mut self, ring: usize) -> Result<Option<(u16, u32)>> {
        let ring = &mut self.rings[ring];
        let used = ring.tables + USED;
        let index: u16 = self.memory.load(ring_index(used), Ordering::Acquire)?;
        if u16::from_le(index) == ring.used {
            return Ok(None);
        }
        let element = used + 4 + u64::from(ring.used % ENTRIES) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(element))?;
        let len: u32 = self.memory.read_obj(GuestAddress(element + 4))?;
        ring.used = ring.used.wrapping_add(1);
        // Tells the device to call for the next one, too (VIRTIO_F_EVENT_IDX).
        let event = ring.tables + AVAILABLE + 4 + u64::from(ENTRIES) * 2;
        self.memory.write_obj(ring.used.to_le(), GuestAddress(event))?;
        Ok(Some((u16::try_from(u32::from_le(head))?, u32::from_le(len))))
    }

    /// Waits for the next chain that is given back.
    pub fn take(&mut self, ring: usize) -> Result<(u16, u32)> {
        self.take_within(ring, PATIENCE)?.context("the device gives nothing back")
    }

    /// The same, `limit` at most.
    pub fn take_within(&mut self, ring: usize, limit: Duration) -> Result<Option<(u16, u32)>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(taken) = self.try_take(ring)? {
                return Ok(Some(taken));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let call = &self.rings[ring].call;
            let call = call.try_clone()?;
            // A monitor's eventfd does not block: it is looked at again.
            if call.read().is_err() {
                std::thread::sleep(Duration::from_micros(200).min(left));
            }
        }
    }

    /// Index up to which the device has used a ring.
    pub fn used(&self, ring: usize) -> Result<u16> {
        let address = ring_index(self.rings[ring].tables + USED);
        Ok(u16::from_le(self.memory.load(address, Ordering::Acquire)?))
    }

    /// A new guest in the same memory.
    pub fn reboot(&mut self) -> Result<()> {
        for ring in &mut self.rings {
            self.memory.write_slice(&vec![0; usize::try_from(RING)?], GuestAddress(ring.tables))?;
            (ring.available, ring.used) = (0, 0);
        }
        Ok(())
    }
}

/// Where in a ring's memory the available and the used ring are.
const AVAILABLE: u64 = 16 << 10;
const USED: u64 = 32 << 10;

/// Where the index of an available or used ring is.
fn ring_index(ring: u64) -> GuestAddress {
    GuestAddress(ring + 2)
}

impl Monitor {
    /// Connects, and agrees on all that the device offers of `wanted`; rings are not started.
    pub fn connect(socket: &Path, rings: usize, wanted: u64) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let mut frontend = loop {
            match Frontend::connect(socket, rings as u64) {
                Ok(frontend) => break frontend,
                Err(e) if Instant::now() > deadline => bail!("{}: {e}", socket.display()),
                Err(_) => std::thread::yield_now(),
            }
        };
        frontend.set_owner()?;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = frontend.get_features()? & (wanted | protocol);
        ensure!(features & protocol != 0, "no protocol features");
        frontend.set_features(features)?;
        let offered = frontend.get_protocol_features()?;
        let agreed = offered
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG);
        frontend.set_protocol_features(agreed)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let queues = frontend.get_queue_num()?;
        ensure!(queues >= rings as u64, "{queues} queues");
        Ok(Self { frontend, features })
    }

    /// Shares the guest's memory and starts its rings where they are: at the index that was used, as front ends do that
    /// come back to a device that has lost its state.
    pub fn start(&mut self, guest: &Guest) -> Result<()> {
        self.share(guest)?;
        for ring in 0..guest.rings.len() {
            self.start_ring(guest, ring)?;
        }
        Ok(())
    }

    /// Shares the guest's memory.
    pub fn share(&mut self, guest: &Guest) -> Result<()> {
        let regions = guest.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions = regions.collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(self.frontend.set_mem_table(&regions)?)
    }

    /// Starts a ring.
    pub fn start_ring(&mut self, guest: &Guest, number: usize) -> Result<()> {
        let ring = &guest.rings[number];
        let host =
            |address| -> Result<u64> { Ok(guest.memory.get_host_address(GuestAddress(address))? as u64) };
        self.frontend.set_vring_num(number, ENTRIES)?;
        self.frontend.set_vring_addr(
            number,
            &VringConfigData {
                queue_max_size: ENTRIES,
                queue_size: ENTRIES,
                flags: 0,
                desc_table_addr: host(ring.tables)?,
                used_ring_addr: host(ring.tables + USED)?,
                avail_ring_addr: host(ring.tables + AVAILABLE)?,
                log_addr: None,
            },
        )?;
        self.frontend.set_vring_base(number, guest.used(number)?)?;
        self.frontend.set_vring_call(number, &ring.call)?;
        self.frontend.set_vring_kick(number, &ring.kick)?;
        Ok(self.frontend.set_vring_enable(number, true)?)
    }

    /// Stops a ring; the index up to which the device has taken it.
    pub fn stop_ring(&mut self, ring: usize) -> Result<u32> {
        Ok(self.frontend.get_vring_base(ring)?)
    }

    /// The device's configuration space.
    pub fn config(&mut self, len: u32) -> Result<Vec<u8>> {
        let (_, config) =
            self.frontend.get_config(0, len, VhostUserConfigFlags::empty(), &vec![0; len as usize])?;
        Ok(config)
    }
}
