//! `delete`: clean-up from the state on disk alone.
//!
//! containerd runs it when a shim has died, and also after every normal Delete, possibly for several
//! members of a pod at once, and kills it after 5 s. It knows neither whether the shim lives nor
//! what is left, so everything here can be repeated and stops early where there is nothing to do.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::{
    api,
    protobuf::{Message, MessageField},
    shim_async::TaskClient,
};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context,
};

use super::{ADDRESS_FILE, BootstrapError, Flags, io_error, load_config, ttrpc_address};
use crate::{
    events::timestamp,
    sandbox::{Exit, Host, LinuxHost, spec},
    state::RunDir,
};

/// How long another `delete` of the same sandbox is waited for.
const LOCK_LIMIT: Duration = Duration::from_millis(3500);

/// Time for each call to a shim that lives.
const CALL_LIMIT: Duration = Duration::from_millis(700);

/// Gives what goes to stdout.
pub(super) fn run(flags: &Flags) -> Result<Vec<u8>, BootstrapError> {
    flags.check()?;
    let pid = clean(flags, &LinuxHost)?;
    let exit = Exit::killed();
    let answer = api::DeleteResponse {
        pid,
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.at_ns)),
        ..Default::default()
    };
    Ok(answer.write_to_bytes()?)
}

/// Cleans up after container `flags.id`; gives the pid that containerd was told, 0 if nothing is
/// left that knows it.
fn clean(flags: &Flags, host: &dyn Host) -> Result<u32, BootstrapError> {
    let run_dir = find(flags)?;
    let Some(state) = run_dir.load()? else {
        // Between `start` and the first Create there is a directory without a state.
        return remove_unused(&run_dir).map(|()| 0);
    };
    let member = state.sandbox_id != flags.id && state.containers.keys().any(|id| *id != flags.id);
    if member && delete_member(&run_dir, &flags.id)? {
        return Ok(state.vmm_pid);
    }
    let Some(_lock) = run_dir.lock(LOCK_LIMIT)? else { return Ok(state.vmm_pid) };
    host.destroy(&run_dir, &state.cgroup)?;
    Ok(state.vmm_pid)
}

/// The run directory: of the shim that the bundle names, else of the sandbox that the spec names.
fn find(flags: &Flags) -> Result<RunDir, BootstrapError> {
    let bundle = flags.bundle()?;
    if let Some(run_dir) = named_by(&bundle.join(ADDRESS_FILE)) {
        return Ok(run_dir);
    }
    let config = load_config(None)?;
    let spec = spec::load(&bundle).unwrap_or_default();
    let id = spec::sandbox_id(&spec).unwrap_or(&flags.id);
    Ok(RunDir::of(&config.run_dir, &ttrpc_address(None, flags)?, &flags.namespace, id))
}

fn named_by(address: &Path) -> Option<RunDir> {
    let text = fs::read_to_string(address).ok()?;
    let socket = PathBuf::from(text.trim().strip_prefix("unix://")?);
    RunDir::of_socket(&socket).filter(|_| socket.is_absolute())
}

/// A shim that never got a Create ends by itself; what a dead one left is removed.
fn remove_unused(run_dir: &RunDir) -> Result<(), BootstrapError> {
    let Some(_lock) = run_dir.lock(LOCK_LIMIT)? else { return Ok(()) };
    let lives = std::os::unix::net::UnixStream::connect(run_dir.path().join("shim.sock")).is_ok();
    if !lives && run_dir.load()?.is_none() {
        run_dir.remove()?;
    }
    Ok(())
}

/// Asks the pod's shim, if it lives, to remove one member. Tells whether it did: with the shim gone,
/// the whole sandbox is lost and goes.
fn delete_member(run_dir: &RunDir, id: &str) -> Result<bool, BootstrapError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io_error("cannot make", "the runtime"))?;
    Ok(runtime.block_on(async {
        let socket = run_dir.path().join("shim.sock");
        let Ok(Ok(stream)) = timeout(CALL_LIMIT, UnixStream::connect(&socket)).await else { return false };
        let client = TaskClient::new(Client::new(Socket::new(stream)));
        let context = || context::with_duration(CALL_LIMIT);
        let kill =
            api::KillRequest { id: id.into(), signal: libc::SIGKILL as u32, all: true, ..Default::default() };
        let wait = api::WaitRequest { id: id.into(), ..Default::default() };
        let delete = api::DeleteRequest { id: id.into(), ..Default::default() };
        // What has exited or is gone already fails here, which is fine: Delete tells.
        let _ = client.kill(context(), &kill).await;
        let _ = client.wait(context(), &wait).await;
        match client.delete(context::with_duration(CALL_LIMIT * 3), &delete).await {
            Ok(_) => true,
            Err(ttrpc::Error::RpcStatus(status)) => status.code() == ttrpc::Code::NOT_FOUND,
            Err(_) => false,
        }
    }))
}
