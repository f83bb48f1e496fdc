//! Programs run to their end, with what they said when they fail.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// What a finished program left: exit code (none after a signal), both streams as text.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs `command` to its end, whatever the end is.
///
/// # Errors
/// The program could not be started.
pub fn finish(command: &mut Command) -> Result<Finished> {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    Ok(Finished {
        code: status.code(),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    })
}

/// Runs `command` and returns its standard output.
///
/// # Errors
/// It could not be started, or ended with anything but 0; its streams are in the message.
pub fn run(command: &mut Command) -> Result<String> {
    let finished = finish(command)?;
    if finished.code != Some(0) {
        bail!(
            "{command:?} ended with {:?}\n--- stdout\n{}--- stderr\n{}",
            finished.code,
            finished.stdout,
            finished.stderr
        );
    }
    Ok(finished.stdout)
}

/// Runs `command`, which must fail with exit code 1, and returns its standard error.
///
/// # Errors
/// It succeeded, was killed, or used another code.
pub fn run_refused(command: &mut Command) -> Result<String> {
    let finished = finish(command)?;
    if finished.code != Some(1) {
        bail!("{command:?} should fail with 1, ended with {:?}: {}", finished.code, finished.stderr);
    }
    Ok(finished.stderr)
}
