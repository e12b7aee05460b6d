//! Figures, what they may be, and the table and file that they end up in.

use std::{fs, io, path::Path};

use serde_json::{Value, json};

/// What was measured, once or several times.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) const fn new() -> Samples {
        Samples(Vec::new())
    }

    pub(crate) fn push(&mut self, sample: f64) {
        self.0.push(sample);
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The smallest sample that at least this share of all does not exceed; NaN without samples.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    /// Each sample divided by the one of the same round: what disturbs a round disturbs both.
    pub(crate) fn over(&self, other: &Samples) -> Samples {
        self.0.iter().zip(&other.0).map(|(mine, others)| mine / others).collect()
    }

    /// Each sample less the one of the same round, which is a part of it.
    pub(crate) fn without(&self, part: &Samples) -> Samples {
        assert_eq!(self.0.len(), part.0.len(), "a round is missing");
        self.0.iter().zip(&part.0).map(|(mine, part)| mine - part).collect()
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<T: IntoIterator<Item = f64>>(samples: T) -> Samples {
        Samples(samples.into_iter().collect())
    }
}

impl From<f64> for Samples {
    fn from(sample: f64) -> Samples {
        Samples(vec![sample])
    }
}

/// What a figure's median is to be.
#[derive(Debug, Clone, Copy)]
enum Budget {
    AtMost(f64),
    AtLeast(f64),
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Figure {
    group: &'static str,
    name: String,
    unit: &'static str,
    samples: Samples,
    budget: Option<Budget>,
    /// Whether a miss fails the build: sizes are the same on every machine, times are not.
    binding: bool,
}

impl Figure {
    pub(crate) fn at_most(&mut self, limit: f64) -> &mut Figure {
        self.budget = Some(Budget::AtMost(limit));
        self
    }

    pub(crate) fn at_least(&mut self, limit: f64) -> &mut Figure {
        self.budget = Some(Budget::AtLeast(limit));
        self
    }

    pub(crate) fn binding(&mut self) -> &mut Figure {
        self.binding = true;
        self
    }

    fn is_met(&self) -> Option<bool> {
        let median = self.samples.median();
        self.budget.map(|budget| match budget {
            Budget::AtMost(limit) => median <= limit,
            Budget::AtLeast(limit) => median >= limit,
        })
    }

    fn verdict(&self) -> String {
        let Some((budget, met)) = self.budget.zip(self.is_met()) else { return String::new() };
        let bound = match budget {
            Budget::AtMost(limit) => format!("<= {limit}"),
            Budget::AtLeast(limit) => format!(">= {limit}"),
        };
        format!("{bound:<8} {}", if met { "met" } else { "MISSED" })
    }

    fn json(&self) -> Value {
        let (kind, limit) = match self.budget {
            Some(Budget::AtMost(limit)) => (Some("at most"), Some(limit)),
            Some(Budget::AtLeast(limit)) => (Some("at least"), Some(limit)),
            None => (None, None),
        };
        json!({
            "group": self.group, "figure": self.name, "unit": self.unit,
            "median": self.samples.median(), "samples": self.samples.0,
            "budget": limit, "budget_is": kind, "met": self.is_met(),
        })
    }
}

/// All figures of one run.
#[derive(Debug, Default)]
pub(crate) struct Table {
    group: &'static str,
    figures: Vec<Figure>,
    notes: Vec<String>,
}

impl Table {
    /// Names what the figures that follow are about, and says that it is being measured.
    pub(crate) fn group(&mut self, name: &'static str) {
        eprintln!("bench: {name}");
        self.group = name;
    }

    pub(crate) fn add(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        samples: impl Into<Samples>,
    ) -> &mut Figure {
        let (name, samples) = (name.into(), samples.into());
        self.figures.push(Figure { group: self.group, name, unit, samples, budget: None, binding: false });
        let last = self.figures.len() - 1;
        &mut self.figures[last]
    }

    /// Says below the table what was not measured, and why.
    pub(crate) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    pub(crate) fn print(&self) {
        println!("{:<58} {:>10} {:>21} {:>3}  budget", "median of n, and the range", "", "", "n");
        let mut group = "";
        for figure in &self.figures {
            if figure.group != group {
                group = figure.group;
                println!("\n{group}");
            }
            let Figure { name, unit, samples, .. } = figure;
            let range = match samples.0.len() {
                1 => String::new(),
                _ => format!("{} .. {}", short(samples.quantile(0.0)), short(samples.quantile(1.0))),
            };
            let line = format!(
                "  {name:<48} {:>9} {unit:<8} {range:>19} {:>3}  {}",
                short(samples.median()),
                samples.0.len(),
                figure.verdict()
            );
            println!("{}", line.trim_end());
        }
        self.notes.iter().for_each(|note| println!("\n{note}"));
    }

    pub(crate) fn save(&self, file: &Path) -> io::Result<()> {
        let figures: Vec<Value> = self.figures.iter().map(Figure::json).collect();
        let all = json!({ "figures": figures, "notes": self.notes });
        fs::write(file, format!("{all:#}\n"))
    }

    /// Whether every binding budget is met.
    pub(crate) fn holds(&self) -> bool {
        self.figures.iter().all(|figure| !figure.binding || figure.is_met() != Some(false))
    }
}

/// Three significant digits, roughly.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
