//! `nydusctl check`: is this machine ready for `nydusd`?
//!
//! Every finding says what was found and, where something is missing, what to do. What only costs
//! speed or comfort is a warning.

mod directory;
mod machine;

use std::process::ExitCode;

use serde::Serialize;

use nydusd::words::counted;

use crate::cli::Check;

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Works, with the loss that the remedy tells.
    Warning,
    /// `nydusd` does not work without it.
    Missing,
}

/// What was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do, unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), remedy: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, state: State::Warning, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn missing(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, state: State::Missing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks at everything and prints it; fails if something is missing.
///
/// # Errors
/// No cache directory was named and this account has none.
pub fn run(options: &Check, raw: bool) -> anyhow::Result<ExitCode> {
    let dir = match &options.cache_dir {
        Some(dir) => dir.clone(),
        None => nydusd::image::default_cache_dir()?,
    };
    let findings: Vec<Finding> = machine::look().into_iter().chain(directory::look(&dir)).collect();
    let missing = findings.iter().filter(|finding| finding.state == State::Missing).count();
    if options.json || raw {
        say!("{}", serde_json::json!({ "ready": missing == 0, "findings": findings }));
    } else {
        say!("{}", text(&findings).trim_end());
    }
    Ok(if missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let state = match finding.state {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Missing => "MISSING",
        };
        text.push_str(&format!("{state:<8} {:<22} {}\n", finding.name, finding.found));
        if let Some(remedy) = &finding.remedy {
            text.push_str(&format!("{:<8} {:<22} -> {remedy}\n", "", ""));
        }
    }
    let count = |state| findings.iter().filter(|finding| finding.state == state).count() as u64;
    let (missing, warnings) = (count(State::Missing), count(State::Warning));
    text.push_str(&match (missing, warnings) {
        (0, 0) => "This machine is ready.\n".to_owned(),
        (0, warnings) => format!("This machine is ready, with {}.\n", counted(warnings, "warning")),
        (missing, warnings) => {
            format!("This machine is not ready: {missing} missing, {}.\n", counted(warnings, "warning"))
        }
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_stands_out_with_its_remedy() {
        let text = text(&[
            Finding::ok("kernel", "6.12"),
            Finding::missing("FUSE device", "no /dev/fuse", "modprobe fuse"),
            Finding::warning("free space", "1 GiB", "make room"),
        ]);
        assert!(text.contains("MISSING  FUSE device") && text.contains("-> modprobe fuse"), "{text}");
        assert!(text.ends_with("not ready: 1 missing, 1 warning.\n"), "{text}");
        assert!(super::text(&[Finding::ok("kernel", "6.12")]).ends_with("This machine is ready.\n"));
    }
}
