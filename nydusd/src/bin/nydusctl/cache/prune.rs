//! `nydusctl cache prune`: least recently used first, until the rest fits.

use std::process::ExitCode;

use serde_json::{Value, json};
use storage::cache::stock::{Item, Removal, Usage};
use storage::leftovers;

use nydusd::words::printable;

use super::{Stock, local_time};
use crate::why::size;

/// Removes what was not used for longest until at most `limit` bytes are left; fails if more are.
///
/// # Errors
/// Standard output is gone.
pub fn run(stock: &Stock, limit: u64, dry_run: bool, raw: bool) -> anyhow::Result<ExitCode> {
    let before = stock.total();
    let (mut left, mut gone) = (before, Vec::new());
    for item in order(&stock.items, |item| stock.usage(item) == Usage::Free) {
        if left <= limit {
            break;
        }
        match if dry_run { Ok(Removal::Removed) } else { stock.remove(item) } {
            Ok(Removal::Removed) => {
                left -= item.allocated_size;
                gone.push(item);
            }
            // Who came since we looked keeps it.
            Ok(Removal::Kept(_)) => {}
            // The others may do.
            Err(e) => eprintln!("nydusctl: kept: {e:#}"),
        }
    }
    let leftovers = match dry_run {
        true => Vec::new(),
        false => leftovers::sweep(&stock.dir, leftovers::is_cache_temporary),
    };
    if raw {
        let removed: Value = gone.iter().map(|item| stock.document(item)).collect();
        say!("{}", json!({ "removed": removed, "dry_run": dry_run, "before": before, "left": left }));
    } else {
        let verb = if dry_run { "would remove" } else { "removed" };
        for item in &gone {
            say!(
                "{verb} {} {}: {}, last used {}",
                item.kind.name(),
                item.name,
                size(item.allocated_size),
                local_time(item.last_use)
            );
        }
        for path in &leftovers {
            say!("removed {}, which a killed process left", printable(&path.to_string_lossy()));
        }
        say!("{verb} {} of {}, {} left", size(before - left), size(before), size(left));
    }
    if left > limit {
        eprintln!(
            "nydusctl: {} more than wanted: the rest is in use or can not be removed",
            size(left - limit)
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// What may go, in the order in which it goes.
fn order(items: &[Item], may_go: impl Fn(&Item) -> bool) -> Vec<&Item> {
    let mut items: Vec<_> = items.iter().filter(|item| may_go(item)).collect();
    items.sort_by_key(|item| item.last_use);
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};
    use storage::cache::stock::Kind;

    #[test]
    fn the_oldest_goes_first_and_what_is_used_never() {
        let item = |name: &str, age: u64, usage| Item {
            kind: Kind::Blob,
            name: name.to_owned(),
            files: Vec::new(),
            allocated_size: 1,
            decoded_size: 1,
            chunks: None,
            last_use: SystemTime::UNIX_EPOCH + Duration::from_secs(1000 - age),
            usage,
        };
        let items = [
            item("new", 1, Usage::Free),
            item("used", 9, Usage::InUse),
            item("old", 5, Usage::Free),
            item("unknown", 9, Usage::Unknown),
        ];
        let names: Vec<_> =
            order(&items, |item| item.usage == Usage::Free).iter().map(|item| item.name.as_str()).collect();
        assert_eq!(names, ["old", "new"]);
    }
}
