//! containerd's Task service: translate, validate, delegate to the [`Sandbox`].
//!
//! The service is registered under the names of versions 2 and 3, whose messages are the same.

mod checkpoint;

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{self, Empty, Status as TaskStatus},
    protobuf::{Message as _, MessageField, well_known_types::any::Any},
    shim_async::{Task, create_task},
};
use tracing::{debug, info};
use ttrpc::{
    Code,
    asynchronous::{Service, TtrpcContext},
};

use crate::{
    errors::{Error, chain},
    events::timestamp,
    options,
    sandbox::{CreateRequest, ExecRequest, KillRequest, ProcessId, Sandbox, SnapshotRequest, Status, Stdio},
};

/// The service name that `create_task` of containerd-shim-protos uses, and the one before it.
const V3: &str = "containerd.task.v3.Task";
const V2: &str = "containerd.task.v2.Task";

/// Name of [`api::ProcessInfo`] for containerd's clients.
const PROCESS_INFO: &str = "containerd.v1.types.ProcessInfo";

/// Longest id that containerd accepts.
const ID_MAX: usize = 76;

/// What [`check_id`] accepts, in words.
pub const ID_RULE: &str = "1 to 76 letters and digits, with single dots, dashes or underscores between them";

/// Largest signal number of Linux, `SIGRTMAX`.
const SIGNAL_MAX: u32 = 64;

/// Serves the Task API for one sandbox.
pub struct TaskService {
    sandbox: Sandbox,
}

impl TaskService {
    /// The ttrpc services, by name, to be registered with a server.
    pub fn services(sandbox: Sandbox) -> HashMap<String, Service> {
        let service: Arc<dyn Task + Send + Sync> = Arc::new(TaskService { sandbox });
        let mut services = create_task(service.clone());
        if let Some(v2) = create_task(service).remove(V3) {
            services.insert(V2.into(), v2);
        }
        services
    }
}

/// Checks an id as containerd does: letters and digits, with single `.`, `_` or `-` between them. It
/// becomes a part of paths on the host and in the guest.
pub fn check_id(what: &'static str, id: &str) -> Result<(), Error> {
    let words = || id.split(['.', '_', '-']);
    let valid = id.len() <= ID_MAX
        && words().all(|word| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    if valid { Ok(()) } else { Err(Error::Id { what, id: id.into(), rule: ID_RULE }) }
}

fn process(container: String, exec: String) -> Result<ProcessId, Error> {
    check_id("container id", &container)?;
    if !exec.is_empty() {
        check_id("exec id", &exec)?;
    }
    Ok(ProcessId { container, exec })
}

fn init(container: String) -> Result<ProcessId, Error> {
    process(container, String::new())
}

/// A process of the guest. Its pid means nothing on the host, where the VMM is what runs it; it is in the info,
/// in a message that every client of containerd knows.
fn process_info(reported: u32, in_guest: u32) -> api::ProcessInfo {
    let inner = api::ProcessInfo { pid: in_guest, ..Default::default() };
    // Encoding into memory fails only for a message beyond 2 GiB.
    let value = inner.write_to_bytes().unwrap_or_default();
    let info = Any { type_url: PROCESS_INFO.into(), value, ..Default::default() };
    api::ProcessInfo { pid: reported, info: MessageField::some(info), ..Default::default() }
}

/// containerd takes Unimplemented from Create for a shim of version 2, and tries again in vain.
fn never_unimplemented(error: Error) -> ttrpc::Error {
    match error.code() {
        Code::UNIMPLEMENTED => {
            ttrpc::Error::RpcStatus(ttrpc::get_status(Code::FAILED_PRECONDITION, chain(&error)))
        }
        _ => error.into(),
    }
}

impl TaskService {
    async fn try_create(&self, request: api::CreateTaskRequest) -> Result<u32, Error> {
        check_id("container id", &request.id)?;
        options::config_path(request.options.as_ref())?;
        if !request.parent_checkpoint.is_empty() {
            let what = format!("parent_checkpoint {:?}", request.parent_checkpoint);
            return Err(Error::Unimplemented { what, hint: "" });
        }
        let restore = match request.checkpoint.as_str() {
            "" => None,
            dir => Some(checkpoint::read(dir).await?),
        };
        let bundle = PathBuf::from(&request.bundle);
        if !bundle.is_absolute() {
            let reason = "it must be an absolute path";
            return Err(Error::Argument { field: "bundle", value: request.bundle, reason });
        }
        let stdio = Stdio {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        self.sandbox
            .create(CreateRequest { id: request.id, bundle, rootfs: request.rootfs, stdio, restore })
            .await
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        info!(id = request.id, bundle = request.bundle, terminal = request.terminal, "create");
        let pid = self.try_create(request).await.map_err(never_unimplemented)?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        info!(id = request.id, exec = request.exec_id, "start");
        let pid = self.sandbox.start(process(request.id, request.exec_id)?).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        info!(id = request.id, exec = request.exec_id, terminal = request.terminal, "exec");
        check_id("exec id", &request.exec_id)?;
        let process = process(request.id, request.exec_id)?;
        let stdio = Stdio {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let spec = request.spec.unwrap_or_default();
        self.sandbox.exec(ExecRequest { process, spec, stdio }).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        info!(id = request.id, exec = request.exec_id, signal = request.signal, all = request.all, "kill");
        let process = process(request.id, request.exec_id)?;
        if request.signal > SIGNAL_MAX {
            let (value, reason) = (request.signal.to_string(), "signals are numbered up to 64");
            return Err(Error::Argument { field: "signal", value, reason }.into());
        }
        self.sandbox.kill(KillRequest { process, signal: request.signal, all: request.all }).await?;
        Ok(Empty::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        info!(id = request.id, exec = request.exec_id, "delete");
        let deleted = self.sandbox.delete(process(request.id, request.exec_id)?).await?;
        Ok(api::DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(timestamp(deleted.exit.at_ns)),
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        let exit = self.sandbox.wait(process(request.id, request.exec_id)?).await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let process = process(request.id, request.exec_id)?;
        let name = if process.is_init() { &process.container } else { &process.exec }.clone();
        let state = self.sandbox.state(process).await?;
        let status = match state.status {
            Status::Created => TaskStatus::CREATED,
            Status::Running => TaskStatus::RUNNING,
            Status::Pausing => TaskStatus::PAUSING,
            Status::Paused => TaskStatus::PAUSED,
            Status::Stopped => TaskStatus::STOPPED,
        };
        Ok(api::StateResponse {
            id: name,
            bundle: state.bundle.to_string_lossy().into_owned(),
            pid: state.pid,
            status: status.into(),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: state.exit.map(|exit| exit.status).unwrap_or_default(),
            exited_at: state.exit.map(|exit| timestamp(exit.at_ns)).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let pids = self.sandbox.pids(init(request.id)?.container).await?;
        let processes = pids.guest.into_iter().map(|pid| process_info(pids.reported, pid)).collect();
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let stats = self.sandbox.stats(init(request.id)?.container).await?;
        Ok(api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        info!(id = request.id, "update");
        let id = init(request.id)?.container;
        self.sandbox.update(id, request.resources.unwrap_or_default()).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> ttrpc::Result<Empty> {
        let process = process(request.id, request.exec_id)?;
        self.sandbox.resize(process, request.width, request.height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> ttrpc::Result<Empty> {
        debug!(id = request.id, exec = request.exec_id, stdin = request.stdin, "close io");
        let process = process(request.id, request.exec_id)?;
        if request.stdin {
            self.sandbox.close_stdin(process).await?;
        }
        Ok(Empty::new())
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let task_pid = self.sandbox.pid(init(request.id)?.container).await?;
        let (shim_pid, version) = (std::process::id(), env!("CARGO_PKG_VERSION").into());
        Ok(api::ConnectResponse { shim_pid, task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        debug!(id = request.id, "shutdown");
        self.sandbox.shutdown().await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        info!(id = request.id, "pause");
        self.sandbox.pause(init(request.id)?.container).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        info!(id = request.id, "resume");
        self.sandbox.resume(init(request.id)?.container).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        info!(id = request.id, path = request.path, "checkpoint");
        let process = init(request.id)?;
        // A container that does not exist has no snapshot.
        let status = self.sandbox.state(process.clone()).await?.status;
        let wanted = checkpoint::Wanted::read(request.path, request.options.as_ref())?;
        // What it would do between the snapshot and its end would be done again by whoever goes on from there.
        let pauses = wanted.exit && status == Status::Running;
        if pauses {
            self.sandbox.pause(process.container.clone()).await?;
        }
        let taken = self.checkpoint_to(&process, &wanted).await;
        match &taken {
            Ok(()) if wanted.exit => {
                let signal = libc::SIGKILL.unsigned_abs();
                self.sandbox.kill(KillRequest { process, signal, all: false }).await?;
            }
            Err(_) if pauses => self.sandbox.resume(process.container).await?,
            _ => {}
        }
        taken?;
        Ok(Empty::new())
    }
}

impl TaskService {
    async fn checkpoint_to(&self, process: &ProcessId, wanted: &checkpoint::Wanted) -> Result<(), Error> {
        let checkpoint = Some((process.container.clone(), wanted.path().to_owned()));
        let copy_to = wanted.image_path.clone();
        let snapshot = self.sandbox.snapshot(SnapshotRequest { name: None, checkpoint, copy_to }).await?;
        wanted.write(&snapshot).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_containerd() {
        for id in ["a", "c1", "my-app_1.2", &"x".repeat(76)] {
            assert!(check_id("container id", id).is_ok(), "{id}");
        }
        for id in ["", "../x", "a/b", ".", "..", "-a", "a-", "a..b", "a b", "ä", "a\0", &"x".repeat(77)] {
            let error = check_id("container id", id).unwrap_err();
            assert_eq!(error.code(), Code::INVALID_ARGUMENT, "{id}");
        }
    }

    #[test]
    fn create_never_answers_unimplemented() {
        let error = Error::Unimplemented { what: "checkpoint".into(), hint: "" };
        let ttrpc::Error::RpcStatus(status) = never_unimplemented(error) else { panic!("not a status") };
        assert_eq!(status.code(), Code::FAILED_PRECONDITION);
    }
}
