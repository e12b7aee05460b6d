//! A second copy of the streams, as a restore makes one: for the tests of both sides of the protocol.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize},
    },
};

use tokio::io::Interest;

use super::{
    ChildStdio, Hub, ProcessId, StdioError, failed, locked, null, output::Output, pipe, pool::Pool,
    process::Process, watch,
};
use crate::guest::active_clock::ActiveClock;

impl Hub {
    /// The hub as it wakes up from a snapshot that is taken now: held, its connections gone, everything else
    /// as here. Its processes are for the caller to play, with the other ends of new pipes: what was in the
    /// old ones is the caller's to write again. Processes must not have terminals.
    ///
    /// # Errors
    ///
    /// [`StdioError::Io`].
    #[doc(hidden)]
    pub fn fork(&self) -> Result<(Arc<Hub>, HashMap<ProcessId, ChildStdio>), StdioError> {
        let clock = ActiveClock::start();
        clock.hold();
        let pool = Pool::new(self.limits.ring_budget, Arc::clone(&clock));
        let (mut processes, mut children) = (HashMap::new(), HashMap::new());
        for (id, process) in locked(&self.processes).iter() {
            let (stdout, out) = fork_output(process.stdout.as_ref(), &pool, &clock)?;
            let (stderr, err) = fork_output(process.stderr.as_ref(), &pool, &clock)?;
            let mut child = [null()?, out, err];
            let stdin = process.stdin.as_ref().map(|input| input.fork());
            if let Some(stdin) = &stdin {
                let (agent, end) = pipe::input().map_err(failed("cannot make a pipe"))?;
                stdin.attach(watch(agent, Interest::WRITABLE)?);
                child[0] = end;
            }
            processes.insert(id.clone(), Process { stdin, stdout, stderr, terminal: None });
            children.insert(id.clone(), ChildStdio::Pipes(child));
        }
        let hub = Hub {
            limits: self.limits,
            timeline: AtomicU64::new(self.timeline()),
            clock,
            pool,
            processes: Mutex::new(processes),
            connections: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
        };
        Ok((Arc::new(hub), children))
    }
}

fn fork_output(
    output: Option<&Arc<Output>>,
    pool: &Arc<Pool>,
    clock: &Arc<ActiveClock>,
) -> Result<(Option<Arc<Output>>, std::os::fd::OwnedFd), StdioError> {
    let Some(output) = output else { return Ok((None, null()?)) };
    let fork = output.fork(pool, clock).map_err(failed("no memory for a ring"))?;
    let (agent, child) = pipe::output().map_err(failed("cannot make a pipe"))?;
    fork.attach(watch(agent, Interest::READABLE)?);
    Ok((Some(fork), child))
}
