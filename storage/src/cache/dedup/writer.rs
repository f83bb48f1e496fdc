//! The one thread that writes the database.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tracing::debug;

use super::database::{Database, Row, Trouble};
use super::files::{is_gone, private};
use super::{GATHER, GivenUp, Queue, REOPEN, Shared};

impl Shared {
    /// Carries out what is queued until the database is closed or given up.
    pub(super) fn write_all(&self) {
        let (mut database, mut tried) = (None, None);
        // Made at once, for whoever looks for it.
        if self.connect(&mut database, &mut tried).is_err() {
            return;
        }
        loop {
            let work = {
                let queue = self.queue();
                let waited = self.wake.wait_while(queue, |queue| queue.is_empty());
                let queue = waited.unwrap_or_else(PoisonError::into_inner);
                let waited = self.wake.wait_timeout_while(queue, GATHER, |queue| !queue.is_urgent());
                let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
                if queue.closed {
                    return;
                }
                std::mem::take(&mut *queue)
            };
            // It may be free again.
            if self.connect(&mut database, &mut tried).is_err() {
                return;
            }
            // Whoever waits hears of a failure by the end of its channel.
            let Some(database) = &mut database else { continue };
            match self.carry_out(database, &work) {
                // Who has waited long enough is gone.
                Ok(()) => work.waiting.iter().for_each(|waiter| {
                    let _ = waiter.send(());
                }),
                Err(trouble @ Trouble::Broken(_)) => return self.give_up(&trouble),
                Err(Trouble::Busy(error)) => debug!(%error, rows = work.fresh.len(), "rows are lost"),
                Err(trouble) => self.warn(&trouble),
            }
        }
    }

    /// Opens the file, unless it is open or was tried lately. An error: it is given up.
    fn connect(
        &self,
        database: &mut Option<Database>,
        tried: &mut Option<Instant>,
    ) -> std::result::Result<(), GivenUp> {
        if database.is_some() || tried.is_some_and(|at| at.elapsed() < REOPEN) {
            return Ok(());
        }
        *tried = Some(Instant::now());
        match self.open_all() {
            Ok(connected) => *database = Some(connected),
            // The warning is for what lasts.
            Err(Trouble::Busy(error)) => debug!(%error, "another process has the dedup database to itself"),
            Err(trouble) => {
                self.give_up(&trouble);
                return Err(GivenUp);
            }
        }
        Ok(())
    }

    fn open_all(&self) -> std::result::Result<Database, Trouble> {
        let path = private(&self.path).map_err(|error| Trouble::Other(error.into()))?;
        let database = Database::create(&path)?;
        let (demand, ahead) = (Database::attach(&path)?, Database::attach(&path)?);
        // Only this thread sets them, once.
        let _ = self.demand.reader.set(Mutex::new(demand));
        let _ = self.ahead.reader.set(Mutex::new(ahead));
        Ok(database)
    }

    fn carry_out(&self, database: &mut Database, work: &Queue) -> std::result::Result<(), Trouble> {
        let is_there = |file: &str| match (self.open_file)(Path::new(file)) {
            Ok(_) => true,
            Err(e) => !is_gone(&e),
        };
        // A chunk may have been ready, and its file gone since.
        let files: HashSet<&str> = work.fresh.iter().map(|row| &*row.file).collect();
        let gone: HashSet<&str> = files.into_iter().filter(|file| !is_there(file)).collect();
        let rows: Vec<&Row> = work.fresh.iter().filter(|row| !gone.contains(&*row.file)).collect();
        if !rows.is_empty() {
            database.add(rows)?;
        }
        if !work.wrong.is_empty() {
            database.remove(&work.wrong)?;
        }
        let mut files: Vec<String> = work.missing.iter().map(|file| file.to_string()).collect();
        if work.collect {
            files.extend(database.files()?);
        }
        files.retain(|file| !is_there(file));
        if !files.is_empty() {
            database.remove_files(files.iter().map(String::as_str))?;
        }
        Ok(())
    }
}
