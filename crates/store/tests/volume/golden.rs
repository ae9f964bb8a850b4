//! The bytes on disk: a store of this format is in `tests/golden`, can be read, and the same history still gives the
//! same bytes; and docs/FORMAT.md says where they are.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use holdfast_env::disk::{AlignedBuffer, Durability, OpenMode};
use holdfast_store::testing::{MemoryDisk, Tear, simulate};
use holdfast_types::BLOCK_BYTES;

use crate::crashes::live;
use crate::replica::{BLOCKS, Command, Reference, Replica, What};

/// Stores of this format: as the same history has written them over time, the newest last. Before it the journal did not say
/// what is committed before anything came home.
const STORES: [&str; 2] = ["format-3", "format-3-committed"];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A block of a file without its trailing zeros.
type Part = (String, u32, Vec<u8>);

fn encode(parts: &[Part]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, block, data) in parts {
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&block.to_le_bytes());
        out.extend_from_slice(&(data.len() as u16).to_le_bytes());
        out.extend_from_slice(data);
    }
    out
}

fn decode(mut bytes: &[u8]) -> Vec<Part> {
    let mut take = |length: usize| {
        let (head, tail) = bytes.split_at(length);
        bytes = tail;
        (head.to_vec(), tail.is_empty())
    };
    let mut parts = Vec::new();
    loop {
        let short = |bytes: Vec<u8>| u16::from_le_bytes(bytes.try_into().expect("two bytes")) as usize;
        let length = short(take(2).0);
        let name = String::from_utf8(take(length).0).expect("a name is text");
        let block = u32::from_le_bytes(take(4).0.try_into().expect("four bytes"));
        let length = short(take(2).0);
        let (data, ended) = take(length);
        parts.push((name, block, data));
        if ended {
            return parts;
        }
    }
}

fn history() -> Vec<Command> {
    let command = |what, start, count| Command { what, start, count };
    vec![
        command(What::Write, 3, 2),
        command(What::Write, 64 * 14 - 1, 2),
        command(What::Zero, 4, 1),
        command(What::Trim, 64 * 14, 1),
        command(What::Write, BLOCKS - 1, 1),
    ]
}

/// The store after the history: two checkpoints, and a command that is in the journal only.
fn made() -> Vec<Part> {
    let disk = MemoryDisk::new(7);
    simulate(7, Replica::create(disk.directory()));
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 7, |replica| async move {
        let commands = history();
        for part in [&commands[..2], &commands[2..4]] {
            part.iter().for_each(|command| replica.submit(*command));
            replica.clean().await.map_err(|error| error.to_string())?;
        }
        replica.submit(commands[4]);
        replica.flushed().await;
        Ok(())
    })
    .expect("lives");
    disk.power_cut(Tear::Nothing);
    let mut parts = Vec::new();
    for name in disk.names() {
        for (block, _) in disk.written(&name) {
            let mut data = disk.block(&name, block);
            let end = data.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            data.truncate(end);
            if !data.is_empty() {
                parts.push((name.clone(), block as u32, data));
            }
        }
    }
    parts
}

fn golden() -> Vec<Part> {
    stored(STORES[STORES.len() - 1])
}

fn stored(name: &str) -> Vec<Part> {
    decode(&std::fs::read(path(name)).expect("the golden file is there"))
}

#[test]
fn the_same_history_still_gives_the_same_bytes() {
    let made = made();
    if std::env::var_os("HOLDFAST_WRITE_GOLDEN").is_some() {
        std::fs::write(path(STORES[STORES.len() - 1]), encode(&made)).expect("writes");
    }
    let golden = golden();
    for (made, golden) in made.iter().zip(&golden) {
        let place = format!("{} block {}", golden.0, golden.1);
        assert_eq!(made, golden, "{place}: the format has changed; raise its version and add a golden file");
    }
    assert_eq!(made.len(), golden.len());
}

#[test]
fn a_store_of_this_format_is_read() {
    STORES.into_iter().for_each(|name| is_read(stored(name)));
}

fn is_read(parts: Vec<Part>) {
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        let directory = disk.directory();
        for number in 0..6 {
            let name = format!("journal/{number:04}");
            directory.open(&name, OpenMode::CreateNew).await.expect("creates");
        }
        for (name, block, data) in parts {
            let file = match directory.open(&name, OpenMode::Existing).await {
                Ok(file) => file,
                Err(_) => directory.open(&name, OpenMode::CreateNew).await.expect("creates"),
            };
            let offset = u64::from(block) * BLOCK_BYTES as u64;
            file.write_at(offset, AlignedBuffer::copy_of(&data), Durability::Durable).await.expect("writes");
        }
        directory.sync().await.expect("syncs");
    });
    let reference = Rc::new(Reference::default());
    *reference.commands.borrow_mut() = history();
    reference.acknowledged.set(5);
    live(&disk, &reference, 2, |replica| async move {
        assert_eq!(replica.data.checkpoint().id.index.0, 4);
        assert_eq!(replica.log.last().map(|id| id.index.0), Some(5));
        Ok(())
    })
    .unwrap_or_else(|why| panic!("{why}"));
}

struct Field {
    offset: usize,
    bytes: Option<usize>,
    text: String,
}

/// The first table of a section of docs/FORMAT.md whose rows have an offset.
fn fields(section: &str) -> Vec<Field> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/FORMAT.md");
    let page = std::fs::read_to_string(page).expect("the page is there");
    let from =
        page.find(&format!("\n## {section}")).unwrap_or_else(|| panic!("there is a section {section}"));
    let rows = page[from + 1..].lines().skip_while(|line| !line.starts_with("| offset")).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let parse = |row: &str| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let offset = cells[0].parse().ok()?;
        Some(Field { offset, bytes: cells[1].parse().ok(), text: cells[2].to_owned() })
    };
    rows.filter_map(parse).collect()
}

fn magics(text: &str) -> Vec<u64> {
    let hex = text.split("`0x").skip(1).filter_map(|rest| rest.split('`').next());
    hex.map(|hex| u64::from_str_radix(hex, 16).expect("a magic is a number")).collect()
}

#[test]
fn the_page_says_where_the_bytes_are() {
    let golden = golden();
    let number = |data: &[u8], field: &Field| {
        let mut bytes = [0; 8];
        let length = field.bytes.expect("a field of fixed size").min(8);
        bytes[..length].copy_from_slice(&data[field.offset..field.offset + length]);
        u64::from_le_bytes(bytes)
    };
    let sections = [
        ("`journal/identity`", "journal/identity"),
        ("Segments", "journal/0000"),
        ("`manifest`", "/manifest"),
        ("`table`", "/table"),
    ];
    for (section, file) in sections {
        let fields = fields(section);
        assert!(fields.len() >= 5, "{section}: {} fields were understood", fields.len());
        for pair in fields.windows(2) {
            let end = pair[0].offset + pair[0].bytes.unwrap_or_default();
            assert!(pair[0].bytes.is_none() || end == pair[1].offset, "{section}: {}", pair[1].text);
        }
        let (_, _, data) = golden.iter().find(|(name, _, _)| name.ends_with(file)).expect("is there");
        assert_eq!(number(data, &fields[0]), magics(&fields[0].text)[0], "{section}");
        let version = number(data, &fields[1]).to_string();
        assert!(fields[1].text.starts_with(&format!("version, {version}")), "{section}: {version}");
    }
    let list = fields("Segments");
    let named = |text: &str| list.iter().find(|field| field.text.contains(text)).expect("the field is there");
    let lists = golden.iter().filter(|(name, _, data)| {
        name == "journal/0000" && data.len() > 96 && magics(&list[0].text).contains(&number(data, &list[0]))
    });
    let lists: Vec<&Part> = lists.collect();
    assert!(lists.len() >= 8);
    for (_, block, data) in lists {
        let is_front = number(data, &list[0]) == magics(&list[0].text)[0];
        let start = number(data, named("first block"));
        let total = number(data, named("blocks of the batch"));
        let copy = number(data, named("blocks of one copy"));
        let expected = if is_front { start } else { start + total - copy };
        assert_eq!(u64::from(*block), expected);
        assert!(number(data, named("was flushed when")) < number(data, named("sequence number; never")));
    }
    let table = fields("`table`");
    let (_, _, page) = golden.iter().find(|(name, _, _)| name.ends_with("/table")).expect("is there");
    assert_eq!(
        number(page, table.iter().find(|field| field.text.starts_with("number")).expect("is there")),
        0
    );
    // Block 3 is data and block 4 zeros, in the first chunk.
    assert_eq!((page[64], page[72]), (1 << 3, 1 << 4));
}
