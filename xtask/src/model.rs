//! `cargo xtask model`: the models of `tests/model`, each checked exhaustively in its scope, and each way to break it.

/// How it is called.
pub const USAGE: &str = "cargo xtask model [--deep] [--only MODEL]";

/// Runs it; false if a model does not hold, or if what is broken on purpose is not found.
pub fn run(given: &[&str]) -> bool {
    let known = |flags: &[&str]| matches!(flags, [] | ["--deep"] | ["--only", _]);
    let mut rest = given;
    while !rest.is_empty() {
        let length = if rest[0] == "--only" { 2 } else { 1 };
        if rest.len() < length || !known(&rest[..length]) {
            eprintln!("usage: {USAGE}");
            return false;
        }
        rest = &rest[length..];
    }
    crate::cargo(&[&["run", "--quiet", "--locked", "-p", "holdfast-model", "--"], given].concat(), &[])
}
