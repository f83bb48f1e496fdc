//! The tables on disk, and the few statements that work on them.
//!
//! Other programs open the file directly, so names, types and keys are fixed. Row numbers are
//! not carried from one transaction to the next: somebody else may have removed the row since.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::limits::Limit;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, TransactionBehavior, params};

use crate::digest::Digest;

/// A file and its chunks: `ChunkId` is the digest in hex, `ChunkOffset` a byte of the file.
const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS Blobs (
    BlobId INTEGER PRIMARY KEY,
    FilePath TEXT NOT NULL UNIQUE
);
CREATE TABLE IF NOT EXISTS Chunks (
    ChunkId TEXT NOT NULL,
    ChunkOffset INTEGER NOT NULL,
    BlobId INTEGER NOT NULL REFERENCES Blobs (BlobId),
    PRIMARY KEY (ChunkId, BlobId)
) WITHOUT ROWID;";

/// A file that goes must not cost a look at all chunks.
const INDEX: &str = "CREATE INDEX IF NOT EXISTS ChunksOfBlob ON Chunks (BlobId);";

/// What stands in for a table may compute without end.
const TABLES: &str = "SELECT COUNT(*) FROM pragma_table_list
    WHERE schema = 'main' AND type = 'table' AND lower(name) IN ('blobs', 'chunks')";

/// How long whoever writes waits for another process to finish writing: nobody waits for us.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);

/// What a connection keeps of the file in memory, in KiB; SQLite's default is 2000.
const PAGE_CACHE_KIB: i64 = 512;

/// Longest text or row that is read, in bytes: far more than a path has.
const MAX_LENGTH: i32 = 64 << 10;

/// Instructions of SQLite between looks at the clock: some ten microseconds.
const STRETCH: i32 = 1000;

/// Files that one search opens.
const MAX_FILES: usize = 256;

/// A chunk that a cache file has, or had.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct Row {
    pub(in super::super) digest: Digest,
    /// Absolute path of the file.
    pub(in super::super) file: Arc<str>,
    /// First byte in the file.
    pub(in super::super) offset: u64,
}

/// A connection.
pub(super) struct Database(Connection);

/// What SQLite or the system said.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why the database can not be used.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Another process has the file to itself; it may be done soon.
    Busy(Cause),
    /// It is no database, not this one, or damaged.
    Broken(Cause),
    /// Anything else: a full disk, say.
    Other(Cause),
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        // A statement that does not fit the tables comes as one or the other.
        if matches!(error, rusqlite::Error::SqlInputError { .. }) {
            return Self::Broken(error.into());
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy(error.into()),
            // `Unknown` is SQLite's word for a statement that does not fit the tables.
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown) => {
                Self::Broken(error.into())
            }
            _ => Self::Other(error.into()),
        }
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Busy(error) | Self::Broken(error) | Self::Other(error)) = self;
        error.fmt(f)
    }
}

impl Database {
    /// Opens the file for writing, and makes what is missing of it.
    pub(super) fn create(path: &Path) -> Result<Self, Trouble> {
        let database = Self::open(path, OpenFlags::SQLITE_OPEN_CREATE)?;
        let connection = &database.0;
        connection.busy_timeout(WRITE_PATIENCE)?;
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        // What a power cut takes are the last rows, never the order of the file.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        // Chunks go before their file, and in the same transaction.
        connection.pragma_update(None, "foreign_keys", false)?;
        connection.execute_batch(SCHEMA)?;
        if connection.query_row(TABLES, [], |row| row.get::<_, i64>(0))? != 2 {
            return Err(Trouble::Broken("Blobs and Chunks are not both tables".into()));
        }
        connection.execute_batch(INDEX)?;
        Ok(database)
    }

    /// Opens a file that is there for looking things up, which waits for nobody.
    pub(super) fn attach(path: &Path) -> Result<Self, Trouble> {
        let database = Self::open(path, OpenFlags::empty())?;
        database.0.busy_timeout(Duration::ZERO)?;
        database.0.pragma_update(None, "query_only", true)?;
        Ok(database)
    }

    fn open(path: &Path, flags: OpenFlags) -> Result<Self, Trouble> {
        // Each connection is used by one thread at a time.
        let flags = flags
            | OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let connection = Connection::open_with_flags(path, flags)?;
        // The file may bring triggers and views along.
        connection.pragma_update(None, "trusted_schema", false)?;
        connection.pragma_update(None, "cache_size", -PAGE_CACHE_KIB)?;
        connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, MAX_LENGTH)?;
        Ok(Self(connection))
    }

    /// Adds rows, in one transaction. A row that tells of another place in the same file is
    /// replaced.
    pub(super) fn add<'a>(&mut self, rows: impl IntoIterator<Item = &'a Row>) -> Result<(), Trouble> {
        let transaction = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut file =
                transaction.prepare("INSERT INTO Blobs (FilePath) VALUES (?1) ON CONFLICT DO NOTHING")?;
            let mut number = transaction.prepare("SELECT BlobId FROM Blobs WHERE FilePath = ?1")?;
            let mut chunk = transaction.prepare(
                "INSERT INTO Chunks (ChunkId, ChunkOffset, BlobId) VALUES (?1, ?2, ?3)
                 ON CONFLICT (ChunkId, BlobId) DO UPDATE SET ChunkOffset = excluded.ChunkOffset
                 WHERE ChunkOffset <> excluded.ChunkOffset",
            )?;
            let mut numbers: HashMap<&'a str, i64> = HashMap::new();
            for row in rows {
                let known = match numbers.get(&*row.file) {
                    Some(known) => *known,
                    None => {
                        file.execute([&*row.file])?;
                        let new: i64 = number.query_row([&*row.file], |row| row.get(0))?;
                        numbers.insert(&row.file, new);
                        new
                    }
                };
                // Files are shorter than 2^63 bytes.
                chunk.execute(params![row.digest.to_string(), row.offset.cast_signed(), known])?;
            }
        }
        Ok(transaction.commit()?)
    }

    /// Removes rows that turned out to be wrong, in one transaction.
    pub(super) fn remove(&mut self, rows: &[Row]) -> Result<(), Trouble> {
        let transaction = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut statement = transaction.prepare(
                "DELETE FROM Chunks WHERE ChunkId = ?1 AND ChunkOffset = ?2
                 AND BlobId = (SELECT BlobId FROM Blobs WHERE FilePath = ?3)",
            )?;
            for row in rows {
                statement.execute(params![row.digest.to_string(), row.offset.cast_signed(), &*row.file])?;
            }
        }
        Ok(transaction.commit()?)
    }

    /// All files that there are rows of. A name that is no text is nobody's, and left out.
    pub(super) fn files(&self) -> Result<Vec<String>, Trouble> {
        let mut statement = self.0.prepare("SELECT FilePath FROM Blobs")?;
        let mut rows = statement.query([])?;
        let mut files = Vec::new();
        while let Some(row) = rows.next()? {
            files.extend(row.get_ref(0)?.as_str().map(str::to_owned));
        }
        Ok(files)
    }

    /// Removes files and what there is of them, each in a transaction of its own: others write in
    /// between.
    pub(super) fn remove_files<'a>(
        &mut self,
        files: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), Trouble> {
        for file in files {
            let transaction = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute(
                "DELETE FROM Chunks WHERE BlobId = (SELECT BlobId FROM Blobs WHERE FilePath = ?1)",
                [file],
            )?;
            transaction.execute("DELETE FROM Blobs WHERE FilePath = ?1", [file])?;
            transaction.commit()?;
        }
        Ok(())
    }

    /// For each digest the first row whose file can be opened, with what `open` makes of that, as far
    /// as it is known by `deadline`. Each file is opened once, and [`MAX_FILES`] of them.
    pub(super) fn find<T: Clone>(
        &mut self,
        digests: &[Digest],
        open: impl FnMut(&str) -> Option<T>,
        deadline: Instant,
    ) -> Result<Vec<Option<(T, u64)>>, Trouble> {
        // Whatever the file makes of a statement, it ends.
        self.0.progress_handler(STRETCH, Some(move || Instant::now() >= deadline))?;
        let mut found = Vec::with_capacity(digests.len());
        let ended = self.find_each(digests, open, deadline, &mut found);
        self.0.progress_handler(0, None::<fn() -> bool>)?;
        match ended {
            Err(e) if e.sqlite_error_code() != Some(ErrorCode::OperationInterrupted) => return Err(e.into()),
            Ok(()) | Err(_) => found.resize(digests.len(), None),
        }
        Ok(found)
    }

    fn find_each<T: Clone>(
        &mut self,
        digests: &[Digest],
        mut open: impl FnMut(&str) -> Option<T>,
        deadline: Instant,
        found: &mut Vec<Option<(T, u64)>>,
    ) -> rusqlite::Result<()> {
        // One look at what others have written for all of them.
        let transaction = self.0.transaction()?;
        if transaction.query_row("SELECT 1 FROM Chunks LIMIT 1", [], |_| Ok(())).optional()?.is_none() {
            return Ok(());
        }
        let mut statement = transaction.prepare(
            "SELECT ChunkOffset, FilePath FROM Chunks JOIN Blobs USING (BlobId) WHERE ChunkId = ?1",
        )?;
        let mut files: HashMap<String, Option<T>> = HashMap::new();
        for digest in digests {
            let mut rows = statement.query([digest.to_string()])?;
            let mut first = None;
            while first.is_none() {
                // Also between rows: opening a file may take its time.
                if Instant::now() >= deadline {
                    return Ok(());
                }
                let Some(row) = rows.next()? else { break };
                // What is no path or no offset is no row of ours.
                let offset = row.get_ref(0)?.as_i64().ok().and_then(|offset| u64::try_from(offset).ok());
                let (Some(offset), Ok(name)) = (offset, row.get_ref(1)?.as_str()) else { continue };
                let file = match files.get(name) {
                    Some(file) => file.clone(),
                    None if files.len() >= MAX_FILES => None,
                    None => {
                        let file = open(name);
                        files.insert(name.to_owned(), file.clone());
                        file
                    }
                };
                first = file.map(|file| (file, offset));
            }
            found.push(first);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestAlgorithm;

    pub(super) fn row(chunk: &str, file: &str, offset: u64) -> Row {
        Row { digest: DigestAlgorithm::Sha256.digest(chunk.as_bytes()), file: file.into(), offset }
    }

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn columns(connection: &Connection, table: &str) -> Vec<(String, String)> {
        let mut statement = connection.prepare(&format!("PRAGMA table_info({table})")).unwrap();
        let columns = statement.query_map([], |row| Ok((row.get(1)?, row.get(2)?))).unwrap();
        columns.collect::<Result<_, _>>().unwrap()
    }

    /// Other programs know these names, types and keys.
    #[test]
    fn the_file_is_what_other_programs_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cas.db");
        let mut database = Database::create(&path).unwrap();
        database.add(&[row("abc", "/cache/a.blob.data", 4096)]).unwrap();
        let other = Connection::open(&path).unwrap();
        let text = |sql: &str| other.query_row(sql, [], |row| row.get::<_, String>(0)).unwrap();
        assert_eq!(text("PRAGMA journal_mode"), "wal");
        let owned = |list: &[(&str, &str)]| {
            list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>()
        };
        assert_eq!(columns(&other, "Blobs"), owned(&[("BlobId", "INTEGER"), ("FilePath", "TEXT")]));
        let chunks = [("ChunkId", "TEXT"), ("ChunkOffset", "INTEGER"), ("BlobId", "INTEGER")];
        assert_eq!(columns(&other, "Chunks"), owned(&chunks));
        let sql =
            "SELECT ChunkId || ' ' || ChunkOffset || ' ' || FilePath FROM Chunks JOIN Blobs USING (BlobId)";
        assert_eq!(
            text(sql),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad 4096 /cache/a.blob.data"
        );
        let refused = |sql: &str| {
            let error = other.execute(sql, []).unwrap_err();
            assert_eq!(error.sqlite_error_code(), Some(ErrorCode::ConstraintViolation), "{sql}");
        };
        refused("INSERT INTO Blobs (FilePath) VALUES ('/cache/a.blob.data')");
        refused("INSERT INTO Chunks SELECT ChunkId, 7, BlobId FROM Chunks");
    }

    #[test]
    fn rows_are_unique_follow_their_chunk_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cas.db");
        let mut database = Database::create(&path).unwrap();
        let mut reader = Database::attach(&path).unwrap();
        let mut find = |chunk: &str, barred: &[&str]| {
            let digest = row(chunk, "", 0).digest;
            let open = |file: &str| (!barred.contains(&file)).then(|| file.to_owned());
            let found = reader.find(&[digest], open, late()).unwrap().remove(0);
            found.map(|(file, offset)| row(chunk, &file, offset))
        };
        assert_eq!(find("x", &[]), None);
        database.add(&[row("x", "/a", 1), row("x", "/b", 2), row("y", "/a", 3)]).unwrap();
        database.add(&[row("x", "/a", 1), row("x", "/a", 9)]).unwrap();
        assert_eq!(find("x", &["/b"]), Some(row("x", "/a", 9)));
        assert_eq!(find("x", &["/a"]), Some(row("x", "/b", 2)));
        assert_eq!(find("x", &["/a", "/b"]), None);
        // What was replaced meanwhile stays.
        database.remove(&[row("x", "/a", 1), row("x", "/b", 2)]).unwrap();
        assert_eq!((find("x", &[]), find("x", &["/a"])), (Some(row("x", "/a", 9)), None));
        assert_eq!(database.files().unwrap(), ["/a", "/b"]);
        database.remove_files(["/a", "/never"]).unwrap();
        assert_eq!((find("x", &[]), find("y", &[])), (None, None));
        assert_eq!(database.files().unwrap(), ["/b"]);
        database.add(&[row("y", "/a", 3)]).unwrap();
        database.remove_files(["/b"]).unwrap();
        assert_eq!(database.files().unwrap(), ["/a"]);
    }

    #[test]
    fn a_search_ends_at_its_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let mut database = Database::create(&dir.path().join("cas.db")).unwrap();
        database.add(&[row("x", "/a", 1)]).unwrap();
        let digest = row("x", "", 0).digest;
        let over = Instant::now();
        assert_eq!(database.find(&[digest; 3], |_| Some(()), over).unwrap(), [None, None, None]);
    }

    /// Somebody may replace the tables later.
    #[test]
    fn a_statement_that_does_not_end_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cas.db");
        let mut database = Database::create(&path).unwrap();
        let endless = "DROP TABLE Chunks; CREATE VIEW Chunks (ChunkId, ChunkOffset, BlobId) AS
            WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)
            SELECT i, i, i FROM n WHERE i < 0";
        Connection::open(&path).unwrap().execute_batch(endless).unwrap();
        let digest = row("x", "", 0).digest;
        let soon = Instant::now() + Duration::from_millis(50);
        assert_eq!(database.find(&[digest; 2], |_| Some(()), soon).unwrap(), [None, None]);
        // The connection is as good as before.
        assert_eq!(database.files().map_err(|e| e.to_string()), Ok(Vec::new()));
    }

    #[test]
    fn rows_of_other_programs_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cas.db");
        let mut database = Database::create(&path).unwrap();
        database.add(&[row("x", "/a", 1)]).unwrap();
        let foreign = "INSERT INTO Blobs (FilePath) VALUES (x'ff'), (CAST(x'ff' AS TEXT))";
        Connection::open(&path).unwrap().execute_batch(foreign).unwrap();
        assert_eq!(database.files().unwrap(), ["/a"]);
    }

    #[test]
    fn what_is_no_such_database_is_told_apart_from_one_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cas.db");
        std::fs::write(&path, [b'x'; 8192]).unwrap();
        assert!(matches!(Database::create(&path).err(), Some(Trouble::Broken(_))));
        let other = dir.path().join("other.db");
        Connection::open(&other).unwrap().execute_batch("CREATE TABLE Chunks (Name TEXT)").unwrap();
        assert!(matches!(Database::create(&other).err(), Some(Trouble::Broken(_))));
        let view = dir.path().join("view.db");
        let tables = "CREATE VIEW Chunks (ChunkId, ChunkOffset, BlobId) AS
            WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, i, i FROM n";
        Connection::open(&view).unwrap().execute_batch(tables).unwrap();
        assert!(matches!(Database::create(&view).err(), Some(Trouble::Broken(_))));
        let third = dir.path().join("third.db");
        let mut database = Database::create(&third).unwrap();
        database.0.busy_timeout(Duration::ZERO).unwrap();
        let mut other = Connection::open(&third).unwrap();
        let held = other.transaction_with_behavior(TransactionBehavior::Immediate).unwrap();
        assert!(matches!(database.add(&[row("x", "/a", 1)]), Err(Trouble::Busy(_))));
        drop(held);
        database.add(&[row("x", "/a", 1)]).unwrap();
    }
}
