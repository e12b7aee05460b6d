//! What happens to which connection.

use std::{
    collections::VecDeque,
    env, thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cube_protocol::{ports, stream::Stream};

const SEED: &str = "CUBE_TEST_SEED";

/// A direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// From the shim to the agent.
    ToGuest,
    /// From the agent to the shim.
    ToHost,
}

/// A place in a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// `CONNECT` has come from the shim, and the guest has not seen it.
    Connect,
    /// So many bytes of the answer to `CONNECT` have gone to the shim; at most all of them.
    Answer(usize),
    /// So many bytes behind the handshake have passed. 0: the first one came, and is lost.
    Bytes(Side, u64),
    /// So many whole frames have passed. Streams only.
    Frames(Side, u64),
}

/// What one connection meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It ends, in both directions, at the first of these places that it reaches.
    Cut(Vec<Point>),
    /// Every byte is a write of its own.
    SingleBytes,
    /// What comes is held for this long, and goes on in one burst with what came meanwhile, however much
    /// that is: no window holds the sender back.
    Bursts(Duration),
    /// One direction stops after so many bytes behind the handshake: for a time, or (`None`) until the
    /// other side of the connection gives up.
    Stall(Side, u64, Option<Duration>),
    /// The smallest window that the kernel allows.
    Narrow,
}

impl Fault {
    /// Whether a cut is due at `point`.
    pub(super) fn cuts_at(&self, point: Point) -> bool {
        matches!(self, Fault::Cut(points) if points.contains(&point))
    }

    /// How much of the answer to `CONNECT` goes to the shim before the cut, if there is one.
    pub(super) fn answer(&self) -> Option<usize> {
        let Fault::Cut(points) = self else { return None };
        points.iter().find_map(|point| if let Point::Answer(bytes) = point { Some(*bytes) } else { None })
    }
}

/// Which connections a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Port 1024.
    Control,
    /// Port 1025.
    Streams,
    /// Of port 1025 those that open this kind of stream. OPEN tells, so they meet no fault before it.
    Only(Stream),
}

impl Target {
    pub(super) fn includes(self, port: u32, stream: Option<Stream>) -> bool {
        match self {
            Target::Control => port == ports::CONTROL,
            Target::Streams => port == ports::STREAM && stream.is_none(),
            Target::Only(only) => stream == Some(only),
        }
    }
}

/// What a number of connections meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// All of them the same.
    Each(Fault),
    /// The first ones a fault each, those after them none.
    Once(VecDeque<Fault>),
    /// Each is cut after a number of bytes in either direction: at most `most`, as `random` says.
    Random {
        /// Where the numbers come from.
        random: Random,
        /// In bytes; at least 20 pass.
        most: u64,
    },
}

impl Plan {
    /// Each fault for one connection, in this order.
    pub fn once(faults: impl IntoIterator<Item = Fault>) -> Plan {
        Plan::Once(faults.into_iter().collect())
    }

    /// Cuts at points that are the same for the same `seed`, as far as the connections are.
    pub fn random(seed: u64, most: u64) -> Plan {
        Plan::Random { random: Random(seed), most }
    }

    /// What the next connection meets.
    pub(super) fn next(&mut self) -> Option<Fault> {
        match self {
            Plan::Each(fault) => Some(fault.clone()),
            Plan::Once(faults) => faults.pop_front(),
            Plan::Random { random, most } => {
                let bytes = 20 + random.below(*most);
                let sides = [Side::ToGuest, Side::ToHost];
                Some(Fault::Cut(sides.map(|side| Point::Bytes(side, bytes)).into()))
            }
        }
    }
}

/// What the random numbers of a test begin with. Printed when the test fails.
#[derive(Debug)]
pub struct Seed(pub u64);

impl Seed {
    /// Another one each time, or that of the variable `CUBE_TEST_SEED`, which repeats a test.
    pub fn choose() -> Seed {
        let given = env::var(SEED).ok().map(|seed| seed.parse().expect(SEED));
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_micros() as u64);
        Seed(given.unwrap_or_else(clock))
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the faults of this test are those of {SEED}={}", self.0);
        }
    }
}

/// splitmix64: the same numbers for the same seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random(pub u64);

impl Random {
    /// A number from 0 up to but not including `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

/// Every step by which a stream of the `process` backend is opened, each the place of one cut: before
/// the guest has CONNECT, within its answer and right after it, within OPEN, before OPENED, after it.
pub fn handshake() -> Vec<Fault> {
    // "OK 1025\n". More bytes than OPEN or OPENED have fall into what follows it, and are as good.
    const ANSWER: usize = 8;
    const OPEN: u64 = 72;
    const OPENED: u64 = 26;
    let answer = (0..=ANSWER).map(Point::Answer);
    let open = (1..OPEN).map(|bytes| Point::Bytes(Side::ToGuest, bytes));
    let opened = (0..OPENED).map(|bytes| Point::Bytes(Side::ToHost, bytes));
    let whole = [Side::ToGuest, Side::ToHost].map(|side| Point::Frames(side, 1));
    let points = [Point::Connect].into_iter().chain(answer).chain(open).chain(opened).chain(whole);
    points.map(|point| Fault::Cut(vec![point])).collect()
}
