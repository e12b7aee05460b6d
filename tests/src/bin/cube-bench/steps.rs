//! The steps of the shim's work, as its own debug lines tell them.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
    thread::{self, JoinHandle},
};

use nix::{sys::stat::Mode, unistd::mkfifo};

/// The shim says when a step is done, and how long it took, in a line with this field.
const FIELD: &str = " took_us=";

/// A step's name, and how many milliseconds it took.
pub(crate) type Step = (String, f64);

/// Makes the FIFO that the shim of `bundle` logs to, reads it until the shim ends, and keeps the steps.
pub(crate) fn read(bundle: &Path) -> JoinHandle<Vec<Step>> {
    let fifo = bundle.join("log");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    // So that opening it does not wait, and there is no end before the shim's.
    let keep = File::options().read(true).write(true).open(&fifo).unwrap();
    let log = BufReader::new(File::open(fifo).unwrap());
    thread::spawn(move || {
        let mut steps = Vec::new();
        for line in log.lines().map(Result::unwrap) {
            if let Some((_, us)) = line.split_once(FIELD) {
                let message = line.split_once("msg=\"").unwrap().1.split_once('"').unwrap().0;
                let us: f64 = us.split(' ').next().unwrap().parse().unwrap();
                steps.push((message.to_owned(), us / 1e3));
            }
            if line.contains("shim ends") {
                break;
            }
        }
        drop(keep);
        steps
    })
}
