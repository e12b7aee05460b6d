//! How long a pause and a resume take, and how much of that is ours: all but what the VMM needs itself.

use std::{
    fs::File,
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use cube_tests::{
    command::poll,
    direct::{
        Direct, bind_mount,
        exec::{Ends, Exec},
    },
    lab::Lab,
    needs::Backend,
};

use crate::{
    pipeline::timed,
    steps::{self, Step},
    table::{Figure, Samples, Table},
};

const ROUNDS: usize = 25;

/// Execs with three streams each, of the 300 that an agent gives stdio to.
const COUNTS: [usize; 3] = [1, 10, 100];

/// What flows to each busy reader before the next pause: it begins with all buffers as full as they get.
const BETWEEN: u64 = 2 << 20;

/// Emulation is slow.
const BETWEEN_EMULATED: u64 = 256 << 10;

/// Longest time for that.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes as fast as it can, to both streams, and does not come to its end.
const BUSY: [&str; 6] = ["cube-test-writer", "stream", "1", "1099511627776", "2", "1099511627776"];

/// One of the two calls, and the steps that the shim takes for it.
struct Call {
    name: &'static str,
    steps: &'static [&'static str],
    /// Which of them is the VMM's.
    vmm: &'static str,
}

const PAUSE: Call = Call {
    name: "pause",
    // The first three go on side by side.
    steps: &["guest quiesced", "streams at rest", "events at rest", "VM paused"],
    vmm: "VM paused",
};

const RESUME: Call = Call { name: "resume", steps: &["VM resumed", "guest thawed"], vmm: "VM resumed" };

/// On each backend that runs here.
pub(crate) fn measure(table: &mut Table, backends: &[Backend]) {
    for backend in backends {
        table.group(match backend {
            Backend::Process => "pause with a busy logger and three execs, process backend",
            Backend::Qemu => "pause with a busy logger and three execs, QEMU",
            Backend::CloudHypervisor => "pause with a busy logger and three execs, Cloud Hypervisor",
        });
        measure_on(table, *backend);
    }
    measure_many(table);
}

/// What a stream costs that only has to be stopped, and opened again.
fn measure_many(table: &mut Table) {
    table.group("pause and resume by the number of idle execs, three streams each, process backend");
    let lab = Lab::new(Backend::Process);
    let mut direct = Direct::new(&lab, "c", &["sleep", "100000"]);
    let rootfs = direct.unpack_image();
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let mut execs = Vec::new();
    for count in COUNTS {
        while execs.len() < count {
            execs.push(exec(&direct, &format!("e{}", execs.len()), &["cat"]));
        }
        let [mut pauses, mut resumes] = [const { Samples::new() }; 2];
        for _ in 0..ROUNDS {
            // Answers once it has its connection again.
            execs.iter_mut().for_each(|(_, ends)| echo(ends));
            pauses.push(timed(|| direct.pause().unwrap()).0 * 1e3);
            resumes.push(timed(|| direct.resume().unwrap()).0 * 1e3);
        }
        table.add(format!("{count} execs: pause"), "ms", pauses);
        table.add(format!("{count} execs: resume"), "ms", resumes);
    }
    direct.kill(9).unwrap();
    direct.wait().unwrap();
    drop(execs);
    direct.delete().unwrap();
    direct.finish();
}

fn echo(Ends { stdin, stdout, .. }: &mut Ends) {
    stdin.write_all(b"x").unwrap();
    stdout.read_exact(&mut [0]).unwrap();
}

fn measure_on(table: &mut Table, backend: Backend) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &BUSY);
    let rootfs = direct.unpack_image();
    let log = steps::read(&direct.bundle);
    let init = direct.read_fifos().map(Reader::start);
    direct.start_shim();
    direct.create(bind_mount(&rootfs)).unwrap();
    direct.start().unwrap();
    let (busy, busy_ends) = exec(&direct, "busy", &BUSY);
    // These have nothing to say, but streams that must come to rest.
    let idle = [exec(&direct, "copies", &["cat"]), exec(&direct, "sleeps", &["sleep", "100000"])];
    let readers: Vec<Reader> =
        init.into_iter().chain([busy_ends.stdout, busy_ends.stderr].map(Reader::start)).collect();
    let [mut pauses, mut resumes] = [const { Samples::new() }; 2];
    for _ in 0..ROUNDS {
        flow(&readers, if backend.is_vm() { BETWEEN_EMULATED } else { BETWEEN });
        pauses.push(timed(|| direct.pause().unwrap()).0 * 1e3);
        resumes.push(timed(|| direct.resume().unwrap()).0 * 1e3);
    }
    direct.kill(9).unwrap();
    direct.wait().unwrap();
    drop((busy, idle));
    direct.delete().unwrap();
    direct.finish();
    let steps = log.join().unwrap();
    for (call, whole) in [(&PAUSE, &pauses), (&RESUME, &resumes)] {
        let share = report(table, call, whole, &steps);
        // An emulated guest takes ten times as long for its part: emulation decides.
        if backend != Backend::Qemu {
            share.at_most(20.0);
        }
    }
}

/// Gives the figure of our share.
fn report<'a>(table: &'a mut Table, call: &Call, whole: &Samples, steps: &[Step]) -> &'a mut Figure {
    let of =
        |name: &str| -> Samples { steps.iter().filter(|step| step.0 == name).map(|step| step.1).collect() };
    table.add(call.name, "ms", whole.clone());
    for step in call.steps {
        table.add(format!("  {step}"), "ms", of(step));
    }
    table.add(format!("  all but \"{}\"", call.vmm), "ms", whole.without(&of(call.vmm)))
}

fn exec<'a>(direct: &'a Direct<'a>, id: &str, argv: &[&str]) -> (Exec<'a>, Ends) {
    let (mut exec, ends) = Exec::new(direct, id, argv);
    exec.create().unwrap();
    exec.start().unwrap();
    (exec, ends)
}

/// Reads all that comes, and counts it.
struct Reader(Arc<AtomicU64>);

impl Reader {
    fn start(mut fifo: File) -> Reader {
        let count = Arc::<AtomicU64>::default();
        let read = count.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(n @ 1..) = fifo.read(&mut buffer) {
                read.fetch_add(n as u64, Ordering::Relaxed);
            }
        });
        Reader(count)
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Returns when each reader has had `bytes` more.
fn flow(readers: &[Reader], bytes: u64) {
    let goals: Vec<u64> = readers.iter().map(|reader| reader.count() + bytes).collect();
    let reached = || readers.iter().zip(&goals).all(|(reader, goal)| reader.count() >= *goal);
    assert!(poll(PATIENCE, reached), "output does not flow");
}
