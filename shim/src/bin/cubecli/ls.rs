//! `cubecli cubebox ls`

use std::{
    fs::File,
    io::Write,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::api::Status;
use cube_shim::{config::Config, text::printable_json};
use serde::Serialize;

use crate::{
    args::LsArgs,
    error::CliError,
    sandboxes::{self, Sandbox},
    table,
    task::{Silent, TaskState, Tasks},
    time,
};

/// One line of the list.
#[derive(Debug, Serialize)]
struct Container {
    namespace: String,
    id: String,
    sandbox: String,
    /// As containerd names it, or what is known instead.
    status: &'static str,
    /// Of the VMM, on the host.
    pid: u32,
    vmm: String,
    created: String,
    run_dir: String,
    log_dir: Option<String>,
    #[serde(skip)]
    age: String,
}

pub(crate) fn run(config: &Config, args: &LsArgs, mut output: File) -> Result<(), CliError> {
    let tasks = Tasks::new()?;
    let mut containers = Vec::new();
    for sandbox in sandboxes::all(&config.run_dir)? {
        if args.namespace.as_ref().is_none_or(|wanted| *wanted == sandbox.state.namespace) {
            containers.extend(examine(&tasks, &sandbox));
        }
    }
    containers.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    if args.json {
        let mut text = serde_json::to_string_pretty(&containers).map_err(|e| CliError::Output(e.into()))?;
        text.push('\n');
        return output.write_all(printable_json(&text).as_bytes()).map_err(CliError::Output);
    }
    let header = ["NAMESPACE", "ID", "SANDBOX", "STATUS", "PID", "VMM", "AGE"].map(String::from);
    let mut rows = vec![header];
    rows.extend(containers.into_iter().map(|c| {
        let pid = if c.pid == 0 { "-".into() } else { c.pid.to_string() };
        [c.namespace, c.id, c.sandbox, c.status.into(), pid, c.vmm, c.age]
    }));
    table::write(output, &rows)
}

fn examine(tasks: &Tasks, sandbox: &Sandbox) -> Vec<Container> {
    let state = &sandbox.state;
    let socket = sandbox.dir.path().join("shim.sock");
    let mut containers = Vec::new();
    // One deadline for a stuck shim, not one for each of its containers.
    let mut silent = None;
    for (name, container) in sandbox.containers() {
        let answer = match silent {
            Some(silent) => Err(silent),
            None => tasks.state(&socket, &name.id),
        };
        silent = answer.err();
        let created = Duration::from_nanos(container.created_ns);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        containers.push(Container {
            namespace: name.namespace,
            id: name.id,
            sandbox: state.sandbox_id.clone(),
            status: describe(answer, state.suspended.is_some()),
            pid: answer.map_or(state.vmm_pid, |task| task.pid),
            vmm: if state.backend.is_empty() { "-".into() } else { state.backend.clone() },
            created: time::rfc3339(container.created_ns),
            run_dir: sandbox.dir.path().display().to_string(),
            log_dir: container.log_dir.as_ref().map(|dir| dir.display().to_string()),
            age: time::age(now.saturating_sub(created)),
        });
    }
    containers
}

/// containerd has no word for a sandbox that is paused to disk.
fn describe(answer: Result<TaskState, Silent>, on_disk: bool) -> &'static str {
    match answer.map(|task| task.status) {
        Ok(Status::CREATED) => "created",
        Ok(Status::RUNNING) => "running",
        Ok(Status::STOPPED) => "stopped",
        Ok(Status::PAUSED) if on_disk => "suspended",
        Ok(Status::PAUSED) => "paused",
        Ok(Status::PAUSING) => "pausing",
        Ok(Status::UNKNOWN) => "unknown",
        Err(Silent::Gone) => "shim-gone",
        Err(Silent::NoAnswer) => "no-answer",
    }
}
