//! Runs tables of tests: skips by name with a reason, and ends what takes too long.

use std::{
    process::ExitCode,
    sync::mpsc::{self, RecvTimeoutError},
    time::Duration,
};

use cube_shim::vmm::keeper;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::{diagnostics, needs::Backend, soak};

/// One test.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    name: &'static str,
    backend: Backend,
    limit: Duration,
    run: fn(Backend),
}

impl Case {
    /// A test that runs `run` on `backend`. `name` is a path like `scenarios::exits::a_sentence`.
    pub fn new(name: &'static str, backend: Backend, run: fn(Backend)) -> Case {
        // Scenarios with a VM boot several, and exactness moves gigabytes.
        let limit = Duration::from_secs(if backend.is_vm() { 420 } else { 240 });
        Case { name, backend, limit: soak::limit(limit), run }
    }

    fn trial(self) -> Trial {
        let sentence = self.name.rsplit("::").next().unwrap_or(self.name);
        let name = format!("{}::{sentence}", self.backend.name());
        Trial::ignorable_test(name.clone(), move || match self.backend.missing() {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => self.run_within_limit(&name).map(|()| Completion::Completed),
        })
    }

    fn run_within_limit(self, name: &str) -> Result<(), Failed> {
        let (done, result) = mpsc::channel();
        let test = std::thread::Builder::new().name(name.to_owned());
        let test = test.spawn(move || {
            (self.run)(self.backend);
            done.send(()).ok();
        });
        let test = test.map_err(|e| format!("cannot start a thread: {e}"))?;
        match result.recv_timeout(self.limit) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => {
                let panic = test.join().err();
                let text = panic.as_ref().and_then(|panic| {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    text.or_else(|| panic.downcast_ref::<&str>().copied())
                });
                Err(text.unwrap_or("panicked").into())
            }
            Err(RecvTimeoutError::Timeout) => {
                // The thread cannot be ended. Without its processes it fails by itself, mostly.
                diagnostics::dump_and_kill(name);
                Err(format!("took longer than {:?}", self.limit).into())
            }
        }
    }
}

/// The table of tests that run these functions on a backend.
#[macro_export]
macro_rules! cases {
    ($backend:expr => $($run:path),+ $(,)?) => {
        vec![$($crate::runner::Case::new(stringify!($run), $backend, $run)),+]
    };
}

/// Runs `cases` as the command line asks, in the way of `cargo test`.
pub fn main(cases: impl IntoIterator<Item = Case>) -> ExitCode {
    // The process that clients are told the pid of is the program that boots the VM.
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(code) = keeper::run(&words) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    // Emulated VMs and gigabytes of output: more at a time than CPUs measures the scheduler.
    if arguments.test_threads.is_none() {
        arguments.test_threads = std::thread::available_parallelism().ok().map(usize::from);
    }
    libtest_mimic::run(&arguments, cases.into_iter().map(Case::trial).collect()).exit_code()
}
