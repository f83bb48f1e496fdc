//! From what was recorded to the report: joins reads with the fetches they waited for.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use rafs::bootstrap::{Bootstrap, Nid, Step, Walk};
use rafs::fs::Rafs;

use super::record::{End, FetchEvent, ReadEvent, Recorded, Recorder};
use super::report::{
    Chunk, Fetch, File, Image, Outcome, Process, Read, Report, Supplied, Totals, Verdict, Waits,
};
use crate::metrics::supplier_name;
use crate::mount::Mount;

/// Directory entries looked at to name files; those beyond keep their inode number.
const MAX_STEPS: usize = 4 << 20;

/// From this share of the image on, fetching it before anybody read was no start's hints or trace,
/// in percent.
const EARLY: u64 = 50;

/// From this share of the image on, fetching it was not lazy, in percent.
const MOST: u64 = 90;

/// The report of `mount`. Walks the image's tree to name files.
pub fn build(mount: &Mount, recorder: &Recorder) -> Report {
    let recorded = recorder.recorded();
    let rafs = mount.rafs();
    let blobs = rafs.bootstrap().blobs();
    let cache = mount.cache_metrics().snapshot();
    let fetches = mount.fetch_metrics().snapshot();
    let (ready_chunks, chunks) = mount.chunk_counts();

    let mut names = Names::new(&recorded);
    let (reads, fetched_for) = join(&recorded, |event| chunks_of(rafs, event), &mut names);
    let totals = Totals {
        reads: recorded.totals.reads,
        waited: recorded.totals.waited,
        failed: recorded.totals.failed,
        read_bytes: mount.metrics().snapshot("").data_read,
        waited_us: recorded.totals.waited_us,
        blocked_us: union(reads.iter().map(|read| (read.at_us, read.at_us + read.took_us))),
        first_read_us: recorded.totals.first_us,
        requests: mount.backend_metrics().snapshot("").read_count,
        fetched_bytes: cache.fetched_bytes,
        asked_bytes: cache.asked_bytes,
        before_first_read_bytes: recorded.before_first_read,
    };
    let image = Image {
        bytes: blobs.iter().map(|blob| blob.data_size).sum(),
        chunks,
        cached_chunks: mount.cached_at_mount(),
        ready_chunks,
    };
    let supplied: Vec<Supplied> = fetches
        .supplied
        .iter()
        .map(|s| Supplied {
            source: Cow::Borrowed(s.source),
            purpose: Cow::Borrowed(s.purpose),
            chunks: s.chunks,
            bytes: s.bytes,
        })
        .collect();
    let mut waits = Waits::default();
    reads.iter().for_each(|read| waits.add(&read.waits));
    let mut report = Report {
        mountpoint: mount.mountpoint().to_owned(),
        age_us: recorded.age_us,
        verdict: judge(&image, &totals, &supplied),
        image,
        totals,
        waits,
        supplied,
        blobs: blobs.iter().map(|blob| blob.id.to_string()).collect(),
        processes: recorded
            .processes
            .iter()
            .map(|process| Process { pid: process.pid, name: readable(process.name()) })
            .collect(),
        files: names.files(&**rafs.bootstrap(), &recorded, &reads),
        fetches: fetches_of(&recorded.fetches, &fetched_for),
        reads,
        dropped_reads: recorded.dropped_reads,
        dropped_fetches: recorded.dropped_fetches,
    };
    sort(&mut report);
    report
}

/// Longest waits first, of files and of reads.
fn sort(report: &mut Report) {
    let mut order: Vec<usize> = (0..report.files.len()).collect();
    let key = |at: &usize| {
        let file = &report.files[*at];
        (std::cmp::Reverse(file.waited_us), std::cmp::Reverse(file.reads), &file.path)
    };
    order.sort_by(|a, b| key(a).cmp(&key(b)));
    let mut place = vec![0; order.len()];
    for (new, old) in order.iter().enumerate() {
        place[*old] = new;
    }
    let files = std::mem::take(&mut report.files);
    report.files = order.iter().map(|old| files[*old].clone()).collect();
    report.reads.iter_mut().for_each(|read| read.file = place[read.file]);
    report.fetches.iter_mut().for_each(|fetch| fetch.file = fetch.file.map(|file| place[file]));
    report.reads.sort_by_key(|read| (std::cmp::Reverse(read.took_us), read.at_us));
    report.fetches.sort_by_key(|fetch| fetch.at_us);
}

/// The chunks that a read touches: a pure function of the image.
fn chunks_of(rafs: &Rafs, event: &ReadEvent) -> Vec<Chunk> {
    let mut slices = Vec::new();
    // It was resolved once already, when it was read.
    let _ = rafs.read(event.nid, event.offset, event.len, &mut slices);
    slices.iter().map(|slice| Chunk { blob: slice.blob, index: slice.extent.index.0 }).collect()
}

/// Places of files in the report.
struct Names {
    places: HashMap<Nid, usize>,
}

impl Names {
    /// All files that were read.
    fn new(recorded: &Recorded) -> Self {
        let mut nids: Vec<Nid> = recorded.files.keys().copied().collect();
        nids.extend(recorded.reads.iter().map(|read| read.nid));
        nids.sort_unstable();
        nids.dedup();
        Self { places: nids.into_iter().enumerate().map(|(place, nid)| (nid, place)).collect() }
    }

    /// The files in their places, and behind them those that were not told apart.
    fn files(&self, bootstrap: &dyn Bootstrap, recorded: &Recorded, reads: &[Read]) -> Vec<File> {
        let mut nids: Vec<Nid> = self.places.keys().copied().collect();
        nids.sort_unstable();
        let paths = paths_of(bootstrap, &nids);
        let mut spans: Vec<Vec<(u64, u64)>> = vec![Vec::new(); nids.len()];
        for read in reads {
            spans[read.file].push((read.at_us, read.at_us + read.took_us));
        }
        let mut files: Vec<File> = nids
            .iter()
            .zip(spans)
            .map(|(nid, spans)| {
                let used = recorded.files.get(nid).copied().unwrap_or_default();
                File {
                    path: paths.get(nid).cloned().unwrap_or_else(|| format!("inode {nid}")),
                    reads: used.reads.into(),
                    bytes: used.bytes,
                    waited: spans.len() as u64,
                    waited_us: spans.iter().map(|(from, to)| to - from).sum(),
                    blocked_us: union(spans.into_iter()),
                }
            })
            .collect();
        if recorded.other_files.reads > 0 {
            files.push(File {
                path: "(other files)".to_owned(),
                reads: recorded.other_files.reads.into(),
                bytes: recorded.other_files.bytes,
                waited: 0,
                waited_us: 0,
                blocked_us: 0,
            });
        }
        files
    }
}

/// A path of each of `nids`, which are sorted; a hard link has several.
fn paths_of(bootstrap: &dyn Bootstrap, nids: &[Nid]) -> HashMap<Nid, String> {
    let mut missing: HashSet<Nid> = nids.iter().copied().collect();
    let mut paths = HashMap::with_capacity(nids.len());
    let mut walk = Walk::new(bootstrap, bootstrap.root());
    for _ in 0..MAX_STEPS {
        if missing.is_empty() {
            break;
        }
        // The tree was validated; what can not be walked keeps its numbers.
        match walk.step() {
            Ok(Some(Step::Leaf(entry))) => {
                if missing.remove(&entry.nid) {
                    paths.insert(entry.nid, format!("/{}", readable(walk.path())));
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => break,
        }
    }
    paths
}

/// A name as text; one that is no text, or would play tricks on a terminal, with escapes.
fn readable(name: &[u8]) -> String {
    match std::str::from_utf8(name) {
        Ok(text) if !text.chars().any(|c| c.is_control() || c == '\\' || is_format(c)) => text.to_owned(),
        _ => name.escape_ascii().to_string(),
    }
}

/// Characters that are not seen but change how others are shown, such as their direction.
fn is_format(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// What each read waited for, and for each fetch the file of a read that waited for it.
fn join(
    recorded: &Recorded,
    chunks_of: impl Fn(&ReadEvent) -> Vec<Chunk>,
    names: &mut Names,
) -> (Vec<Read>, HashMap<usize, usize>) {
    let mut by_chunk: HashMap<Chunk, Vec<usize>> = HashMap::new();
    for (place, fetch) in recorded.fetches.iter().enumerate() {
        by_chunk.entry(Chunk { blob: fetch.blob, index: fetch.chunk }).or_default().push(place);
    }
    let mut copies: HashMap<Chunk, Vec<(u64, u64)>> = HashMap::new();
    for copy in &recorded.copies {
        let span = (copy.began_us, copy.began_us + u64::from(copy.took_us));
        copies.entry(Chunk { blob: copy.blob, index: copy.chunk }).or_default().push(span);
    }
    let mut fetched_for = HashMap::new();
    let reads = recorded
        .reads
        .iter()
        .map(|event| {
            let file = names.places[&event.nid];
            let chunks = chunks_of(event);
            let span = (event.began_us, event.began_us + u64::from(event.took_us));
            let places = chunks.iter().flat_map(|chunk| by_chunk.get(chunk).into_iter().flatten());
            let mut last: Option<usize> = None;
            for place in places.copied().filter(|place| overlaps(&recorded.fetches[*place], span)) {
                fetched_for.entry(place).or_insert(file);
                if last.is_none_or(|last| ready(&recorded.fetches[place]) > ready(&recorded.fetches[last])) {
                    last = Some(place);
                }
            }
            let fetch = last.map(|place| &recorded.fetches[place]);
            let copied = chunks.iter().flat_map(|chunk| copies.get(chunk).into_iter().flatten());
            let disk_us =
                copied.map(|(began, ended)| ended.min(&span.1).saturating_sub(*began.max(&span.0))).max();
            Read {
                process: event.process.0.into(),
                file,
                offset: event.offset,
                len: event.len,
                at_us: event.began_us,
                took_us: event.took_us.into(),
                waits: waits_of(event, fetch, disk_us.unwrap_or(0)),
                source: match (event.end, fetch) {
                    (End::SlowHit, _) => Some(Cow::Borrowed("cache")),
                    (_, Some(fetch)) => fetch.supplier.map(|s| Cow::Borrowed(supplier_name(s))),
                    (_, None) => None,
                },
                chunk: fetch
                    .map(|fetch| Chunk { blob: fetch.blob, index: fetch.chunk })
                    .or_else(|| chunks.first().copied()),
                outcome: match event.end {
                    End::Done | End::SlowHit => Outcome::Done,
                    End::Failed => Outcome::Failed,
                    End::Waiting => Outcome::Waiting,
                },
            }
        })
        .collect();
    (reads, fetched_for)
}

/// When the chunk was ready.
fn ready(fetch: &FetchEvent) -> u64 {
    moments(fetch)[4]
}

/// Wanted, requested, answered, received, verified.
fn moments(fetch: &FetchEvent) -> [u64; 5] {
    let mut at = fetch.wanted_us;
    let steps = [0, fetch.queue_us, fetch.answer_us, fetch.transfer_us, fetch.decode_us];
    steps.map(|step| {
        at += u64::from(step);
        at
    })
}

/// True if the fetch was under way while the read waited.
fn overlaps(fetch: &FetchEvent, (from, to): (u64, u64)) -> bool {
    fetch.wanted_us <= to && ready(fetch) >= from
}

/// The parts of a read's wait that fall into the phases of the fetch that ended last, and the
/// time it took to copy from the data file.
fn waits_of(event: &ReadEvent, fetch: Option<&FetchEvent>, copy_us: u64) -> Waits {
    let (from, to) = (event.began_us, event.began_us + u64::from(event.took_us));
    let mut waits = Waits::default();
    if let Some(fetch) = fetch {
        let [wanted, requested, _, received, verified] = moments(fetch).map(|at| at.clamp(from, to));
        waits.queue_us = requested - wanted;
        waits.network_us = received - requested;
        waits.decode_us = verified - received;
    }
    let known = waits.queue_us + waits.network_us + waits.decode_us;
    let rest = (to - from).saturating_sub(known);
    waits.disk_us = if event.end == End::SlowHit { rest } else { copy_us.min(rest) };
    waits.other_us = rest - waits.disk_us;
    waits
}

/// Length of the union of spans.
fn union(spans: impl Iterator<Item = (u64, u64)>) -> u64 {
    let mut spans: Vec<_> = spans.collect();
    spans.sort_unstable();
    let (mut covered, mut until) = (0, 0);
    for (from, to) in spans {
        let from = from.max(until);
        covered += to.saturating_sub(from);
        until = until.max(to);
    }
    covered
}

fn fetches_of(events: &[FetchEvent], fetched_for: &HashMap<usize, usize>) -> Vec<Fetch> {
    events
        .iter()
        .enumerate()
        .map(|(place, event)| Fetch {
            chunk: Chunk { blob: event.blob, index: event.chunk },
            bytes: event.stored.into(),
            at_us: event.wanted_us,
            queue_us: event.queue_us.into(),
            answer_us: event.answer_us.into(),
            transfer_us: event.transfer_us.into(),
            decode_us: event.decode_us.into(),
            source: event.supplier.map(|supplier| Cow::Borrowed(supplier_name(supplier))),
            file: fetched_for.get(&place).copied(),
            demanded: event.demanded,
            failed: event.failed,
        })
        .collect()
}

/// Says plainly what lazy loading came to.
fn judge(image: &Image, totals: &Totals, supplied: &[Supplied]) -> Verdict {
    let share = |bytes: u64| bytes.saturating_mul(100).checked_div(image.bytes).unwrap_or(0).min(100);
    let fetched = share(totals.fetched_bytes);
    let local = !supplied.is_empty() && supplied.iter().all(|s| s.source == "local");
    let said = |lazy, text: String| Verdict { lazy, text };
    if image.chunks > 0 && image.cached_chunks >= image.chunks {
        said(false, "not lazy: the whole image was in the cache before it was mounted".to_owned())
    } else if fetched >= MOST && totals.asked_bytes < totals.fetched_bytes / 2 {
        said(
            false,
            format!(
                "not lazy: {fetched} % of the image was fetched, though readers asked for {} % only",
                share(totals.asked_bytes)
            ),
        )
    } else if fetched >= MOST {
        said(
            false,
            format!("not lazy: {fetched} % of the image was fetched, and readers asked for most of it"),
        )
    } else if share(totals.before_first_read_bytes) >= EARLY {
        said(
            false,
            format!(
                "not lazy: {} % of the image came before anybody had read a byte of it",
                share(totals.before_first_read_bytes)
            ),
        )
    } else if totals.reads == 0 {
        said(true, "lazy so far: nobody has read anything".to_owned())
    } else if totals.requests == 0 {
        said(true, "lazy, but nothing was fetched: the cache had all that was read".to_owned())
    } else if local {
        said(true, format!("lazy, from a disk of this node: {fetched} % of the image was read"))
    } else {
        said(true, format!("lazy: {fetched} % of the image was fetched"))
    }
}

#[cfg(test)]
mod tests;
