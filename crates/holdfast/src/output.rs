//! How results and errors are shown.

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table};
use holdfast_types::UserError;
use serde::Serialize;
use serde_json::{Value, json};

/// The format of results.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Format {
    /// A table for people.
    Table,
    /// The same with more columns.
    Wide,
    /// JSON for scripts.
    Json,
    /// YAML.
    Yaml,
}

/// Where results go.
pub struct Output {
    format: Format,
}

/// Texts that are absent rather than empty.
const NULL_IF_EMPTY: &[&str] = &[
    "attached_to",
    "leader",
    "frontend",
    "device",
    "healed_by",
    "source_volume",
    "source_snapshot",
    "filled_by",
    "recovery",
    "refused",
];

fn tidy(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (key, field) in fields.iter_mut() {
                if NULL_IF_EMPTY.contains(&key.as_str()) && field == "" {
                    *field = Value::Null;
                }
                tidy(field);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

impl Output {
    /// In this format.
    pub fn new(format: Format) -> Self {
        Self { format }
    }
    /// Whether it is for people.
    pub fn is_human(&self) -> bool {
        matches!(self.format, Format::Table | Format::Wide)
    }
    /// Whether there is room for more columns.
    pub fn wide(&self) -> bool {
        self.format == Format::Wide
    }

    /// Shows a result: as data, or as the text that `human` makes.
    pub fn show(&self, result: &impl Serialize, human: impl FnOnce() -> String) {
        let data = || {
            let mut value = serde_json::to_value(result).unwrap_or(Value::Null);
            tidy(&mut value);
            value
        };
        match self.format {
            Format::Table | Format::Wide => println!("{}", human()),
            Format::Json => println!("{:#}", data()),
            Format::Yaml => print!("{}", serde_yaml::to_string(&data()).unwrap_or_default()),
        }
    }

    /// Tells an error.
    pub fn error(&self, error: &UserError) {
        if self.format == Format::Json {
            let code = serde_json::to_value(error.code).unwrap_or(Value::Null);
            let shown = json!({"error": {"code": code, "message": error.message, "hint": error.hint}});
            eprintln!("{shown}");
            return;
        }
        eprintln!("error: {}", error.message);
        if !error.hint.is_empty() {
            eprintln!("  {}", error.hint);
        }
    }
}

/// A table with these columns.
pub fn table(columns: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    *table.style_mut() = comfy_table::presets::NOTHING;
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|column| column.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}
