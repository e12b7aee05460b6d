//! Streams in one sandbox: execs, each with its stdout in a FIFO that somebody reads.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{DeleteRequest, ExecProcessRequest, StartRequest},
    protobuf::{MessageField, well_known_types::any::Any},
};
use cube_tests::{
    direct::{Direct, bind_mount},
    lab::Lab,
    needs::Backend,
};
use nix::{
    sys::stat::Mode,
    unistd::{Pid, mkfifo},
};
use serde_json::json;

use crate::{
    cost::{MIB, resident},
    table::Table,
    throughput::relays_of,
};

/// The agent gives stdio to 300 processes, of which the init process is one.
const COUNTS: [usize; 4] = [1, 10, 100, 299];

/// Bytes through all streams together.
const BYTES: usize = 512 << 20;

/// Longest time for all of them.
const LIMIT: Duration = Duration::from_secs(120);

const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

pub(crate) fn measure(table: &mut Table) {
    table.group("cost of many streams in one sandbox, process backend: an exec and a FIFO each");
    let lab = Lab::new(Backend::Process);
    let mut direct = Direct::new(&lab, "c", &["sleep", "3600"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let pids = relays_of(&lab, &direct.key(), "c");
    for count in COUNTS {
        let streams = Streams::open(&direct, &rootfs, count);
        // What starting took is given back.
        thread::sleep(Duration::from_secs(3));
        let idle = pids.map(resident);
        let Transferred { rate, peaks } = streams.transfer(pids);
        let of = format!("{count} streams");
        table.add(format!("{of}: all together"), "MiB/s", rate);
        for (who, idle, peak) in [("agent", idle[0], peaks[0]), ("shim", idle[1], peaks[1])] {
            table.add(format!("{of}: {who} idle, RSS"), "MiB", idle as f64 / MIB);
            table.add(format!("{of}: {who} busy, highest RSS"), "MiB", peak as f64 / MIB);
        }
    }
    direct.kill(9).unwrap();
    direct.wait().unwrap();
    direct.delete().unwrap();
    direct.finish();
}

/// Execs that wait at a gate, and the threads that read what they will write.
struct Streams<'a> {
    direct: &'a Direct<'a>,
    ids: Vec<String>,
    gate: PathBuf,
    readers: Vec<JoinHandle<usize>>,
    bytes: usize,
}

struct Transferred {
    /// MiB per second.
    rate: f64,
    peaks: [u64; 2],
}

impl<'a> Streams<'a> {
    fn open(direct: &'a Direct<'a>, rootfs: &Path, count: usize) -> Streams<'a> {
        // Opening a FIFO for reading waits until somebody has it open for writing.
        let gate = rootfs.join("gate");
        mkfifo(&gate, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let share = BYTES / count;
        let script = format!(": < /gate; exec cube-test-writer blocks 65536 {share}");
        let mut streams =
            Streams { direct, ids: Vec::new(), gate, readers: Vec::new(), bytes: share * count };
        for number in 0..count {
            let id = format!("e{number}");
            let fifo = direct.bundle.join(format!("{id}.stdout"));
            mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
            // The end of a FIFO that nobody has opened for writing yet must not look like its last.
            let keep = File::options().read(true).write(true).open(&fifo).unwrap();
            let reader = File::options().read(true).open(&fifo).unwrap();
            streams.start(&id, &fifo, &script);
            drop(keep);
            let builder = thread::Builder::new().stack_size(64 << 10);
            streams.readers.push(builder.spawn(move || count_bytes(reader)).unwrap());
            std::fs::remove_file(&fifo).unwrap();
            streams.ids.push(id);
        }
        streams
    }

    fn start(&self, exec_id: &str, fifo: &Path, script: &str) {
        let process = json!({
            "user": { "uid": 0, "gid": 0 }, "cwd": "/",
            "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"],
        });
        let spec =
            Any { type_url: PROCESS_TYPE.into(), value: process.to_string().into(), ..Default::default() };
        let (id, exec_id) = (self.direct.id.clone(), exec_id.to_owned());
        let request = ExecProcessRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            stdout: fifo.display().to_string(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.direct.task().exec(self.direct.context(), &request).unwrap();
        let request = StartRequest { id, exec_id, ..Default::default() };
        self.direct.task().start(self.direct.context(), &request).unwrap();
    }

    /// Opens the gate, and watches until the last byte has been read.
    fn transfer(self, pids: [Pid; 2]) -> Transferred {
        let start = Instant::now();
        let gate = File::options().read(true).write(true).open(&self.gate).unwrap();
        let mut peaks = [0; 2];
        while !self.readers.iter().all(JoinHandle::is_finished) {
            assert!(start.elapsed() < LIMIT, "the streams do not end");
            for (peak, pid) in peaks.iter_mut().zip(pids) {
                *peak = resident(pid).max(*peak);
            }
            thread::sleep(Duration::from_millis(2));
        }
        let seconds = start.elapsed().as_secs_f64();
        let bytes: usize = self.readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        assert_eq!(bytes, self.bytes);
        drop(gate);
        std::fs::remove_file(&self.gate).unwrap();
        for exec_id in self.ids {
            let request = DeleteRequest { id: self.direct.id.clone(), exec_id, ..Default::default() };
            self.direct.task().delete(self.direct.context(), &request).unwrap();
        }
        Transferred { rate: bytes as f64 / MIB / seconds, peaks }
    }
}

fn count_bytes(mut from: File) -> usize {
    let mut buffer = vec![0; 64 << 10];
    let mut bytes = 0;
    loop {
        match from.read(&mut buffer).unwrap() {
            0 => return bytes,
            n => bytes += n,
        }
    }
}
