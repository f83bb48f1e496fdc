//! From chunks that somebody wants to fetches: who waits for whom, and what comes along.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::inflight::{Lead, Waiter};
use super::plan::{MAX_BETWEEN, MAX_GAP};
use super::{Inner, fetch, neighbours};
use crate::backend::{Priority, ReadContext};
use crate::extent::ChunkExtent;
use crate::ids::ChunkIndex;
use crate::link::Slot;

/// Chunks that one miss is widened by.
const MAX_FOLLOWING: u32 = 512;

/// What became of a wish for chunks.
#[derive(Default)]
pub(super) struct Obtained {
    /// One for each chunk, with true if this call leads its fetch.
    pub(super) waiters: Vec<(Waiter, bool)>,
    /// Chunks that are on their way because they were read ahead.
    pub(super) hits: Vec<ChunkExtent>,
    /// Chunks `low..high` that a reader's miss fetches.
    pub(super) span: Option<(u32, u32)>,
    /// Stored bytes of these that the reader needs, and the others.
    pub(super) needed: u64,
    pub(super) widened: u64,
}

impl Inner {
    /// Joins or starts the fetch of chunks that are not ready. A reader's fetch is widened
    /// by about `widening` stored bytes; `slot` is the right of one that nobody waits for.
    pub(super) fn obtain(
        self: &Arc<Self>,
        wanted: &[ChunkExtent],
        context: &ReadContext,
        slot: Option<Arc<Slot>>,
        widening: u64,
    ) -> Obtained {
        let demanded = context.priority == Priority::OnDemand;
        let mut leads = Vec::new();
        let mut obtained = Obtained::default();
        // The last unit whose members were asked for: chunks come in order.
        let mut asked = None;
        for extent in wanted {
            let (waiter, lead) = self.inflight.join(extent, demanded);
            obtained.waiters.push((waiter, lead.is_some()));
            let touched = demanded && self.untouched.touch(extent.index);
            if touched {
                obtained.hits.push(extent.clone());
            }
            if touched || (demanded && lead.is_some()) {
                self.metrics.asked_bytes.fetch_add(extent.stored_share(), Ordering::Relaxed);
            }
            let Some(lead) = lead else { continue };
            if !demanded {
                self.untouched.set(extent.index);
            }
            leads.push(lead);
            if asked != Some(&extent.unit) {
                asked = Some(&extent.unit);
                obtained.needed += extent.unit.compressed.len();
                leads.extend(self.join_ahead(self.siblings(extent)));
            }
        }
        if demanded && let Some(last) = leads.last() {
            let last = last.extent().clone();
            // Where a read jumps in the blob, what lies between is none of its business.
            let run = leads.iter().rev().map(|lead| lead.extent().index.0);
            let low = run.reduce(|low, index| if index.checked_add(1) == Some(low) { index } else { low });
            let low = low.unwrap_or(last.index.0);
            let widened = self.join_ahead(self.following(&last, widening)).collect::<Vec<_>>();
            let high = widened.last().map_or(last.index.0, |lead| lead.extent().index.0);
            obtained.span = Some((low, high.saturating_add(1)));
            let ahead = widened.iter().map(|lead| lead.extent().unit.compressed);
            obtained.widened = ahead.map(|unit| unit.len()).sum();
            leads.extend(widened);
        }
        if !leads.is_empty() {
            leads.extend(self.join_ahead(self.between(&leads)));
            let context = ReadContext {
                cancel: self.cancel.child_token(),
                retries: Arc::clone(&self.backend_metrics.retries),
                ..context.clone()
            };
            self.engine.spawn(fetch::lead(Arc::clone(self), leads, context, slot));
        }
        obtained
    }

    /// The other chunks of the unit that holds `extent`.
    fn siblings(&self, extent: &ChunkExtent) -> Vec<ChunkExtent> {
        let Some(table) = &self.chunks else { return Vec::new() };
        let mut members = neighbours::unit_members(table, extent);
        members.retain(|member| member.index != extent.index && self.check(member).is_ok());
        members
    }

    /// Missing chunks in the small gaps between those of `leads`: read with them, they save a
    /// request now and perhaps another one later.
    fn between(&self, leads: &[Lead]) -> Vec<ChunkExtent> {
        let Some(table) = &self.chunks else { return Vec::new() };
        let mut places: Vec<_> = leads.iter().map(|lead| lead.extent()).collect();
        places.sort_by_key(|extent| extent.index);
        let mut missing = Vec::new();
        for pair in places.windows(2) {
            let (from, to) = (pair[0].unit.compressed.end(), pair[1].unit.compressed.start());
            let gap = to.checked_sub(from);
            let between = pair[0].index.0.saturating_add(1)..pair[1].index.0;
            if gap.is_some_and(|gap| (1..=MAX_GAP).contains(&gap)) && between.len() <= MAX_BETWEEN {
                let known = between.filter_map(|index| table(ChunkIndex(index)));
                // An image may say that others lie there, too.
                let inside = known.filter(|extent| {
                    extent.unit.compressed.start() >= from && extent.unit.compressed.end() <= to
                });
                missing.extend(inside.filter(|extent| self.check(extent).is_ok() && !self.is_ready(extent)));
            }
        }
        missing
    }

    /// Missing chunks that follow `last` in the blob without a gap, of about `bytes` stored
    /// bytes.
    fn following(&self, last: &ChunkExtent, bytes: u64) -> Vec<ChunkExtent> {
        let Some(table) = self.chunks.as_ref().filter(|_| bytes > 0) else { return Vec::new() };
        let mut following = Vec::new();
        let mut unit = last.unit.compressed;
        let end = unit.end().saturating_add(bytes);
        let next = last.index.0.saturating_add(1);
        for index in (next..self.chunk_count.min(next.saturating_add(MAX_FOLLOWING))).map(ChunkIndex) {
            let Some(extent) = table(index).filter(|extent| self.check(extent).is_ok()) else { break };
            let next = extent.unit.compressed;
            let adjacent =
                next == unit || next.start().checked_sub(unit.end()).is_some_and(|gap| gap <= MAX_GAP);
            if !adjacent || next.end() > end || self.is_ready(&extent) {
                break;
            }
            unit = next;
            following.push(extent);
        }
        following
    }

    /// Leads those of `chunks` that nobody fetches yet.
    fn join_ahead(self: &Arc<Self>, chunks: Vec<ChunkExtent>) -> impl Iterator<Item = Lead> {
        let inner = Arc::clone(self);
        chunks.into_iter().filter_map(move |extent| {
            let lead = inner.inflight.join(&extent, false).1?;
            inner.untouched.set(extent.index);
            Some(lead)
        })
    }
}
