//! Figures that have a budget or a rival, measured in one run and printed beside it: `make bench`.
//!
//! Times are never a failure, for they are the machine's as well; sizes are.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark fails loudly")]

mod cost;
mod create;
mod flow;
mod growth;
mod latency;
mod memory;
mod pause;
mod pipeline;
mod polling;
mod runc;
mod snapshot;
mod steps;
mod table;
mod throughput;

use std::{env, path::Path, process::ExitCode};

use cube_tests::needs::Backend;

use crate::table::Table;

/// Where the figures go for machines to read.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench.json");

/// A part of the table, chosen by name on the command line; all without.
type Part = (&'static str, fn(&mut Table, &[Backend]));

const PARTS: [Part; 8] = [
    ("throughput", throughput_everywhere),
    ("latency", |table, _| latency::measure(table)),
    ("runc", |table, _| runc::measure(table)),
    ("create", |table, _| create::measure(table)),
    ("pause", pause::measure),
    ("snapshot", snapshot::measure),
    ("memory", memory::measure),
    ("growth", |table, _| growth::measure(table)),
];

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    if let Some((first, role)) = args.split_first()
        && first == pipeline::ROLE
    {
        pipeline::play(role);
        return ExitCode::SUCCESS;
    }
    if let Some(unknown) = args.iter().find(|arg| PARTS.iter().all(|(name, _)| name != arg)) {
        eprintln!("there is no part {unknown:?}, but {:?}", PARTS.map(|(name, _)| name));
        return ExitCode::from(64);
    }
    if let Some(reason) = Backend::Process.missing() {
        eprintln!("nothing can be measured here: {reason}");
        return ExitCode::FAILURE;
    }
    let mut table = Table::default();
    let backends = available(&mut table);
    for (name, measure) in PARTS {
        if args.is_empty() || args.iter().any(|arg| arg == name) {
            measure(&mut table, &backends);
        }
    }
    table.print();
    if args.is_empty() {
        table.save(Path::new(FILE)).unwrap();
    }
    if table.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn available(table: &mut Table) -> Vec<Backend> {
    let mut backends = vec![Backend::Process];
    for backend in [Backend::Qemu, Backend::CloudHypervisor] {
        match backend.missing() {
            Some(reason) => table.note(format!("{}: not measured: {reason}", backend.name())),
            None => backends.push(backend),
        }
    }
    backends
}

fn throughput_everywhere(table: &mut Table, backends: &[Backend]) {
    throughput::measure(table);
    for backend in backends.iter().filter(|backend| backend.is_vm()) {
        throughput::measure_emulated(table, *backend);
    }
}
