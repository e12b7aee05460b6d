//! Tells when somebody opens a FIFO.
//!
//! A user has 128 inotify instances by default (`fs.inotify.max_user_instances`), and a host runs
//! hundreds of sandboxes with many FIFOs each: so all FIFOs of a process share one instance. A thread
//! reads it; it begins with the first FIFO that waits for a reader, and stays.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::watch;

/// The thread calls the kernel and a short stack of ours.
const STACK: usize = 64 << 10;

/// Several events; each has no name, and so 16 bytes.
const BUFFER: usize = 1024;

/// The FIFOs of this process that wait for a reader.
pub(super) static OPENS: Opens = Opens::new(Inotify::init);

/// Files whose opening is waited for, behind one inotify instance.
#[derive(Debug)]
pub(super) struct Opens {
    /// Makes the instance.
    init: fn() -> io::Result<Inotify>,
    state: Mutex<State>,
    /// Whether somebody was told that there is no instance.
    warned: AtomicBool,
}

#[derive(Debug)]
enum State {
    /// Nobody has waited yet, or there was no instance to be had.
    Idle,
    /// The thread reads.
    Watching(Instance),
    /// The thread could not read, and has ended.
    Broken,
}

#[derive(Debug)]
struct Instance {
    watches: Watches,
    /// By the id of the watch descriptor. A file has one, however many wait for it.
    watched: HashMap<libc::c_int, Watched>,
}

#[derive(Debug)]
struct Watched {
    descriptor: WatchDescriptor,
    /// Its receivers are those who wait.
    opened: watch::Sender<()>,
}

/// Waits for the opening of one file. Dropping it ends the watch.
#[derive(Debug)]
pub(super) struct Watch {
    opens: &'static Opens,
    id: libc::c_int,
    opened: watch::Receiver<()>,
}

impl Opens {
    pub(super) const fn new(init: fn() -> io::Result<Inotify>) -> Opens {
        Opens { init, state: Mutex::new(State::Idle), warned: AtomicBool::new(false) }
    }

    /// Watches `file` from now on. `None` if that cannot be had at the moment: the caller must look for
    /// himself, and may ask again.
    pub(super) fn watch(&'static self, file: &File) -> Option<Watch> {
        match self.try_watch(file) {
            Ok(watch) => Some(watch),
            Err(error) => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    let limit = match error.raw_os_error() {
                        Some(libc::ENOSPC) => "fs.inotify.max_user_watches",
                        _ => "fs.inotify.max_user_instances",
                    };
                    tracing::warn!(%error, "looking for readers of FIFOs once a second: raise the sysctl {limit}");
                }
                None
            }
        }
    }

    fn try_watch(&'static self, file: &File) -> io::Result<Watch> {
        let mut state = self.lock();
        if let State::Idle = *state {
            *state = State::Watching(self.begin()?);
        }
        let State::Watching(Instance { watches, watched }) = &mut *state else {
            return Err(io::Error::other("inotify cannot be read"));
        };
        // Not by its name: what has that name may be another file by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let descriptor = watches.add(path, WatchMask::OPEN)?;
        let id = descriptor.get_watch_descriptor_id();
        let entry =
            watched.entry(id).or_insert_with(|| Watched { descriptor, opened: watch::Sender::new(()) });
        Ok(Watch { opens: self, id, opened: entry.opened.subscribe() })
    }

    fn begin(&'static self) -> io::Result<Instance> {
        let mut inotify = (self.init)()?;
        let watches = inotify.watches();
        thread::Builder::new().name("fifo-opens".into()).stack_size(STACK).spawn(move || {
            let error = self.read(&mut inotify);
            tracing::error!(%error, "cannot read inotify events any more");
            // Everybody who waits wakes up, for his sender is gone.
            *self.lock() = State::Broken;
        })?;
        Ok(Instance { watches, watched: HashMap::new() })
    }

    /// Wakes up whose file is opened, until reading fails.
    fn read(&self, inotify: &mut Inotify) -> io::Error {
        let mut buffer = [0; BUFFER];
        loop {
            match inotify.read_events_blocking(&mut buffer) {
                Ok(events) => {
                    events.for_each(|event| self.seen(event.wd.get_watch_descriptor_id(), event.mask));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return e,
            }
        }
    }

    fn seen(&self, id: libc::c_int, mask: EventMask) {
        let mut state = self.lock();
        let State::Watching(Instance { watched, .. }) = &mut *state else { return };
        if mask.contains(EventMask::Q_OVERFLOW) {
            watched.values().for_each(|watched| watched.opened.send_replace(()));
        } else if mask.contains(EventMask::IGNORED) {
            // The kernel has ended the watch: unmounted, for example.
            watched.remove(&id);
        } else if let Some(watched) = watched.get(&id) {
            watched.opened.send_replace(());
        }
    }

    fn forget(&self, id: libc::c_int) {
        let mut state = self.lock();
        let State::Watching(Instance { watches, watched }) = &mut *state else { return };
        if let Entry::Occupied(entry) = watched.entry(id)
            // The one that is being dropped.
            && entry.get().opened.receiver_count() <= 1
        {
            // Fails only if the kernel has ended the watch meanwhile.
            let _ = watches.remove(entry.remove().descriptor);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    /// Resolves when the file has been opened since the watch was made or this was last called. May
    /// resolve without. Cancel safe.
    pub(super) async fn opened(&mut self) {
        // An error means that the watch has ended: its owner looks, and makes another.
        let _ = self.opened.changed().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.opens.forget(self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    /// Instances of the whole process have nothing to do with this one.
    fn opens(init: fn() -> io::Result<Inotify>) -> &'static Opens {
        Box::leak(Box::new(Opens::new(init)))
    }

    fn watched(opens: &Opens) -> usize {
        match &*opens.lock() {
            State::Watching(instance) => instance.watched.len(),
            State::Idle | State::Broken => 0,
        }
    }

    fn files(dir: &tempfile::TempDir, count: usize) -> Vec<File> {
        (0..count).map(|n| File::create(dir.path().join(n.to_string())).unwrap()).collect()
    }

    #[tokio::test]
    async fn an_open_wakes_those_who_wait_for_this_file_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let (opens, files) = (opens(Inotify::init), files(&dir, 2));
        let mut first = [opens.watch(&files[0]).unwrap(), opens.watch(&files[0]).unwrap()];
        let mut second = opens.watch(&files[1]).unwrap();
        File::open(dir.path().join("0")).unwrap();
        for watch in &mut first {
            tokio::time::timeout(LIMIT, watch.opened()).await.unwrap();
        }
        // Events come in order: this one is behind that of the first file.
        assert!(!second.opened.has_changed().unwrap());
        File::open(dir.path().join("1")).unwrap();
        tokio::time::timeout(LIMIT, second.opened()).await.unwrap();
    }

    #[tokio::test]
    async fn watches_come_and_go_and_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (opens, files) = (opens(Inotify::init), files(&dir, 200));
        for _ in 0..5 {
            let watches: Vec<Watch> = files.iter().filter_map(|file| opens.watch(file)).collect();
            assert_eq!((watches.len(), watched(opens)), (200, 200));
            let twice = opens.watch(&files[0]).unwrap();
            drop(watches);
            assert_eq!(watched(opens), 1, "somebody still waits for the first");
            drop(twice);
            assert_eq!(watched(opens), 0);
        }
    }

    #[tokio::test]
    async fn a_file_is_watched_though_its_name_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (opens, files) = (opens(Inotify::init), files(&dir, 1));
        std::fs::rename(dir.path().join("0"), dir.path().join("renamed")).unwrap();
        let mut watch = opens.watch(&files[0]).unwrap();
        File::open(dir.path().join("renamed")).unwrap();
        tokio::time::timeout(LIMIT, watch.opened()).await.unwrap();
    }

    #[test]
    fn an_instance_that_was_not_to_be_had_is_asked_for_again() {
        static ASKED: AtomicBool = AtomicBool::new(false);
        let dir = tempfile::tempdir().unwrap();
        let opens = opens(|| match ASKED.swap(true, Ordering::Relaxed) {
            false => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            true => Inotify::init(),
        });
        let file = &files(&dir, 1)[0];
        assert!(opens.watch(file).is_none() && opens.warned.load(Ordering::Relaxed));
        assert!(opens.watch(file).is_some());
    }
}
