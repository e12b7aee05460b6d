//! What happened to tasks, kept until the host has it.
//!
//! The host asks for everything after the last event that it handled, so an answer that got lost is
//! simply asked for again, and a shim that knows nothing asks from 0. An exit is therefore kept until
//! its process is deleted. OOM kills are a count per container, of which only the last matters.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cube_protocol::guest::{Event, TaskExit, TaskOom, event};
use tokio::{sync::watch, time::timeout};

use crate::{boot::reaper::Exit, errors::lock, stdio::ProcessId};

/// Most events in one answer.
pub const BATCH: usize = 64;

/// Longest time that a poll may last.
pub const POLL_LIMIT: Duration = Duration::from_secs(30);

/// The queue. Bounded by the number of processes (exits) and of containers (OOM kills).
#[derive(Debug)]
pub struct Events {
    pending: Mutex<BTreeMap<u64, Kept>>,
    /// Number of the last event. Changes after the event is in `pending`.
    last: watch::Sender<u64>,
}

#[derive(Debug)]
struct Kept {
    process: ProcessId,
    kind: event::Kind,
}

impl Default for Events {
    fn default() -> Events {
        Events { pending: Mutex::default(), last: watch::Sender::new(0) }
    }
}

impl Events {
    /// A process ended. Once per process.
    pub fn exited(&self, process: &ProcessId, pid: i32, exit: Exit) {
        let kind = event::Kind::Exit(TaskExit {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            pid: pid.unsigned_abs(),
            exit_status: exit.status.into(),
            exited_at_ns: nanoseconds(exit.at),
            ..Default::default()
        });
        self.push(process.clone(), kind, |_| true);
    }

    /// The kernel has killed `count` processes of a container for want of memory, all told.
    pub fn out_of_memory(&self, container: &str, count: u64) {
        let process = ProcessId { container: container.to_owned(), exec: String::new() };
        let oom = TaskOom { container_id: container.to_owned(), count, ..Default::default() };
        let earlier =
            |kept: &Kept| kept.process.container == container && matches!(kept.kind, event::Kind::Oom(_));
        self.push(process, event::Kind::Oom(oom), |kept| !earlier(kept));
    }

    fn push(&self, process: ProcessId, kind: event::Kind, keep: impl Fn(&Kept) -> bool) {
        let mut pending = lock(&self.pending);
        pending.retain(|_, kept| keep(kept));
        self.last.send_modify(|last| {
            *last += 1;
            pending.insert(*last, Kept { process, kind });
        });
    }

    /// The process was deleted. With its init process, everything of a container is forgotten.
    pub fn forget(&self, process: &ProcessId) {
        let concerns = |kept: &Kept| {
            kept.process.container == process.container
                && (process.exec.is_empty() || kept.process.exec == process.exec)
        };
        lock(&self.pending).retain(|_, kept| !concerns(kept));
    }

    /// Number of the last event; 0 before the first.
    pub fn last(&self) -> u64 {
        *self.last.borrow()
    }

    /// The events after number `after`, oldest first, at most [`BATCH`]. Waits for one for `limit`, at
    /// most [`POLL_LIMIT`]. Cancel safe: it takes nothing out.
    pub async fn after(&self, after: u64, limit: Duration) -> Vec<Event> {
        let mut last = self.last.subscribe();
        let poll = async {
            loop {
                let batch = self.batch(after);
                // The sender lives as long as `self`.
                if !batch.is_empty() || last.changed().await.is_err() {
                    return batch;
                }
            }
        };
        timeout(limit.min(POLL_LIMIT), poll).await.unwrap_or_default()
    }

    fn batch(&self, after: u64) -> Vec<Event> {
        let Some(first) = after.checked_add(1) else { return Vec::new() };
        let pending = lock(&self.pending);
        let batch = pending.range(first..).take(BATCH);
        batch
            .map(|(sequence, kept)| Event {
                sequence: *sequence,
                kind: Some(kept.kind.clone()),
                ..Default::default()
            })
            .collect()
    }
}

/// Since the epoch; 0 for a clock before it.
fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT_ONCE: Duration = Duration::ZERO;

    fn process(container: usize, exec: &str) -> ProcessId {
        ProcessId { container: format!("c{container}"), exec: exec.into() }
    }

    fn exit(status: u8) -> Exit {
        Exit { status, at: UNIX_EPOCH + Duration::from_nanos(1_000_000_007) }
    }

    /// (container, exec, sequence) of the exits, checked to be in order.
    fn exits(events: &[Event]) -> Vec<(String, String)> {
        assert!(events.is_sorted_by_key(|event| event.sequence));
        let exit = |event: &Event| match &event.kind {
            Some(event::Kind::Exit(exit)) => Some((exit.container_id.clone(), exit.exec_id.clone())),
            _ => None,
        };
        events.iter().filter_map(exit).collect()
    }

    #[derive(Debug, Clone)]
    enum Step {
        Exit(usize),
        Oom(usize),
        /// The host reads, and remembers what it read if the answer arrives.
        Read {
            arrives: bool,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3usize).prop_map(Step::Exit),
            1 => (0..3usize).prop_map(Step::Oom),
            1 => any::<bool>().prop_map(|arrives| Step::Read { arrives }),
        ]
    }

    proptest! {
        #[test]
        fn a_host_that_reads_now_and_then_sees_every_exit_once_and_in_order(
            steps in prop::collection::vec(step(), 0..300),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let events = Events::default();
                let (mut happened, mut seen, mut after) = (Vec::new(), Vec::new(), 0);
                let mut ooms = [0u64; 3];
                for (number, step) in steps.iter().chain([&Step::Read { arrives: true }; 6]).enumerate() {
                    match step {
                        Step::Exit(container) => {
                            let process = process(*container, &number.to_string());
                            events.exited(&process, 1, exit(0));
                            happened.push((process.container, process.exec));
                        }
                        Step::Oom(container) => {
                            ooms[*container] += 1;
                            events.out_of_memory(&format!("c{container}"), ooms[*container]);
                        }
                        Step::Read { arrives } => {
                            let batch = events.after(after, AT_ONCE).await;
                            assert!(batch.len() <= BATCH);
                            if *arrives {
                                after = batch.last().map_or(after, |event| event.sequence);
                                seen.extend(exits(&batch));
                            }
                        }
                    }
                }
                assert_eq!(seen, happened);
                assert_eq!(after, events.last());
            });
        }
    }

    #[tokio::test]
    async fn exits_are_kept_until_the_process_is_deleted() {
        let events = Events::default();
        events.exited(&process(1, "e1"), 7, exit(3));
        events.exited(&process(1, ""), 5, exit(0));
        events.exited(&process(2, ""), 6, exit(0));
        assert_eq!(events.after(0, AT_ONCE).await.len(), 3);
        assert_eq!(events.after(0, AT_ONCE).await.len(), 3);
        events.forget(&process(1, "e1"));
        assert_eq!(
            exits(&events.after(0, AT_ONCE).await),
            [("c1".into(), "".into()), ("c2".into(), "".into())]
        );
        events.out_of_memory("c1", 1);
        events.forget(&process(1, ""));
        assert_eq!(exits(&events.after(0, AT_ONCE).await), [("c2".into(), "".into())]);
        assert_eq!(events.last(), 4);
    }

    #[tokio::test]
    async fn an_exit_carries_pid_status_and_time() {
        let events = Events::default();
        events.exited(&process(1, "e1"), 7, exit(137));
        let Some(event::Kind::Exit(exit)) = events.after(0, AT_ONCE).await.remove(0).kind else {
            panic!("not an exit")
        };
        assert_eq!((exit.pid, exit.exit_status, exit.exited_at_ns), (7, 137, 1_000_000_007));
    }

    #[tokio::test]
    async fn out_of_memory_kills_are_one_event_with_the_last_count() {
        let events = Events::default();
        for count in 1..=100 {
            events.out_of_memory("c1", count);
        }
        let batch = events.after(0, AT_ONCE).await;
        let [Event { sequence: 100, kind: Some(event::Kind::Oom(oom)), .. }] = &batch[..] else {
            panic!("{batch:?}")
        };
        assert_eq!(oom.count, 100);
    }

    #[tokio::test]
    async fn a_poll_is_answered_by_the_event_that_it_waits_for() {
        let events = std::sync::Arc::new(Events::default());
        let poll = tokio::spawn({
            let events = events.clone();
            async move { events.after(0, POLL_LIMIT).await }
        });
        tokio::task::yield_now().await;
        events.exited(&process(1, ""), 7, exit(0));
        assert_eq!(poll.await.unwrap().len(), 1);
        assert!(events.after(u64::MAX, AT_ONCE).await.is_empty());
    }
}
