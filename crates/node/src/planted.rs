//! Faults that a test plants in a daemon by the variable `HOLDFAST_PLANTED`, to prove that it finds them. A build
//! without the feature `planted-bugs` refuses to start with it: a test that plants nothing would prove nothing.

use holdfast_types::UserError;

/// Names of faults, separated by commas.
const VARIABLE: &str = "HOLDFAST_PLANTED";

/// Plants what the environment names, on this thread, which is the shard's.
#[cfg(feature = "planted-bugs")]
pub(crate) fn plant() -> Result<(), UserError> {
    let Ok(names) = std::env::var(VARIABLE) else { return Ok(()) };
    let known = |name: &&str| holdfast_protocol::planted::KNOWN.iter().any(|(known, _)| known == name);
    let (of_protocol, of_store): (Vec<&str>, Vec<&str>) =
        names.split(',').filter(|name| !name.is_empty()).partition(known);
    holdfast_protocol::planted::plant(&of_protocol);
    holdfast_store::testing::plant(&of_store);
    tracing::warn!(names, "faults are planted: this daemon breaks its promises");
    Ok(())
}

/// Refuses what cannot be planted.
#[cfg(not(feature = "planted-bugs"))]
pub(crate) fn plant() -> Result<(), UserError> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    let message = format!("{VARIABLE} is set, and no fault can be planted in this build");
    Err(UserError::new(holdfast_types::ErrorCode::InvalidArgument, message)
        .hint("unset it, or build with --features planted-bugs for tests"))
}
