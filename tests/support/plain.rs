//! A plain HTTP server of blobs, over TCP or a unix socket: `HEAD` and ranged `GET`, no more.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};

/// Objects by their path, with a leading slash.
pub type Objects = HashMap<String, Vec<u8>>;

/// Serves `objects` on a free loopback port until the test program ends; its `HOST:PORT`.
///
/// # Errors
/// No port.
pub fn serve_tcp(objects: Objects) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    serve(objects, move || {
        let (stream, _) = listener.accept()?;
        Ok((stream.try_clone()?, stream))
    });
    Ok(address)
}

/// Serves `objects` on the socket `path` until the test program ends.
///
/// # Errors
/// The socket cannot be made.
pub fn serve_unix(path: &Path, objects: Objects) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    serve(objects, move || {
        let (stream, _) = listener.accept()?;
        Ok((stream.try_clone()?, stream))
    });
    Ok(())
}

/// Talks to everybody who comes, each on a thread of its own.
fn serve<S: Read + Write + Send + 'static>(
    objects: Objects,
    accept: impl Fn() -> io::Result<(S, S)> + Send + 'static,
) {
    let objects = Arc::new(objects);
    thread::spawn(move || {
        loop {
            let Ok((input, output)) = accept() else { continue };
            let objects = Arc::clone(&objects);
            thread::spawn(move || talk(input, output, &objects));
        }
    });
}

/// Answers requests until the peer hangs up.
fn talk(input: impl Read, mut output: impl Write, objects: &Objects) -> Result<()> {
    let mut lines = BufReader::new(input).lines();
    while let Some(request) = lines.next().transpose()? {
        let mut range = None;
        for line in lines.by_ref() {
            let line = line?;
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (first, last) = value.split_once('-').context("a range")?;
                range = Some((first.parse::<usize>()?, last.parse::<usize>()? + 1));
            }
        }
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let Some(object) = objects.get(path) else {
            output.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        };
        match range {
            Some((first, end)) if end <= object.len() && first < end => {
                write!(
                    output,
                    "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{}/{}\r\nContent-Length: {}\r\n\r\n",
                    end - 1,
                    object.len(),
                    end - first
                )?;
                output.write_all(&object[first..end])?;
            }
            Some(_) => output.write_all(b"HTTP/1.1 416 Out Of Range\r\nContent-Length: 0\r\n\r\n")?,
            None => {
                write!(output, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", object.len())?;
                if method == "GET" {
                    output.write_all(object)?;
                }
            }
        }
    }
    Ok(())
}
