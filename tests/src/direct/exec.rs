//! Another process in the container of a [`Direct`], with all three streams.

use std::fs::{self, File};

use containerd_shim_protos::{
    api::{
        DeleteRequest, ExecProcessRequest, KillRequest, StartRequest, StateRequest, StateResponse,
        WaitRequest,
    },
    protobuf::well_known_types::any::Any,
};

use super::{Direct, fifos::Fifos, spec};

/// One exec. Its FIFOs go with it.
pub struct Exec<'a> {
    direct: &'a Direct<'a>,
    /// The exec's id.
    pub id: String,
    argv: Vec<String>,
    fifos: Fifos,
}

/// The client's ends of the streams.
#[derive(Debug)]
pub struct Ends {
    /// To write to.
    pub stdin: File,
    /// To read from.
    pub stdout: File,
    /// To read from.
    pub stderr: File,
}

impl<'a> Exec<'a> {
    /// An exec that the shim does not know yet.
    pub fn new(direct: &'a Direct<'a>, id: &str, argv: &[&str]) -> (Exec<'a>, Ends) {
        let path = |stream| direct.bundle.with_file_name(format!("{id}.{stream}"));
        let mut fifos = Fifos::default();
        let stdin = fifos.writer(&path("stdin"));
        let [stdout, stderr] =
            [("stdout", 1), ("stderr", 2)].map(|(stream, n)| fifos.reader(n, &path(stream)));
        let argv = argv.iter().map(|arg| (*arg).to_owned()).collect();
        (Exec { direct, id: id.into(), argv, fifos }, Ends { stdin, stdout, stderr })
    }

    /// Makes the exec, in the container of its shim.
    pub fn create(&mut self) -> ttrpc::Result<()> {
        let argv: Vec<&str> = self.argv.iter().map(String::as_str).collect();
        let process = spec(&argv)["process"].to_string().into_bytes();
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned();
        let [stdin, stdout, stderr] = self.fifos.paths.clone();
        let request = ExecProcessRequest {
            id: self.direct.id.clone(),
            exec_id: self.id.clone(),
            stdin,
            stdout,
            stderr,
            spec: Some(Any { type_url, value: process, ..Default::default() }).into(),
            ..Default::default()
        };
        let made = self.direct.task().exec(self.direct.context(), &request);
        self.fifos.attached();
        made.map(drop)
    }

    /// Lets it run.
    pub fn start(&self) -> ttrpc::Result<()> {
        let request =
            StartRequest { id: self.direct.id.clone(), exec_id: self.id.clone(), ..Default::default() };
        self.direct.task().start(self.direct.context(), &request).map(drop)
    }

    /// Its state.
    pub fn state(&self) -> ttrpc::Result<StateResponse> {
        let request =
            StateRequest { id: self.direct.id.clone(), exec_id: self.id.clone(), ..Default::default() };
        self.direct.task().state(self.direct.context(), &request)
    }

    /// No more will come to its stdin.
    pub fn close_stdin(&self) -> ttrpc::Result<()> {
        self.direct.close_stdin(&self.id)
    }

    /// Sends a signal.
    pub fn kill(&self, signal: u32) -> ttrpc::Result<()> {
        let (id, exec_id) = (self.direct.id.clone(), self.id.clone());
        let request = KillRequest { id, exec_id, signal, ..Default::default() };
        self.direct.task().kill(self.direct.context(), &request).map(drop)
    }

    /// Waits for its end and gives its exit status.
    pub fn wait(&self) -> ttrpc::Result<u32> {
        let request =
            WaitRequest { id: self.direct.id.clone(), exec_id: self.id.clone(), ..Default::default() };
        Ok(self.direct.task().wait(self.direct.context(), &request)?.exit_status)
    }

    /// Deletes it, and gives its exit status.
    pub fn delete(&self) -> ttrpc::Result<u32> {
        let request =
            DeleteRequest { id: self.direct.id.clone(), exec_id: self.id.clone(), ..Default::default() };
        Ok(self.direct.task().delete(self.direct.context(), &request)?.exit_status)
    }
}

impl Drop for Exec<'_> {
    fn drop(&mut self) {
        for path in self.fifos.paths.iter().filter(|path| !path.is_empty()) {
            fs::remove_file(path).ok();
        }
    }
}
