//! What vhost-user-backend asks of a device, and what it is told.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringT as _};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::Memory;
use super::request::Request;
use super::ring::{Policy, Ring};

/// Entries of a ring: as many as virtio-queue and QEMU know of for these devices.
const QUEUE_SIZE: usize = 1024;

/// Room for answers of all requests of a ring that may be under way at once: some hundred reads ahead.
const MOST_UNDER_WAY: u64 = 64 << 20;

/// What answers requests.
pub(crate) trait Device: Send + Sync + 'static {
    /// For logs and threads.
    fn name(&self) -> &'static str;

    /// Rings, each of which has a thread.
    fn queues(&self) -> usize;

    /// Features of its kind of device, beside those of all.
    fn features(&self) -> u64 {
        0
    }

    /// Its configuration space; empty if it has none.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Requests are answered in the order of the ring.
    fn in_order(&self) -> bool;

    /// Answers a request from ring `queue`, now or later.
    fn serve(&self, queue: usize, request: Request);

    /// Has requests that wait for a source end.
    fn abandon(&self);

    /// The guest's driver, if there was one, is gone.
    fn reset(&self);
}

/// A device for one connection of a monitor.
pub(super) struct Backend {
    device: Arc<dyn Device>,
    /// By ring, once it was kicked.
    rings: Vec<OnceLock<Ring>>,
    /// By ring: what wakes its thread to go on with a ring that was full.
    wakers: Vec<(EventConsumer, Arc<EventNotifier>)>,
    /// What vhost-user-backend made of the events that end its threads: it does not close them.
    exits: Mutex<Vec<RawFd>>,
}

impl Backend {
    pub fn new(device: Arc<dyn Device>) -> io::Result<Self> {
        let queues = device.queues();
        let waker = |_| {
            let (consumer, notifier) =
                new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
            Ok((consumer, Arc::new(notifier)))
        };
        Ok(Self {
            rings: (0..queues).map(|_| OnceLock::new()).collect(),
            wakers: (0..queues).map(waker).collect::<io::Result<_>>()?,
            exits: Mutex::default(),
            device,
        })
    }

    /// By ring: what its thread is to wait for, too, and the number of that event.
    pub fn wakers(&self) -> impl Iterator<Item = (RawFd, u64)> {
        let number = self.device.queues() as u64 + 1;
        self.wakers.iter().map(move |(consumer, _)| (consumer.as_raw_fd(), number))
    }

    /// The monitor is gone: nothing is written to the guest any more.
    pub fn close(&self) {
        self.rings.iter().filter_map(OnceLock::get).for_each(Ring::close);
        self.device.reset();
    }

    /// Closes what ended the threads of vhost-user-backend, which must have ended.
    pub fn close_exits(&self) {
        for fd in self.exits.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // `exit_event` made it. vhost-user-backend has its epoll instance watch it, and never closes it (0.22).
            if let Err(e) = nix::unistd::close(fd) {
                tracing::error!("close an event: {e}");
            }
        }
    }

    /// How requests of ring `queue` are taken.
    fn policy(&self, queue: usize) -> Policy {
        let (device, waker) = (Arc::clone(&self.device), Arc::clone(&self.wakers[queue].1));
        Policy {
            in_order: self.device.in_order(),
            most: MOST_UNDER_WAY,
            abandon: Box::new(move || device.abandon()),
            resume: Box::new(move || {
                if let Err(e) = waker.notify() {
                    tracing::error!("wake the thread of a ring: {e}");
                }
            }),
        }
    }

    /// Answers all that is in a ring.
    fn drain(&self, queue: usize, ring: &Ring) {
        let drained = || -> Result<(), virtio_queue::Error> {
            loop {
                ring.disable_notification()?;
                while let Some(request) = ring.take()? {
                    let served = catch_unwind(AssertUnwindSafe(|| self.device.serve(queue, request)));
                    if served.is_err() {
                        // It was given back, empty, when it was dropped.
                        tracing::error!("a request of ring {queue} panicked");
                    }
                }
                if !ring.may_take() || !ring.enable_notification()? {
                    return Ok(());
                }
            }
        };
        if let Err(e) = drained() {
            tracing::warn!(
                "{}: ring {queue} of the guest makes no sense and is left alone: {e}",
                self.device.name()
            );
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        self.device.queues()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let order = if self.device.in_order() { 1 << VIRTIO_F_IN_ORDER } else { 0 };
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | self.device.features()
            | order
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let config = match self.device.config().is_empty() {
            true => VhostUserProtocolFeatures::empty(),
            false => VhostUserProtocolFeatures::CONFIG,
        };
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | config
    }

    fn reset_device(&self) {
        self.device.reset();
    }

    /// The crate tells its queues.
    fn set_event_idx(&self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.device.config();
        let wanted = (offset as usize).checked_add(size as usize).map(|end| offset as usize..end);
        wanted.and_then(|range| config.get(range)).unwrap_or_default().to_vec()
    }

    /// Each request looks at the memory of its time.
    fn update_memory(&self, _: Memory) -> io::Result<()> {
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.device.queues()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        let pair = new_event_consumer_and_notifier(EventFlag::CLOEXEC);
        let (consumer, notifier) = pair.inspect_err(|e| tracing::error!("make an event: {e}")).ok()?;
        self.exits.lock().unwrap_or_else(PoisonError::into_inner).push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn handle_event(&self, event: u16, _: EventSet, rings: &[Ring], queue: usize) -> io::Result<()> {
        let Some(ring) = rings.first() else { return Ok(()) };
        if usize::from(event) == self.num_queues() + 1 {
            // Another waker may have been faster.
            let _ = self.wakers[queue].0.consume();
        }
        self.rings[queue].get_or_init(|| {
            ring.govern(|| self.policy(queue));
            ring.clone()
        });
        self.drain(queue, ring);
        Ok(())
    }
}
