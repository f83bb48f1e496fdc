//! The API's documents.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::version::BuildInfo;

/// Daemon info (contract 3.4).
#[derive(Debug, Serialize)]
pub(super) struct Info<'a> {
    pub version: BuildInfo,
    pub id: Option<&'a str>,
    pub supervisor: Option<std::borrow::Cow<'a, str>>,
    pub state: &'static str,
    pub backend_collection: Option<BTreeMap<String, Backend>>,
}

/// One mounted file system.
#[derive(Debug, Serialize)]
pub(super) struct Backend {
    pub backend_type: &'static str,
    pub mountpoint: String,
    pub mounted_time: String,
    pub config: serde_json::Value,
    /// Beyond the contract: what is mounted, and whether every byte of it is verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bootstrap: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified: Option<bool>,
    /// Beyond the contract: the directory, of a pass-through mount.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// Body of `PUT /api/v1/daemon`.
#[derive(Debug, Deserialize)]
pub(super) struct Configure {
    pub log_level: String,
}

/// Backend metrics (contract 3.8).
#[derive(Debug, Serialize)]
pub(super) struct BackendCounters {
    #[serde(flatten)]
    pub counters: storage::metrics::BackendSnapshot,
    /// Beyond the contract: the servers behind it.
    pub origins: Vec<storage::metrics::OriginSnapshot>,
}

/// Blob cache metrics (contract 3.8).
#[derive(Debug, Serialize)]
pub(super) struct BlobCache {
    pub underlying_files: Vec<String>,
    pub store_path: String,
    #[serde(flatten)]
    pub counters: storage::metrics::CacheSnapshot,
    pub entries_count: u64,
    /// Orders of chunks to fetch ahead that are being worked off.
    pub prefetch_workers: u64,
    /// Time in which a request of prefetch was under way.
    pub prefetch_cumulative_time_millis: u64,
    pub prefetch_begin_time_secs: u64,
    pub prefetch_begin_time_millis: u64,
    pub prefetch_end_time_secs: u64,
    pub prefetch_end_time_millis: u64,
    /// Bytes that fetches hold in memory.
    pub buffered_backend_size: u64,
    pub data_all_ready: bool,
    /// Beyond the contract: chunks of all blobs.
    pub chunks_total: u64,
    /// Beyond the contract: stored bytes of chunk data in all blobs.
    pub compressed_bytes_total: u64,
    /// Beyond the contract: where bytes came from, and where their time went.
    pub fetches: crate::metrics::FetchSnapshot,
    /// Beyond the contract: resident bytes of the daemon by kind.
    pub memory: BTreeMap<&'static str, u64>,
}
