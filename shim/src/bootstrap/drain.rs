//! Saving the output that the guest still holds when its shim has died.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::api;
use futures::future::join_all;
use tokio::time::{Instant, timeout};

use crate::{
    agent::{Agent, Dial, dial::HybridVsock},
    cgroup::SandboxCgroup,
    config,
    state::{ContainerState, RunDir, State},
    stdio::{Begin, Flows, LogConfig, ProcessIo, StdioConfig},
    vmm::VSOCK_SOCKET,
};

/// Time for all of it: containerd kills `delete` after 5 s, and the clean-up comes after this.
const LIMIT: Duration = Duration::from_millis(2500);

/// Time to reach the agent. A guest that lives answers in milliseconds, but not where every CPU is busy,
/// and without an answer all that it holds is lost; one that hangs holds the clean-up no longer than this.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Time for each call.
const CALL_LIMIT: Duration = Duration::from_secs(1);

/// Ends every container of the sandbox, so that its streams end, and writes what the guest holds of
/// their output to the logs. Does what it can in its time: what fails here is lost with the guest.
pub(super) async fn drain(run_dir: &RunDir, state: &State, log: &config::Log) {
    let _ = timeout(LIMIT, try_drain(run_dir, state, log)).await;
}

async fn try_drain(run_dir: &RunDir, state: &State, log: &config::Log) {
    let begun = Instant::now();
    // Whatever becomes of the guest, the writer died in the middle of its work.
    let logs =
        join_all(state.containers.iter().map(|(id, container)| recover(state, id, container, log))).await;
    cube_fault::point("cleanup.log_recovered");
    // Whoever waited for it would have no time left to clean up: it is on disk, or has died with its VM.
    if !SandboxCgroup::at(&state.cgroup).has_processes() {
        return;
    }
    let dial: Arc<dyn Dial> = Arc::new(HybridVsock::new(run_dir.path().join(VSOCK_SOCKET)));
    let Ok((agent, _link, _)) = Agent::connect(dial.clone(), CONNECT_LIMIT).await else { return };
    let ids = state.containers.iter().map(|(id, container)| container.guest_id(id));
    join_all(ids.map(|id| kill(&agent, id))).await;
    cube_fault::point("cleanup.containers_killed");
    let flows = Flows::on(state.timeline);
    let drains = logs.into_iter().flatten().map(|mut io| {
        io.start(dial.clone(), &flows);
        io.process_exited();
        // It must be over before the time limit cuts it off.
        io.finish((LIMIT * 9 / 10).saturating_sub(begun.elapsed()))
    });
    join_all(drains).await;
}

/// Completes what the writer of a container's log was doing, and takes the log over. `None` if it has none.
async fn recover(
    state: &State,
    id: &str,
    container: &ContainerState,
    log: &config::Log,
) -> Option<ProcessIo> {
    let log = LogConfig {
        dir: container.log_dir.clone()?,
        // That of a template may belong to the next build by now.
        exclusive: true,
        segment_bytes: log.segment_bytes,
        segments: log.segments,
    };
    let config = StdioConfig {
        namespace: state.namespace.clone(),
        container_id: id.into(),
        guest_container_id: container.guest_id(id).into(),
        exec_id: String::new(),
        terminal: false,
        stdin: String::new(),
        stdout: String::new(),
        stderr: String::new(),
        log: Some(log),
        begin: Begin::default(),
    };
    ProcessIo::recover(config, state.timeline).await.ok()
}

async fn kill(agent: &Agent, id: &str) {
    let call =
        api::KillRequest { id: id.into(), signal: libc::SIGKILL as u32, all: true, ..Default::default() };
    // What has exited already has ended its streams as well.
    let _ = agent.call_once("Kill", CALL_LIMIT, |c, ctx| async move { c.task.kill(ctx, &call).await }).await;
}
