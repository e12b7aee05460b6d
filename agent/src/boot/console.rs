//! What an operator sees of the guest: log lines, and the one line that says why it died.

use std::{fs::OpenOptions, io::Write, panic, process};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::time;

use super::power;

/// Sends log lines to stderr, which is the console in a guest, with the seconds since the start.
pub fn init_logging(level: LevelFilter) {
    let result = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_timer(time::uptime())
        .with_target(false)
        .with_ansi(false)
        // On the `process` backend stderr is a pipe to the shim. When that has died, a complaint about a
        // line that could not be written would be one more, and a panic: the output that the agent still
        // holds would die with it.
        .log_internal_errors(false)
        .try_init();
    if let Err(error) = result {
        eprintln!("cube-agent: cannot set up logging: {error}");
    }
}

/// Makes a panic of PID 1 end the guest with one clear line instead of a hang: a panic that aborts
/// becomes a kernel panic, which without `panic=` on the command line halts for ever.
pub fn power_off_on_panic() {
    panic::set_hook(Box::new(|panic| fatal(&panic.to_string())));
}

/// Ends the guest because PID 1 cannot go on. File systems are not synced: the cause may be one of
/// them, and this must not hang.
pub fn fatal(reason: &str) -> ! {
    let line = format!("cube-agent: fatal: {}\n", reason.replace('\n', " "));
    // The console is what the host captures; the kernel's ring is what a crash dump shows. Priority 6
    // keeps the kernel from printing the line a second time under `quiet`.
    for (path, line) in [("/dev/console", &line), ("/dev/kmsg", &format!("<6>{line}"))] {
        if let Ok(mut file) = OpenOptions::new().write(true).open(path) {
            // Nobody is left to tell if this fails.
            let _ = file.write_all(line.as_bytes());
        }
    }
    power::off();
    // Only where the kernel cannot power off: the end of PID 1 is a kernel panic, which
    // `panic=-1` turns into a reset.
    process::abort();
}
