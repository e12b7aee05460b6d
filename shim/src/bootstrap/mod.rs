//! How containerd runs this program: `start`, `delete`, `-info`, `-v`, and our own `serve`, the
//! daemon that `start` leaves behind.
//!
//! The command line is that of Go's flag package. See containerd's runtime v2 documentation,
//! `docs/runtime-v2.md` in its sources.

mod delete;
mod drain;
mod expired;
mod info;
mod reply;
mod serve;
mod start;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
};

use containerd_shim_protos::protobuf;

use crate::{
    config::{Config, ConfigError},
    errors::Error,
    options::OptionsError,
    sandbox::spec::SpecError,
    state::StateError,
};

pub use delete::clean_up;
pub use reply::Protocol;

/// Name under which containerd's configuration knows this runtime.
pub const RUNTIME: &str = "io.containerd.cube.v2";

/// Where containerd takes events, for those before 2.3; later ones say it in `BootstrapParams`.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// File in each bundle that names the shim's socket. Without it containerd 1.6 and 1.7 delete a live
/// sandbox when they restart.
const ADDRESS_FILE: &str = "address";

/// The command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// Log more.
    pub debug: bool,
    /// Print the version.
    pub version: bool,
    /// Describe the runtime.
    pub info: bool,
    /// containerd namespace.
    pub namespace: String,
    /// Container id.
    pub id: String,
    /// The bundle, if it is not the working directory.
    pub bundle: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// What to do.
    pub action: String,
}

/// Why an action failed; printed to stderr, which containerd shows to its client.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// A command line that containerd does not write.
    #[error("invalid command line")]
    Flags(#[from] go_flag::FlagError),
    /// An action that we do not know, or none.
    #[error("unknown action {0:?}: containerd runs this program with start or delete; try -v or -info")]
    Action(String),
    /// A flag or variable that the action needs is missing.
    #[error("{0} is not set")]
    Missing(&'static str),
    /// `BootstrapParams` for somebody else.
    #[error("the bootstrap parameters are for {found:?}, the command line says {expected:?}")]
    Identity {
        /// Namespace and id of the parameters.
        found: String,
        /// Namespace and id of the command line.
        expected: String,
    },
    /// Something on the host failed.
    #[error("{action} {path}")]
    Io {
        /// What was done, "cannot bind" for example.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon ended before it was ready.
    #[error("the shim did not start: {0}")]
    Daemon(String),
    /// A message could not be encoded or decoded.
    #[error("protobuf")]
    Protobuf(#[from] protobuf::Error),
    /// JSON could not be encoded.
    #[error("JSON")]
    Json(#[from] serde_json::Error),
    /// The ttrpc server cannot run.
    #[error("cannot serve")]
    Serve(#[from] ttrpc::Error),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What is to be cleaned up is somebody's.
    #[error("the shim with the socket {0} lives: it has to remove its sandbox itself")]
    Lives(PathBuf),
    /// The runtime options cannot be used.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The spec cannot be used.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The state on disk cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// An id is not valid, or the clean-up failed.
    #[error(transparent)]
    Sandbox(#[from] Error),
}

impl Flags {
    /// Parses the arguments, the program's name excluded.
    pub fn parse(arguments: &[OsString]) -> Result<Flags, BootstrapError> {
        let mut flags = Flags::default();
        let (mut v, mut version) = (false, false);
        // Taken and not needed: we publish over ttrpc, and choose our socket ourselves.
        let (mut publish_binary, mut socket) = (String::new(), String::new());
        let rest: Vec<String> = go_flag::parse_args(arguments, |set| {
            set.add_flag("debug", &mut flags.debug);
            set.add_flag("v", &mut v);
            set.add_flag("version", &mut version);
            set.add_flag("info", &mut flags.info);
            set.add_flag("namespace", &mut flags.namespace);
            set.add_flag("id", &mut flags.id);
            set.add_flag("bundle", &mut flags.bundle);
            set.add_flag("address", &mut flags.address);
            set.add_flag("publish-binary", &mut publish_binary);
            set.add_flag("socket", &mut socket);
        })?;
        flags.version = v || version;
        flags.action = rest.into_iter().next().unwrap_or_default();
        Ok(flags)
    }

    /// The bundle: containerd runs `start` and `delete` in it.
    fn bundle(&self) -> Result<PathBuf, BootstrapError> {
        if !self.bundle.is_empty() {
            return Ok(PathBuf::from(&self.bundle));
        }
        std::env::current_dir().map_err(io_error("cannot find", "the working directory"))
    }

    fn check(&self) -> Result<(), BootstrapError> {
        if self.namespace.is_empty() {
            return Err(BootstrapError::Missing("-namespace"));
        }
        // It becomes a part of paths, as the id does.
        crate::task::check_id("namespace", &self.namespace)?;
        Ok(crate::task::check_id("container id", &self.id)?)
    }
}

/// Runs what the command line says. On success stdout has the answer and nothing else.
pub fn run(arguments: &[OsString]) -> Result<(), BootstrapError> {
    let flags = Flags::parse(arguments)?;
    if flags.version {
        return print(info::version().as_bytes());
    }
    if flags.info {
        return print(&info::encode()?);
    }
    match flags.action.as_str() {
        "start" => print(&start::run(&flags)?),
        "delete" => print(&delete::run(&flags)?),
        serve::ACTION => serve::run(&flags),
        action => Err(BootstrapError::Action(action.into())),
    }
}

fn print(answer: &[u8]) -> Result<(), BootstrapError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(answer).and_then(|()| stdout.flush()).map_err(io_error("cannot write to", "stdout"))
}

/// Address of containerd's event service, in the order of how sure we can be of it.
fn ttrpc_address(given: Option<&str>, flags: &Flags) -> Result<String, BootstrapError> {
    let given = given.map(str::to_owned).or_else(|| std::env::var(TTRPC_ADDRESS).ok());
    match given.filter(|address| !address.is_empty()) {
        Some(address) => Ok(address),
        // containerd's default for it.
        None if !flags.address.is_empty() => Ok(format!("{}.ttrpc", flags.address)),
        None => Err(BootstrapError::Missing(TTRPC_ADDRESS)),
    }
}

fn load_config(explicit: Option<PathBuf>) -> Result<Config, BootstrapError> {
    Ok(Config::load(explicit.as_deref())?)
}

fn io_error(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> BootstrapError {
    let path = path.into();
    move |source| BootstrapError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Flags {
        Flags::parse(&line.split(' ').map(OsString::from).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_command_lines_of_containerd_are_understood() {
        let flags = parse(
            "-namespace default -address /run/c/c.sock -publish-binary /usr/bin/containerd -id c1 -bundle /b -debug delete",
        );
        let expected = Flags {
            debug: true,
            namespace: "default".into(),
            id: "c1".into(),
            bundle: "/b".into(),
            address: "/run/c/c.sock".into(),
            action: "delete".into(),
            ..Default::default()
        };
        assert_eq!(flags, expected);
        assert!(parse("-v").version && parse("-version").version && parse("-info").info);
    }

    #[test]
    fn an_id_that_leaves_its_directory_is_refused() {
        assert!(parse("-namespace default -id ../x start").check().is_err());
        assert!(parse("-namespace ../x -id c start").check().is_err());
        assert!(parse("-id c start").check().is_err());
        assert!(parse("-namespace k8s.io -id c start").check().is_ok());
    }
}
