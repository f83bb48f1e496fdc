//! All counters as text for a scraper: OpenMetrics 1.0, which Prometheus reads.
//!
//! Durations are seconds, sizes bytes. Each family has one sample a mount and label set.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use storage::metrics::OriginSnapshot;

use super::fetches::{PHASES, amplification};
use super::{Durations, FOP_NAMES, READ_LATENCY_US};
use crate::daemon::Daemon;
use crate::mount::Mount;

/// What [`expose`] answers.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Inclusive upper bounds of the latency classes of requests in milliseconds.
const REQUEST_LATENCY_MS: [u64; 7] = [1, 20, 50, 100, 500, 1000, 2000];

/// All counters of the daemon.
///
/// # Errors
/// None that a string as target can cause.
pub fn expose(daemon: &Daemon) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("nydus");
    let inflight = daemon.adapter().inflight().entries().len() as u64;
    registry.register_collector(Box::new(Snapshot { mounts: daemon.adapter().table().mounts(), inflight }));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Snapshot {
    mounts: Vec<Arc<Mount>>,
    inflight: u64,
}

/// A family: name without prefix and suffix, what it says.
type Family = (&'static str, &'static str);

/// Labels of one sample beside its mount, and its value.
type Sample<'a> = (&'a [(&'static str, &'a str)], f64);

/// The family of one metric, over all mounts.
struct Writer<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
    mounts: &'a [Arc<Mount>],
}

impl Writer<'_, '_> {
    /// A family whose samples `of` lists for each mount.
    fn family(
        &mut self,
        (name, help): Family,
        kind: MetricType,
        mut of: impl FnMut(&Mount, &mut dyn FnMut(Sample<'_>) -> fmt::Result) -> fmt::Result,
    ) -> fmt::Result {
        let mut metric = self.encoder.encode_descriptor(name, help, None, kind)?;
        for mount in self.mounts {
            of(mount, &mut |(labels, value)| {
                let labels = labels_of(mount, labels);
                let mut sample = metric.encode_family(&labels)?;
                match kind {
                    MetricType::Counter => sample.encode_counter::<NoLabelSet, _, f64>(&value, None),
                    _ => sample.encode_gauge(&value),
                }
            })?;
        }
        Ok(())
    }

    /// A counter without further labels.
    fn counter(&mut self, family: Family, of: impl Fn(&Mount) -> u64) -> fmt::Result {
        self.family(family, MetricType::Counter, |mount, sample| sample((&[], of(mount) as f64)))
    }

    fn histograms(
        &mut self,
        (name, help): Family,
        of: impl Fn(&Mount, &mut dyn FnMut(&[(&'static str, &str)], Buckets) -> fmt::Result) -> fmt::Result,
    ) -> fmt::Result {
        let mut metric = self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for mount in self.mounts {
            of(mount, &mut |labels, buckets| {
                let labels = labels_of(mount, labels);
                let count = buckets.classes.iter().map(|(_, count)| count).sum();
                let mut sample = metric.encode_family(&labels)?;
                sample.encode_histogram::<NoLabelSet>(buckets.sum, count, &buckets.classes, None)
            })?;
        }
        Ok(())
    }
}

fn labels_of<'a>(mount: &'a Mount, more: &[(&'static str, &'a str)]) -> Vec<(&'static str, &'a str)> {
    std::iter::once(("mount", mount.mountpoint())).chain(more.iter().copied()).collect()
}

/// One histogram.
struct Buckets {
    /// Bound in seconds and count of each class, the last without a bound.
    classes: Vec<(f64, u64)>,
    /// Seconds.
    sum: f64,
}

impl From<&Durations> for Buckets {
    fn from(durations: &Durations) -> Self {
        Self { classes: durations.classes(), sum: durations.sum() }
    }
}

impl Buckets {
    /// `counts` by `bounds`, which are in parts of a second.
    fn classes(bounds: &[u64; 7], parts: f64, counts: &[u64; 8], sum: f64) -> Self {
        let bounds = bounds.iter().map(|bound| *bound as f64 / parts).chain([f64::INFINITY]);
        Self { classes: bounds.zip(counts.iter().copied()).collect(), sum }
    }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer { encoder: &mut encoder, mounts: &self.mounts };
        reads(&mut writer)?;
        requests(&mut writer)?;
        origins(&mut writer)?;
        chunks(&mut writer)?;
        process(&mut encoder, self.inflight)
    }
}

/// What readers got, and how long it took.
fn reads(writer: &mut Writer<'_, '_>) -> fmt::Result {
    use MetricType::Counter;
    writer.family(("reads", "Reads by what the cache had of them"), Counter, |mount, sample| {
        let cache = mount.cache_metrics().snapshot();
        for (result, count) in
            [("hit", cache.whole_hits), ("partial", cache.partial_hits), ("miss", cache.misses)]
        {
            sample((&[("result", result)], count as f64))?;
        }
        Ok(())
    })?;
    writer
        .counter(("read_errors", "Reads that failed"), |mount| mount.metrics().snapshot("").fop_errors[4])?;
    writer.family(
        ("read_bytes", "Bytes given to readers: from the cache, or after a wait for a fetch"),
        Counter,
        |mount, sample| {
            let all = mount.metrics().data_read.load(Relaxed);
            let waited = mount.metrics().waited_bytes.load(Relaxed);
            sample((&[("source", "cache")], all.saturating_sub(waited) as f64))?;
            sample((&[("source", "fetch")], waited as f64))
        },
    )?;
    writer.histograms(("read_duration_seconds", "Time of all reads in the daemon"), |mount, sample| {
        let shot = mount.metrics().snapshot("");
        let sum = shot.fop_cumulative_latency_total[4] as f64 / 1e6;
        sample(&[], Buckets::classes(&READ_LATENCY_US, 1e6, &shot.read_latency_dist, sum))
    })?;
    writer.histograms(("read_wait_seconds", "Time of reads that waited for a fetch"), |mount, sample| {
        sample(&[], Buckets::from(&mount.metrics().waits))
    })?;
    writer.family(("operations", "File system operations"), Counter, |mount, sample| {
        let shot = mount.metrics().snapshot("");
        for (at, operation) in FOP_NAMES.into_iter().enumerate() {
            for (result, count) in [("ok", shot.fop_hits[at]), ("error", shot.fop_errors[at])] {
                if count > 0 {
                    sample((&[("operation", operation), ("result", result)], count as f64))?;
                }
            }
        }
        Ok(())
    })
}

/// What was asked of the source.
fn requests(writer: &mut Writer<'_, '_>) -> fmt::Result {
    use MetricType::{Counter, Gauge};
    let kind = |mount: &Mount| mount.config().backend.kind();
    writer.family(("backend_requests", "Requests for blob bytes"), Counter, |mount, sample| {
        let shot = mount.backend_metrics().snapshot(kind(mount));
        for (result, count) in
            [("ok", shot.read_count.saturating_sub(shot.read_errors)), ("error", shot.read_errors)]
        {
            sample((&[("backend", kind(mount)), ("result", result)], count as f64))?;
        }
        Ok(())
    })?;
    writer.counter(("backend_retries", "Requests sent again after a failure"), |mount| {
        mount.backend_metrics().snapshot(kind(mount)).read_retries
    })?;
    writer.counter(("backend_received_bytes", "Blob bytes received, wanted or not"), |mount| {
        mount.backend_metrics().snapshot(kind(mount)).read_amount_total
    })?;
    writer.histograms(
        ("backend_request_duration_seconds", "Time from a request to the last byte of its answer"),
        |mount, sample| {
            let shot = mount.backend_metrics().snapshot(kind(mount));
            let counts =
                std::array::from_fn(|at| shot.read_latency_sizes_dist.iter().map(|sizes| sizes[at]).sum());
            let sum = shot.read_cumulative_latency_millis_total as f64 / 1e3;
            sample(&[("backend", kind(mount))], Buckets::classes(&REQUEST_LATENCY_MS, 1e3, &counts, sum))
        },
    )?;
    writer.counter(("prefetch_requests", "Requests that nobody waited for"), |mount| {
        mount.cache_metrics().snapshot().prefetch_requests_count
    })?;
    writer.counter(
        ("prefetch_received_bytes", "Blob bytes received by requests that nobody waited for"),
        |mount| mount.cache_metrics().snapshot().prefetch_data_amount,
    )?;
    writer.counter(
        ("asked_bytes", "Stored bytes of fetched chunks that readers asked for, sooner or later"),
        |mount| mount.cache_metrics().snapshot().asked_bytes,
    )?;
    writer.family(
        ("amplification_ratio", "Bytes received for one byte of chunks that readers asked for, as stored"),
        Gauge,
        |mount, sample| {
            let cache = mount.cache_metrics().snapshot();
            sample((&[], amplification(cache.fetched_bytes, cache.asked_bytes)))
        },
    )
}

/// What was asked of each server of the source. What came back from a server that redirects
/// counts for the one it redirects to.
fn origins(writer: &mut Writer<'_, '_>) -> fmt::Result {
    use MetricType::{Counter, Gauge};
    type Of = fn(&OriginSnapshot) -> u64;
    let families: [(Family, MetricType, Of); 8] = [
        (("origin_requests", "Requests to one server, hedges included"), Counter, |o| o.requests),
        (
            ("origin_failures", "Requests that the server did not answer, or answered as a broken one"),
            Counter,
            |o| o.failures,
        ),
        (("origin_retries", "Requests made to the server again after a failure"), Counter, |o| o.retries),
        (("origin_hedges", "Second requests sent to the server because the first was late"), Counter, |o| {
            o.hedges
        }),
        (("origin_hedge_wins", "Second requests that were answered first"), Counter, |o| o.hedge_wins),
        (
            ("origin_breaker_opens", "Times that the server failed so often that prefetch was held back"),
            Counter,
            |o| o.breaker_opens,
        ),
        (("origin_received_bytes", "Bytes of bodies received from the server"), Counter, |o| o.bytes),
        (
            ("origin_held_back", "1 while the server is spared: it fails, or asked to be left alone"),
            Gauge,
            |o| u64::from(o.breaker_open || o.paused),
        ),
    ];
    for (family, kind, of) in families {
        writer.family(family, kind, |mount, sample| {
            for origin in mount.origins() {
                sample((&[("origin", &origin.origin)], of(&origin) as f64))?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What became of chunks.
fn chunks(writer: &mut Writer<'_, '_>) -> fmt::Result {
    use MetricType::{Counter, Gauge};
    for (family, of) in [
        (("fetched_chunks", "Chunks fetched and verified, by supplier and purpose"), false),
        (
            ("fetched_chunk_bytes", "Stored bytes of chunks fetched and verified, by supplier and purpose"),
            true,
        ),
    ] {
        writer.family(family, Counter, |mount, sample| {
            for supplied in mount.fetch_metrics().snapshot().supplied {
                let value = if of { supplied.bytes } else { supplied.chunks };
                sample((&[("source", supplied.source), ("purpose", supplied.purpose)], value as f64))?;
            }
            Ok(())
        })?;
    }
    writer.counter(
        ("deduplicated_chunks", "Chunks copied from the cache file of another blob, and verified"),
        |mount| mount.cache_metrics().snapshot().deduplicated_chunks,
    )?;
    writer.counter(("deduplicated_bytes", "Their stored bytes, which were not fetched"), |mount| {
        mount.cache_metrics().snapshot().deduplicated_bytes
    })?;
    writer.histograms(
        (
            "fetch_phase_seconds",
            "Time of fetched chunks waiting for their request, on the network, being decoded and verified",
        ),
        |mount, sample| {
            for (phase, histogram) in PHASES.into_iter().zip(&mount.fetch_metrics().phases) {
                sample(&[("phase", phase)], Buckets::from(histogram))?;
            }
            Ok(())
        },
    )?;
    writer.counter(("fetch_failures", "Chunks that could not be had"), |mount| {
        mount.fetch_metrics().snapshot().failures
    })?;
    writer.counter(("verification_failures", "Units whose bytes were wrong or incomplete"), |mount| {
        mount.cache_metrics().snapshot().verification_failures
    })?;
    writer.counter(("cache_write_errors", "Chunks that could not be written to the cache"), |mount| {
        mount.cache_metrics().snapshot().write_errors
    })?;
    writer.family(("cpu_seconds", "CPU time of work on chunks"), Counter, |mount, sample| {
        let cache = mount.cache_metrics().snapshot();
        for (work, ns) in [("verify", cache.verify_cpu_ns), ("decode", cache.decode_cpu_ns)] {
            sample((&[("work", work)], ns as f64 / 1e9))?;
        }
        Ok(())
    })?;
    writer.family(("chunks", "Chunks of the image, and those in the cache"), Gauge, |mount, sample| {
        let (ready, all) = mount.chunk_counts();
        sample((&[("state", "ready")], ready as f64))?;
        sample((&[("state", "all")], all as f64))
    })
}

/// What the daemon itself uses.
fn process(encoder: &mut DescriptorEncoder<'_>, inflight: u64) -> fmt::Result {
    let mut metric =
        encoder.encode_descriptor("inflight_reads", "Reads that wait now", None, MetricType::Gauge)?;
    metric.encode_gauge(&inflight)?;
    let help = "Resident memory of the daemon";
    let mut metric = encoder.encode_descriptor("memory_bytes", help, None, MetricType::Gauge)?;
    for (kind, bytes) in resident_memory() {
        metric.encode_family(&[("kind", kind)])?.encode_gauge(&bytes)?;
    }
    let mut metric = encoder.encode_descriptor("build", "Version of the daemon", None, MetricType::Info)?;
    let version = crate::version::BUILD;
    metric.encode_info(&[("version", version.package_ver), ("commit", version.git_commit)])
}

/// Resident bytes by kind, from the kernel.
pub fn resident_memory() -> Vec<(&'static str, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    [("anonymous", "RssAnon:"), ("file", "RssFile:"), ("shared", "RssShmem:")]
        .into_iter()
        .filter_map(|(kind, key)| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some((kind, kib * 1024))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_known() {
        let kinds: Vec<_> = resident_memory().into_iter().collect();
        assert_eq!(kinds.len(), 3);
        assert!(kinds[0].1 > 0, "{kinds:?}");
    }
}
