//! `delete`: clean-up from the state on disk alone.
//!
//! containerd runs it when a shim has died, and also after every normal Delete, possibly for several
//! members of a pod at once, and kills it after 5 s. It knows neither whether the shim lives nor
//! what is left, so everything here can be repeated and stops early where there is nothing to do.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::{
    api,
    protobuf::{Message, MessageField},
    shim_async::TaskClient,
};
use tokio::{net::UnixStream, time::timeout};
use tracing::warn;
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context,
};

use super::{ADDRESS_FILE, BootstrapError, Flags, drain, io_error, load_config, ttrpc_address};
use crate::{
    config::Config,
    errors::chain,
    events::timestamp,
    sandbox::{Exit, Host, LinuxHost, spec},
    state::{RunDir, RunDirLock, StateError},
    users,
};

/// How long another `delete` of the same sandbox is waited for.
const LOCK_LIMIT: Duration = Duration::from_millis(3500);

/// Time for each call to a shim that lives.
const CALL_LIMIT: Duration = Duration::from_millis(700);

/// Gives what goes to stdout.
pub(super) fn run(flags: &Flags) -> Result<Vec<u8>, BootstrapError> {
    flags.check()?;
    let pid = clean(flags, &LinuxHost::default())?;
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io_error("cannot make", "the runtime"))?;
    let Some(state) = run_dir.load()? else {
        // Between `start` and the first Create there is a directory without a state.
        runtime.block_on(shut_down(&run_dir));
        return remove_unused(&run_dir).map(|()| 0);
    };
    let member = state.sandbox_id != flags.id && state.containers.keys().any(|id| *id != flags.id);
    if member && runtime.block_on(delete_member(&run_dir, &flags.id)) {
        return Ok(state.vmm_pid);
    }
    let Some(_lock) = run_dir.lock(LOCK_LIMIT)? else { return Ok(state.vmm_pid) };
    // Without a readable configuration the defaults say how logs rotate.
    let config = load_config(None).unwrap_or_default();
    runtime.block_on(destroy(&run_dir, &config, host))?;
    Ok(state.vmm_pid)
}

/// Removes the sandbox in `run_dir`, as [`run`] does, unless it has a shim. May be repeated.
///
/// # Errors
///
/// [`BootstrapError::Lives`] if there is one, and what cannot be removed.
pub async fn clean_up(run_dir: &RunDir, config: &Config) -> Result<(), BootstrapError> {
    let Some(_lock) = run_dir.lock(LOCK_LIMIT)? else { return Ok(()) };
    let socket = run_dir.path().join("shim.sock");
    if !is_silent(&socket) {
        return Err(BootstrapError::Lives(socket));
    }
    destroy(run_dir, config, &LinuxHost::default()).await
}

/// Whether nobody listens on `socket`. In doubt somebody does.
fn is_silent(socket: &Path) -> bool {
    let nobody = [ErrorKind::NotFound, ErrorKind::ConnectionRefused];
    std::os::unix::net::UnixStream::connect(socket).is_err_and(|e| nobody.contains(&e.kind()))
}

/// Removes the sandbox in `run_dir`, which is locked, unless another one has done so meanwhile.
async fn destroy(run_dir: &RunDir, config: &Config, host: &dyn Host) -> Result<(), BootstrapError> {
    if let Some(state) = run_dir.load()? {
        cube_fault::point("cleanup.begun");
        drain::drain(run_dir, &state, &config.log).await;
        cube_fault::point("cleanup.drained");
        host.destroy(run_dir, &state.cgroup)?;
    }
    Ok(())
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

/// Removes what a shim left that never got a Create.
fn remove_unused(run_dir: &RunDir) -> Result<(), BootstrapError> {
    let Some(lock) = run_dir.lock(LOCK_LIMIT)? else { return Ok(()) };
    Ok(remove_if_unused(run_dir, &lock)?)
}

/// Removes a run directory that has no state and no shim.
pub(super) fn remove_if_unused(run_dir: &RunDir, _: &RunDirLock) -> Result<(), StateError> {
    let lives = std::os::unix::net::UnixStream::connect(run_dir.path().join("shim.sock")).is_ok();
    if !lives && run_dir.load()?.is_none() {
        if let Err(e) = users::release_all(run_dir) {
            warn!("cannot give back the users of a sandbox: {}", chain(&e));
        }
        run_dir.remove()?;
    }
    Ok(())
}

async fn connect(run_dir: &RunDir) -> Option<TaskClient> {
    let socket = run_dir.path().join("shim.sock");
    let stream = timeout(CALL_LIMIT, UnixStream::connect(&socket)).await.ok()?.ok()?;
    Some(TaskClient::new(Client::new(Socket::new(stream))))
}

/// A shim without containers ends when it is told so, and takes its files along.
async fn shut_down(run_dir: &RunDir) {
    if let Some(client) = connect(run_dir).await {
        // It may end before its answer is out.
        let _ = client.shutdown(context::with_duration(CALL_LIMIT), &api::ShutdownRequest::new()).await;
    }
}

/// Asks the pod's shim, if it lives, to remove one member. Tells whether it did: with the shim gone,
/// the whole sandbox is lost and goes.
async fn delete_member(run_dir: &RunDir, id: &str) -> bool {
    let Some(client) = connect(run_dir).await else { return false };
    let context = || context::with_duration(CALL_LIMIT);
    let signal = libc::SIGKILL as u32;
    let kill = api::KillRequest { id: id.into(), signal, all: true, ..Default::default() };
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
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use serde_json::Value;

    use super::*;
    use crate::{
        cgroup::{Limited, Limits},
        errors::Error,
        rootfs::block::Staged,
        sandbox::{Placed, Rootfs, RootfsRequest, Selected},
        state::{ContainerState, FORMAT, State},
        vmm::{Disk, VmSpec},
    };

    /// Counts how often a sandbox is destroyed.
    #[derive(Default)]
    struct Counter(AtomicU32);

    impl Host for Counter {
        fn destroy(&self, run_dir: &RunDir, _: &Path) -> Result<(), Error> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(run_dir.remove()?)
        }

        fn cgroup(&self, _: &str, _: Option<&str>) -> Result<Placed, Error> {
            unreachable!()
        }

        fn claim_user(&self, _: &Config, _: &RunDir) -> Result<u32, Error> {
            unreachable!()
        }

        fn create_cgroup(&self, _: &Path) -> Result<(), Error> {
            unreachable!()
        }

        fn limit(&self, _: &Path, _: &Limits) -> Result<Limited, Error> {
            unreachable!()
        }

        fn prepare_rootfs(&self, _: RootfsRequest, _: &mut Value) -> Result<Rootfs, Error> {
            unreachable!()
        }

        fn restore_disks(&self, _: &Config, _: &RunDir, _: &[Disk]) -> Result<Vec<Disk>, Error> {
            unreachable!()
        }

        fn stage_disks(&self, _: &Config, _: &RunDir, _: &[Disk], _: &[Disk]) -> Result<Staged, Error> {
            unreachable!()
        }

        fn release_rootfs(&self, _: &RunDir, _: &str) -> Result<(), Error> {
            unreachable!()
        }

        fn select(&self, _: &Config, _: VmSpec) -> Result<Selected, Error> {
            unreachable!()
        }
    }

    /// A sandbox whose shim has died, with a bundle for each container.
    fn dead_sandbox(root: &Path, containers: &[&str]) -> RunDir {
        let run_dir = RunDir::of(&root.join("run"), "/c", "default", containers[0]);
        run_dir.create().unwrap();
        let entry = |id: &&str| {
            let bundle = root.join(id);
            fs::create_dir_all(&bundle).unwrap();
            let address = format!("unix://{}", run_dir.socket().unwrap().display());
            fs::write(bundle.join(ADDRESS_FILE), address).unwrap();
            ((*id).to_owned(), ContainerState { bundle, log_dir: None, created_ns: 1, guest_id: None })
        };
        let state = State {
            format: FORMAT,
            namespace: "default".into(),
            sandbox_id: containers[0].into(),
            cgroup: "/no/such/cgroup".into(),
            shim_home: None,
            backend: "fake".into(),
            user: 0,
            vmm_pid: 4242,
            timeline: 1,
            past_timelines: Vec::new(),
            suspended: None,
            created_ns: 1,
            containers: containers.iter().map(entry).collect(),
        };
        run_dir.save(&state).unwrap();
        run_dir
    }

    fn flags(root: &Path, id: &str) -> Flags {
        let bundle = root.join(id).display().to_string();
        Flags {
            namespace: "default".into(),
            id: id.into(),
            bundle,
            address: "/c".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_dead_sandbox_is_destroyed_once_however_many_ask_at_once_and_again() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = dead_sandbox(root.path(), &["pod", "m1", "m2"]);
        let host = Counter::default();
        std::thread::scope(|scope| {
            for id in ["pod", "m1", "m2", "m1", "pod"] {
                let flags = flags(root.path(), id);
                let host = &host;
                scope.spawn(move || clean(&flags, host).unwrap());
            }
        });
        assert_eq!(host.0.load(Ordering::Relaxed), 1);
        assert!(!run_dir.path().exists());
        assert_eq!(clean(&flags(root.path(), "pod"), &host).unwrap(), 0);
        assert_eq!(host.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_pid_that_containerd_was_told_is_told_again() {
        let root = tempfile::tempdir().unwrap();
        dead_sandbox(root.path(), &["c1"]);
        assert_eq!(clean(&flags(root.path(), "c1"), &Counter::default()).unwrap(), 4242);
    }

    #[test]
    fn an_address_that_is_no_shims_has_nothing_removed() {
        let root = tempfile::tempdir().unwrap();
        dead_sandbox(root.path(), &["c1"]);
        let precious = root.path().join("precious");
        fs::create_dir_all(&precious).unwrap();
        for socket in ["shim.sock", "other.sock", "../precious/shim.sock"] {
            let address = format!("unix://{}/{socket}", precious.display());
            fs::write(root.path().join("c1").join(ADDRESS_FILE), address).unwrap();
            let _ = clean(&flags(root.path(), "c1"), &Counter::default());
            assert!(precious.exists(), "{socket}");
        }
    }

    #[test]
    fn a_directory_without_a_state_and_without_a_shim_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = dead_sandbox(root.path(), &["c1"]);
        fs::remove_file(run_dir.path().join(crate::state::FILE)).unwrap();
        assert_eq!(clean(&flags(root.path(), "c1"), &Counter::default()).unwrap(), 0);
        assert!(!run_dir.path().exists());
    }
}
