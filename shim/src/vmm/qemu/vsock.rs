//! vhost-device-vsock: gives QEMU the hybrid vsock that Cloud Hypervisor has built in.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::sleep;

use super::{
    super::{
        VSOCK_SOCKET, VmSpec, VmmError,
        helper::{Helper, Launch, own_dir, remove_stale},
        program::{VSOCK_HINT, find},
        wall::{Root, Wall},
    },
    directory, vsock_device_socket,
};
use crate::cgroup::SandboxCgroup;

/// The name that the host's socket has until the guest's driver is ready.
const UNPUBLISHED: &str = "vsock/host.sock";

/// How often the daemon is looked at while the guest boots.
const POLL: Duration = Duration::from_millis(10);

/// Starts the daemon. The host can dial after [`publish`].
///
/// As a user without capabilities, with a filter of system calls, and a root of which it can write to one
/// directory: it has no wall of its own, and parses the queues of the guest.
pub(super) fn launch(spec: &VmSpec, program: &Path) -> Result<Helper, VmmError> {
    let program = find(program, VSOCK_HINT)?;
    let dir = directory(&spec.run_dir);
    own_dir(&dir, spec.helper_user())?;
    let root = Root::new(&spec.root()).program(&program).write(&dir);
    let root = root.device("/dev/null".as_ref(), 0o666, spec.helper_user());
    for socket in
        [vsock_device_socket(&spec.run_dir), spec.run_dir.join(UNPUBLISHED), spec.run_dir.join(VSOCK_SOCKET)]
    {
        remove_stale(&socket)?;
    }
    Helper::launch(Launch {
        program,
        args: vec![
            "--guest-cid=3".into(),
            "--socket".into(),
            vsock_device_socket(&spec.run_dir).into(),
            "--uds-path".into(),
            spec.run_dir.join(UNPUBLISHED).into(),
        ],
        cgroup: SandboxCgroup::at(&spec.cgroup).helpers(),
        fds: Vec::new(),
        wall: Wall::helper(root, spec.helper_user()).filtered(),
        stdout: None,
    })
}

/// Gives the host's socket its name once the guest's driver has started the device.
///
/// Between the moment when QEMU shares the guest's memory and the one when it sets up the queues,
/// the daemon (0.3.0) takes a connection, finds its queue not ready, and ends the thread that serves
/// the queues: every later connection hangs. So nobody may find the socket before.
pub(super) async fn publish(daemon: Helper, run_dir: PathBuf) {
    let ready = async {
        while !serves_queues(daemon.pid())? {
            sleep(POLL).await;
        }
        fs::rename(run_dir.join(UNPUBLISHED), run_dir.join(VSOCK_SOCKET))
    };
    tokio::select! {
        _ = daemon.ended() => {}
        result = ready => match result {
            Ok(()) => tracing::debug!("the guest's vsock device is ready"),
            Err(error) => tracing::error!(%error, "the guest's vsock device cannot be watched"),
        }
    }
}

/// Whether the daemon waits for the guest on both of its queues, RX (0) and TX (1): it adds a queue
/// to its epoll instance, with the queue's number as the data, right after it has made it ready.
fn serves_queues(pid: u32) -> io::Result<bool> {
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor that was closed meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
        if waits_on_queues(&info) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn waits_on_queues(fdinfo: &str) -> bool {
    let data: Vec<u64> = fdinfo.lines().filter_map(epoll_data).collect();
    data.contains(&0) && data.contains(&1)
}

/// `tfd:        7 events:        1 data:                1 pos:0 ino:2 sdev:e`, see proc_pid_fdinfo(5).
fn epoll_data(line: &str) -> Option<u64> {
    let mut words = line.strip_prefix("tfd:")?.split_whitespace().skip_while(|word| *word != "data:");
    u64::from_str_radix(words.nth(1)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use nix::sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
        eventfd::EventFd,
    };

    use super::*;

    #[test]
    fn the_daemon_is_ready_when_it_waits_on_both_queues() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let queues = [EventFd::new().unwrap(), EventFd::new().unwrap()];
        let path = format!("/proc/self/fdinfo/{}", epoll.0.as_raw_fd());
        let waits = || waits_on_queues(&fs::read_to_string(&path).unwrap());
        for (number, queue) in queues.iter().enumerate() {
            assert!(!waits());
            epoll.add(queue.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, number as u64)).unwrap();
        }
        assert!(waits());
    }

    #[test]
    fn other_lines_of_fdinfo_say_nothing() {
        assert_eq!(
            epoll_data("tfd:        7 events:       1b data:               ff pos:0 ino:2"),
            Some(255)
        );
        for line in ["pos:\t0", "flags:\t02", "eventfd-count: 0", "tfd: 7", ""] {
            assert_eq!(epoll_data(line), None);
        }
    }
}
