//! `containerd.task.v3.Task`: translation and checks; the work is in [`super::tasks`].

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::Task,
};
use cube_protocol::guest::{CreateOptions, LogMode};
use oci_spec::runtime::{self, LinuxResources, Spec};
use protobuf::{
    EnumOrUnknown, Message, MessageField,
    well_known_types::{any::Any, timestamp::Timestamp},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::Notify;
use ttrpc::asynchronous::TtrpcContext;

use super::{
    detached,
    error::Error,
    ids,
    specs::Specs,
    tasks::{NewTask, State, Streams, Tasks},
};
use crate::{
    boot::reaper::Exit,
    container,
    guest::{gate::Pass, quiesce::Quiescence, storage::Mount},
    stdio::{Hub, Policy},
};

/// Types of the messages in `Any` fields.
const CREATE_OPTIONS: &str = "cube.agent.v1.CreateOptions";
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
const METRICS: &str = "io.containerd.cgroups.v2.Metrics";

/// What a stdio field holds for a stream that is wanted. The host keeps the paths.
const STREAM: &str = "stream";

/// The service.
#[derive(Debug)]
pub(super) struct TaskService {
    tasks: Arc<Tasks>,
    hub: Arc<Hub>,
    quiescence: Arc<Quiescence>,
    specs: Arc<Specs>,
    shutdown: Arc<Notify>,
}

impl TaskService {
    pub(super) fn new(
        tasks: Arc<Tasks>,
        hub: Arc<Hub>,
        quiescence: Arc<Quiescence>,
        specs: Arc<Specs>,
        shutdown: Arc<Notify>,
    ) -> TaskService {
        TaskService { tasks, hub, quiescence, specs, shutdown }
    }

    /// To be held for as long as `call` changes anything.
    fn pass(&self, call: &'static str) -> Result<Pass, Error> {
        self.quiescence.pass().ok_or(Error::Quiesced { call })
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let new = new_task(request, |id, bytes| {
            // A repeated request learns what the first one has done: that has taken the parts.
            self.tasks.check_free(id)?;
            self.specs.take(id, bytes)
        })?;
        let (pass, tasks) = (self.pass("Create")?, self.tasks.clone());
        let pid = detached(pass, async move { tasks.create(new).await }).await?;
        Ok(CreateTaskResponse { pid: wire_pid(pid), ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let (pass, tasks) = (self.pass("Start")?, self.tasks.clone());
        let pid = detached(pass, async move { tasks.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid: wire_pid(pid), ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let task = self.tasks.get(&request.id)?;
        let process = task.process(&request.exec_id)?;
        let (state, streams) = (process.state(), process.request);
        let stream = |wanted: bool| if wanted { STREAM.to_owned() } else { String::new() };
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            pid: wire_pid(process.pid()),
            status: EnumOrUnknown::new(status(state, task.is_paused())),
            stdin: stream(streams.stdin),
            stdout: stream(streams.stdout),
            stderr: stream(streams.stderr),
            terminal: streams.terminal,
            exit_status: state.exit().map_or(0, |exit| exit.status.into()),
            exited_at: timestamp(state.exit()),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        ids::exec(&request.exec_id)?;
        let streams = streams(request.terminal, &request.stdin, &request.stdout, &request.stderr)?;
        let process: runtime::Process = json("spec", PROCESS, request.spec.into_option())?;
        check_terminal(&process, streams)?;
        let (pass, tasks) = (self.pass("Exec")?, self.tasks.clone());
        let exec = async move { tasks.exec(&request.id, &request.exec_id, process, streams).await };
        detached(pass, exec).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let signal = i32::try_from(request.signal).ok().filter(|signal| *signal <= libc::SIGRTMAX());
        let signal = signal.ok_or_else(|| Error::Invalid {
            field: "signal",
            value: request.signal.to_string(),
            reason: "no such signal",
        })?;
        // A frozen process dies of SIGKILL as any other. To be delivered later, another signal would have
        // to be remembered, here and in every clone.
        let _pass = if signal == libc::SIGKILL { None } else { Some(self.pass("Kill")?) };
        self.tasks.get(&request.id)?.kill(&request.exec_id, signal, request.all).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (pass, tasks) = (self.pass("Delete")?, self.tasks.clone());
        let deleted =
            detached(pass, async move { tasks.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid: wire_pid(deleted.pid),
            exit_status: deleted.exit.map_or(0, |exit| exit.status.into()),
            exited_at: timestamp(deleted.exit),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.tasks.get(&request.id)?.pids().await?;
        let info = |pid| ProcessInfo { pid: wire_pid(pid), ..Default::default() };
        Ok(PidsResponse { processes: pids.into_iter().map(info).collect(), ..Default::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let _pass = self.pass("ResizePty")?;
        let process = self.tasks.get(&request.id)?.process(&request.exec_id)?;
        let (width, height) = (characters("width", request.width)?, characters("height", request.height)?);
        self.hub.resize(&process.id, width, height).map_err(Error::from)?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources: LinuxResources = json("resources", RESOURCES, request.resources.into_option())?;
        let (pass, task) = (self.pass("Update")?, self.tasks.get(&request.id)?);
        detached(pass, async move { task.update(&resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.tasks.get(&request.id)?.process(&request.exec_id)?.wait().await;
        Ok(WaitResponse {
            exit_status: exit.map_or(0, |exit| exit.status.into()),
            exited_at: timestamp(exit),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let metrics = self.tasks.get(&request.id)?.stats().await?;
        let value = metrics.write_to_bytes().map_err(|error| undecodable("stats", error))?;
        let stats = Any { type_url: METRICS.to_owned(), value, ..Default::default() };
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task = self.tasks.get(&request.id)?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: wire_pid(task.init.pid()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.shutdown.notify_one();
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let (pass, tasks) = (self.pass("Pause")?, self.tasks.clone());
        detached(pass, async move { tasks.pause(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let (pass, tasks) = (self.pass("Resume")?, self.tasks.clone());
        detached(pass, async move { tasks.resume(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let reason = "a sandbox is snapshotted as a whole, by its VMM";
        Err(Error::Unimplemented { call: "Checkpoint", reason }.into())
    }

    async fn close_io(&self, _: &TtrpcContext, _: CloseIORequest) -> ttrpc::Result<Empty> {
        let reason = "the end of stdin is an EOF frame on its stream";
        Err(Error::Unimplemented { call: "CloseIO", reason }.into())
    }
}

/// What a Create asks for. `brought` gives the config.json of this container that came in parts, and has this
/// length.
fn new_task(
    request: CreateTaskRequest,
    brought: impl FnOnce(&str, u64) -> Result<Vec<u8>, Error>,
) -> Result<NewTask, Error> {
    ids::container(&request.id)?;
    for (field, checkpoint) in
        [("checkpoint", &request.checkpoint), ("parent_checkpoint", &request.parent_checkpoint)]
    {
        if !checkpoint.is_empty() {
            let value = format!("{checkpoint:?}");
            return Err(Error::Invalid { field, value, reason: "the agent restores no checkpoints" });
        }
    }
    let streams = streams(request.terminal, &request.stdin, &request.stdout, &request.stderr)?;
    let options = value("options", CREATE_OPTIONS, request.options.into_option())?;
    let options = CreateOptions::parse_from_bytes(&options).map_err(|error| undecodable("options", error))?;
    let policy = match options.log_mode.enum_value() {
        Ok(LogMode::BLOCK) => Policy::Block,
        Ok(LogMode::DROP_OLDEST) => Policy::DropOldest,
        Err(number) => {
            let value = number.to_string();
            return Err(Error::Invalid { field: "options.log_mode", value, reason: "no such mode" });
        }
    };
    let json = if options.spec_bytes == 0 { options.spec } else { brought(&request.id, options.spec_bytes)? };
    let spec: Spec = container::parse(&json)?;
    if let Some(process) = spec.process() {
        check_terminal(process, streams)?;
    }
    let mounts = request.rootfs.into_iter().map(mount).collect::<Result<_, _>>()?;
    let allow_vsock = allow_vsock(&spec)?;
    Ok(NewTask { id: request.id, spec, mounts, streams, policy, allow_vsock })
}

fn mount(mount: containerd_shim_protos::api::Mount) -> Result<Mount, Error> {
    if !mount.target.is_empty() {
        let value = format!("{:?}", mount.target);
        return Err(Error::Invalid {
            field: "rootfs.target",
            value,
            reason: "every mount is on the root itself",
        });
    }
    Ok(Mount { fs_type: mount.type_, source: mount.source, options: mount.options })
}

fn allow_vsock(spec: &Spec) -> Result<bool, Error> {
    const FIELD: &str = cube_protocol::annotations::ALLOW_VSOCK;
    let annotation = spec.annotations().as_ref().and_then(|annotations| annotations.get(FIELD));
    match annotation.map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(Error::Invalid {
            field: FIELD,
            value: format!("{other:?}"),
            reason: "\"true\" or \"false\" is needed",
        }),
    }
}

fn streams(terminal: bool, stdin: &str, stdout: &str, stderr: &str) -> Result<Streams, Error> {
    if terminal && !stderr.is_empty() {
        let value = format!("{stderr:?}");
        return Err(Error::Invalid { field: "stderr", value, reason: "a terminal has one output" });
    }
    Ok(Streams { terminal, stdin: !stdin.is_empty(), stdout: !stdout.is_empty(), stderr: !stderr.is_empty() })
}

/// The request and the spec say both whether there is a terminal.
fn check_terminal(process: &runtime::Process, streams: Streams) -> Result<(), Error> {
    let in_spec = process.terminal().unwrap_or(false);
    if in_spec == streams.terminal {
        return Ok(());
    }
    let value = in_spec.to_string();
    Err(Error::Invalid { field: "process.terminal", value, reason: "the request says otherwise" })
}

fn characters(field: &'static str, value: u32) -> Result<u16, Error> {
    u16::try_from(value).map_err(|_| Error::Invalid {
        field,
        value: value.to_string(),
        reason: "a terminal has at most 65535 columns and rows",
    })
}

/// The bytes in `any`, which must be of type `expected`.
fn value(field: &'static str, expected: &'static str, any: Option<Any>) -> Result<Vec<u8>, Error> {
    let any = any.unwrap_or_default();
    // typeurl in containerd compares what follows the last slash of a protobuf type, and all of others.
    if any.type_url == expected || any.type_url.rsplit('/').next() == Some(expected) {
        return Ok(any.value);
    }
    Err(Error::Type { field, found: any.type_url, needed: expected })
}

fn json<T: DeserializeOwned + Serialize>(
    field: &'static str,
    expected: &'static str,
    any: Option<Any>,
) -> Result<T, Error> {
    Ok(container::parse(&value(field, expected, any)?)?)
}

fn undecodable(field: &'static str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Undecodable { field, source: Box::new(error) }
}

fn status(state: State, paused: bool) -> Status {
    match state {
        State::Created | State::Starting => Status::CREATED,
        State::Running if paused => Status::PAUSED,
        State::Running => Status::RUNNING,
        State::Stopped(_) => Status::STOPPED,
    }
}

fn wire_pid(pid: i32) -> u32 {
    pid.unsigned_abs()
}

fn timestamp(exit: Option<Exit>) -> MessageField<Timestamp> {
    exit.map(|exit| Timestamp::from(exit.at)).into()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::ttrpc::Code;

    use super::*;

    const SPEC: &str = r#"{"ociVersion": "1.1.0", "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}}, "root": {"path": "rootfs"}}"#;

    fn request(spec: &str) -> CreateTaskRequest {
        let options = CreateOptions { spec: spec.as_bytes().to_vec(), ..Default::default() };
        CreateTaskRequest {
            id: "c1".into(),
            options: MessageField::some(Any {
                type_url: CREATE_OPTIONS.into(),
                value: options.write_to_bytes().unwrap(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn refused(request: CreateTaskRequest) -> String {
        let error = new_task(request, |_, _| unreachable!()).unwrap_err();
        assert_eq!(error.code(), Code::INVALID_ARGUMENT);
        crate::errors::chain(&error)
    }

    #[test]
    fn a_plain_request_is_taken() {
        let mut plain = request(SPEC);
        plain.stdout = STREAM.into();
        let new = new_task(plain, |_, _| unreachable!()).unwrap();
        assert_eq!(new.streams, Streams { terminal: false, stdin: false, stdout: true, stderr: false });
        assert_eq!((new.policy, new.allow_vsock), (Policy::Block, false));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_field_and_its_value() {
        let text = refused(request("not json"));
        assert!(text.starts_with("cannot read the JSON of the spec: expected"), "{text}");

        let mut other = request(SPEC);
        other.options.mut_or_insert_default().type_url = "containerd.runc.v1.Options".into();
        let text = refused(other);
        assert!(text.contains("runc.v1") && text.contains(CREATE_OPTIONS), "{text}");

        let mut outside = request("not json");
        outside.id = "../c1".into();
        assert!(refused(outside).contains("../c1"));

        let mut none = request(SPEC);
        none.options = MessageField::none();
        assert!(refused(none).contains(CREATE_OPTIONS));

        let mut checkpoint = request(SPEC);
        checkpoint.checkpoint = "/tmp/cp".into();
        assert!(refused(checkpoint).contains("/tmp/cp"));

        let mut terminal = request(SPEC);
        terminal.terminal = true;
        assert!(refused(terminal.clone()).starts_with("process.terminal is false"));
        terminal.stderr = STREAM.into();
        assert!(refused(terminal).starts_with("stderr is"));

        let annotated = SPEC.replacen('{', r#"{"annotations": {"cube.container.allow_vsock": "yes"},"#, 1);
        assert!(refused(request(&annotated)).contains("\"yes\""));
    }

    #[test]
    fn a_terminal_has_a_size_that_fits() {
        assert_eq!(characters("width", 65_535).unwrap(), 65_535);
        let error = characters("width", 65_536).unwrap_err();
        assert!(error.to_string().contains("width is 65536"), "{error}");
    }
}
