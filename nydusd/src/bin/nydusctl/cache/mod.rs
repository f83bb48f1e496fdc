//! `nydusctl cache`: what lies in a cache directory, and taking it away.

mod place;
mod prune;
mod users;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use storage::cache::stock::{self, Item, Kind, Removal, Usage};

use nydusd::words::counted;

use crate::cli::{Cache, CacheAction};
use crate::why::size;
use users::Users;

/// Lists or removes.
///
/// # Errors
/// The directory can not be read, or a name means nothing in it.
pub fn run(options: &Cache, socket: Option<&Path>, timeout: Duration, raw: bool) -> anyhow::Result<ExitCode> {
    let one = || match &options.cache_dir {
        Some(dir) => Stock::open(dir),
        None => Stock::open(&place::one(socket, timeout)?),
    };
    match &options.action {
        CacheAction::Ls => {
            let dirs = match &options.cache_dir {
                Some(dir) => vec![dir.clone()],
                None => place::all(socket, timeout)?,
            };
            let mut code = ExitCode::SUCCESS;
            let opened = dirs.iter().map(|dir| Stock::open(dir)).filter_map(|stock| {
                stock
                    .inspect_err(|e| {
                        // The others are shown all the same.
                        eprintln!("nydusctl: {e:#}");
                        code = ExitCode::FAILURE;
                    })
                    .ok()
            });
            show(&opened.collect::<Vec<_>>(), raw)?;
            Ok(code)
        }
        CacheAction::Rm { names } => one()?.remove_named(names),
        CacheAction::Prune { size, dry_run } => prune::run(&one()?, *size, *dry_run, raw),
    }
}

fn show(stocks: &[Stock], raw: bool) -> std::io::Result<()> {
    if raw {
        let items = stocks.iter().flat_map(|stock| stock.items.iter().map(|item| stock.document(item)));
        say!("{}", items.collect::<Value>());
        return Ok(());
    }
    stocks.iter().try_for_each(Stock::show)
}

/// A cache directory as it was when we looked.
struct Stock {
    dir: PathBuf,
    items: Vec<Item>,
    users: Users,
}

impl Stock {
    fn open(dir: &Path) -> anyhow::Result<Self> {
        let context = || format!("cache directory {}; --cache-dir names another", dir.display());
        let dir = dir.canonicalize().with_context(context)?;
        // In this order: who opens something in between is seen.
        let items = stock::list(&dir)?;
        let users = Users::of(&dir, &items);
        Ok(Self { dir, items, users })
    }

    /// Is it in use? Locks tell of blobs, mappings of bootstraps.
    fn usage(&self, item: &Item) -> Usage {
        match (item.kind, self.users.of_item(item).is_empty()) {
            (_, false) => Usage::InUse,
            (Kind::Bootstrap, true) if self.users.may_be_more() => Usage::Unknown,
            (Kind::Bootstrap, true) => Usage::Free,
            (Kind::Blob, true) => item.usage,
        }
    }

    fn remove(&self, item: &Item) -> anyhow::Result<Removal> {
        match self.usage(item) {
            // Nothing locks a bootstrap: who has come since is looked for.
            Usage::Free if item.kind == Kind::Bootstrap => {
                let users = Users::of(&self.dir, std::slice::from_ref(item));
                match users.of_item(item).is_empty() {
                    true => Ok(stock::remove(&self.dir, item.kind, &item.name)?),
                    false => Ok(Removal::Kept(Usage::InUse)),
                }
            }
            Usage::Free => Ok(stock::remove(&self.dir, item.kind, &item.name)?),
            kept => Ok(Removal::Kept(kept)),
        }
    }

    fn total(&self) -> u64 {
        self.items.iter().map(|item| item.allocated_size).sum()
    }

    fn show(&self) -> std::io::Result<()> {
        say!("{:<64} {:<10} {:>11} {:>20}  {:<19}  USED BY", "NAME", "KIND", "ON DISK", "CHUNKS", "LAST USE");
        for item in &self.items {
            say!(
                "{:<64} {:<10} {:>11} {:>20}  {:<19}  {}",
                item.name,
                item.kind.name(),
                size(item.allocated_size),
                item.chunks.map_or_else(|| "-".to_owned(), |(ready, all)| format!("{ready} of {all}")),
                local_time(item.last_use),
                self.used_by(item)
            );
        }
        say!(
            "{} in {} of {}",
            size(self.total()),
            counted(self.items.len() as u64, "item"),
            self.dir.display()
        );
        Ok(())
    }

    /// Who has it open, in a few words.
    fn used_by(&self, item: &Item) -> String {
        let users = self.users.of_item(item);
        match self.usage(item) {
            Usage::Free => "-".to_owned(),
            Usage::Unknown => "unknown".to_owned(),
            // Locked, but by nobody that can be seen from here: another container, another user.
            Usage::InUse if users.is_empty() => "somebody".to_owned(),
            Usage::InUse => {
                users.iter().map(|(pid, name)| format!("{name} [{pid}]")).collect::<Vec<_>>().join(", ")
            }
        }
    }

    fn document(&self, item: &Item) -> Value {
        let seconds = item.last_use.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        json!({
            "name": item.name,
            "directory": self.dir.to_string_lossy(),
            "kind": item.kind.name(),
            "allocated_size": item.allocated_size,
            "decoded_size": item.decoded_size,
            "chunks_ready": item.chunks.map(|(ready, _)| ready),
            "chunks_total": item.chunks.map(|(_, all)| all),
            "last_use": seconds,
            "in_use": match self.usage(item) {
                Usage::Free => json!(false),
                Usage::InUse => json!(true),
                Usage::Unknown => Value::Null,
            },
            "used_by": self.users.of_item(item).iter().map(|(pid, _)| *pid).collect::<Vec<_>>(),
        })
    }

    fn remove_named(&self, names: &[String]) -> anyhow::Result<ExitCode> {
        // All names first: a mistake removes nothing.
        let chosen = names.iter().map(|name| self.find(name)).collect::<anyhow::Result<Vec<_>>>()?;
        let mut code = ExitCode::SUCCESS;
        for item in chosen.into_iter().flatten() {
            match self.remove(item)? {
                Removal::Removed => {
                    say!("removed {} {}: {}", item.kind.name(), item.name, size(item.allocated_size));
                }
                Removal::Kept(usage) => {
                    code = ExitCode::FAILURE;
                    eprintln!("kept {} {}: {}", item.kind.name(), item.name, self.why_kept(item, usage));
                }
            }
        }
        Ok(code)
    }

    fn why_kept(&self, item: &Item, usage: Usage) -> String {
        match usage {
            Usage::Unknown if item.kind == Kind::Bootstrap => {
                "a daemon runs whose files this user may not see; ask as its user, or as root".to_owned()
            }
            Usage::Unknown => "its lock can not be asked for here, so nobody knows who uses it".to_owned(),
            Usage::Free | Usage::InUse => match self.used_by(item).as_str() {
                "-" => "in use by somebody who came just now".to_owned(),
                users => format!("in use by {users}"),
            },
        }
    }

    /// What `name` means: a whole name may be a blob and a bootstrap, the beginning of one only one.
    fn find(&self, name: &str) -> anyhow::Result<Vec<&Item>> {
        let whole: Vec<_> = self.items.iter().filter(|item| item.name == name).collect();
        if !whole.is_empty() {
            return Ok(whole);
        }
        let begun: Vec<_> =
            self.items.iter().filter(|item| !name.is_empty() && item.name.starts_with(name)).collect();
        match begun.len() {
            0 => bail!("nothing in {} is called {name:?}; see `nydusctl cache ls`", self.dir.display()),
            1 => Ok(begun),
            several => bail!("{several} items in {} begin with {name:?}; say more of it", self.dir.display()),
        }
    }
}

fn local_time(time: SystemTime) -> String {
    chrono::DateTime::<chrono::Local>::from(time).format("%Y-%m-%d %H:%M:%S").to_string()
}
