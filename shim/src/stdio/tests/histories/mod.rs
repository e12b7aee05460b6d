//! Both sides of the stream protocol against each other, through everything that can happen to them, in every
//! order: the shim's relays, the agent's streams, in memory, on a simulated clock.

mod guest;
mod host;
mod log;
mod real;
mod rests;
mod wire;

use std::{fmt, future::Future, io::Write, time::Duration};

use cube_agent::stdio::Policy;
use cube_protocol::stream::Stream;
use proptest::{prelude::*, test_runner::TestRunner};
use tokio::time::{Instant, sleep};

use self::{
    guest::{Guest, OUTPUTS},
    host::{Host, Sinks},
    log::Pace,
    wire::Fate,
};

/// Once nothing stands in the way any more, both sides are done after this: a dial that nobody answers, and a
/// handshake after it, are given up after 2 s each, and the longest wait between two dials is 1 s.
const DONE_LIMIT: Duration = Duration::from_secs(10);

/// Bytes that tell where they belong.
fn byte_at(stream: Stream, offset: u64) -> u8 {
    (offset.wrapping_add(stream as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// What happens.
#[derive(Debug, Clone)]
enum Action {
    /// The process writes, until nobody takes more.
    Write { output: usize, bytes: u64 },
    /// The client writes to stdin.
    Feed { bytes: u64 },
    /// The process reads its stdin.
    Read { bytes: usize },
    /// Time passes.
    Pass { millis: u64 },
    /// Tasks run, and no time passes.
    Yield { times: usize },
    /// Every connection ends.
    Cut,
    /// What comes of a dial.
    Fate(Fate),
    /// Nothing moves between host and guest, or does again.
    Hold(bool),
    /// Each piece takes this long.
    Delay { millis: u64 },
    /// How long a log takes.
    Pace { output: usize, pace: Pace },
    /// Quiesce, halt the streams, and thaw; `elsewhere` is on a new timeline and without the connections, as
    /// after a stay on disk.
    Rest { millis: u64, elsewhere: bool },
    /// Quiesce, halt the streams, snapshot, thaw: the guest goes on, and what it was is kept. A snapshot that
    /// others take does not halt them.
    Snapshot { halted: bool },
    /// The guest that was kept wakes up, with another host. So it does each time.
    Restore,
    /// The sandbox is put back to its snapshot, with the same host.
    RollBack,
    /// CloseIO.
    Close,
    /// Quiesce, and wake up as another. Its connections are found dead before the thaw or after it.
    Become { cut_first: bool },
}

fn action() -> impl Strategy<Value = Action> {
    let output = || prop_oneof![3 => Just(0usize), 1 => Just(1usize)];
    let cut_at = || prop_oneof![4 => 0..200usize, 2 => 0..80_000usize, 2 => Just(usize::MAX)];
    prop_oneof![
        8 => (output(), 1..90_000u64).prop_map(|(output, bytes)| Action::Write { output, bytes }),
        3 => (1..70_000u64).prop_map(|bytes| Action::Feed { bytes }),
        2 => (1..70_000usize).prop_map(|bytes| Action::Read { bytes }),
        5 => prop_oneof![Just(1u64), 1..50u64, 50..12_000u64].prop_map(|millis| Action::Pass { millis }),
        4 => (1..20usize).prop_map(|times| Action::Yield { times }),
        4 => Just(Action::Cut),
        5 => (cut_at(), cut_at()).prop_map(|(to_guest, to_host)| {
            Action::Fate(Fate::Connected { to_guest, to_host })
        }),
        1 => prop_oneof![Just(Fate::Refused), Just(Fate::Silence)].prop_map(Action::Fate),
        3 => any::<bool>().prop_map(Action::Hold),
        1 => (0..30u64).prop_map(|millis| Action::Delay { millis }),
        4 => (output(), prop_oneof![
            Just(Pace::Quick),
            Just(Pace::Stuck),
            (1..3000u64).prop_map(|millis| Pace::Slow(Duration::from_millis(millis))),
        ]).prop_map(|(output, pace)| Action::Pace { output, pace }),
        5 => (0..5000u64, any::<bool>()).prop_map(|(millis, elsewhere)| Action::Rest { millis, elsewhere }),
        4 => prop::bool::weighted(0.8).prop_map(|halted| Action::Snapshot { halted }),
        2 => Just(Action::Restore),
        6 => Just(Action::RollBack),
        1 => Just(Action::Close),
        2 => any::<bool>().prop_map(|cut_first| Action::Become { cut_first }),
    ]
}

/// A sandbox, and one that it was.
struct World {
    sinks: Sinks,
    guest: Guest,
    host: Host,
    timeline: u64,
    /// What the guest's count of lost bytes began with.
    lost_before: [u64; 2],
    kept: Option<Kept>,
    /// Sandboxes that there were before this one.
    sandbox: u32,
    /// Whether nothing has happened to the way between them.
    is_undisturbed: bool,
}

/// A snapshot.
struct Kept {
    /// Whose it is.
    sandbox: u32,
    guest: Guest,
    lost: [u64; 2],
}

impl World {
    fn new(policy: Policy, sinks: Sinks) -> World {
        let timeline = 1;
        let guest = Guest::start(timeline, policy);
        let host = Host::start(&guest, timeline, true, sinks);
        let lost_before = [0; 2];
        World { sinks, guest, host, timeline, lost_before, kept: None, sandbox: 0, is_undisturbed: true }
    }

    async fn act(&mut self, action: &Action) -> Result<(), String> {
        let World { guest, host, is_undisturbed, .. } = self;
        *is_undisturbed &=
            !matches!(action, Action::Cut | Action::Fate(_) | Action::Hold(_) | Action::Delay { .. });
        match action {
            Action::Write { output, bytes } => write(guest, *output, *bytes).await,
            Action::Feed { bytes } => host.feed(*bytes),
            Action::Read { bytes } => guest.read(*bytes),
            Action::Pass { millis } => sleep(Duration::from_millis(*millis)).await,
            Action::Yield { times } => {
                for _ in 0..*times {
                    tokio::task::yield_now().await;
                }
            }
            Action::Cut => host.wire.cut(),
            Action::Fate(fate) => host.wire.fate(*fate),
            Action::Hold(held) => host.wire.hold(*held),
            Action::Delay { millis } => host.wire.delay(Duration::from_millis(*millis)),
            Action::Pace { output, pace } => host.pace(*output, *pace),
            Action::Rest { millis, elsewhere } => {
                self.rest().await?;
                if *elsewhere {
                    self.timeline += 1;
                    self.host.wire.cut();
                    self.guest.hub.begin_timeline(self.timeline);
                }
                sleep(Duration::from_millis(*millis)).await;
                self.go_on();
            }
            Action::Snapshot { halted } => {
                match halted {
                    true => self.rest().await?,
                    false => self.guest.hub.hold(),
                }
                let (sandbox, lost) = (self.sandbox, self.lost());
                self.kept = Some(Kept { sandbox, guest: self.guest.fork(), lost });
                self.go_on();
            }
            Action::Restore => self.restore().await?,
            Action::RollBack => self.roll_back().await?,
            Action::Close => host.close_stdin(),
            Action::Become { cut_first } => {
                self.guest.hub.hold();
                if *cut_first {
                    self.host.wire.cut();
                    sleep(Duration::from_millis(1)).await;
                }
                self.lost_before = self.lost();
                self.wake().await?;
            }
        }
        self.check()
    }

    /// As the shim brings a sandbox to rest.
    async fn rest(&mut self) -> Result<(), String> {
        self.guest.hub.hold();
        // A stream that has no connection at the moment tells the guest when it has one again.
        let tells = self.host.connected().map(|connected| connected && self.is_undisturbed);
        self.host.rest().await?;
        self.host.check(&self.guest)?;
        self.host.check_rest(&self.guest, tells)
    }

    fn go_on(&mut self) {
        self.guest.hub.release();
        self.host.flow(self.timeline);
    }

    /// Bytes that were lost below what the guest knows to be acknowledged.
    fn lost(&self) -> [u64; 2] {
        [0, 1].map(|output| {
            let acknowledged = self.guest.info(OUTPUTS[output]).acked_offset;
            let log = self.host.log(output);
            let known = log.gaps.iter().filter(|(to, _)| *to <= acknowledged);
            self.lost_before[output] + known.map(|(_, lost)| lost).sum::<u64>()
        })
    }

    async fn restore(&mut self) -> Result<(), String> {
        let Some(kept) = &self.kept else { return Ok(()) };
        self.guest = kept.guest.fork();
        self.lost_before = kept.lost;
        self.wake().await
    }

    /// As the shim puts a sandbox back to a snapshot of its own.
    async fn roll_back(&mut self) -> Result<(), String> {
        let Some(kept) = self.kept.as_ref().filter(|kept| kept.sandbox == self.sandbox) else {
            return Ok(());
        };
        let (guest, lost) = (kept.guest.fork(), kept.lost);
        self.rest().await?;
        self.host.wire.cut();
        self.timeline += 1;
        (self.guest, self.lost_before) = (guest, lost);
        self.guest.goes_on_with(self.host.given());
        self.host.rewind(&self.guest, self.timeline).await;
        self.host.check(&self.guest)?;
        self.guest.hub.begin_timeline(self.timeline);
        self.go_on();
        Ok(())
    }

    /// The guest, which is at rest, goes on in another sandbox.
    async fn wake(&mut self) -> Result<(), String> {
        self.timeline += 1;
        self.sandbox += 1;
        self.guest.hub.begin_timeline(self.timeline);
        let deaf = self.guest.is_deaf().await;
        self.guest.goes_on_with(0);
        let successor = Host::start(&self.guest, self.timeline, !deaf, self.sinks);
        std::mem::replace(&mut self.host, successor).abandon().await?;
        self.guest.hub.release();
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        self.host.reap();
        self.host.check(&self.guest)?;
        let Guest { got, got_wrong, .. } = self.guest;
        match got_wrong {
            Some(offset) => Err(format!("the process got another byte of stdin at {offset}, now {got}")),
            None => Ok(()),
        }
    }

    /// Nothing stands in the way any more, and the process comes to its end.
    async fn finish(mut self) -> Result<(), String> {
        let World { guest, host, .. } = &mut self;
        host.wire.mend();
        (0..2).for_each(|output| host.pace(output, Pace::Quick));
        guest.exit();
        host.close_stdin();
        let began = Instant::now();
        loop {
            self.guest.read(1 << 20);
            self.check()?;
            if self.host.is_done() && self.host.fed().is_none_or(|_| self.guest.got_eof) {
                break;
            }
            if began.elapsed() > DONE_LIMIT {
                return Err(format!("not done after {DONE_LIMIT:?}: {}", self.figures()));
            }
            sleep(Duration::from_millis(10)).await;
        }
        for (output, stream) in OUTPUTS.into_iter().enumerate() {
            let log = self.host.log(output);
            let info = self.guest.info(stream);
            let lost = self.lost_before[output] + log.lost();
            // A guest that did not hear the last ACK does not know what has arrived.
            let is_told = info.acked_offset == log.offset;
            let right = if is_told { info.lost_bytes == lost } else { info.lost_bytes >= lost };
            if log.offset != self.guest.written[output] || !right {
                return Err(format!("the end is not that of the process: {log:?}, {}", self.figures()));
            }
        }
        if self.host.fed().is_some_and(|fed| fed != self.guest.given()) {
            return Err(format!(
                "{:?} bytes were fed, the process got {}",
                self.host.fed(),
                self.guest.given()
            ));
        }
        self.host.verify()
    }

    fn figures(&self) -> impl fmt::Display {
        let infos: Vec<String> = self.guest.hub.streams().iter().map(ToString::to_string).collect();
        format!("written {:?}, {}", self.guest.written, infos.join("; "))
    }
}

/// Writes on while the agent empties the pipe.
async fn write(guest: &mut Guest, output: usize, bytes: u64) {
    let end = guest.written[output] + bytes;
    let mut before = None;
    while guest.written[output] < end && before != Some(guest.written[output]) {
        before = Some(guest.written[output]);
        guest.write(output, end - guest.written[output]);
        // No time passes, but the agent reads what is there.
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
    }
}

fn simulated<T>(history: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true).build().unwrap().block_on(history)
}

/// Histories in `make test`, and in `make soak`.
const COUNT: u32 = 3_000;
const SOAK_COUNT: u32 = 100_000;

#[test]
fn every_byte_arrives_once_and_in_time_whatever_happens_in_whatever_order() {
    let cases = if std::env::var_os("CUBE_SOAK").is_some() { SOAK_COUNT } else { COUNT };
    // A failure is told as a few actions, which may become a test of their own.
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let actions = prop::collection::vec(action(), 1..16);
    let began = std::time::Instant::now();
    // Files cost time: a simulated log shows most of what there is to see.
    let sinks = prop_oneof![4 => Just(Sinks::Simulated), 1 => Just(Sinks::Real)];
    let histories = (actions, prop::bool::weighted(0.3), sinks);
    let result = TestRunner::new(config).run(&histories, |(actions, drops, sinks)| {
        let outcome = simulated(async {
            let mut world = World::new(if drops { Policy::DropOldest } else { Policy::Block }, sinks);
            for action in &actions {
                world.act(action).await?;
            }
            world.finish().await
        });
        outcome.map_err(TestCaseError::fail)
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
    record("stream protocol, random histories", cases, began.elapsed());
}

/// Puts the count into the table of `make soak`, as the end-to-end tests do theirs.
fn record(what: &str, cases: u32, took: Duration) {
    let Some(path) = std::env::var_os("CUBE_SOAK_FIGURES") else { return };
    let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
    let figures = [("histories", u64::from(cases)), ("seconds", took.as_secs())];
    for (figure, value) in figures {
        file.write_all(format!("{what}\t{figure}\t{value}\n").as_bytes()).unwrap();
    }
}
