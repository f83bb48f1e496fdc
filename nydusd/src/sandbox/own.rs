//! The daemon's own mount among what its jail shows.
//!
//! A directory that is admitted brings along what is mounted below it. A copy of the own mount would keep that alive as
//! long as the jail lasts, so that nobody who unmounts it would end the daemon. It is told by its connection: it may be
//! there more than once, under any path, and below others.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, umount2};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::transport::mounted::{self, Row};

/// What is done next.
#[derive(Debug, PartialEq, Eq)]
enum Step<'a> {
    /// The own mount is what is seen there.
    TakeAway(&'a Path),
    /// What is seen there hides it, and comes back afterwards.
    SetAside(&'a Path),
}

/// Takes every mount of connection `number` out of the mount namespace that this thread is in. `process` is the thread's
/// own directory in a proc file system.
///
/// # Errors
/// The system's.
pub(super) fn take_away(process: &OwnedFd, number: u64) -> anyhow::Result<()> {
    let mut aside = Vec::new();
    let taken = take_all(process, number, &mut aside);
    // What was on top comes last.
    let back = aside
        .iter()
        .rev()
        .map(|(path, tree)| put_back(path, tree).with_context(|| format!("mount {} again", path.display())));
    back.fold(taken, |before, now| before.and(now))
}

fn take_all(process: &OwnedFd, number: u64, aside: &mut Vec<(PathBuf, OwnedFd)>) -> anyhow::Result<()> {
    let table = || mounted::rows_at(process).context("the mount table");
    let mut rows = table()?;
    // Each step takes a mount away at least. There may be new ones meanwhile, but not that many.
    for _ in 0..2 * rows.len() {
        let Some(step) = next_step(&rows, number) else { return Ok(()) };
        let (path, tree) = match step {
            Step::TakeAway(path) => (path, None),
            Step::SetAside(path) => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
                let all = OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
                let tree = open_tree(CWD, path, flags | all);
                (path, Some(tree.with_context(|| format!("set {} aside", path.display()))?))
            }
        };
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => aside.extend(tree.map(|tree| (path.to_owned(), tree))),
            // Whoever unmounted it on the host was faster.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(e) => return Err(e).with_context(|| format!("unmount {}", path.display())),
        }
        rows = table()?;
    }
    match next_step(&rows, number) {
        None => Ok(()),
        Some(_) => bail!("the daemon's own mount can not be unmounted in its jail"),
    }
}

fn put_back(path: &Path, tree: &OwnedFd) -> rustix::io::Result<()> {
    let at = openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", &at, "", flags)
}

/// What brings the end of the mounts of connection `number` nearer; `None` if there are none.
fn next_step(rows: &[Row], number: u64) -> Option<Step<'_>> {
    let own: Vec<_> = rows.iter().filter(|row| row.connection == Some(number)).collect();
    let hidden = |own: &&Row| hider(rows, own);
    // Those that hide others may have one in themselves.
    match own.iter().find(|own| hidden(own).is_none()) {
        Some(own) => Some(Step::TakeAway(&own.at)),
        None => own.iter().find_map(hidden).map(|hider| Step::SetAside(&hider.at)),
    }
}

/// What keeps `row` from being reached by its path: the first such mount on the way from the root.
fn hider<'a>(rows: &'a [Row], row: &Row) -> Option<&'a Row> {
    let above = |row: &Row| rows.iter().find(|other| other.id == row.parent && other.id != row.id);
    let mut way: Vec<&Row> = std::iter::successors(above(row), |row| above(row)).take(rows.len()).collect();
    way.reverse();
    let next = way.iter().skip(1).copied().chain([row]);
    let ways = way.iter().copied().zip(next).chain([(row, row)]);
    for (from, to) in ways {
        let on_the_way = |other: &&Row| other.parent == from.id && other.id != to.id && other.id != from.id;
        let hides = |other: &&Row| match std::ptr::eq(from, to) {
            true => other.at == to.at,
            false => to.at.starts_with(&other.at),
        };
        let first =
            rows.iter().filter(on_the_way).filter(hides).min_by_key(|other| other.at.components().count());
        if first.is_some() {
            return first;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u64 = 52;

    fn row(id: u64, parent: u64, at: &str, connection: u64) -> Row {
        Row { id, parent, at: at.into(), connection: Some(connection) }
    }

    /// All steps, as if each did what it says.
    fn steps(mut rows: Vec<Row>) -> Vec<String> {
        let mut steps = Vec::new();
        while let Some(step) = next_step(&rows, OWN) {
            let (text, path) = match step {
                Step::TakeAway(path) => ("take", path.to_owned()),
                Step::SetAside(path) => ("aside", path.to_owned()),
            };
            steps.push(format!("{text} {}", path.display()));
            // The topmost one that can be reached, and what is below it.
            let top = rows.iter().rposition(|row| row.at == path && hider(&rows, row).is_none()).unwrap();
            let mut gone = vec![rows.remove(top).id];
            while let Some(below) = rows.iter().position(|row| gone.contains(&row.parent)) {
                gone.push(rows.remove(below).id);
            }
        }
        steps
    }

    #[test]
    fn the_own_mount_is_found_wherever_it_is() {
        let root = || row(1, 1, "/", 1);
        assert!(steps(vec![root(), row(2, 1, "/a", 2)]).is_empty());
        // Twice, once with something mounted in it.
        let twice = vec![
            root(),
            row(2, 1, "/a", 2),
            row(3, 2, "/a/m", OWN),
            row(4, 3, "/a/m/x", 4),
            row(5, 1, "/b", OWN),
        ];
        assert_eq!(steps(twice), ["take /a/m", "take /b"]);
        // Below others, which lie on it one above the other.
        let below = vec![
            root(),
            row(2, 1, "/a", 2),
            row(3, 2, "/a/m", OWN),
            row(4, 3, "/a/m", 4),
            row(5, 4, "/a/m", 5),
        ];
        assert_eq!(steps(below), ["aside /a/m", "aside /a/m", "take /a/m"]);
        // On top of others.
        assert_eq!(steps(vec![root(), row(2, 1, "/m", 2), row(3, 2, "/m", OWN)]), ["take /m"]);
        // In a directory that was admitted once more, with a copy of its own.
        let again = vec![
            root(),
            row(2, 1, "/a/b", 2),
            row(3, 2, "/a/b/m", OWN),
            row(4, 1, "/a", 2),
            row(5, 4, "/a/b/m", OWN),
        ];
        assert_eq!(steps(again), ["take /a/b/m", "aside /a", "take /a/b/m"]);
        let stacked = vec![
            root(),
            row(2, 1, "/a", 2),
            row(3, 2, "/a/m", OWN),
            row(4, 2, "/a", 2),
            row(5, 4, "/a/m", OWN),
        ];
        assert_eq!(steps(stacked), ["take /a/m", "aside /a", "take /a/m"]);
        // What is beside it or begins alike hides nothing.
        let beside = vec![root(), row(2, 1, "/a", 2), row(3, 2, "/a/m", OWN), row(4, 2, "/a/mm", 4)];
        assert_eq!(steps(beside), ["take /a/m"]);
    }
}
