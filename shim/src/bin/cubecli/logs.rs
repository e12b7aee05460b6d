//! `cubecli cubebox logs`

use std::{fs::File, path::PathBuf, thread, time::Duration};

use containerd_shim_protos::api::Status;
use cube_shim::{
    config::Config,
    errors::chain,
    log::{
        follow::{Wake, Watch},
        locate::{self, Log},
        reader::{Cursor, Position, Segments, Stream},
        since::since,
        tail::tail,
    },
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    args::LogsArgs,
    error::CliError,
    namespace,
    print::{Format, Printer, Source},
    sandboxes,
    task::Tasks,
};

/// Lines printed if nothing else is asked for.
const DEFAULT_TAIL: u64 = 100;

/// The writer of a log makes a record of a write right after it, so that by then it exists.
const RECORD_DELAY: Duration = Duration::from_millis(2);

/// Looks without growth, 500 ms apart, after which the log of a stopped container is complete: what
/// its process left in pipes is drained within 2 s.
const STOPPED_LOOKS: u32 = 6;

/// Which lines of each stream to print.
#[derive(Debug, Clone, Copy)]
enum Range {
    Tail(u64),
    Head(u64),
    All,
}

pub(crate) fn run(config: &Config, args: &LogsArgs, output: File) -> Result<(), CliError> {
    if let Some(pid) = args.pid {
        namespace::enter_mounts_of(pid)?;
    }
    // Every segment is held open, so that rotation takes none away from under the reader.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let log = match args.tpl {
        true => locate::find_template(&config.log.template_dir, &args.id)?,
        false => locate::find(&roots(config)?, args.namespace.as_deref(), &args.id)?,
    };
    // Before the first look at the files: what happens after that look must not go unseen.
    let watch = args.follow.then(|| Watch::new(&log.dir));
    let (mut sources, format) = open(args, &log)?;
    let mut printer = Printer::new(output, format);
    printer.print(&mut sources)?;
    match watch {
        Some(watch) => Follower { config, log, watch, sources, printer, warned: false }.run(),
        None => Ok(()),
    }
}

/// Where logs are: below the configured directory, or in bundles; and where running sandboxes say.
fn roots(config: &Config) -> Result<Vec<PathBuf>, CliError> {
    let dir = &config.log.dir;
    let configured = if dir.as_os_str() == locate::BUNDLE { locate::TASK_DIR.into() } else { dir.clone() };
    let mut roots = vec![configured];
    for sandbox in sandboxes::all(&config.run_dir)? {
        for (name, container) in sandbox.containers() {
            let root = container.log_dir.as_deref().and_then(|dir| locate::root_of(dir, &name));
            roots.extend(root.filter(|root| !roots.contains(root)));
        }
    }
    Ok(roots)
}

fn open(args: &LogsArgs, log: &Log) -> Result<(Vec<Source>, Format), CliError> {
    let streams: &[Stream] = match (args.both, args.stderr) {
        (true, _) => &[Stream::Stdout, Stream::Stderr],
        (_, true) => &[Stream::Stderr],
        _ => &[Stream::Stdout],
    };
    let range = match (args.tail, args.head) {
        (Some(lines), _) => Range::Tail(lines),
        (_, Some(lines)) => Range::Head(lines),
        _ if args.all || args.since.is_some() => Range::All,
        _ => Range::Tail(DEFAULT_TAIL),
    };
    let mut format = Format { timestamps: args.timestamps, ..Format::default() };
    let mut sources = Vec::new();
    let mut found = 0;
    for stream in streams {
        let segments = Segments::open(&log.dir, *stream)?;
        let from = args.since.map_or(Ok(Position::default()), |time| since(&segments, time.0))?;
        let start = match range {
            Range::Tail(lines) => {
                let tail = tail(&segments, from, lines)?;
                found += tail.lines;
                tail.start
            }
            Range::Head(_) | Range::All => from,
        };
        sources.push(Cursor::new(segments, start)?);
    }
    match range {
        Range::Head(lines) => format.limit = Some(lines),
        // The last lines of both streams together are among the last lines of each.
        Range::Tail(lines) if sources.iter().all(Cursor::has_times) => {
            format.skip = found.saturating_sub(lines);
        }
        Range::Tail(_) | Range::All => {}
    }
    Ok((sources.into_iter().map(Source::new).collect(), format))
}

/// Prints what is added to a log.
struct Follower<'a> {
    config: &'a Config,
    log: Log,
    watch: Watch,
    sources: Vec<Source>,
    printer: Printer,
    /// Whether it was told what is in the place of the log.
    warned: bool,
}

impl Follower<'_> {
    fn run(mut self) -> Result<(), CliError> {
        let tasks = Tasks::new()?;
        let mut quiet_looks_left = STOPPED_LOOKS;
        while !self.printer.is_done() {
            let wake = self.watch.wait(&self.log.dir, self.printer.output()).map_err(CliError::Wait)?;
            // Asked before the last look, so that nothing is written after that.
            let life = match wake {
                Wake::ReaderGone => return Ok(()),
                Wake::Quiet | Wake::Gone => life(self.config, &tasks, &self.log)?,
                Wake::Changed => Life::Running,
            };
            if self.look()? > 0 {
                quiet_looks_left = STOPPED_LOOKS;
                continue;
            }
            if wake == Wake::Gone {
                match self.find_again()? {
                    Found::This => continue,
                    Found::Another => return Ok(()),
                    Found::None => {}
                }
            }
            match life {
                Life::Deleted => return Ok(()),
                Life::Stopped => quiet_looks_left -= 1,
                Life::Running => quiet_looks_left = STOPPED_LOOKS,
            }
            if quiet_looks_left == 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Looks for the log where it was before its directory was removed or renamed: its writer makes another as
    /// soon as it has something to write. If it is there, it is followed from now on.
    fn find_again(&mut self) -> Result<Found, CliError> {
        let dir = match self.log.open_again() {
            Ok(Some(dir)) => dir,
            Ok(None) => return Ok(Found::None),
            // A link, say: its writer waits for that to go, and so do we.
            Err(e) => {
                if !std::mem::replace(&mut self.warned, true) {
                    eprintln!("cubecli: {}", chain(&e));
                }
                return Ok(Found::None);
            }
        };
        let watch = Watch::new(&dir);
        for source in &self.sources {
            match source.goes_on_in(&dir)? {
                Some(true) => {
                    (self.watch, self.log.dir) = (watch, dir);
                    return Ok(Found::This);
                }
                Some(false) => return Ok(Found::Another),
                None => {}
            }
        }
        Ok(Found::None)
    }

    /// Prints what was added since the last look; the number of bytes.
    fn look(&mut self) -> Result<u64, CliError> {
        for source in &mut self.sources {
            source.refresh(&self.log.dir)?;
        }
        if self.printer.needs_times() || self.sources.len() > 1 {
            thread::sleep(RECORD_DELAY);
        }
        self.printer.print(&mut self.sources)
    }
}

/// What is where a log was.
enum Found {
    /// The same log.
    This,
    /// That of another container.
    Another,
    /// None, or none yet.
    None,
}

/// How it is with a container whose log is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Running,
    Stopped,
    Deleted,
}

fn life(config: &Config, tasks: &Tasks, log: &Log) -> Result<Life, CliError> {
    let Some((sandbox, container)) = sandboxes::that_logs(&config.run_dir, log)? else {
        return Ok(Life::Deleted);
    };
    match tasks.state(&sandbox.dir.path().join("shim.sock"), &container) {
        Ok(task) if task.status == Status::STOPPED => Ok(Life::Stopped),
        // A shim that is gone or stuck is not the end of its container.
        _ => Ok(Life::Running),
    }
}
