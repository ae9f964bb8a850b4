//! The first table: rounds in which floor and subject take turns.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::child::Worker;
use crate::daemons::Daemons;
use crate::floors::{Fio, Raw, Three, find_fio};
use crate::load::{Figures, Operation, Pattern, Work};
use crate::report::{self, Machine};
use crate::trio::Trio;
use crate::usage::Usage;

/// How to measure.
#[derive(clap::Args, Clone, Debug)]
pub struct Plan {
    /// The `holdfast` program.
    #[arg(long)]
    pub program: PathBuf,
    /// Where the table is written.
    #[arg(long, default_value = "benches/results")]
    pub results: PathBuf,
    /// What is measured, for the table's head and name.
    #[arg(long, default_value = "unknown")]
    pub commit: String,
    /// Rounds; the table shows the median.
    #[arg(long, default_value_t = 5)]
    pub rounds: u64,
    /// Size of the volume and of the raw file, in MiB.
    #[arg(long, default_value_t = 1024)]
    pub size_mib: u64,
    /// Where the data is put while it runs: the file system that is measured. Default: beside the program.
    #[arg(long)]
    pub directory: Option<PathBuf>,
}

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
/// How long the cleaners may take to bring everything home.
const CLEAN: Duration = Duration::from_secs(60);

/// One measurement of one round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Times and rates.
    pub figures: Figures,
    /// Bytes of a request.
    pub bytes: u64,
    /// Processor time of those that hold the volume, per request, in microseconds.
    pub cpu_us: f64,
    /// The same of a client of its own.
    pub client_cpu_us: f64,
    /// What was counted meanwhile.
    pub usage: Usage,
}

/// Samples by what was measured.
pub type Samples = BTreeMap<&'static str, Vec<Sample>>;

/// Bytes written per byte of a guest and replica.
#[derive(Clone, Copy, Debug)]
pub struct Amplification {
    /// What was written.
    pub name: &'static str,
    /// What DESIGN allows.
    pub goal: &'static str,
    /// Bytes of the guest.
    pub user_bytes: f64,
    /// All replicas together.
    pub usage: Usage,
}

/// Everything that a load is given to.
struct Bench {
    three: Three,
    fio: Fio,
    echoes: Vec<Worker>,
    asker: Worker,
    trio: Trio,
    daemons: Daemons,
    span: u64,
    samples: Samples,
    seed: u64,
}

fn echoes() -> Outcome<(Vec<Worker>, Worker)> {
    let part = std::process::id() % 250;
    let addresses = [2, 3].map(|n| format!("127.19.{part}.{n}:7600"));
    let start = |address: &String| Worker::start("an echo", &["echo", "--address", address]);
    let echoes = addresses.iter().map(start).collect::<Outcome<Vec<_>>>()?;
    let asker = Worker::start("the asker", &["ask", "--address", &addresses[0], "--address", &addresses[1]])?;
    Ok((echoes, asker))
}

impl Bench {
    fn start(plan: &Plan, directory: &Path) -> Outcome<Self> {
        let span = plan.size_mib * MIB;
        println!("preparing raw files and {} MiB volumes in {}", plan.size_mib, directory.display());
        let three = Three::new(directory)?;
        let fio = Fio::new(directory, span)?;
        let (echoes, asker) = echoes()?;
        let trio = Trio::start(&directory.join("t"), span)?;
        let daemons = Daemons::start(&plan.program, &directory.join("d"), span)?;
        Ok(Self { three, fio, echoes, asker, trio, daemons, span, samples: Samples::new(), seed: 1 })
    }

    fn work(&mut self, operation: Operation, pattern: Pattern, bytes: u64, depth: u64, ms: u64) -> Work {
        self.seed += 1;
        Work { operation, pattern, bytes, depth, milliseconds: ms, span: self.span, seed: self.seed * 7919 }
    }

    fn note(&mut self, name: &'static str, sample: Sample) {
        let (figures, bytes) = (sample.figures, sample.bytes);
        println!(
            "  {name:24} p50 {:9.1} us  p99 {:9.1} us  {:10.0}/s {:8.1} MB/s  cpu {:6.1} us",
            figures.p50_us,
            figures.p99_us,
            figures.rate(),
            figures.rate() * bytes as f64 / 1e6,
            sample.cpu_us
        );
        self.samples.entry(name).or_default().push(sample);
    }

    fn floor(&mut self, name: &'static str, bytes: u64, figures: Figures) {
        self.note(name, Sample { figures, bytes, ..Sample::default() });
    }

    fn raw(&mut self, name: &'static str, bytes: u64, raw: Raw, milliseconds: u64) -> Outcome<()> {
        let figures = self.fio.run(raw, milliseconds)?;
        self.floor(name, bytes, figures);
        Ok(())
    }

    fn on_trio(&mut self, name: &'static str, work: &Work) -> Outcome<()> {
        let (cpu, usage) = (self.trio.cpu_ns()?, self.trio.usage()?);
        let figures = self.trio.work(work)?;
        let cpu_us = (self.trio.cpu_ns()? - cpu) as f64 / 1e3 / figures.count as f64;
        let usage = self.trio.usage()?.since(usage);
        self.note(name, Sample { figures, bytes: work.bytes, cpu_us, client_cpu_us: 0.0, usage });
        Ok(())
    }

    fn on_daemons(&mut self, name: &'static str, work: &Work) -> Outcome<()> {
        let (cpu, client) = (self.daemons.cpu_ns()?, self.daemons.client_cpu_ns()?);
        let usage = self.daemons.usage()?;
        let figures = self.daemons.work(work)?;
        let per = |ns: u64| ns as f64 / 1e3 / figures.count as f64;
        let cpu_us = per(self.daemons.cpu_ns()? - cpu);
        let client_cpu_us = per(self.daemons.client_cpu_ns()? - client);
        let usage = self.daemons.usage()?.since(usage);
        self.note(name, Sample { figures, bytes: work.bytes, cpu_us, client_cpu_us, usage });
        Ok(())
    }

    /// Every block of both volumes is written once, so that nothing below is a first write.
    fn fill(&mut self) -> Outcome<()> {
        let work = self.work(Operation::Write, Pattern::Sequential, MIB, 4, 0);
        self.trio.work(&work)?;
        self.daemons.work(&work)?;
        let warm = self.work(Operation::Write, Pattern::Random, BLOCK, 32, 500);
        self.trio.work(&warm)?;
        self.daemons.work(&warm)?;
        Ok(())
    }

    fn reads(&mut self) -> Outcome<()> {
        for (depth, raw, trio, nbd) in [
            (1, "raw read 1", "session read 1", "nbd read 1"),
            (32, "raw read 32", "session read 32", "nbd read 32"),
        ] {
            self.raw(raw, BLOCK, Raw { kind: "randread", block: "4k", depth, durable: false }, 700)?;
            let work = self.work(Operation::Read, Pattern::Random, BLOCK, depth, 700);
            self.on_trio(trio, &work)?;
            self.on_daemons(nbd, &work)?;
        }
        self.raw("raw read MiB", MIB, Raw { kind: "read", block: "1m", depth: 4, durable: false }, 700)?;
        let work = self.work(Operation::Read, Pattern::Sequential, MIB, 4, 700);
        self.on_trio("session read MiB", &work)?;
        self.on_daemons("nbd read MiB", &work)
    }

    fn single_writes(&mut self) -> Outcome<()> {
        let figures = self.three.second_of_three(600, self.seed)?;
        self.floor("A3", BLOCK, figures);
        let figures: Figures = self.asker.ask(&400)?;
        self.floor("B2", BLOCK, figures);
        let work = self.work(Operation::Write, Pattern::Random, BLOCK, 1, 1000);
        self.on_trio("session write 1", &work)?;
        self.on_daemons("nbd write 1", &work)
    }

    fn deep_writes(&mut self) -> Outcome<()> {
        let raw = Raw { kind: "randwrite", block: "4k", depth: 32, durable: true };
        self.raw("D", BLOCK, raw, 1500)?;
        let work = self.work(Operation::Write, Pattern::Random, BLOCK, 32, 1500);
        self.on_trio("session write 32", &work)?;
        self.on_daemons("nbd write 32", &work)?;
        let work = self.work(Operation::Write, Pattern::Random, BLOCK, 64, 1000);
        self.on_trio("session write 64", &work)
    }

    fn large_writes(&mut self) -> Outcome<()> {
        self.raw("raw write MiB", MIB, Raw { kind: "write", block: "1m", depth: 4, durable: false }, 700)?;
        let work = self.work(Operation::Write, Pattern::Sequential, MIB, 4, 1000);
        self.on_trio("session write MiB", &work)?;
        self.on_daemons("nbd write MiB", &work)
    }

    /// Waits until the daemons' blocks are home.
    fn clean(&self) -> Outcome<Usage> {
        let deadline = Instant::now() + CLEAN;
        loop {
            let usage = self.daemons.usage()?;
            if usage.dirty_bytes == 0.0 {
                return Ok(usage);
            }
            if Instant::now() > deadline {
                return Err(format!("{} bytes are not home in {CLEAN:?}", usage.dirty_bytes));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Bytes written per byte of the guest, until everything is home.
    fn amplification(&mut self) -> Outcome<Vec<Amplification>> {
        let hot = 4 * MIB;
        let mut out = Vec::new();
        for (name, goal, pattern, bytes, depth, span, ms) in [
            ("random 4 KiB, QD32", "≤ 2.2", Pattern::Random, BLOCK, 32, self.span, 4000),
            ("hot set of 4 MiB, 4 KiB, QD32", "≤ 1.2", Pattern::Random, BLOCK, 32, hot, 3000),
            ("sequential 1 MiB, QD4", "≤ 2.05", Pattern::Sequential, MIB, 4, self.span, 2000),
        ] {
            let before = self.clean()?;
            let work = Work { span, ..self.work(Operation::Write, pattern, bytes, depth, ms) };
            let figures = self.daemons.work(&work)?;
            let usage = self.clean()?.since(before);
            println!("  {name:30} {:.2}", usage.written() / 3.0 / (figures.count * bytes) as f64);
            out.push(Amplification { name, goal, user_bytes: (figures.count * bytes) as f64, usage });
        }
        Ok(out)
    }
}

/// Measures and writes the table.
pub fn run(plan: &Plan) -> Outcome<()> {
    let began = Instant::now();
    find_fio()?;
    let beside = plan.program.parent().map(Path::to_path_buf).unwrap_or_default();
    let base = plan.directory.clone().unwrap_or(beside);
    // Short: unix sockets below it have a bound.
    let place = tempfile::Builder::new().prefix("b").tempdir_in(&base).map_err(|error| error.to_string())?;
    for part in ["t", "d"] {
        std::fs::create_dir(place.path().join(part)).map_err(|error| error.to_string())?;
    }
    let machine = Machine::look(place.path());
    let mut bench = Bench::start(plan, place.path())?;
    bench.fill()?;
    for round in 1..=plan.rounds {
        println!("round {round} of {}", plan.rounds);
        bench.reads()?;
        bench.single_writes()?;
        bench.deep_writes()?;
        bench.large_writes()?;
    }
    println!("write amplification");
    // What was measured before is told even if the cleaners do not come to an end.
    let (amplification, failed) = match bench.amplification() {
        Ok(found) => (found, None),
        Err(why) => (Vec::new(), Some(why)),
    };
    let mut text = report::table(plan, &machine, &bench.samples, &amplification, began.elapsed());
    if let Some(why) = &failed {
        text += &format!("\nWrite amplification could not be measured: {why}.\n");
    }
    bench.echoes.clear();
    println!("\n{text}");
    std::fs::create_dir_all(&plan.results).map_err(|error| error.to_string())?;
    let path = plan.results.join(format!("first-{}.md", plan.commit));
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    println!("written to {}", path.display());
    failed.map_or(Ok(()), Err)
}
