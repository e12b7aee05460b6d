//! What the stand-in pretends to be: processes that run and exit.

use std::{
    collections::HashMap,
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cube_protocol::guest::{Event, TaskExit, event};

use crate::control::Attack;

/// A process by its container and exec id.
pub(crate) type Id = (String, String);

/// The state that all connections share.
pub(crate) struct World {
    pub(crate) attack: Attack,
    state: PathBuf,
    started: AtomicBool,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    processes: HashMap<Id, Process>,
    events: Vec<Event>,
    counts: HashMap<String, (u64, Option<File>)>,
}

#[derive(Default)]
struct Process {
    args: Vec<String>,
    started: bool,
    exited: bool,
    /// Connections per stream so far.
    opened: HashMap<i32, u64>,
}

impl World {
    pub(crate) fn new(attack: Attack, state: PathBuf) -> World {
        World {
            attack,
            state,
            started: AtomicBool::new(false),
            inner: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// From here on the attack is under way.
    pub(crate) fn start(&self) {
        self.started.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    pub(crate) fn has_started(&self) -> bool {
        self.started.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, id: Id, args: Vec<String>) {
        self.inner.lock().unwrap().processes.insert(id, Process { args, ..Process::default() });
    }

    /// Arguments of a process; empty for one that does not exist.
    pub(crate) fn args(&self, id: &Id) -> Vec<String> {
        self.inner.lock().unwrap().processes.get(id).map(|process| process.args.clone()).unwrap_or_default()
    }

    /// Counts a connection of a stream, and gives how many came before it.
    pub(crate) fn opened(&self, id: &Id, stream: i32) -> u64 {
        let mut inner = self.inner.lock().unwrap();
        let process = inner.processes.entry(id.clone()).or_default();
        let count = process.opened.entry(stream).or_default();
        *count += 1;
        *count - 1
    }

    /// The process exits, once.
    pub(crate) fn exit(&self, id: &Id, status: u32) {
        let mut inner = self.inner.lock().unwrap();
        let Some(process) = inner.processes.get_mut(id).filter(|process| !process.exited) else { return };
        process.exited = true;
        let sequence = inner.events.len() as u64 + 1;
        let (container_id, exec_id) = id.clone();
        let exit = TaskExit {
            container_id,
            exec_id,
            pid: 2,
            exit_status: status,
            exited_at_ns: now_ns(),
            ..Default::default()
        };
        let kind = Some(event::Kind::Exit(exit));
        inner.events.push(Event { sequence, kind, ..Default::default() });
        self.changed.notify_all();
    }

    /// A process runs from now on.
    pub(crate) fn run(&self, id: &Id) {
        if let Some(process) = self.inner.lock().unwrap().processes.get_mut(id) {
            process.started = true;
        }
        self.changed.notify_all();
    }

    /// Waits for the start of a process.
    pub(crate) fn wait_start(&self, id: &Id) {
        let inner = self.inner.lock().unwrap();
        let waits = |inner: &mut Inner| inner.processes.get(id).is_some_and(|process| !process.started);
        drop(self.changed.wait_while(inner, waits).unwrap());
    }

    /// Waits for the exit of a process.
    pub(crate) fn wait_exit(&self, id: &Id) {
        let inner = self.inner.lock().unwrap();
        let running = |inner: &mut Inner| inner.processes.get(id).is_some_and(|process| !process.exited);
        drop(self.changed.wait_while(inner, running).unwrap());
    }

    /// The events after number `after`, as soon as there are any or the attack begins.
    pub(crate) fn events_after(&self, after: u64, limit: Duration) -> Vec<Event> {
        let attacks = matches!(self.attack, Attack::Events(_));
        let later = |inner: &Inner| -> Vec<Event> {
            inner.events.iter().filter(|event| event.sequence > after).cloned().collect()
        };
        let waiting = |inner: &mut Inner| later(inner).is_empty() && !(attacks && self.has_started());
        let inner = self.inner.lock().unwrap();
        let (inner, _) = self.changed.wait_timeout_while(inner, limit, waiting).unwrap();
        later(&inner)
    }

    /// Counts something, for the test to read in the file `name` of the state directory.
    pub(crate) fn count(&self, name: &str) -> u64 {
        let mut inner = self.inner.lock().unwrap();
        let (count, file) = inner
            .counts
            .entry(name.to_owned())
            .or_insert_with(|| (0, File::create(self.state.join(name)).ok()));
        *count += 1;
        // In place: a file that is truncated and closed is written to the disk at once, by some.
        if let Some(file) = file {
            file.write_all_at(format!("{count:20}").as_bytes(), 0).ok();
        }
        *count
    }

    /// Notes something that the host should not have done, for the test to find.
    pub(crate) fn complain(&self, text: &str) {
        let file = File::options().create(true).append(true).open(self.state.join("complaints"));
        file.and_then(|mut file| writeln!(file, "{text}")).ok();
    }
}

pub(crate) fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}
