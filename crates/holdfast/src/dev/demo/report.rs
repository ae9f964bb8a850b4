//! What a demonstration shows: lines as they come for people, one document at the end for programs.
//!
//! A check that does not hold is never lost: the exit code is 0 only if all of them held.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::cli::Demo;
use crate::output::Output;

/// Width of the labels.
const LABEL: usize = 10;

/// One check and what came of it.
#[derive(Serialize)]
struct Check {
    what: String,
    held: bool,
    detail: String,
}

/// A part of the story.
#[derive(Serialize)]
struct Act {
    name: String,
    facts: Map<String, Value>,
    checks: Vec<Check>,
}

/// The report of one demonstration.
pub(super) struct Report<'o> {
    output: &'o Output,
    demo: String,
    began: Instant,
    acts: Vec<Act>,
    /// Hidden where standard error is no terminal.
    bar: ProgressBar,
}

impl<'o> Report<'o> {
    /// An empty report.
    pub(super) fn new(output: &'o Output, demo: Demo) -> Self {
        let bar = if output.is_human() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        bar.enable_steady_tick(Duration::from_millis(120));
        let demo = demo.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        Self { output, demo, began: Instant::now(), acts: Vec::new(), bar }
    }

    fn say(&self, line: &str) {
        if self.output.is_human() {
            self.bar.suspend(|| println!("{line}"));
        }
    }

    /// What is going on, for a terminal.
    pub(super) fn step(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }

    /// A bar that counts bytes, for a terminal.
    pub(super) fn count_bytes(&self, what: &'static str, total: u64) -> Counting {
        self.bar.set_length(total);
        self.bar.set_position(0);
        let style = ProgressStyle::with_template("{spinner} {msg}  {bytes} of {total_bytes}");
        self.bar.set_style(style.expect("the template is well formed"));
        self.bar.set_message(what);
        Counting(self.bar.clone())
    }

    /// A new part begins.
    pub(super) fn act(&mut self, name: &str) {
        let gap = if self.acts.is_empty() { "" } else { "\n" };
        self.say(&format!("{gap}{name}"));
        self.acts.push(Act { name: name.into(), facts: Map::new(), checks: Vec::new() });
    }

    /// Something that was seen; `facts` is an object.
    pub(super) fn fact(&mut self, label: &str, text: impl AsRef<str>, facts: Value) {
        self.say(&format!("  {label:LABEL$} {}", text.as_ref()));
        if let (Some(act), Value::Object(facts)) = (self.acts.last_mut(), facts) {
            act.facts.extend(facts);
        }
    }

    /// Something that must hold: the detail of how it does, or of why it does not.
    pub(super) fn check(&mut self, what: &str, outcome: Result<String, String>) {
        let (held, detail) = match outcome {
            Ok(detail) => (true, detail),
            Err(why) => (false, why),
        };
        let mark = if held { "ok" } else { "FAILED" };
        let shown = if detail.is_empty() { String::new() } else { format!(": {detail}") };
        self.say(&format!("  {mark:LABEL$} {what}{shown}"));
        if let Some(act) = self.acts.last_mut() {
            act.checks.push(Check { what: what.into(), held, detail });
        }
    }

    /// Ends what moves on the terminal.
    pub(super) fn quiet(&self) {
        self.bar.finish_and_clear();
        self.bar.set_draw_target(ProgressDrawTarget::hidden());
    }

    fn count(&self) -> (usize, usize) {
        let checks = || self.acts.iter().flat_map(|act| &act.checks);
        (checks().count(), checks().filter(|check| !check.held).count())
    }

    /// The last word.
    pub(super) fn finish(&self) -> ExitCode {
        let (all, broken) = self.count();
        let seconds = self.began.elapsed().as_secs_f64();
        // A story without checks has shown nothing.
        let passed = broken == 0 && all > 0;
        let document = json!({
            "demo": self.demo,
            "passed": passed,
            "seconds": (seconds * 10.0).round() / 10.0,
            "acts": self.acts,
        });
        self.output.show(&document, || {
            if passed {
                format!("\nAll {all} checks held, in {seconds:.0} s.")
            } else {
                format!("\n{broken} of {all} checks FAILED.")
            }
        });
        if passed { ExitCode::SUCCESS } else { ExitCode::from(1) }
    }
}

/// Counts until it is dropped.
pub(super) struct Counting(ProgressBar);

impl Counting {
    /// So many more.
    pub(super) fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.0.set_style(ProgressStyle::default_spinner());
        self.0.set_message("");
    }
}

/// A duration for people.
pub(super) fn span(duration: Duration) -> String {
    match duration.as_millis() {
        ms if ms < 10_000 => format!("{ms} ms"),
        _ => format!("{:.1} s", duration.as_secs_f64()),
    }
}

/// Milliseconds for programs.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Bytes in a time, for people.
pub(super) fn rate(bytes: u64, in_time: Duration) -> String {
    let seconds = in_time.as_secs_f64().max(1e-6);
    format!("{:.0} MiB/s", bytes as f64 / f64::from(1 << 20) / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Format;

    #[test]
    fn one_broken_check_fails_it_and_so_does_having_checked_nothing() {
        let output = Output::new(Format::Json);
        let mut report = Report::new(&output, Demo::ZoneLoss);
        assert_eq!(report.demo, "zone-loss");
        report.act("an act");
        assert_eq!(report.count(), (0, 0));
        assert_eq!(report.finish(), ExitCode::from(1));
        report.check("a thing", Ok(String::new()));
        assert_eq!(report.finish(), ExitCode::SUCCESS);
        report.act("another");
        report.check("another thing", Err("it is not so".into()));
        report.check("a third thing", Ok(String::new()));
        assert_eq!(report.count(), (3, 1));
        assert_eq!(report.finish(), ExitCode::from(1));
    }

    #[test]
    fn facts_are_kept_by_act() {
        let output = Output::new(Format::Json);
        let mut report = Report::new(&output, Demo::ZoneLoss);
        report.act("an act");
        report.fact("stall", "5 ms", json!({"stall_ms": 5}));
        report.fact("epoch", "3", json!({"epoch": 3}));
        assert_eq!(
            serde_json::to_value(&report.acts[0].facts).ok(),
            Some(json!({"stall_ms": 5, "epoch": 3}))
        );
        assert_eq!(
            (span(Duration::from_millis(812)), span(Duration::from_secs(61))),
            ("812 ms".into(), "61.0 s".into())
        );
    }
}
