//! The same pipeline where the host asks for output: a ttrpc request for every 4 KiB, as shims do that
//! read their agent's `ReadStdout`. The runtime is the agent's, tokio with one thread.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    path::Path,
    sync::Mutex,
};

use containerd_shim_protos::protobuf::{
    Message,
    well_known_types::wrappers::{BytesValue, UInt32Value},
};
use tokio::io::{Interest, unix::AsyncFd};
use ttrpc::{
    asynchronous::{Client, MethodHandler, Server, Service, TtrpcContext},
    proto::{Request, Response},
};

use crate::pipeline::writer;

const SERVICE: &str = "bench.Polling";
const METHOD: &str = "ReadStdout";

/// Bytes asked for at a time.
const CHUNK: u32 = 4096;

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

/// Answers requests with what comes out of the writer's pipe.
struct ReadStdout {
    pipe: AsyncFd<File>,
    done: Mutex<Option<tokio::sync::oneshot::Sender<()>>>,
}

impl ReadStdout {
    async fn read(&self, max: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; max as usize];
        let len = self.pipe.async_io(Interest::READABLE, |mut pipe| pipe.read(&mut bytes)).await?;
        bytes.truncate(len);
        Ok(bytes)
    }
}

#[async_trait::async_trait]
impl MethodHandler for ReadStdout {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let max = UInt32Value::parse_from_bytes(&request.payload).unwrap().value;
        let value = self.read(max).await.unwrap();
        if value.is_empty()
            && let Some(done) = self.done.lock().unwrap().take()
        {
            done.send(()).unwrap();
        }
        let payload = BytesValue { value, ..Default::default() }.write_to_bytes().unwrap();
        let mut response = Response::new();
        response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
        response.payload = payload;
        Ok(response)
    }
}

/// The agent's part.
pub(crate) fn relay(socket: &Path, bytes: &str) {
    let (mut writer, pipe) = writer(bytes);
    nix::fcntl::fcntl(&pipe, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    block_on(async {
        let (done, over) = tokio::sync::oneshot::channel();
        // SAFETY: a File stays the same open descriptor until the AsyncFd that owns it drops it.
        let pipe = unsafe { AsyncFd::register_with_interest(File::from(pipe), Interest::READABLE) }.unwrap();
        let handler: Box<dyn MethodHandler + Send + Sync> =
            Box::new(ReadStdout { pipe, done: Mutex::new(Some(done)) });
        let service =
            Service { methods: HashMap::from([(METHOD.to_owned(), handler)]), streams: HashMap::new() };
        let address = format!("unix://{}", socket.display());
        let services = HashMap::from([(SERVICE.to_owned(), service)]);
        let mut server = Server::new().bind(&address).unwrap().register_service(services);
        server.start().await.unwrap();
        over.await.unwrap();
        // Answers that are being written go out first.
        server.shutdown().await.unwrap();
    });
    assert!(writer.wait().unwrap().success());
}

/// The shim's part.
pub(crate) fn receive(socket: &Path, file: &Path) {
    let mut file = File::create_new(file).unwrap();
    block_on(async {
        let client = Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
        let ask = UInt32Value { value: CHUNK, ..Default::default() }.write_to_bytes().unwrap();
        loop {
            let mut request = Request::new();
            request.service = SERVICE.into();
            request.method = METHOD.into();
            request.payload = ask.clone();
            let answer = client.request(request).await.unwrap();
            let bytes = BytesValue::parse_from_bytes(&answer.payload).unwrap().value;
            if bytes.is_empty() {
                return;
            }
            file.write_all(&bytes).unwrap();
        }
    });
}
