//! One line in the log when a start is over.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tracing::info;

use crate::metrics::amplification;
use crate::mount::Mount;

/// A start is over when no reader has waited for this long.
const QUIET: Duration = Duration::from_secs(3);

/// Waits for the first read and for the end of the start that it begins, and logs what it
/// cost. Ends with the mount, of which it holds nothing while it waits.
pub async fn log_start(mount: Weak<Mount>) {
    let recorder = || {
        let mount = mount.upgrade()?;
        let recorder = Arc::clone(mount.recorder()?);
        Some((mount, recorder))
    };
    let Some(begun) = recorder().map(|(_, recorder)| recorder.first_read()) else { return };
    begun.notified().await;
    let (mount, recorder) = loop {
        let Some((mount, recorder)) = recorder() else { return };
        let totals = recorder.totals();
        let quiet_since = totals.last_wait_us.max(totals.first_us.unwrap_or(0));
        let quiet = Duration::from_micros(recorder.now_us().saturating_sub(quiet_since));
        if quiet >= QUIET && !recorder.is_waited_for() {
            break (mount, recorder);
        }
        drop((mount, recorder));
        tokio::time::sleep(QUIET.saturating_sub(quiet).max(Duration::from_secs(1))).await;
    };
    let totals = recorder.totals();
    let cache = mount.cache_metrics().snapshot();
    let seconds = |us: u64| us as f64 / 1e6;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    info!(
        "start of {}: {:.2} s from the first read to the end of the last wait; {} reads, {} of them waited {:.2} s \
         in all, the longest {:.3} s; {:.1} MiB fetched in {} requests, x{:.2} of the {:.1} MiB that readers asked \
         for (`nydusctl why` tells more)",
        mount.mountpoint(),
        seconds(totals.last_wait_us.saturating_sub(totals.first_us.unwrap_or(0))),
        totals.reads,
        totals.waited,
        seconds(totals.waited_us),
        seconds(totals.longest_us.into()),
        mib(cache.fetched_bytes),
        mount.backend_metrics().snapshot("").read_count,
        amplification(cache.fetched_bytes, cache.asked_bytes),
        mib(cache.asked_bytes),
    );
}
