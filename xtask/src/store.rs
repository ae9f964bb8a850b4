//! `cargo xtask mutants store`: plants faults in the store and demands that the ordinary test that is named for each
//! fails, and passes without it. `cargo xtask store --depth N`: every sequence of up to N operations with every crash.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How it is called.
pub const USAGE: &str = "cargo xtask mutants store [FAULT…]\n       cargo xtask store --depth N";

/// A fault that holds up its test for so long is not found by it.
const PATIENCE: Duration = Duration::from_secs(120);

/// A fault, the invariant that it breaks, and the test that finds it: its program and its name.
type Mutant = (&'static str, &'static str, &'static str, &'static str);

const ANY_HISTORY: &str = "histories::nothing_acknowledged_is_lost_in_any_history";
const SHORT_HISTORY: &str = "histories::every_cut_of_short_histories";
const ROTTEN_BLOCK: &str = "damage::a_rotten_block_is_reported_and_nothing_else";
const CUT_CLEANING: &str = "crashes::every_cut_of_a_cleaning_pass";
const CUT_REBUILD: &str = "crashes::every_cut_of_a_rebuild_leaves_all_of_it_or_nothing";
const CUT_MERGE: &str = "layers::every_cut_of_a_merge";
const LOST_WRITE: &str = "lost::a_lost_write_of_home_table_or_manifest_is_never_read_as_something_else";
const ROTTEN_COPY: &str = "lost::after_any_cut_of_a_cleaning_pass_either_copy_of_every_page_may_rot";

const MUTANTS: &[Mutant] = &[
    ("skip-journal-flush", "INV-ACK", "journal", ANY_HISTORY),
    (
        "acknowledge-out-of-order",
        "INV-ACK",
        "journal",
        "directed::what_is_behind_a_batch_that_hangs_is_not_acknowledged",
    ),
    ("vote-not-flushed", "INV-TERM", "journal", ANY_HISTORY),
    ("parked-logs-pin", "INV-ROOM", "journal", "parked::a_log_that_nobody_purges_holds_up_nobody"),
    ("rubbish-behind-a-list", "INV-ACK", "journal", "parked::a_log_that_is_copied_survives_every_power_cut"),
    ("copy-undoes-repair", "INV-TERM", "journal", "parked::a_repair_is_not_undone_by_a_copy"),
    (
        "failed-write-goes-on",
        "INV-ACK",
        "rebuild",
        "fail_stop::whatever_fails_to_be_written_stops_the_store_and_nothing_is_written_after_it",
    ),
    (
        "failed-write-counts",
        "INV-ACK",
        "journal",
        "directed::a_failed_write_stops_the_store_and_nothing_is_tried_again",
    ),
    ("reuse-at-once", "INV-ACK", "journal", ANY_HISTORY),
    ("release-at-once", "INV-ACK", "journal", ANY_HISTORY),
    ("small-records-left", "INV-TERM", "journal", ANY_HISTORY),
    (
        "copy-what-was-cut",
        "INV-TERM",
        "holdfast_store",
        "journal::writer::tests::a_copy_that_was_overtaken_does_not_bring_back_what_was_cut",
    ),
    (
        "no-admission",
        "INV-ADMIT",
        "pacing",
        "admission::writers_who_outrun_the_cleaner_are_slowed_evenly_and_the_line_never_stops",
    ),
    ("first-come", "INV-ADMIT", "pacing", "admission::who_writes_little_is_hardly_slowed_by_who_writes_much"),
    ("never-give-way", "INV-YIELD", "pacing", "giving_way::who_writes_is_given_way_to"),
    ("never-hurry", "INV-YIELD", "pacing", "giving_way::a_cleaner_that_is_needed_gives_way_to_nobody"),
    ("forget-cut", "INV-TERM", "crash_twice", "what_follows_two_torn_tails_is_not_cut_with_them"),
    (
        "no-closing-mark",
        "INV-ACK",
        "journal",
        "directed::an_idle_journal_says_that_its_last_batch_was_flushed",
    ),
    ("no-reserve", "INV-ROOM", "full_journal", "a_full_journal_takes_a_vote_and_a_purge"),
    (
        "recover-unflushed",
        "INV-ACK",
        "journal",
        "directed::what_a_killed_process_left_in_the_cache_is_flushed_before_it_counts",
    ),
    ("cut-faulty-entry", "INV-ACK", "journal", ROTTEN_BLOCK),
    ("payload-unchecked", "INV-ACK", "journal", ROTTEN_BLOCK),
    ("forget-second-list", "INV-ACK", "journal", ROTTEN_BLOCK),
    ("trust-behind-a-hole", "INV-ACK", "journal", SHORT_HISTORY),
    ("reuse-number", "INV-TERM", "journal", SHORT_HISTORY),
    ("forget-vote", "INV-TERM", "journal", SHORT_HISTORY),
    ("forget-truncation", "INV-TERM", "journal", SHORT_HISTORY),
    (
        "ignore-misplaced",
        "INV-ACK",
        "journal",
        "directed::a_misdirected_write_is_noticed_even_if_it_is_the_last",
    ),
    (
        "forget-doubt",
        "INV-TERM",
        "journal",
        "damage::a_batch_that_lost_both_lists_makes_every_group_unknown_for_good",
    ),
    ("foreign-store", "INV-TERM", "volume", "lost::a_store_of_somebody_else_is_refused"),
    (
        "forget-destroyed",
        "INV-TERM",
        "holdfast_store",
        "destroyed_file::tests::what_was_destroyed_is_known_whenever_the_power_goes",
    ),
    (
        "destroyed-in-one-copy",
        "INV-TERM",
        "holdfast_store",
        "destroyed_file::tests::either_copy_is_as_new_as_what_was_answered",
    ),
    (
        "forget-recovery",
        "INV-RECOVER",
        "holdfast_store",
        "recovery_file::tests::what_was_sealed_is_known_whenever_the_power_goes",
    ),
    (
        "late-take-over",
        "INV-RECOVER",
        "holdfast_store",
        "recovery_file::tests::what_comes_twice_or_late_changes_nothing",
    ),
    (
        "recovery-in-one-copy",
        "INV-RECOVER",
        "holdfast_store",
        "recovery_file::tests::either_copy_is_as_new_as_what_was_answered",
    ),
    ("move-unflushed-home", "INV-ACK", "volume", "crashes::what_is_not_flushed_is_not_moved_home"),
    ("home-before-commit", "INV-STAGE", "volume", CUT_CLEANING),
    (
        "commit-out-of-turn",
        "INV-ACK",
        "full_journal",
        "what_overtakes_the_line_calls_nothing_committed_that_stands_in_it",
    ),
    ("checkpoint-before-home-flush", "INV-ACK", "volume", CUT_CLEANING),
    (
        "forget-hidden-runs",
        "INV-STAGE",
        "volume",
        "crashes::what_newer_commands_hide_is_not_served_before_they_are_applied_again",
    ),
    (
        "trim-leaves-no-mark",
        "INV-MARK",
        "rebuild",
        "change_marks::a_trim_before_the_first_data_comes_home_is_marked",
    ),
    (
        "clean-while-rebuilding",
        "INV-STAGE",
        "rebuild",
        "meets_apply::what_is_applied_after_the_comparison_goes_with_the_old_log",
    ),
    (
        "keep-unnamed-files",
        "INV-SPACE",
        "rebuild",
        "failed_pass::a_rebuild_that_is_given_up_takes_no_names_from_files_of_a_failed_pass",
    ),
    (
        "keep-what-was-taken",
        "INV-SPACE",
        "volume",
        "full::a_pass_that_finds_no_room_changes_nothing_wherever_that_is",
    ),
    (
        "budget-not-kept",
        "INV-BUDGET",
        "volume",
        "budget::nobody_takes_more_than_the_budget_whatever_is_done_at_once",
    ),
    (
        "budget-below-what-stands",
        "INV-BUDGET",
        "volume",
        "budget::a_store_beyond_its_budget_is_full_and_trims_make_room",
    ),
    (
        "refuse-within-a-file",
        "INV-BUDGET",
        "volume",
        "budget::what_is_full_takes_no_more_and_what_stands_is_written_as_before",
    ),
    ("trim-falls-through", "INV-LAYER", "volume", "layers::what_was_given_back_hides_an_older_layer"),
    ("merge-before-manifest", "INV-LAYER", "volume", CUT_MERGE),
    ("empty-before-merged", "INV-LAYER", "volume", CUT_MERGE),
    ("owners-not-told", "INV-LAYER", "volume", "owners::what_was_found_out_is_told_of_every_change"),
    (
        "owners-kept-late",
        "INV-LAYER",
        "volume",
        "owners::what_is_found_out_while_blocks_come_home_is_not_kept",
    ),
    ("manifest-in-place", "INV-ACK", "rebuild", CUT_REBUILD),
    ("state-in-place", "INV-ACK", "holdfast_store", "state_file::tests::the_newest_whole_generation_counts"),
    ("page-in-place", "INV-ACK", "volume", CUT_CLEANING),
    ("one-table-copy", "INV-ACK", "volume", "rot::a_rotten_table_page_has_a_second_copy_that_is_as_new"),
    ("leave-copies-unequal", "INV-ACK", "volume", ROTTEN_COPY),
    ("forget-lost-pages", "INV-ACK", "rebuild", "many_pages::what_many_pages_do_is_not_forgotten"),
    (
        "pages-of-no-list",
        "INV-ACK",
        "rebuild",
        "many_pages::a_manifest_without_a_list_is_read_and_every_page_looked_at",
    ),
    ("serve-stale-page", "INV-ACK", "volume", LOST_WRITE),
    ("home-unchecked", "INV-ACK", "volume", "rot::a_rotten_home_block_is_bad_and_no_other"),
    ("address-not-in-checksum", "INV-ACK", "rebuild", "crashes::a_block_of_another_address_is_not_staged"),
    ("foreign-replica", "INV-STAGE", "volume", "lost::the_files_of_another_replica_are_refused"),
    ("replica-not-named", "INV-ACK", "volume", "lost::what_was_made_is_there_after_a_power_cut"),
    (
        "heal-unchecked",
        "INV-HEAL",
        "volume",
        "heal::a_rotten_block_is_healed_with_what_the_table_says_and_with_nothing_else",
    ),
    ("adopt-anything", "INV-HEAL", "volume", "heal::a_chunk_of_another_time_is_not_adopted"),
    (
        "restore-what-was-not-staged",
        "INV-STAGE",
        "rebuild",
        "lost_page::a_page_that_is_lost_after_the_comparison_is_healed_by_others",
    ),
    (
        "adopt-without-floor",
        "INV-LAYER",
        "volume",
        "heal_layers::a_page_of_two_layers_that_became_one_is_restored_whatever_the_cut",
    ),
    (
        "summary-of-two-moments",
        "INV-MARK",
        "rebuild",
        "many_pages::a_chunk_that_is_merged_while_its_mark_is_taken_is_not_taken_for_empty",
    ),
    ("staging-not-named", "INV-STAGE", "rebuild", CUT_REBUILD),
    ("switch-before-flush", "INV-STAGE", "rebuild", CUT_REBUILD),
    ("staged-unchecked", "INV-STAGE", "rebuild", "crashes::what_rots_before_it_comes_home_is_refused"),
    (
        "keep-map-at-switch",
        "INV-STAGE",
        "rebuild",
        "meets_apply::what_is_applied_after_the_comparison_goes_with_the_old_log",
    ),
];

/// The store's test programs by their names.
fn programs() -> Result<BTreeMap<String, PathBuf>, String> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["test", "--locked", "-p", "holdfast-store", "--no-run", "--message-format=json"]);
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err("the store's tests cannot be built".into());
    }
    let mut out = BTreeMap::new();
    for message in cargo_metadata::Message::parse_stream(&output.stdout[..]) {
        let cargo_metadata::Message::CompilerArtifact(artifact) =
            message.map_err(|error| error.to_string())?
        else {
            continue;
        };
        if let (true, Some(program)) = (artifact.profile.test, artifact.executable) {
            out.insert(artifact.target.name.clone(), program.into_std_path_buf());
        }
    }
    Ok(out)
}

/// How a test ended.
enum End {
    Passed,
    Failed(String),
    /// It does not exist, or did not end in time.
    Nothing(String),
}

/// Waits for a child, not for ever.
fn wait(child: &mut Child) -> Result<bool, String> {
    let began = Instant::now();
    loop {
        if child.try_wait().map_err(|error| error.to_string())?.is_some() {
            return Ok(true);
        }
        if began.elapsed() > PATIENCE {
            child.kill().map_err(|error| error.to_string())?;
            child.wait().map_err(|error| error.to_string())?;
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn run_test(program: &PathBuf, test: &str, planted: Option<&str>) -> Result<End, String> {
    let said = tempfile::tempfile().map_err(|error| error.to_string())?;
    let both = || said.try_clone().map_err(|error| error.to_string());
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]).stdout(both()?).stderr(both()?);
    match planted {
        Some(fault) => command.env("HOLDFAST_PLANTED", fault),
        None => command.env_remove("HOLDFAST_PLANTED"),
    };
    // Golden files and proptest look for their directory from the crate's.
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/store"));
    let mut child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
    if !wait(&mut child)? {
        return Ok(End::Nothing(format!("it did not end within {PATIENCE:?}")));
    }
    let said = read_all(said)?;
    if said.contains("test result: ok. 1 passed") {
        return Ok(End::Passed);
    }
    // The line after the panic's place says why.
    let why = said.lines().skip_while(|line| !line.contains("panicked at")).nth(1);
    Ok(match why {
        Some(why) => End::Failed(why.trim().chars().take(110).collect()),
        None => End::Nothing(said.lines().last().unwrap_or("it said nothing").to_owned()),
    })
}

fn read_all(mut file: std::fs::File) -> Result<String, String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut bytes = Vec::new();
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes));
    read.map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn is_found(programs: &BTreeMap<String, PathBuf>, mutant: &Mutant) -> Result<bool, String> {
    let (fault, invariant, program, test) = mutant;
    let path = programs.get(*program).ok_or_else(|| format!("there is no test program {program}"))?;
    let began = Instant::now();
    let (verdict, why) = match run_test(path, test, Some(fault))? {
        End::Failed(why) => match run_test(path, test, None)? {
            End::Passed => ("found", why),
            _ => ("NOT FOUND", "the test fails without it, too".into()),
        },
        End::Passed => ("NOT FOUND", "the test passes with it".into()),
        End::Nothing(why) => ("NOT FOUND", why),
    };
    let seconds = began.elapsed().as_secs_f64();
    println!("{fault:28} {invariant:9} {verdict:9} {seconds:5.1} s  {program} {test}\n    {why}");
    Ok(verdict == "found")
}

/// Runs every mutant, or those that are named; false if one was not found.
pub fn mutants(only: &[&str]) -> bool {
    let chosen: Vec<&Mutant> =
        MUTANTS.iter().filter(|(fault, ..)| only.is_empty() || only.contains(fault)).collect();
    if chosen.is_empty() {
        eprintln!("usage: {USAGE}");
        return false;
    }
    let all = || -> Result<usize, String> {
        let programs = programs()?;
        let mut found = 0;
        for mutant in &chosen {
            found += usize::from(is_found(&programs, mutant)?);
        }
        Ok(found)
    };
    match all() {
        Ok(found) => {
            println!("{found} of {} planted faults of the store found", chosen.len());
            found == chosen.len()
        }
        Err(why) => {
            println!("{why}");
            false
        }
    }
}

/// Runs every sequence of up to so many operations; false if one goes wrong.
pub fn run(given: &[&str]) -> bool {
    let ["--depth", depth] = given else {
        eprintln!("usage: {USAGE}");
        return false;
    };
    let test = ["test", "--locked", "-p", "holdfast-store", "--test", "sequences", "--"];
    // With snapshots, too.
    let only = ["every_crash_of_every_short_sequence", "--nocapture"];
    crate::cargo(&[&test[..], &only[..]].concat(), &[("HOLDFAST_DEPTH", depth)])
}
