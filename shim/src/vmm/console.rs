//! What a program or a guest printed, the newest part of it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes kept of a guest's serial console.
pub(crate) const GUEST_CONSOLE: usize = 1 << 20;

/// Bytes kept of what a program on the host prints.
pub(crate) const PROGRAM_OUTPUT: usize = 64 << 10;

/// Lines, and bytes of them, that an error message quotes.
const QUOTED_LINES: usize = 12;
const QUOTED_BYTES: usize = 8192;

/// How the Linux kernel begins its last words. What follows is a stack that explains little.
const PANIC: &str = "Kernel panic - not syncing";

/// The last bytes of an endless output. Clones share them. Memory is taken as it fills.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    bytes: Arc<Mutex<VecDeque<u8>>>,
    capacity: usize,
}

impl Ring {
    pub(crate) fn new(capacity: usize) -> Ring {
        Ring { bytes: Arc::default(), capacity }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, new: &[u8]) {
        let new = &new[new.len().saturating_sub(self.capacity)..];
        let mut bytes = self.lock();
        let excess = (bytes.len() + new.len()).saturating_sub(self.capacity);
        bytes.drain(..excess);
        bytes.extend(new);
    }

    /// Takes what comes until the other end closes. A reader that stopped would stop the writer:
    /// on a serial console, that is a virtual CPU.
    pub(crate) async fn fill_from(self, mut source: impl AsyncRead + Unpin) {
        let mut buffer = vec![0; 4096];
        while let Ok(count @ 1..) = source.read(&mut buffer).await {
            self.push(&buffer[..count]);
        }
    }

    /// The last lines, fit for a message; of a kernel that panicked, those up to the panic. Control characters are replaced: a guest wrote them, and
    /// an operator's terminal may show them.
    pub(crate) fn last_lines(&self) -> String {
        let tail: Vec<u8> = {
            let bytes = self.lock();
            bytes.range(bytes.len().saturating_sub(QUOTED_BYTES)..).copied().collect()
        };
        let text = String::from_utf8_lossy(&tail);
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        let end = lines.iter().rposition(|line| line.contains(PANIC)).map_or(lines.len(), |line| line + 1);
        let last = &lines[end.saturating_sub(QUOTED_LINES)..end];
        last.join("\n").replace(|c: char| c.is_control() && c != '\n' && c != '\t', "\u{fffd}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_bytes_are_kept() {
        let ring = Ring::new(8);
        ring.push(b"abcdef");
        ring.push(b"ghij");
        assert_eq!(ring.last_lines(), "cdefghij");
        ring.push(b"0123456789abcdef");
        assert_eq!(ring.last_lines(), "89abcdef");
    }

    #[test]
    fn the_last_lines_are_quoted_without_blank_ones() {
        let ring = Ring::new(GUEST_CONSOLE);
        for n in 0..100 {
            ring.push(format!("line {n}\r\n\r\n").as_bytes());
        }
        let lines = ring.last_lines();
        assert!(lines.starts_with("line 88\n") && lines.ends_with("line 99"), "{lines}");
    }

    #[test]
    fn of_a_kernel_that_panicked_the_cause_is_quoted() {
        let ring = Ring::new(GUEST_CONSOLE);
        ring.push(
            b"cube-agent: out of ideas\n[    4.2] Kernel panic - not syncing: Attempted to kill init!\n",
        );
        for n in 0..40 {
            ring.push(format!("[    4.3]  function_{n}+0x1/0x2\n").as_bytes());
        }
        let lines = ring.last_lines();
        assert!(lines.starts_with("cube-agent: out of ideas\n") && lines.ends_with("kill init!"), "{lines}");
    }

    #[test]
    fn what_a_guest_prints_cannot_drive_a_terminal() {
        let ring = Ring::new(64);
        ring.push(b"\x1b[2Jhello\x07\xff");
        assert_eq!(ring.last_lines(), "\u{fffd}[2Jhello\u{fffd}\u{fffd}");
    }

    #[tokio::test]
    async fn a_line_without_end_is_cut() {
        let ring = Ring::new(GUEST_CONSOLE);
        ring.clone().fill_from(&vec![b'x'; 3 << 20][..]).await;
        assert_eq!(ring.lock().len(), GUEST_CONSOLE);
        assert_eq!(ring.last_lines().len(), QUOTED_BYTES);
    }
}
