//! PID 1 duties on the `process` backend, where the guest is a set of fresh namespaces.
//!
//! The mount namespace is a copy of the host's. A tmpfs over /run gives the agent the paths that it
//! has in a VM, /run/cube/shared and /run/cube/containers, without a trace on the host.

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open, openat},
    mount::{MsFlags, mount},
    sys::stat::Mode,
};

use super::{BootError, cgroup, executable};
use crate::{container, guest::paths};

/// The command line of `cube-agent process`. Every path is absolute.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Unix socket to listen on; a stale one is replaced.
    pub listen: PathBuf,
    /// cgroup v2 directory that belongs to the agent; it is not a member itself.
    pub cgroup: PathBuf,
    /// Directory for the mount points of containers.
    pub state: PathBuf,
}

/// A command line that [`Options::parse`] does not take.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0}; usage: cube-agent process --listen <unix socket> --cgroup <cgroup v2 directory> --state <directory>"
)]
pub struct Usage(String);

impl Options {
    /// Reads the arguments after `process`.
    pub fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Options, Usage> {
        let (mut listen, mut cgroup, mut state) = (None, None, None);
        while let Some(option) = args.next() {
            let slot = match option.to_str() {
                Some("--listen") => &mut listen,
                Some("--cgroup") => &mut cgroup,
                Some("--state") => &mut state,
                _ => return Err(Usage(format!("unknown argument {option:?}"))),
            };
            let path = args.next().map(PathBuf::from).filter(|path| path.is_absolute());
            *slot = Some(path.ok_or_else(|| Usage(format!("{option:?} needs an absolute path")))?);
        }
        let given = |path: Option<PathBuf>, name| path.ok_or_else(|| Usage(format!("{name} is missing")));
        Ok(Options {
            listen: given(listen, "--listen")?,
            cgroup: given(cgroup, "--cgroup")?,
            state: given(state, "--state")?,
        })
    }
}

/// The host's /run, which the agent's own tmpfs hides.
#[derive(Debug)]
pub struct HostRun(OwnedFd);

impl HostRun {
    /// Opens `path` as the host sees it, for a bind mount.
    pub fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        Ok(match path.strip_prefix("/run") {
            Ok(below) if !below.as_os_str().is_empty() => openat(&self.0, below, flags, Mode::empty())?,
            _ => open(path, flags, Mode::empty())?,
        })
    }
}

/// Where the mounts of this process find an open file. Needs /proc.
pub fn fd_path(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// Listens, and makes the namespaces look like a guest. To be called by PID 1, with one thread.
pub fn set_up(options: &Options) -> Result<(UnixListener, HostRun), BootError> {
    if std::process::id() != 1 {
        // The mounts below would be made on the host.
        return Err(BootError::NotPidOne(std::process::id()));
    }
    // Not private: mounts that the host makes below the shared directory later have to arrive here.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .map_err(BootError::sys("cannot change the mount propagation of", "/"))?;
    let listener = listen(&options.listen)?;
    fs::create_dir_all(&options.state).map_err(BootError::io("cannot create", &options.state))?;
    cgroup::delegate(&options.cgroup)?;

    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("proc"), "/proc", Some("proc"), plain | MsFlags::MS_NOEXEC, None::<&str>)
        .map_err(BootError::sys("cannot mount a file system on", "/proc"))?;
    let directory = |path: &Path| {
        open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(BootError::sys("cannot open", path))
    };
    let (host_run, state) = (directory(Path::new("/run"))?, directory(&options.state)?);
    mount(Some("tmpfs"), "/run", Some("tmpfs"), plain, Some("mode=0755"))
        .map_err(BootError::sys("cannot mount a file system on", "/run"))?;
    fs::create_dir_all(paths::CONTAINERS).map_err(BootError::io("cannot create", paths::CONTAINERS))?;
    mount(Some(&fd_path(&state)), paths::CONTAINERS, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(BootError::sys("cannot bind the state directory to", paths::CONTAINERS))?;
    container::set_stage_executable(executable::protect()?);
    Ok((listener, HostRun(host_run)))
}

fn listen(path: &Path) -> Result<UnixListener, BootError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(BootError::io("cannot replace", path)(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(BootError::io("cannot listen on", path))?;
    listener.set_nonblocking(true).map_err(BootError::io("cannot listen on", path))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, Usage> {
        Options::parse(args.iter().map(OsString::from))
    }

    #[test]
    fn every_option_is_needed_and_has_an_absolute_path() {
        let options = parse(&["--state", "/s", "--listen", "/l", "--cgroup", "/c"]).unwrap();
        assert_eq!(options, Options { listen: "/l".into(), cgroup: "/c".into(), state: "/s".into() });
        for (args, complaint) in [
            (&["--listen", "/l", "--cgroup", "/c"][..], "--state is missing"),
            (&["--listen", "l"][..], "\"--listen\" needs an absolute path"),
            (&["--listen"][..], "\"--listen\" needs an absolute path"),
            (&["--verbose"][..], "unknown argument \"--verbose\""),
        ] {
            let error = parse(args).unwrap_err().to_string();
            assert!(error.starts_with(complaint), "{error}");
        }
    }
}
