//! Streams of a guest that is quiesced, and of one that wakes up as another.

use std::io::Write;

use proptest::prelude::*;
use stream::Stream::{STDERR, STDIN, STDOUT};

use super::*;
use crate::stdio::ring::RING_MAX;

const HOUR: Duration = Duration::from_secs(3600);

/// The child's ends of a process that this test itself plays.
struct Played {
    stdin: std::io::PipeReader,
    stdout: std::io::PipeWriter,
    stderr: std::io::PipeWriter,
}

fn play(hub: &Arc<Hub>, policy: Policy) -> Played {
    let ChildStdio::Pipes([stdin, stdout, stderr]) = hub.open(&process(), request(policy)).unwrap() else {
        panic!("a process without terminal gets pipes");
    };
    Played { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into() }
}

async fn open_on(hub: &Arc<Hub>, timeline: u64, stream: stream::Stream, attempt: u64, offset: u64) -> Host {
    let mut host = Host::dial(hub, 64 * 1024);
    host.send_open(&Open { timeline, ..open_message(stream, attempt) }, offset).await;
    assert_eq!(host.expect(Kind::Opened).await.header.offset, offset);
    host
}

/// STOP, and what the agent sends before STOPPED; then ACK of `keep` of that with LAST.
async fn stop(host: &mut Host, from: u64, keep: impl FnOnce(usize) -> usize) -> Vec<u8> {
    host.send_header(Header::new(Kind::Stop, 0)).await;
    let mut taken = Vec::new();
    loop {
        let frame = host.receive().await.expect("STOPPED comes before the end");
        match frame.header.kind {
            Kind::Data => taken.extend_from_slice(&frame.body),
            Kind::Eof => {}
            Kind::Stopped => {
                assert_eq!(frame.header.offset, from + taken.len() as u64);
                break;
            }
            kind => panic!("{kind:?}"),
        }
    }
    taken.truncate(keep(taken.len()));
    let last = Header::new(Kind::Ack, from + taken.len() as u64).with_flags(Flags::LAST);
    host.send_header(last).await;
    assert_eq!(host.receive().await, None);
    taken
}

#[tokio::test(start_paused = true)]
async fn the_2_s_of_a_survivor_stand_still_and_go_on_with_what_was_left() {
    let hub = hub();
    let mut survivor = play(&hub, Policy::Block);
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    hub.exited(&process());
    tokio::time::sleep(Duration::from_millis(1500)).await;
    hub.hold();
    tokio::time::sleep(HOUR).await;
    assert_eq!(stop(&mut host, 0, |len| len).await, b"", "no EOF while nothing runs");
    survivor.stdout.write_all(b"late").unwrap();
    hub.release();
    let released = tokio::time::Instant::now();
    let (mut host, _) = Host::open(&hub, STDOUT, 2, 0).await;
    let (taken, eof) = host.drain(0).await;
    assert_eq!((taken.as_slice(), eof.flags), (&b"late"[..], Flags::TRUNCATED));
    assert_eq!(released.elapsed().as_millis().div_ceil(10), 50);
    drop(survivor.stderr);
}

#[tokio::test]
async fn a_dropping_stream_drops_nothing_while_held_and_goes_on_dropping_after() {
    let hub = hub();
    let written = seq(1_000_000);
    hub.hold();
    let mut child = spawn(&hub, &process(), Policy::DropOldest, "seq 1 1000000");
    until(|| info(&hub, "stdout").end_offset == RING_MAX as u64).await;
    assert!(child.0.try_wait().unwrap().is_none(), "6.9 MB fit into no ring and pipe");
    assert_eq!(info(&hub, "stdout").lost_bytes, 0);
    hub.release();
    assert!(exit(child).await.success());
    until(|| info(&hub, "stdout").end_offset == written.len() as u64).await;
    let (mut host, start) = Host::open(&hub, STDOUT, 1, 0).await;
    assert!(start > 0 && host.drain(start).await.0 == written[start as usize..]);
}

#[tokio::test]
async fn streams_are_served_while_held() {
    let hub = hub();
    let mut played = play(&hub, Policy::Block);
    hub.hold();
    played.stdout.write_all(b"before").unwrap();
    let (mut host, _) = Host::open(&hub, STDOUT, 1, 0).await;
    assert_eq!(host.expect(Kind::Data).await.body, &b"before"[..]);
    assert_eq!(stop(&mut host, 6, |len| len).await, b"");
    let (mut host, _) = Host::open(&hub, STDIN, 1, 0).await;
    host.send_data(0, b"in").await;
    assert_eq!(host.expect(Kind::Ack).await.header.offset, 2);
    drop(played.stdin);
}

#[tokio::test]
async fn a_new_timeline_ends_what_was_open_and_keeps_epochs_offsets_and_attempts() {
    let hub = hub();
    let mut played = play(&hub, Policy::Block);
    played.stdout.write_all(b"abcdef").unwrap();
    let (mut out, _) = Host::open(&hub, STDOUT, 5, 0).await;
    out.expect(Kind::Data).await;
    out.ack(2).await;
    until(|| info(&hub, "stdout").acked_offset == 2).await;
    // More than its pipe holds: the rest waits in the agent.
    let (mut input, _) = Host::open(&hub, STDIN, 5, 0).await;
    input.send_data(0, &[1; 65_536]).await;
    input.expect(Kind::Ack).await;
    input.send_data(65_536, &[2; 1000]).await;
    until(|| info(&hub, "stdin").end_offset == 66_536).await;
    let before = info(&hub, "stdout");

    hub.begin_timeline(TIMELINE);
    hub.begin_timeline(TIMELINE + 1);
    out.expect_refusal(ErrorCode::OTHER_TIMELINE).await;
    input.expect_refusal(ErrorCode::OTHER_TIMELINE).await;
    let mut old = Host::dial(&hub, 4096);
    old.send_open(&open_message(STDOUT, 6), 2).await;
    old.expect_refusal(ErrorCode::OTHER_TIMELINE).await;

    let after = info(&hub, "stdout");
    assert_eq!((after.epoch, after.acked_offset, after.attempt), (before.epoch, 2, 5));
    assert_eq!(info(&hub, "stdin").end_offset, 65_536, "what no process got is the new host's to send");
    let mut stale = Host::dial(&hub, 4096);
    stale.send_open(&Open { timeline: TIMELINE + 1, ..open_message(STDOUT, 5) }, 2).await;
    stale.expect_refusal(ErrorCode::STALE_ATTEMPT).await;
    let mut host = Host::dial(&hub, 4096);
    let open = Open { timeline: TIMELINE + 1, epoch: before.epoch, ..open_message(STDOUT, 6) };
    host.send_open(&open, 2).await;
    assert_eq!(host.expect(Kind::Opened).await.header.offset, 2);
    assert_eq!(host.expect(Kind::Data).await.body, &b"cdef"[..]);
}

/// What happens to one stream between its first byte and its EOF.
#[derive(Debug, Clone)]
enum Step {
    /// The process writes as much as its pipe takes of this.
    Write(usize),
    /// The host takes and acknowledges one frame, if one comes.
    Take,
    /// Quiesce, STOP, ACK LAST of this share of what came (in 1/256), and thaw, on a new timeline or not.
    Rest { kept: u8, new_timeline: bool },
    /// The connection dies.
    Cut,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..200_000usize).prop_map(Step::Write),
        4 => Just(Step::Take),
        2 => (any::<u8>(), any::<bool>())
            .prop_map(|(kept, new_timeline)| Step::Rest { kept, new_timeline }),
        1 => Just(Step::Cut),
    ]
}

/// A host with its sink, which survives its connections.
struct Relay {
    hub: Arc<Hub>,
    timeline: u64,
    attempt: u64,
    sink: Vec<u8>,
    host: Option<Host>,
}

impl Relay {
    async fn host(&mut self) -> &mut Host {
        if self.host.is_none() {
            self.attempt += 1;
            let offset = self.sink.len() as u64;
            self.host = Some(open_on(&self.hub, self.timeline, STDOUT, self.attempt, offset).await);
        }
        self.host.as_mut().unwrap()
    }

    async fn take(&mut self) {
        let offset = self.sink.len() as u64;
        let frame = self.host().await.receive().await.unwrap();
        assert_eq!((frame.header.kind, frame.header.offset), (Kind::Data, offset));
        self.sink.extend_from_slice(&frame.body);
        let end = frame.header.end();
        self.host().await.ack(end).await;
    }

    async fn rest(&mut self, kept: u8, new_timeline: bool) {
        self.hub.hold();
        let from = self.sink.len() as u64;
        let taken = stop(self.host().await, from, |len| len * usize::from(kept) / 256).await;
        self.sink.extend_from_slice(&taken);
        self.host = None;
        assert_eq!(info(&self.hub, "stdout").acked_offset, self.sink.len() as u64);
        if new_timeline {
            self.timeline += 1;
            self.hub.begin_timeline(self.timeline);
        }
        self.hub.release();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_byte_arrives_once_whatever_rests_cuts_and_timelines_come_between(
        steps in prop::collection::vec(step(), 1..40),
        seed in any::<u64>(),
        ends_at_rest in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let hub = hub();
            let mut played = play(&hub, Policy::Block);
            let mut random = Random(seed);
            let mut written = Vec::new();
            let mut relay =
                Relay { hub: Arc::clone(&hub), timeline: TIMELINE, attempt: 0, sink: Vec::new(), host: None };
            for step in steps {
                match step {
                    Step::Write(len) => {
                        // Nothing that the process would have to wait for: it runs on this thread. A pipe
                        // counts its bytes in pages, half of each may be unused.
                        let len = len.min((RING_MAX / 2).saturating_sub(written.len() - relay.sink.len()));
                        let bytes = random.bytes(len);
                        played.stdout.write_all(&bytes).unwrap();
                        written.extend(bytes);
                    }
                    Step::Take if relay.sink.len() < written.len() => relay.take().await,
                    Step::Take => {}
                    Step::Rest { kept, new_timeline } => relay.rest(kept, new_timeline).await,
                    Step::Cut => relay.host = None,
                }
            }
            // The last writer goes just before the guest comes to rest, or long before the host looks.
            let Played { stdout, stderr: stderr_of_the_process, .. } = played;
            drop(stdout);
            if ends_at_rest {
                relay.rest(128, true).await;
            }
            while relay.sink.len() < written.len() {
                relay.take().await;
            }
            let eof = relay.host().await.expect(Kind::Eof).await.header;
            assert_eq!(eof, Header::new(Kind::Eof, written.len() as u64));
            assert!(relay.sink == written);
            let mut stderr = open_on(&hub, relay.timeline, STDERR, 1, 0).await;
            drop(stderr_of_the_process);
            assert_eq!(stderr.drain(0).await.0, b"");
        });
    }
}
