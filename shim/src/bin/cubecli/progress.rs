//! What somebody at a terminal sees of work that takes longer than a second. Scripts see nothing.

use std::{
    io::{self, IsTerminal, stderr},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is done before that needs no bar.
const DELAY: Duration = Duration::from_secs(1);

/// How often it is drawn anew.
const TICK: Duration = Duration::from_millis(200);

const UNKNOWN: &str = "{spinner} {msg}, {elapsed}";
const BYTES: &str = "{msg} [{bar:30}] {percent}% of {total_bytes}, {binary_bytes_per_sec}, {eta} left";

/// Work that is going on. It is gone from the terminal when this is dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Shows the bar when it is time, unless this is dropped before.
    shown: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Work of which it is not known how much there is; `what` is "writing the snapshot", for example.
    pub(crate) fn of(what: impl Into<String>) -> Progress {
        let bar = ProgressBar::hidden();
        bar.set_style(style(UNKNOWN));
        bar.set_message(what.into());
        let shown = stderr().is_terminal().then(|| {
            let (stop, stopped) = channel();
            let bar = bar.clone();
            let show = move || {
                if stopped.recv_timeout(DELAY) == Err(RecvTimeoutError::Timeout) {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.enable_steady_tick(TICK);
                }
            };
            (stop, std::thread::spawn(show))
        });
        Progress { bar, shown }
    }

    /// Says what is done now.
    pub(crate) fn now(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }

    /// Says that `done` of `total` bytes are done.
    pub(crate) fn bytes(&self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_style(style(BYTES));
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }

    /// As [`Progress::bytes`], for work that may be ended; this does not.
    pub(crate) fn told(&self, done: u64, total: u64) -> io::Result<()> {
        self.bytes(done, total);
        Ok(())
    }

    /// Runs what writes to the terminal itself.
    pub(crate) fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, shown)) = self.shown.take() {
            drop(stop);
            // It has shown the bar, or it never will.
            let _ = shown.join();
        }
        self.bar.finish_and_clear();
    }
}

/// Awaits `work`, which is `what`.
pub(crate) async fn during<T>(what: &str, work: impl Future<Output = T>) -> T {
    let _progress = Progress::of(what);
    work.await
}

fn style(template: &str) -> ProgressStyle {
    // The templates are those above, and a test reads them.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_can_be_read() {
        for template in [UNKNOWN, BYTES] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[test]
    fn what_ends_early_waits_for_nothing() {
        let begun = std::time::Instant::now();
        let progress = Progress::of("nothing");
        progress.bytes(1, 2);
        progress.now("still nothing");
        assert_eq!(progress.aside(|| 7), 7);
        drop(progress);
        assert!(begun.elapsed() < DELAY);
    }
}
