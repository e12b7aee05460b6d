//! What somebody at a terminal sees of work that takes longer than a second. Scripts see nothing.

use std::{
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};

use tokio::time::interval;

/// Awaits `work`, which is `what`.
pub(crate) async fn during<T>(what: &str, work: impl Future<Output = T>) -> T {
    let (begun, terminal) = (Instant::now(), stderr().is_terminal());
    let mut ticks = interval(Duration::from_secs(1));
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => {
                if terminal {
                    eprint!("\r\x1b[K");
                }
                return done;
            }
            _ = ticks.tick(), if terminal => match begun.elapsed().as_secs() {
                0 => {}
                seconds => eprint!("\r{what}, {seconds} s"),
            },
        }
    }
}
