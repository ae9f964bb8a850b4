//! `cargo xtask mutants cluster`: plants faults in the daemons and shows which attack finds each. A fault that nothing
//! finds is a failure.

use std::process::Command;
use std::time::Instant;

use crate::cluster::programs;

/// How it is called.
pub const USAGE: &str = "cargo xtask mutants cluster [--profile release|dev]";

struct Mutant {
    name: &'static str,
    breaks: &'static str,
    /// What finds it.
    by: By,
}

enum By {
    /// An attack of `holdfast-cluster`, which must fail.
    Attack(&'static [&'static str]),
    /// A test of the session's, by its program and its name, that plants it by itself and passes if it is noticed.
    Session(&'static str, &'static str),
}

const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "skip-journal-flush",
        breaks: "INV-ACK: a write is acknowledged before it is on stable storage",
        by: By::Attack(&["kills", "--kills", "24", "--seed", "1", "--disk", "discard"]),
    },
    Mutant {
        name: "skip-epoch-check",
        breaks: "INV-FENCE: a write of an old epoch is accepted",
        by: By::Attack(&["scenarios", "--seed", "1", "--rounds", "3", "partition", "pause"]),
    },
    Mutant {
        name: "store-ends-the-daemon",
        breaks: "INV-STORES: a store that stops takes its node with it",
        by: By::Attack(&["scenarios", "--seed", "1", "store-lost"]),
    },
    Mutant {
        name: "foreign-store-ends-the-daemon",
        breaks: "INV-STORES: a store that cannot be opened keeps its node from starting",
        by: By::Attack(&["scenarios", "--seed", "1", "store-lost"]),
    },
    Mutant {
        name: "leader-restore",
        breaks: "INV-TERM: a restarted leader leads on in its old term",
        by: By::Session("leader_restore", "with_leader"),
    },
    Mutant {
        name: "run-rolled-back",
        breaks: "INV-ROLLBACK: a replica that was put back to an older state runs",
        by: By::Session("rolled_back", "without_the_question"),
    },
    Mutant {
        name: "rest-unasked",
        breaks: "INV-REST: a leader rests and asks nobody",
        by: By::Session("rests", "a_leader_that_rests_without_asking_is_found"),
    },
    Mutant {
        name: "rest-while-behind",
        breaks: "INV-REST: a group rests of which a member lacks an entry",
        by: By::Session("rests", "a_group_that_rests_while_a_member_is_behind_is_found"),
    },
    Mutant {
        name: "rest-unwatched",
        breaks: "INV-REST: nobody notices that the leader of a group that rests is gone",
        by: By::Session("rests", "followers_that_do_not_watch_their_leader_are_found"),
    },
    Mutant {
        name: "woken-leader-unasked",
        breaks: "INV-REST: a leader that was deposed while it rested answers for the volume",
        by: By::Session("rests", "a_leader_that_woke_and_does_not_ask_is_found"),
    },
];

/// What the last line that says so says of the failure.
fn reason(output: &str) -> String {
    let line = |mark: &str| output.lines().rev().find(|line| line.contains(mark));
    line("FAILED after").or_else(|| line("FAILED: ")).unwrap_or("it ended without a reason").trim().to_owned()
}

fn attack(mutant: &Mutant, arguments: &[&str], profile: &str) -> Result<String, String> {
    let programs = programs(profile)?;
    let mut command = Command::new(programs.join("holdfast-cluster"));
    command.arg("--program").arg(programs.join("holdfast")).args(arguments);
    let output = command.env("HOLDFAST_PLANTED", mutant.name).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Err(format!("{} noticed nothing", arguments.join(" ")));
    }
    let why = reason(&said);
    if why.contains("the cluster has ended") || why.contains("cannot be started") {
        return Err(format!("the cluster did not even run: {why}"));
    }
    Ok(why)
}

fn find(mutant: &Mutant, profile: &str) -> Result<String, String> {
    match mutant.by {
        By::Attack(arguments) => attack(mutant, arguments, profile),
        By::Session(program, test) => {
            let arguments = ["test", "-p", "holdfast-session", "--locked", "--test", program, "--", test];
            let said = format!("cargo {}", arguments.join(" "));
            if crate::cargo(&arguments, &[]) { Ok(said) } else { Err(format!("{said} failed")) }
        }
    }
}

/// Runs it; false if a fault was not found.
pub fn run(given: &[&str]) -> bool {
    let profile = match given {
        ["cluster"] => "release",
        ["cluster", "--profile", profile] => profile,
        _ => {
            eprintln!("usage: {USAGE}");
            return false;
        }
    };
    let flag = format!("--profile={profile}");
    let build = ["build", "--locked", &flag, "-p", "holdfast", "-p", "holdfast-cluster"];
    if !crate::cargo(&[&build[..], &["--features", "holdfast/planted-bugs"]].concat(), &[]) {
        return false;
    }
    let mut found = 0;
    for mutant in MUTANTS {
        let began = Instant::now();
        let (verdict, why) = match find(mutant, profile) {
            Ok(why) => {
                found += 1;
                ("found", why)
            }
            Err(why) => ("NOT FOUND", why),
        };
        println!(
            "{:18} {verdict} in {:.0} s ({})",
            mutant.name,
            began.elapsed().as_secs_f64(),
            mutant.breaks
        );
        println!("    {why}");
    }
    println!("{found} of {} planted faults found", MUTANTS.len());
    found == MUTANTS.len()
}
