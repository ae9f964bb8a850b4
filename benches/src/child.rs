//! A child process that is told what to do by lines of JSON on its standard input and answers each with one line.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Outcome;

/// A running child. Killed when dropped.
pub struct Worker {
    name: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts this program again with other arguments and waits until it says that it is ready.
    pub fn start(name: &str, arguments: &[&str]) -> Outcome<Self> {
        let mut worker = Self::spawn(name, arguments)?;
        worker.ready()?;
        Ok(worker)
    }

    /// Starts it only; [`Self::ready`] waits.
    pub fn spawn(name: &str, arguments: &[&str]) -> Outcome<Self> {
        let wrong = |error: std::io::Error| format!("{name} cannot be started: {error}");
        let program = std::env::current_exe().map_err(wrong)?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(wrong)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(format!("{name} has no pipes"));
        };
        Ok(Self { name: name.into(), child, input, output: BufReader::new(output) })
    }

    /// Waits until the child says that it is ready.
    pub fn ready(&mut self) -> Outcome<()> {
        self.answer::<bool>().map(drop)
    }

    fn answer<A: DeserializeOwned>(&mut self) -> Outcome<A> {
        let mut line = String::new();
        let read = self.output.read_line(&mut line);
        match read {
            Ok(0) => return Err(format!("{} has ended: {:?}", self.name, self.child.wait())),
            Ok(_) => {}
            Err(error) => return Err(format!("{}: {error}", self.name)),
        }
        let answer: Result<A, String> =
            serde_json::from_str(&line).map_err(|error| format!("{}: {error} in {line}", self.name))?;
        answer.map_err(|why| format!("{}: {why}", self.name))
    }

    /// Asks and waits for the answer.
    pub fn ask<A: DeserializeOwned>(&mut self, request: &impl Serialize) -> Outcome<A> {
        let mut line = serde_json::to_string(request).map_err(|error| error.to_string())?;
        line.push('\n');
        self.input.write_all(line.as_bytes()).map_err(|error| format!("{}: {error}", self.name))?;
        self.answer()
    }

    /// Waits for an answer that it was not asked for.
    pub fn hear<A: DeserializeOwned>(&mut self) -> Outcome<A> {
        self.answer()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.child.kill().and_then(|()| self.child.wait()).is_err() {
            eprintln!("{} had ended before", self.name);
        }
    }
}

/// In the child: one answer.
pub fn say<A: Serialize>(answer: &Outcome<A>) -> Outcome<()> {
    let line = serde_json::to_string(answer).map_err(|error| error.to_string())?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|error| error.to_string())
}

/// In the child: the lines that come in, read on a thread of its own until the parent is gone.
pub fn requests() -> tokio::sync::mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Processor time of a process and all its threads so far, in nanoseconds.
pub fn cpu_ns(pid: u32) -> Outcome<u64> {
    let wrong = |error: &dyn std::fmt::Display| format!("processor time of {pid}: {error}");
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|error| wrong(&error))?;
    let mut total = 0;
    for task in tasks {
        let path = task.map_err(|error| wrong(&error))?.path().join("schedstat");
        // A thread that ended meanwhile has no file any more.
        let Ok(text) = std::fs::read_to_string(path) else { continue };
        let ran = text.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok());
        total += ran.ok_or_else(|| wrong(&"schedstat is not understood"))?;
    }
    Ok(total)
}
