use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;

/// The guest has this much memory, and at its beginning a ring of so many entries.
const MEMORY: u64 = 64 << 10;
const ENTRIES: u16 = 16;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Behind the ring.
const DATA: u64 = 0x3000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A guest that writes what it likes.
struct Guest {
    memory: GuestMemoryMmap,
    ring: Ring,
    resumed: Arc<AtomicUsize>,
}

impl Guest {
    fn new(in_order: bool, most: u64) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let ring = Ring::new(Memory::new(memory.clone()), ENTRIES).unwrap();
        let resumed = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&resumed);
        ring.govern(|| Policy {
            in_order,
            most,
            abandon: Box::new(|| {}),
            resume: Box::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }),
        });
        let guest = Self { memory, ring, resumed };
        guest.start();
        guest
    }

    fn start(&self) {
        self.ring.set_queue_size(ENTRIES);
        self.ring.set_queue_info(DESCRIPTORS, AVAILABLE, USED).unwrap();
        self.ring.set_queue_ready(true);
        self.ring.set_enabled(true);
    }

    fn write_u16(&self, at: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = table + u64::from(index) * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.write_u16(at + 12, flags);
        self.write_u16(at + 14, next);
    }

    /// Makes a chain of 8 bytes to read, and `room` to write.
    fn chain(&self, head: u16, room: u32) {
        self.descriptor(DESCRIPTORS, head, DATA, 8, NEXT, head + 1);
        self.descriptor(DESCRIPTORS, head + 1, DATA + 0x1000, room, WRITE, 0);
    }

    /// Puts chains into the ring, `from` having been there before.
    fn offer(&self, from: u16, heads: &[u16]) {
        for (slot, head) in (from..).zip(heads) {
            self.write_u16(AVAILABLE + 4 + u64::from(slot % ENTRIES) * 2, *head);
        }
        self.write_u16(AVAILABLE + 2, from + heads.len() as u16);
    }

    /// What came back: heads, and bytes written.
    fn used(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.read(USED + 2);
        let entry = |slot: u16| USED + 4 + u64::from(slot) * 8;
        (0..count).map(|slot| (self.read(entry(slot)), self.read(entry(slot) + 4))).collect()
    }

    fn image(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

#[test]
fn a_request_is_read_and_answered() {
    let guest = Guest::new(false, 1 << 20);
    guest.chain(0, 100);
    guest.memory.write_slice(b"question", GuestAddress(DATA)).unwrap();
    guest.offer(0, &[0]);
    let request = guest.ring.take().unwrap().unwrap();
    assert!(guest.ring.take().unwrap().is_none());
    assert_eq!((request.readable(), request.writable()), (8, 100));
    let mut bytes = Vec::new();
    assert!(request.copy_to(&mut bytes, 7).is_err());
    request.copy_to(&mut bytes, 8).unwrap();
    assert_eq!(bytes, b"question");
    assert!(guest.used().is_empty());
    request.answer(&[b"ans", b"wer"]).unwrap();
    assert_eq!(guest.used(), [(0, 6)]);
    assert_eq!(guest.image()[DATA as usize + 0x1000..][..7], *b"answer\0");
}

#[test]
fn an_answer_that_does_not_fit_comes_back_empty() {
    let guest = Guest::new(false, 1 << 20);
    guest.chain(0, 3);
    guest.chain(2, 3);
    guest.offer(0, &[0, 2]);
    guest.ring.take().unwrap().unwrap().answer(&[b"four"]).unwrap_err();
    guest.ring.take().unwrap().unwrap().answer_around(b"abc", b"d").unwrap_err();
    assert_eq!(guest.used(), [(0, 0), (2, 0)]);
}

#[test]
fn answers_come_in_any_order_or_in_that_of_the_ring() {
    for (in_order, early, all) in
        [(false, vec![(4, 1)], vec![(4, 1), (0, 1), (2, 0)]), (true, vec![], vec![(0, 1), (2, 0), (4, 1)])]
    {
        let guest = Guest::new(in_order, 1 << 20);
        [0, 2, 4].into_iter().for_each(|head| guest.chain(head, 16));
        guest.offer(0, &[0, 2, 4]);
        let [first, second, third] = std::array::from_fn(|_| guest.ring.take().unwrap().unwrap());
        third.answer(&[b"3"]).unwrap();
        assert_eq!(guest.used(), early);
        first.answer(&[b"1"]).unwrap();
        drop(second);
        assert_eq!(guest.used(), all);
    }
}

#[test]
fn no_more_is_taken_than_there_is_room_for() {
    let guest = Guest::new(false, 8192);
    [0, 2, 4].into_iter().for_each(|head| guest.chain(head, 16));
    guest.offer(0, &[0, 2, 4]);
    let [first, second] = std::array::from_fn(|_| guest.ring.take().unwrap().unwrap());
    assert!(guest.ring.take().unwrap().is_none());
    assert!(!guest.ring.may_take());
    drop(first);
    assert_eq!(guest.resumed.load(Ordering::Relaxed), 1);
    assert!(guest.ring.take().unwrap().is_some());
    drop(second);
}

#[test]
fn nothing_is_written_after_the_end_of_a_ring() {
    let guest = Guest::new(true, 1 << 20);
    guest.chain(0, 16);
    guest.chain(2, 16);
    guest.offer(0, &[0, 2]);
    let late = guest.ring.take().unwrap().unwrap();
    guest.ring.close();
    let before = guest.image();
    assert!(guest.ring.take().unwrap().is_none(), "it is closed");
    late.answer(&[b"late"]).unwrap();
    assert!(guest.image() == before);
    // Another life begins where the monitor says, and has its own requests.
    guest.ring.set_queue_ready(false);
    guest.ring.set_queue_next_avail(0);
    guest.start();
    guest.ring.take().unwrap().unwrap().answer(&[b"again"]).unwrap();
    assert_eq!(guest.used(), [(0, 5)]);
}

#[test]
fn a_ring_that_makes_no_sense_is_left_alone() {
    let guest = Guest::new(false, 1 << 20);
    // More than it has entries.
    guest.write_u16(AVAILABLE + 2, ENTRIES + 1);
    assert!(guest.ring.take().is_err());
    guest.write_u16(AVAILABLE + 2, 1);
    assert!(guest.ring.take().unwrap().is_none());
    assert!(!guest.ring.may_take());
}

/// Addresses of which some are in the memory.
fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![4 => DATA..MEMORY + 4096, 1 => 0..DATA, 1 => any::<u64>(), 1 => u64::MAX - 4096..=u64::MAX]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..5000_u32, 1 => any::<u32>(), 1 => Just(u32::MAX)]
}

fn flags() -> impl Strategy<Value = u16> {
    prop_oneof![6 => 0..4_u16, 2 => Just(INDIRECT), 1 => any::<u16>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Chains that loop, tables anywhere, lengths that overflow: each request comes back at most once, nothing panics
    /// and nothing stays under way.
    #[test]
    fn whatever_a_guest_writes_comes_back(
        in_order: bool,
        descriptors in prop::collection::vec((addresses(), lengths(), flags(), 0..20_u16), 32),
        heads in prop::collection::vec(0..20_u16, 1..=16),
        answers in prop::collection::vec((0..6000_usize, 0..3_u8), 16),
    ) {
        let guest = Guest::new(in_order, 64 << 20);
        // The second half is a table that indirect descriptors may meet.
        for (index, (address, len, flags, next)) in descriptors.iter().enumerate() {
            let (table, index) = if index < 16 { (DESCRIPTORS, index) } else { (DATA, index - 16) };
            guest.descriptor(table, index as u16, *address, *len, *flags, *next);
        }
        guest.offer(0, &heads);
        let mut taken = Vec::new();
        while let Ok(Some(request)) = guest.ring.take() {
            taken.push(request);
            prop_assert!(taken.len() <= heads.len());
        }
        let mut bytes = Vec::new();
        while let Some(request) = taken.pop() {
            let (len, how) = answers[taken.len()];
            let copied = request.copy_to(&mut bytes, 8192);
            prop_assert!(copied.is_err() || bytes.len() as u64 == request.readable());
            let room = request.writable();
            let data = vec![0xa5; len];
            let answered = match how {
                0 => request.answer(&[&data[..len / 2], &data[len / 2..]]),
                1 => request.answer_around(&data, &[1]),
                _ => Ok(()),
            };
            prop_assert!(answered.is_err() || how > 1 || len as u64 <= room);
        }
        let state = guest.ring.flights.lock();
        prop_assert_eq!((state.count, state.bytes, state.writing), (0, 0, 0));
        prop_assert!(state.closed || state.order.is_empty());
        drop(state);
        guest.ring.set_queue_ready(false);
        prop_assert!(!guest.ring.may_take());
    }
}
