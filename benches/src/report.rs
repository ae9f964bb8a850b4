//! The table: medians over the rounds, each beside its floor and the goal of the design.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use crate::first::{Amplification, Plan, Sample, Samples};

/// What it was measured on.
pub struct Machine {
    cores: usize,
    kernel: String,
    file_system: String,
    congestion: String,
    load: String,
    nice: String,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}

fn file_system(path: &Path) -> String {
    let mounts = read("/proc/mounts");
    let on = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        path.starts_with(at).then_some((at.len(), kind))
    });
    on.max_by_key(|(length, _)| *length).map_or_else(|| "unknown".into(), |(_, kind)| kind.to_owned())
}

impl Machine {
    /// The machine and file system of a directory.
    pub fn look(directory: &Path) -> Self {
        let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
        let stat = read("/proc/self/stat");
        let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease"),
            file_system: file_system(&directory),
            congestion: read("/proc/sys/net/ipv4/tcp_congestion_control"),
            load: read("/proc/loadavg").split(' ').take(2).collect::<Vec<_>>().join(" "),
            nice: after_name.split(' ').nth(16).unwrap_or("unknown").to_owned(),
        }
    }

    /// As a sentence.
    pub fn sentence(&self) -> String {
        format!(
            "{} cores, Linux {}, {}, default congestion control {}; load {} when it began, nice {}.",
            self.cores, self.kernel, self.file_system, self.congestion, self.load, self.nice
        )
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

struct Medians<'s>(&'s Samples);

impl Medians<'_> {
    fn of(&self, name: &str, value: impl Fn(&Sample) -> f64) -> f64 {
        median(self.0.get(name).into_iter().flatten().map(value).collect())
    }
    fn p50(&self, name: &str) -> f64 {
        self.of(name, |sample| sample.figures.p50_us)
    }
    fn p99(&self, name: &str) -> f64 {
        self.of(name, |sample| sample.figures.p99_us)
    }
    fn rate(&self, name: &str) -> f64 {
        self.of(name, |sample| sample.figures.rate())
    }
    fn megabytes(&self, name: &str) -> f64 {
        self.of(name, |sample| sample.figures.rate() * sample.bytes as f64 / 1e6)
    }
    /// The median over the rounds of one value over another of the same round.
    fn ratio(&self, name: &str, value: impl Fn(&Sample) -> f64, floor: impl Fn(usize) -> f64) -> f64 {
        let rounds = self.0.get(name).into_iter().flatten().enumerate();
        median(rounds.map(|(round, sample)| value(sample) / floor(round)).collect())
    }
    fn at(&self, name: &str, round: usize, value: impl Fn(&Sample) -> f64) -> f64 {
        self.0.get(name).and_then(|samples| samples.get(round)).map_or(f64::NAN, value)
    }
}

fn p50(sample: &Sample) -> f64 {
    sample.figures.p50_us
}

fn rate(sample: &Sample) -> f64 {
    sample.figures.rate()
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = out.write_fmt(text);
    out.push('\n');
}

fn head(out: &mut String, plan: &Plan, machine: &Machine, took: Duration) {
    line(out, format_args!("# First bench, {}\n", plan.commit));
    line(
        out,
        format_args!("`cargo xtask bench first --rounds {}`, {:.0} s.", plan.rounds, took.as_secs_f64()),
    );
    line(out, format_args!("{}", machine.sentence()));
    line(
        out,
        format_args!(
            "Three replicas share the disk and the cores; TLS and the cleaner are on; the volume has {} MiB, all of it \
             written before. Medians over the rounds; in each round floor and subject take turns; a ratio is the \
             median of the rounds' ratios. A figure counts only from quiet cores: look at the load.\n",
            plan.size_mib
        ),
    );
}

fn floors(out: &mut String, medians: &Medians<'_>) {
    line(out, format_args!("| floor | p50 µs | p99 µs | per second | MB/s |"));
    line(out, format_args!("|---|---|---|---|---|"));
    for (name, what) in [
        ("A3", "A3: second to finish of three concurrent O_DSYNC overwrites of 4 KiB"),
        ("B2", "B2: one frame to two processes, first reply"),
        ("D", "D: fio random 4 KiB O_DSYNC, QD32"),
        ("raw read 1", "fio random 4 KiB O_DIRECT read, QD1"),
        ("raw read 32", "the same, QD32"),
        ("raw write MiB", "fio sequential 1 MiB O_DIRECT write, QD4"),
        ("raw read MiB", "fio sequential 1 MiB O_DIRECT read, QD4"),
    ] {
        let (p50, p99) = (medians.p50(name), medians.p99(name));
        let (rate, megabytes) = (medians.rate(name), medians.megabytes(name));
        line(out, format_args!("| {what} | {p50:.0} | {p99:.0} | {rate:.0} | {megabytes:.0} |"));
    }
    out.push('\n');
}

fn row(out: &mut String, medians: &Medians<'_>, what: &str, name: &str, ratio: &str, goal: &str) {
    let (p50, p99) = (medians.p50(name), medians.p99(name));
    let (rate, megabytes) = (medians.rate(name), medians.megabytes(name));
    line(
        out,
        format_args!("| {what} | {p50:.0} | {p99:.0} | {rate:.0} | {megabytes:.0} | {ratio} | {goal} |"),
    );
}

fn subjects(out: &mut String, medians: &Medians<'_>, amplification: &[Amplification]) {
    line(out, format_args!("| work | p50 µs | p99 µs | per second | MB/s | beside its floor | goal |"));
    line(out, format_args!("|---|---|---|---|---|---|---|"));
    let durable = |round| medians.at("A3", round, p50) + medians.at("B2", round, p50);
    for (what, name, goal) in [
        ("4 KiB durable write, QD1, in-process", "session write 1", "≤ 1.35"),
        ("the same over NBD", "nbd write 1", "in-process + 25 µs"),
    ] {
        let ratio = medians.ratio(name, p50, durable);
        row(out, medians, what, name, &format!("{ratio:.2} × (A3 + B2)"), goal);
    }
    let third = |round| medians.at("D", round, rate) / 3.0;
    for (what, name, goal) in [
        ("4 KiB durable write, QD32, in-process", "session write 32", "≥ 2.0"),
        ("the same over NBD", "nbd write 32", ""),
        ("4 KiB durable write, QD64, in-process", "session write 64", "≥ 2.8"),
    ] {
        let ratio = medians.ratio(name, rate, third);
        row(out, medians, what, name, &format!("{ratio:.2} × D/3"), goal);
    }
    let raw_one = |round| medians.at("raw read 1", round, p50);
    for (what, name, goal) in [
        ("4 KiB read, QD1, in-process", "session read 1", "≤ 1.10"),
        ("the same over NBD", "nbd read 1", "in-process + 25 µs"),
    ] {
        let ratio = medians.ratio(name, p50, raw_one);
        row(out, medians, what, name, &format!("{ratio:.2} × raw"), goal);
    }
    let raw_many = |round| medians.at("raw read 32", round, rate);
    for (what, name) in
        [("4 KiB read, QD32, in-process", "session read 32"), ("the same over NBD", "nbd read 32")]
    {
        let ratio = medians.ratio(name, rate, raw_many);
        row(out, medians, what, name, &format!("{ratio:.2} × raw"), "≥ 0.7");
    }
    let sequential = amplification.iter().find(|of| of.name.starts_with("sequential")).map_or(2.0, factor);
    let share = |round| medians.at("raw write MiB", round, rate) / 3.0 / sequential;
    for (what, name) in [
        ("1 MiB sequential write, QD4, in-process", "session write MiB"),
        ("the same over NBD", "nbd write MiB"),
    ] {
        let ratio = medians.ratio(name, rate, share);
        row(out, medians, what, name, &format!("{ratio:.2} × raw ÷ (3 × {sequential:.2})"), "≥ 0.7");
    }
    let raw_large = |round| medians.at("raw read MiB", round, rate);
    for (what, name) in [
        ("1 MiB sequential read, QD4, in-process", "session read MiB"),
        ("the same over NBD", "nbd read MiB"),
    ] {
        let ratio = medians.ratio(name, rate, raw_large);
        row(out, medians, what, name, &format!("{ratio:.2} × raw"), "");
    }
    out.push('\n');
}

fn costs(out: &mut String, medians: &Medians<'_>) {
    line(
        out,
        format_args!(
            "| cost of a write | CPU µs, all three | CPU µs, own NBD client | journal flushes, all three | other \
             flushes | entries per append | journal bytes per byte and replica |"
        ),
    );
    line(out, format_args!("|---|---|---|---|---|---|---|"));
    for (what, name) in [
        ("QD1, in-process (with its load)", "session write 1"),
        ("QD1, over NBD", "nbd write 1"),
        ("QD32, in-process (with its load)", "session write 32"),
        ("QD32, over NBD", "nbd write 32"),
        ("QD64, in-process (with its load)", "session write 64"),
        ("1 MiB, over NBD", "nbd write MiB"),
    ] {
        let each = |value: fn(&Sample) -> f64| medians.of(name, |s| value(s) / s.figures.count as f64);
        line(
            out,
            format_args!(
                "| {what} | {:.1} | {:.1} | {:.2} | {:.3} | {:.1} | {:.2} |",
                medians.of(name, |sample| sample.cpu_us),
                medians.of(name, |sample| sample.client_cpu_us),
                each(|sample| sample.usage.journal_flushes),
                each(|sample| sample.usage.other_flushes),
                medians.of(name, |sample| sample.usage.appended / sample.usage.appends),
                each(|sample| sample.usage.journal_bytes / 3.0 / sample.bytes as f64),
            ),
        );
    }
    line(out, format_args!("\nGoal at QD32: ≤ 25 µs of CPU, cleaner apart; here the cleaner is in it.\n"));
}

fn factor(of: &Amplification) -> f64 {
    of.usage.written() / 3.0 / of.user_bytes
}

fn amplifications(out: &mut String, all: &[Amplification]) {
    line(
        out,
        format_args!(
            "| write amplification per replica, until everything is home | all | journal | home | table and manifest | goal |"
        ),
    );
    line(out, format_args!("|---|---|---|---|---|---|"));
    for of in all {
        let part = |bytes: f64| bytes / 3.0 / of.user_bytes;
        line(
            out,
            format_args!(
                "| {} | {:.2} | {:.2} | {:.2} | {:.3} | {} |",
                of.name,
                factor(of),
                part(of.usage.journal_bytes),
                part(of.usage.home_bytes),
                part(of.usage.table_bytes),
                of.goal
            ),
        );
    }
    out.push('\n');
}

/// Flushes are nearly free on a machine whose disk is a cache; on a disk that takes a millisecond they are not.
fn projected(out: &mut String, medians: &Medians<'_>) {
    const FLUSH_US: f64 = 1000.0;
    let single = |name: &str| medians.p50(name) - medians.p50("A3") + FLUSH_US;
    let deep = |name: &str| {
        let flush = medians.of(name, |s| s.usage.flush_seconds * 1e6 / s.usage.journal_flushes);
        32.0 / (medians.p50(name) - flush + FLUSH_US) * 1e6
    };
    line(
        out,
        format_args!(
            "Projected for a flush of 1 ms (the measured flush replaced): QD1 {:.0} µs in-process and {:.0} µs over \
             NBD; QD32 {:.0} and {:.0} writes a second.",
            single("session write 1"),
            single("nbd write 1"),
            deep("session write 32"),
            deep("nbd write 32")
        ),
    );
}

/// The whole text.
pub fn table(
    plan: &Plan,
    machine: &Machine,
    samples: &Samples,
    amplification: &[Amplification],
    took: Duration,
) -> String {
    let medians = Medians(samples);
    let mut out = String::new();
    head(&mut out, plan, machine, took);
    floors(&mut out, &medians);
    subjects(&mut out, &medians, amplification);
    costs(&mut out, &medians);
    amplifications(&mut out, amplification);
    projected(&mut out, &medians);
    out
}
