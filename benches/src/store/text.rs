//! Tables of Markdown.

use crate::load::Figures;

/// One table with its title.
pub struct Table {
    title: String,
    rows: Vec<Vec<String>>,
    notes: Vec<String>,
}

impl Table {
    /// With its columns.
    pub fn new(title: &str, columns: &[&str]) -> Self {
        let head = columns.iter().map(|column| (*column).to_owned()).collect();
        Self { title: title.into(), rows: vec![head], notes: Vec::new() }
    }
    /// Another row; shown at once, too.
    pub fn row(&mut self, cells: Vec<String>) {
        println!("  {}", cells.join(" | "));
        self.rows.push(cells);
    }
    /// A sentence below it.
    pub fn note(&mut self, text: String) {
        self.notes.push(text);
    }
    /// As Markdown.
    pub fn markdown(&self) -> String {
        let mut out = format!("## {}\n\n", self.title);
        for (n, cells) in self.rows.iter().enumerate() {
            out += &format!("| {} |\n", cells.join(" | "));
            if n == 0 {
                out += &format!("|{}\n", "---|".repeat(cells.len()));
            }
        }
        for note in &self.notes {
            out += &format!("\n{note}\n");
        }
        out
    }
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Medians of the rounds' p50, p99 and p99.9.
pub fn micros<'f>(rounds: impl Iterator<Item = &'f Figures> + Clone) -> String {
    let of = |value: fn(&Figures) -> f64| median(rounds.clone().map(value).collect());
    let digits = |value: f64| if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") };
    [of(|f| f.p50_us), of(|f| f.p99_us), of(|f| f.p999_us)].map(digits).join(" / ")
}

/// So many times the floor.
pub fn ratio(value: f64) -> String {
    format!("{value:.2} ×")
}
