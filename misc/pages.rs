//! Man pages and shell completions of a program, from its own grammar. A module of every crate with
//! binaries: each writes its own.

use std::fs::{File, create_dir_all};
use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;

/// Where completions lie below `share/`, and what comes before and behind the program's name there.
const COMPLETIONS: [(Shell, &str, &str, &str); 3] = [
    (Shell::Bash, "bash-completion/completions", "", ""),
    (Shell::Zsh, "zsh/site-functions", "_", ""),
    (Shell::Fish, "fish/vendor_completions.d", "", ".fish"),
];

/// Writes below `share` a man page of `command` and of each of its sub-commands, and completions for
/// bash, zsh and fish.
///
/// # Errors
/// A directory or file can not be made.
pub fn write(command: Command, version: &'static str, share: &Path) -> io::Result<()> {
    let name = command.get_name().to_owned();
    // The text of `--version` has several lines, the foot of a page has room for a word. A page for
    // `help` would say less than its name.
    let version = version.strip_prefix('v').unwrap_or(version);
    let mut command = command.version(version).long_version(version).disable_help_subcommand(true);
    for (shell, directory, before, behind) in COMPLETIONS {
        let directory = share.join(directory);
        create_dir_all(&directory)?;
        let mut file = File::create(directory.join(format!("{before}{name}{behind}")))?;
        clap_complete::generate(shell, &mut command, &name, &mut file);
    }
    let man = share.join("man/man1");
    create_dir_all(&man)?;
    clap_mangen::generate_to(command, man)
}
