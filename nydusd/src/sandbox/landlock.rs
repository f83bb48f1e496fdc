//! Landlock: what not even root does to files here, and whom it reaches. What may be seen is the jail's affair, which
//! can grow while the daemon runs.

use anyhow::Context as _;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetStatus, Scope,
};

use crate::cli::{Front, ServeArgs};

/// The newest rules that are known here; older kernels keep those they know.
const NEWEST: ABI = ABI::V6;

/// Lets nothing be executed, no mount be changed, no port be listened on but that of the metrics, no signal and no
/// abstract socket reach a process outside, and no device be made unless directories of the host are written to.
///
/// # Errors
/// This kernel has no Landlock, or refuses.
pub(super) fn restrict(front: &Front, args: &ServeArgs) -> anyhow::Result<bool> {
    let devices = AccessFs::MakeChar | AccessFs::MakeBlock;
    let refused = if front.is_writable() { BitFlags::EMPTY } else { devices } | AccessFs::Execute;
    let all = AccessFs::from_all(NEWEST);
    let mut rules = Ruleset::default()
        .handle_access(all)?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/").context("the root directory")?, all & !refused))?;
    if let Some(address) = args.global.metrics_addr {
        rules = rules.add_rule(NetPort::new(address.port(), AccessNet::BindTcp))?;
    }
    let status = rules.restrict_self()?;
    match status.ruleset {
        RulesetStatus::NotEnforced => anyhow::bail!("this kernel has none, or it is not enabled"),
        RulesetStatus::PartiallyEnforced => tracing::debug!("this kernel knows a part of the Landlock rules"),
        RulesetStatus::FullyEnforced => {}
    }
    Ok(true)
}
