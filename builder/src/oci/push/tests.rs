//! Pushes to Debian's registry.

use super::*;
use crate::oci::source::BlobStore as _;
use crate::oci::testing_registry::{FakeRegistry, Line, Registry};
use crate::progress::Silent;

fn pusher(host: &str, part_size: u64) -> Pusher {
    let mut pusher = Pusher::new(&format!("{host}/team/app:v1"), &RegistryOptions::default()).unwrap();
    pusher.part_size = part_size;
    pusher
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n ^ (n >> 8) ^ (n >> 16)) as u8).collect()
}

fn meter() -> Arc<dyn Meter> {
    Arc::new(Silent)
}

#[test]
fn blobs_of_every_size_arrive_once() {
    let Some(registry) = Registry::start() else { return };
    let pusher = pusher(registry.address(), 64 << 10);
    for len in [0, 1, 64 << 10, (64 << 10) + 1, 1 << 20] {
        let data = bytes(len);
        for outcome in ["", "exists already"] {
            let blob = SpooledBlob::from_bytes(pusher.spool_dir(), &data).unwrap();
            assert_eq!(pusher.put(&blob, &meter()).unwrap(), outcome, "{len}");
            assert_eq!(pusher.repository.read(&blob.digest(), 2 << 20).unwrap(), data, "{len}");
        }
    }
}

#[test]
fn a_streamed_upload_arrives() {
    let Some(registry) = Registry::start() else { return };
    let pusher = pusher(registry.address(), 1024);
    let data = bytes(3 << 20);
    let blob = SpooledBlob::from_bytes(pusher.spool_dir(), &data).unwrap();
    let Repository { client, context, reference, runtime } = &pusher.repository;
    let meter = meter();
    let mut upload = Upload {
        client,
        context,
        access: pusher.access(),
        repository: reference.repository(),
        blob: &blob,
        meter: &meter,
        part_size: 1024,
        whole: true,
        session: None,
        offset: 0,
        furthest: 0,
    };
    runtime.block_on(upload.run()).unwrap();
    assert_eq!(pusher.repository.read(&blob.digest(), 4 << 20).unwrap(), data);
}

#[test]
fn a_broken_line_does_not_stop_an_upload() {
    let Some(registry) = Registry::start() else { return };
    let data = bytes(2 << 20);
    let line = Line::new(registry.address(), 300 << 10, 4);
    let pusher = pusher(line.address(), 128 << 10);
    let blob = SpooledBlob::from_bytes(pusher.spool_dir(), &data).unwrap();
    pusher.put(&blob, &meter()).unwrap();
    assert_eq!(pusher.repository.read(&blob.digest(), 4 << 20).unwrap(), data);
    // This registry forgets a session whose part was cut, so each cut costs what was sent before.
    assert!(line.sent() > data.len() as u64 + (1 << 20), "the line was never cut");
}

#[test]
fn an_upload_goes_on_where_the_registry_has_got() {
    let data = bytes(1_000_000);
    let part = 128 << 10;
    for takes_parts in [true, false] {
        let fake = FakeRegistry::start(takes_parts);
        let pusher = pusher(&fake.address, part);
        let blob = SpooledBlob::from_bytes(pusher.spool_dir(), &data).unwrap();
        pusher.put(&blob, &meter()).unwrap();
        let state = fake.state.lock().unwrap();
        assert!(state.stored == data, "the stored bytes differ");
        assert_eq!(state.sessions, if takes_parts { 1 } else { 2 });
        // Every second part is cut in half: what was sent twice is less than that.
        assert!(!takes_parts || state.received < data.len() as u64 + 8 * part / 2, "{}", state.received);
    }
}

#[test]
fn what_cannot_work_is_said_at_once() {
    let digest = "0".repeat(64);
    let err =
        Pusher::new(&format!("127.0.0.1:1/a@sha256:{digest}"), &RegistryOptions::default()).err().unwrap();
    assert_eq!(err.kind(), ErrorKind::Invalid);
    let options = RegistryOptions::default();
    options.cancel.cancel();
    let pusher = Pusher::new("127.0.0.1:1/a:b", &options).unwrap();
    let blob = SpooledBlob::from_bytes(pusher.spool_dir(), b"x").unwrap();
    let err = pusher.put(&blob, &meter()).unwrap_err();
    let spool = pusher.spool_dir().to_owned();
    drop((pusher, blob));
    assert!(!spool.exists(), "{err}: the temporary directory was left");
}
