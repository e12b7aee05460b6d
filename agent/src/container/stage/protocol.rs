//! What agent and init stage tell each other.
//!
//! | fd | the stage inherits |
//! | --- | --- |
//! | 0, 1, 2 | stdio of the container's process (/dev/null if it will have a terminal) |
//! | 3 | a `SOCK_SEQPACKET` socket: [`Report`]s to the agent, one byte "go" back |
//! | 4 | a memfd with the [`Instructions`] as JSON |
//! | 5 | init: `cgroup.procs` of the leaf, open for writing; exec: pidfd of the container's init |
//!
//! Order: TERMINAL if there is one, READY; then the process that becomes the program, which is the stage
//! or a child that READY brings along, waits for "go" and executes it. All these fds are CLOEXEC by then,
//! so the end of the socket is the sign that `execve` succeeded. FAILED may come at any point and is the
//! last message.
//!
//! The child is in sight of the container, which may be able to take it over, and with it the socket. So
//! every message comes with the pid of its sender, from the kernel, and nothing but FAILED is believed of
//! any other process than the stage.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Seek, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
            UnixCredentials, recvmsg, send, sendmsg, setsockopt, socketpair, sockopt::PassCred,
        },
    },
};
use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize};

use crate::container::{ContainerError, namespaces::Namespaces, readable::Readable};

/// The control socket in the stage.
pub(in crate::container) const CONTROL_FD: RawFd = 3;
/// The instructions in the stage.
pub(super) const INSTRUCTIONS_FD: RawFd = 4;
/// See the table.
pub(super) const EXTRA_FD: RawFd = 5;

/// Reports are a few paths long; what is longer is cut.
const MAX_REPORT: usize = 16 * 1024;

/// What the stage is to become.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::container) enum Instructions {
    Init(Box<Init>),
    Exec(Box<Exec>),
}

/// The init process of a container.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::container) struct Init {
    pub(in crate::container) spec: Spec,
    pub(in crate::container) rootfs: PathBuf,
    pub(in crate::container) namespaces: Namespaces,
    pub(in crate::container) proc: Proc,
    pub(in crate::container) allow_vsock: bool,
}

/// Where the proc file system of a container comes from. It shows the pid namespace of the process that
/// mounts it, which a stage that stays outside of the container's never can.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::container) enum Proc {
    /// The stage mounts it.
    Mount,
    /// The stage is the first process of a pid namespace: it mounts one in this directory of the guest,
    /// too, for containers that join the namespace later.
    Keep(PathBuf),
    /// The stage binds the one that another container's has kept there.
    Kept(PathBuf),
}

/// Another process in a container.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::container) struct Exec {
    pub(in crate::container) process: Process,
    pub(in crate::container) allow_vsock: bool,
}

impl Instructions {
    /// In a memfd, because they may be longer than any socket or pipe buffer.
    pub(in crate::container) fn to_memfd(&self) -> io::Result<OwnedFd> {
        let mut file = std::fs::File::from(memfd_create("instructions", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&serde_json::to_vec(self)?)?;
        file.rewind()?;
        Ok(file.into())
    }

    pub(super) fn from_memfd(fd: OwnedFd) -> io::Result<Self> {
        let mut json = Vec::new();
        std::fs::File::from(fd).read_to_end(&mut json)?;
        Ok(serde_json::from_slice(&json)?)
    }
}

/// A message of the stage.
#[derive(Debug)]
pub(in crate::container) enum Report {
    /// Master of the terminal.
    Terminal(OwnedFd),
    /// Only `execve` is left, in the stage itself or in the child that it has made.
    Ready(Option<Born>),
    /// What it did when it failed, and the errno.
    Failed { action: String, errno: i32 },
}

/// The process that is to become the program: a child of the agent's, made by its stage.
#[derive(Debug)]
pub(in crate::container) struct Born {
    /// Pid in the agent's pid namespace.
    pub(in crate::container) pid: i32,
    pub(in crate::container) pidfd: OwnedFd,
}

/// A report, and who sent it: a pid in the agent's pid namespace.
#[derive(Debug)]
pub(in crate::container) struct Message {
    pub(in crate::container) sender: i32,
    pub(in crate::container) report: Report,
}

const TAG_TERMINAL: u8 = b'T';
const TAG_READY: u8 = b'R';
const TAG_FAILED: u8 = b'F';

/// A FAILED message of fixed size, which the child can fill in between clone and execve, where it must
/// not allocate: put the errno into bytes 1 to 4.
pub(in crate::container) fn failed_template(action: &str) -> Vec<u8> {
    let mut message = vec![TAG_FAILED, 0, 0, 0, 0];
    message.extend_from_slice(action.as_bytes().get(..MAX_REPORT - 5).unwrap_or(action.as_bytes()));
    message
}

/// A pair of connected control sockets: the agent's end, and the one that the stage inherits.
pub(in crate::container) fn control_sockets() -> Result<(AgentEnd, OwnedFd), ContainerError> {
    let sockets = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    sockets
        .map_err(io::Error::from)
        .and_then(|(ours, theirs)| {
            setsockopt(&ours, PassCred, &true)?;
            Ok((AgentEnd(Readable::new(ours)?), theirs))
        })
        .map_err(|source| ContainerError::stage("make a socket for the init stage", source))
}

/// The agent's end of the control socket.
#[derive(Debug)]
pub(in crate::container) struct AgentEnd(Readable);

impl AgentEnd {
    /// Lets the stage execute the program.
    pub(in crate::container) fn go(&self) -> io::Result<()> {
        send(self.0.as_raw_fd(), b"g", MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }

    /// The next message; `None` when the stage is gone or has become the program. Cancel safe.
    pub(in crate::container) async fn message(&self) -> io::Result<Option<Message>> {
        match self.0.read(|fd| receive(fd.as_raw_fd(), MsgFlags::MSG_DONTWAIT)).await {
            // A stage that died with an unread "go" in its socket resets the connection.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            report => report,
        }
    }
}

fn receive(socket: RawFd, flags: MsgFlags) -> io::Result<Option<Message>> {
    let mut bytes = vec![0; MAX_REPORT];
    let mut ancillary = cmsg_space!(UnixCredentials, RawFd);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket, &mut buffers, Some(&mut ancillary), flags)?;
    let length = message.bytes;
    let (mut sender, mut passed) = (0, Vec::new());
    for cmsg in message.cmsgs()? {
        match cmsg {
            ControlMessageOwned::ScmCredentials(credentials) => sender = credentials.pid(),
            ControlMessageOwned::ScmRights(fds) => passed.extend(fds.into_iter().map(|fd| {
                // SAFETY: the kernel has just installed it for us, and nobody else knows it.
                unsafe { OwnedFd::from_raw_fd(fd) }
            })),
            _ => {}
        }
    }
    bytes.truncate(length);
    let report = decode(&bytes, passed.into_iter().next())?;
    Ok(report.map(|report| Message { sender, report }))
}

fn decode(message: &[u8], passed: Option<OwnedFd>) -> io::Result<Option<Report>> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed report of the init stage");
    let Some((tag, rest)) = message.split_first() else { return Ok(None) };
    match *tag {
        TAG_READY => {
            let born = |pidfd| {
                let (pid, _) = rest.split_first_chunk().ok_or_else(malformed)?;
                Ok::<_, io::Error>(Born { pid: i32::from_ne_bytes(*pid), pidfd })
            };
            Ok(Some(Report::Ready(passed.map(born).transpose()?)))
        }
        TAG_TERMINAL => Ok(Some(Report::Terminal(passed.ok_or_else(malformed)?))),
        TAG_FAILED => {
            let (errno, action) = rest.split_first_chunk().ok_or_else(malformed)?;
            let action = String::from_utf8_lossy(action).into_owned();
            Ok(Some(Report::Failed { action, errno: i32::from_ne_bytes(*errno) }))
        }
        _ => Err(malformed()),
    }
}

/// A report that is well formed but out of order, or of somebody who has none to make.
pub(in crate::container) fn unexpected(message: &Message) -> ContainerError {
    let source = io::Error::new(io::ErrorKind::InvalidData, format!("unexpected report {message:?}"));
    ContainerError::stage("follow the init stage", source)
}

/// The stage's end of the control socket.
#[derive(Debug)]
pub(super) struct StageEnd(OwnedFd);

impl StageEnd {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub(super) fn terminal(&self, master: &OwnedFd) -> nix::Result<()> {
        self.pass(&[TAG_TERMINAL], master)
    }

    /// This very process is to become the program.
    pub(super) fn ready(&self) -> nix::Result<()> {
        send(self.0.as_raw_fd(), &[TAG_READY], MsgFlags::MSG_NOSIGNAL).map(drop)
    }

    /// A child is to become it.
    pub(super) fn born(&self, child: &Born) -> nix::Result<()> {
        let [a, b, c, d] = child.pid.to_ne_bytes();
        self.pass(&[TAG_READY, a, b, c, d], &child.pidfd)
    }

    fn pass(&self, message: &[u8], fd: &OwnedFd) -> nix::Result<()> {
        let fds = [fd.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let bytes = [IoSlice::new(message)];
        sendmsg::<()>(self.0.as_raw_fd(), &bytes, &rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
    }

    pub(super) fn failed(&self, action: &str, errno: Errno) {
        let mut message = failed_template(action);
        if let Some(place) = message.get_mut(1..5) {
            place.copy_from_slice(&(errno as i32).to_ne_bytes());
        }
        // An agent that is gone needs no report.
        let _ = send(self.0.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL);
    }

    /// Waits for "go". `false` if the agent is gone or wants no such process any more.
    pub(super) fn await_go(&self) -> nix::Result<bool> {
        let mut byte = [0];
        loop {
            match nix::sys::socket::recv(self.0.as_raw_fd(), &mut byte, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                received => return received.map(|length| length > 0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_arrives_with_its_text_and_errno_and_then_the_end() {
        let (agent, stage) = control_sockets().unwrap();
        let stage = StageEnd::new(stage);
        stage.failed("exec /bin/nosuch", Errno::ENOENT);
        drop(stage);
        let Report::Failed { action, errno } = report(&agent).await else { panic!() };
        assert_eq!((action.as_str(), errno), ("exec /bin/nosuch", libc::ENOENT));
        assert!(agent.message().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn the_death_of_a_stage_that_was_told_to_go_is_an_end_and_no_error() {
        let (agent, stage) = control_sockets().unwrap();
        agent.go().unwrap();
        drop(stage);
        assert!(agent.message().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_passed_descriptor_is_the_senders_file() {
        let (agent, stage) = control_sockets().unwrap();
        let master = memfd_create("master", MFdFlags::MFD_CLOEXEC).unwrap();
        StageEnd::new(stage).terminal(&master).unwrap();
        let Report::Terminal(received) = report(&agent).await else { panic!() };
        assert_eq!(inode(&received), inode(&master));
    }

    #[tokio::test]
    async fn a_child_arrives_with_its_pid_and_descriptor() {
        let (agent, stage) = control_sockets().unwrap();
        let stage = StageEnd::new(stage);
        stage.ready().unwrap();
        assert!(matches!(report(&agent).await, Report::Ready(None)));
        let pidfd = memfd_create("stands for a pidfd", MFdFlags::MFD_CLOEXEC).unwrap();
        let sent = Born { pid: 0x0102_0304, pidfd };
        stage.born(&sent).unwrap();
        let Report::Ready(Some(received)) = report(&agent).await else { panic!() };
        assert_eq!((received.pid, inode(&received.pidfd)), (sent.pid, inode(&sent.pidfd)));
    }

    /// The kernel says who sent it.
    async fn report(agent: &AgentEnd) -> Report {
        let message = agent.message().await.unwrap().unwrap();
        assert_eq!(message.sender.unsigned_abs(), std::process::id());
        message.report
    }

    fn inode(fd: &OwnedFd) -> libc::ino_t {
        nix::sys::stat::fstat(fd).unwrap().st_ino
    }
}
