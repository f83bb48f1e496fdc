//! Files whose bytes go to the disk while more are made, so that little is left when they are synced.

use std::fs::File;
use std::io::{Result, Write};
use std::num::NonZeroU64;

use rustix::fs::{Advice, fadvise};

/// Bytes that are handed to the disk at once.
const STRETCH: u64 = 8 << 20;

/// A file that is written front to back from its first byte, and synced by its owner.
#[derive(Debug)]
pub struct WriteBack {
    file: File,
    /// Bytes written.
    len: u64,
    /// Those of them that are on their way to the disk.
    started: u64,
}

impl WriteBack {
    /// Writes to `file`, a new one, or anything that is no file and takes bytes in order.
    pub fn new(file: File) -> Self {
        Self { file, len: 0, started: 0 }
    }
}

impl Write for WriteBack {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let written = self.file.write(bytes)?;
        self.len += written as u64;
        if let Some(ready) = NonZeroU64::new(self.len - self.started)
            && ready.get() >= STRETCH
        {
            // Linux starts to write what it is told will not be needed, and keeps what is being
            // written. It is only advice: a FIFO takes none.
            let _ = fadvise(&self.file, self.started, Some(ready), Advice::DontNeed);
            self.started = self.len;
        }
        Ok(written)
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_hold_what_was_written_and_fifos_take_it() {
        let bytes: Vec<u8> = (0..(STRETCH as usize * 5 / 2)).map(|n| (n / 4096) as u8).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = WriteBack::new(File::create(&path).unwrap());
        bytes.chunks(1_000_001).for_each(|part| file.write_all(part).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), bytes);

        let (mut reader, writer) = std::io::pipe().unwrap();
        let whole = bytes.clone();
        let writer = std::thread::spawn(move || {
            WriteBack::new(File::from(std::os::fd::OwnedFd::from(writer))).write_all(&whole)
        });
        let mut read = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut read).unwrap();
        writer.join().unwrap().unwrap();
        assert_eq!(read, bytes);
    }
}
