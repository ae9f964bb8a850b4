//! The fuzzer's targets on stable: every input of `tests/corpus`, parts of real files, and a bounded number of inputs
//! that are made of them by chance.

use std::path::{Path, PathBuf};

use holdfast_store::testing::{Random, fuzz};

/// Inputs made by chance, a target; fewer of the one that recovers a whole journal each time.
const INPUTS: u64 = 1500;
const JOURNALS: u64 = 300;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target);
    let entries = std::fs::read_dir(&place).unwrap_or_else(|why| panic!("{}: {why}", place.display()));
    let mut out: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("an entry").path();
            let bytes = std::fs::read(&path).expect("an input can be read");
            (path, bytes)
        })
        .collect();
    out.sort();
    out
}

/// A few bytes are changed, doubled, left out, or taken from elsewhere.
fn changed(input: &[u8], random: &Random) -> Vec<u8> {
    let mut out = input.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(out.len() as u64 + 1) as usize;
        let count = random.below(9).min((out.len() - at) as u64) as usize;
        match random.below(5) {
            0 => out.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
            1 => out.iter_mut().skip(at).take(count).for_each(|byte| *byte = [0, 0xff, 0x7f][count % 3]),
            2 => out.iter_mut().skip(at).take(count).for_each(|byte| *byte = random.next() as u8),
            3 => drop(out.drain(at..at + count)),
            _ => {
                let part = out[at..at + count].to_vec();
                out.splice(at..at, part);
            }
        }
    }
    out
}

#[test]
fn no_input_makes_a_reader_panic_or_invent() {
    for (name, target) in fuzz::TARGETS {
        let corpus = corpus(name);
        assert!(!corpus.is_empty(), "there is no input for {name}");
        for (path, input) in &corpus {
            println!("{}", path.display());
            target(input);
        }
        let random = Random::new(name.len() as u64);
        let count = if name == "journal" { JOURNALS } else { INPUTS };
        for number in 0..count {
            let (_, input) = &corpus[random.below(corpus.len() as u64) as usize];
            let input = changed(input, &random);
            // Says which input it was, if the target panics.
            println!("{name} {number}: {} bytes {:02x?}", input.len(), &input[..input.len().min(120)]);
            target(&input);
        }
    }
}
