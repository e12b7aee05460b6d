//! The shim's own log lines, which containerd reads from the `log` FIFO in the bundle.
//!
//! containerd copies them to its own log as they are, so they have the form of its lines. A FIFO
//! that is full or has no reader costs a line and never makes the shim wait.

use std::{
    fmt,
    fs::File,
    io::{self, Write},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use tracing::{Event, Level, Subscriber, field::Field, field::Visit};
use tracing_subscriber::{
    filter::LevelFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, format::Writer},
    registry::LookupSpan,
};

/// Sends `tracing` and `log` records of this process to the FIFO `path`. Panics go there as well:
/// nobody reads the daemon's stderr.
pub fn init(path: &Path, debug: bool) {
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    // The loggers of ttrpc and others report each closed connection as an error.
    let targets = tracing_subscriber::filter::Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("cube", level)
        .with_target("containerd_shim_cube", level)
        .with_target("ttrpc", LevelFilter::OFF);
    use tracing_subscriber::{Layer, layer::SubscriberExt, util::SubscriberInitExt};
    let layer = tracing_subscriber::fmt::layer()
        .event_format(Line)
        .with_writer(Fifo { path: path.into(), open: Mutex::new(None) })
        .with_filter(targets);
    // Fails only if a subscriber is set already, which then keeps working.
    let _ = tracing_subscriber::registry().with(layer).try_init();
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
}

/// Bytes of a message, of one field, and of all fields, at most. A line goes to the FIFO in one piece,
/// or not at all, only up to PIPE_BUF (4096, pipe(7)), and guests have a say in how long it is.
const MESSAGE_MAX: usize = 2400;
const VALUE_MAX: usize = 500;
const OTHERS_MAX: usize = 1200;

/// `time="..." level=info msg="..." key=value`, as containerd's logrus writes it.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        write!(
            out,
            "time=\"{:.9}\" level={level} msg={}",
            jiff::Timestamp::now(),
            quoted(&fields.message, MESSAGE_MAX)
        )?;
        writeln!(out, " runtime=io.containerd.cube.v2{}", fields.others)
    }
}

/// `text` in quotes, control characters escaped; of one that is too long, its beginning and its end.
fn quoted(text: &str, max: usize) -> String {
    let escaped: Vec<String> = text.chars().map(escape).collect();
    let length = |text: &String| text.len();
    if escaped.iter().map(length).sum::<usize>() <= max {
        return format!("\"{}\"", escaped.concat());
    }
    let fits = |used: &mut usize, text: &&String| {
        *used += text.len();
        (*used <= max / 2).then(|| (*text).clone())
    };
    let head: String = escaped.iter().scan(0, |used, text| fits(used, &text)).collect();
    let mut tail: Vec<String> = escaped.iter().rev().scan(0, |used, text| fits(used, &text)).collect();
    tail.reverse();
    format!("\"{head} … {}\"", tail.concat())
}

fn escape(c: char) -> String {
    // As `Debug` of a string has it.
    if c == '\'' { c.into() } else { c.escape_debug().collect() }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value, quoted(value, VALUE_MAX));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        // Numbers and words stand bare, everything else is quoted once.
        let bare = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
        let is_quoted = text.starts_with('"') && !text.contains(char::is_control);
        let value = if (bare || is_quoted) && text.len() <= VALUE_MAX {
            text.clone()
        } else {
            quoted(&text, VALUE_MAX)
        };
        self.put(field, &text, value);
    }
}

impl Fields {
    fn put(&mut self, field: &Field, plain: &str, value: String) {
        match field.name() {
            "message" => self.message = plain.into(),
            // What the bridge from the `log` crate adds says nothing to an operator.
            name if name.starts_with("log.") => {}
            name if self.others.len() + name.len() + value.len() > OTHERS_MAX => {}
            name => self.others.push_str(&format!(" {name}={value}")),
        }
    }
}

/// Opened at the first line, and again after containerd has restarted.
struct Fifo {
    path: PathBuf,
    open: Mutex<Option<File>>,
}

impl<'a> MakeWriter<'a> for Fifo {
    type Writer = &'a Fifo;

    fn make_writer(&'a self) -> &'a Fifo {
        self
    }
}

impl Write for &Fifo {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..2 {
            if open.is_none() {
                *open = open_fifo(&self.path);
            }
            match open.as_ref().map(|mut file| file.write(line)) {
                Some(Err(e)) if e.kind() == io::ErrorKind::BrokenPipe => *open = None,
                _ => break,
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// ENXIO (no reader) and ENOENT (bundle gone) are both "nobody listens".
fn open_fifo(path: &Path) -> Option<File> {
    let file =
        File::options().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path).ok()?;
    file.metadata().ok()?.file_type().is_fifo().then_some(file)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn fifo() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).unwrap();
        (dir, path)
    }

    fn reader(path: &Path) -> File {
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
    }

    #[test]
    fn what_a_guest_says_stays_one_line_of_bounded_length() {
        assert_eq!(quoted("it's a\n\"line\"\x1b[2J", 100), r#""it's a\n\"line\"\u{1b}[2J""#);
        let long = format!("begins {} ends", "\x1b".repeat(100_000));
        let cut = quoted(&long, MESSAGE_MAX);
        assert!(
            cut.starts_with("\"begins ") && cut.ends_with(" ends\"") && cut.len() < MESSAGE_MAX + 16,
            "{cut}"
        );
    }

    #[test]
    fn a_fifo_that_nobody_reads_or_that_is_full_never_blocks() {
        let (_dir, path) = fifo();
        let log = Fifo { path: path.clone(), open: Mutex::new(None) };
        (&log).write_all(b"nobody reads this\n").unwrap();
        let _idle = reader(&path);
        (0..100).for_each(|_| (&log).write_all(&[b'x'; 4096]).unwrap());
    }

    #[test]
    fn lines_go_on_after_the_reader_was_replaced() {
        let (_dir, path) = fifo();
        let log = Fifo { path: path.clone(), open: Mutex::new(None) };
        let first = reader(&path);
        (&log).write_all(b"one\n").unwrap();
        drop(first);
        (&log).write_all(b"nobody reads this\n").unwrap();
        let mut second = reader(&path);
        (&log).write_all(b"two\n").unwrap();
        let mut text = [0; 16];
        let len = second.read(&mut text).unwrap();
        assert_eq!(&text[..len], b"two\n");
    }
}
