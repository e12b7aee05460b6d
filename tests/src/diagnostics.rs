//! What a failed test tells: logs, consoles and processes of its lab.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
};

use crate::leftovers;

/// Labs in use: the name of the thread, which is that of the test, and the directory.
static LABS: Mutex<Vec<(String, PathBuf)>> = Mutex::new(Vec::new());

/// Most bytes shown of one file, from its end.
const SHOWN: usize = 12 << 10;

/// Remembers that the test of this thread uses `dir`.
pub fn register(dir: &Path) {
    let test = thread::current().name().unwrap_or_default().to_owned();
    LABS.lock().unwrap().push((test, dir.to_owned()));
}

/// Forgets `dir`.
pub fn unregister(dir: &Path) {
    LABS.lock().unwrap().retain(|(_, used)| used != dir);
}

/// Shows everything about the labs of a test that took too long, and kills their processes.
pub fn dump_and_kill(test: &str) {
    let labs = LABS.lock().unwrap().clone();
    for (_, dir) in labs.iter().filter(|(user, _)| user == test) {
        dump(dir);
        leftovers::kill_processes(dir);
    }
}

/// Writes to stderr what may explain why the test that uses `dir` failed.
pub fn dump(dir: &Path) {
    let mut report = format!("---- what is known of {}\n", dir.display());
    for process in leftovers::processes(dir) {
        report += &format!("process {process}\n");
    }
    let mut files = Vec::new();
    for below in ["run", "state", "direct"] {
        files_below(&dir.join(below), 4, &mut files);
    }
    files.push(dir.join("config.toml"));
    files.push(dir.join("containerd.log"));
    for file in files {
        let Ok(bytes) = fs::read(&file) else { continue };
        let tail = &bytes[bytes.len().saturating_sub(SHOWN)..];
        let text = String::from_utf8_lossy(tail);
        report += &format!("---- {} ({} bytes)\n{text}\n", file.display(), bytes.len());
    }
    eprintln!("{report}----");
}

/// Logs, consoles and state files; neither root file systems nor FIFOs, which would block.
fn files_below(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let name = entry.file_name();
        if kind.is_dir() && depth > 0 && name != "rootfs" && name != "shared" {
            files_below(&entry.path(), depth - 1, found);
        } else if kind.is_file() {
            let suffix = entry.path().extension().map(|e| e.to_string_lossy().into_owned());
            if matches!(suffix.as_deref(), Some("log" | "json" | "txt" | "console")) {
                found.push(entry.path());
            }
        }
    }
}
