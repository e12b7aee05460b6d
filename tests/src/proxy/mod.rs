//! Stands between a shim and its guest, in the place of the hybrid vsock socket, and lets their
//! connections fail: [`plan`] says which and how, [`pump`] does it.

mod frames;
pub mod plan;
mod pump;

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use cube_protocol::{
    frame::HEADER_LEN,
    ports,
    stream::{Open, Stream},
};
use protobuf::Message;

use self::{
    plan::{Fault, Plan, Point, Target},
    pump::Connection,
};
use crate::{lab::Lab, paths};

/// See the module. Without a plan everything passes.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    listener: UnixListener,
}

#[derive(Debug)]
struct Shared {
    /// Where the guest is.
    real: PathBuf,
    plans: Mutex<Vec<(Target, Plan)>>,
    live: Mutex<Vec<(u32, Weak<Connection>)>>,
    connections: AtomicU64,
    cuts: AtomicU64,
}

impl Proxy {
    /// Takes the place of the socket at `path`, which stays beside it under another name. Connections
    /// that were there before it go on.
    pub fn at(path: &Path) -> Proxy {
        fs::rename(path, real(path)).unwrap();
        Proxy::listen(path, real(path))
    }

    /// Is there before the first connection of the sandbox in `run_dir`, which must not exist yet. Only
    /// the `process` backend can be told to listen elsewhere.
    pub fn before(lab: &Lab, run_dir: &Path) -> Proxy {
        let agent = lab.dir().join("agent-behind-proxy");
        // The shim calls it with "process --listen <socket> ...", when it has removed a stale socket there.
        let script = format!(
            "#!/bin/sh\ncommand=$1 socket=$3\n[ \"$2\" = --listen ] || exit 64\nshift 3\n\
             ln \"${{socket%.vsock}}.proxy\" \"$socket\" || exit 1\n\
             exec '{}' \"$command\" --listen \"${{socket%.vsock}}.real\" \"$@\"\n",
            paths::agent().display()
        );
        fs::write(&agent, script).unwrap();
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
        let config = fs::read_to_string(lab.config_file()).unwrap();
        let config = config.replace(&paths::agent().display().to_string(), agent.to_str().unwrap());
        fs::write(lab.config_file(), config).unwrap();
        fs::create_dir_all(run_dir).unwrap();
        fs::set_permissions(run_dir, fs::Permissions::from_mode(0o700)).unwrap();
        Proxy::listen(&run_dir.join("vm.proxy"), real(&run_dir.join("vsock/vm.vsock")))
    }

    fn listen(path: &Path, real: PathBuf) -> Proxy {
        let listener = UnixListener::bind(path).unwrap();
        let shared = Arc::new(Shared {
            real,
            plans: Mutex::default(),
            live: Mutex::default(),
            connections: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
        });
        let (accepting, serving) = (listener.try_clone().unwrap(), shared.clone());
        thread::spawn(move || {
            while let Ok((near, _)) = accepting.accept() {
                let shared = serving.clone();
                // An error is the end of the connection by one of its sides.
                thread::spawn(move || shared.serve(near).ok());
            }
        });
        Proxy { shared, listener }
    }

    /// From now on new connections to `target` meet what `plan` says.
    pub fn follow(&self, target: Target, plan: Plan) {
        let mut plans = self.shared.plans.lock().unwrap();
        plans.retain(|(other, _)| *other != target);
        plans.push((target, plan));
    }

    /// From now on new connections pass.
    pub fn rest(&self) {
        self.shared.plans.lock().unwrap().clear();
    }

    /// On the connections to `port` that are there now nothing passes any more.
    pub fn freeze(&self, port: u32) {
        let live = self.shared.live.lock().unwrap();
        let frozen = live.iter().filter(|(other, _)| *other == port).filter_map(|(_, live)| live.upgrade());
        frozen.for_each(|connection| connection.freeze());
    }

    /// Connections so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Connections that were cut.
    pub fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Ends accept(2); std has no way to close it under a thread.
        nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both).ok();
    }
}

impl Shared {
    fn serve(&self, mut near: UnixStream) -> io::Result<()> {
        self.connections.fetch_add(1, Ordering::Relaxed);
        let connect = read_line(&mut near)?;
        let port = connect.trim_start_matches("CONNECT ").trim_end().parse().unwrap_or_default();
        let mut fault = self.fault(port, None);
        if fault.as_ref().is_some_and(|fault| fault.cuts_at(Point::Connect)) {
            return self.cut();
        }
        let mut far = UnixStream::connect(&self.real)?;
        far.write_all(connect.as_bytes())?;
        let answer = read_line(&mut far)?;
        match fault.as_ref().map(Fault::answer) {
            Some(Some(bytes)) => {
                near.write_all(&answer.as_bytes()[..bytes.min(answer.len())])?;
                return self.cut();
            }
            _ if fault == Some(Fault::SingleBytes) => {
                answer.as_bytes().chunks(1).try_for_each(|byte| near.write_all(byte))?;
            }
            _ => near.write_all(answer.as_bytes())?,
        }
        let mut head = Vec::new();
        if fault.is_none() && port == ports::STREAM {
            let stream = read_open(&mut near, &mut head)?;
            fault = self.fault(port, stream);
        }
        let connection = Arc::new(Connection::new(near, far, fault)?);
        let mut live = self.live.lock().unwrap();
        live.retain(|(_, connection)| connection.strong_count() > 0);
        live.push((port, Arc::downgrade(&connection)));
        drop(live);
        if connection.run(&head) { self.cut() } else { Ok(()) }
    }

    fn fault(&self, port: u32, stream: Option<Stream>) -> Option<Fault> {
        let mut plans = self.plans.lock().unwrap();
        plans.iter_mut().find(|(target, _)| target.includes(port, stream))?.1.next()
    }

    fn cut(&self) -> io::Result<()> {
        self.cuts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn real(path: &Path) -> PathBuf {
    path.with_extension("real")
}

/// A line of the handshake with its newline; what follows stays on the socket.
fn read_line(socket: &mut UnixStream) -> io::Result<String> {
    let (mut line, mut byte) = (String::new(), [0]);
    while byte[0] != b'\n' {
        socket.read_exact(&mut byte)?;
        line.push(byte[0].into());
    }
    Ok(line)
}

/// The first frame, which tells what stream the connection is for.
fn read_open(socket: &mut UnixStream, frame: &mut Vec<u8>) -> io::Result<Option<Stream>> {
    let mut header = [0; HEADER_LEN];
    socket.read_exact(&mut header)?;
    let mut body = vec![0; frames::body_len(&header)];
    socket.read_exact(&mut body)?;
    frame.extend_from_slice(&header);
    frame.extend_from_slice(&body);
    Ok(Open::parse_from_bytes(&body)?.stream.enum_value().ok())
}
