//! What the stand-in does on port 1024: ttrpc by hand, for no server would send what it sends.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    process,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use containerd_shim_protos::api;
use cube_protocol::{guest, version};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use ttrpc::proto::{Request, Response, Status};

use crate::world::{Id, World, now_ns};

/// Most bytes of a message: what ttrpc allows.
const MESSAGE_MAX: usize = 4 << 20;

const RESPONSE: u8 = 2;
const DATA: u8 = 3;

/// Made up anew for a guest that pretends to be another.
static BOOT_ID: AtomicU64 = AtomicU64::new(77);

/// What the control port does. `METHOD` is that of one call that is answered wrongly.
#[derive(Debug)]
pub(crate) enum Attack {
    /// `none`: only streams attack.
    None,
    /// `version`: Hello with a protocol that nobody speaks.
    Version,
    /// `other-guest`: once the container runs, the connection ends, and the next Hello has another boot id.
    OtherGuest,
    /// `hang`: no call is answered any more once the container runs.
    Hang,
    /// `console`: prints without a pause.
    Console,
    /// `handshake`: a line without end in place of `OK`, once the container runs, on the stream port.
    Handshake,
    /// `METHOD=HOW`.
    Reply(String, How),
    /// `events=KIND`, once the container runs.
    Events(String),
}

/// How a call is answered.
#[derive(Debug)]
pub(crate) enum How {
    /// Not at all.
    Silence,
    /// The connection is closed.
    Close,
    /// A message that is no protobuf.
    Garbage,
    /// A response whose payload is no protobuf.
    GarbagePayload,
    /// As many bytes as a message may have.
    Huge,
    /// Small in bytes, large once decoded.
    Bomb,
    /// A message of 4 GiB, of which some comes.
    Oversize,
    /// An error with this code and a long text full of control characters.
    Status(i32),
    /// Honestly, behind responses to calls that nobody made.
    Strays,
    /// Stream data in place of a response, again and again, then honestly.
    Data,
    /// Half a message.
    Half,
}

impl Attack {
    pub(crate) fn parse(text: &str) -> Option<Attack> {
        let attack = match text {
            "none" => Attack::None,
            "version" => Attack::Version,
            "other-guest" => Attack::OtherGuest,
            "hang" => Attack::Hang,
            "console" => Attack::Console,
            "handshake" => Attack::Handshake,
            _ => match text.split_once('=')? {
                ("events", kind) => Attack::Events(kind.into()),
                (method, how) => Attack::Reply(method.into(), How::parse(how)?),
            },
        };
        Some(attack)
    }
}

impl How {
    fn parse(text: &str) -> Option<How> {
        let how = match text {
            "silence" => How::Silence,
            "close" => How::Close,
            "garbage" => How::Garbage,
            "garbage-payload" => How::GarbagePayload,
            "huge" => How::Huge,
            "bomb" => How::Bomb,
            "oversize" => How::Oversize,
            "strays" => How::Strays,
            "data" => How::Data,
            "half" => How::Half,
            _ => How::Status(text.strip_prefix("status:")?.parse().ok()?),
        };
        Some(how)
    }
}

/// What goes out in answer to a call.
enum Answer {
    Payload(Vec<u8>),
    Status(i32, String),
    /// Bytes as they are.
    Wire(Vec<u8>),
    Silence,
    Close,
}

struct Call {
    stream: u32,
    method: String,
    payload: Vec<u8>,
}

pub(crate) fn serve(world: &Arc<World>, mut socket: UnixStream) {
    let Ok(writer) = socket.try_clone() else { return };
    let writer = Arc::new(Mutex::new(writer));
    while let Some(call) = read_call(&mut socket) {
        let (world, writer) = (world.clone(), writer.clone());
        // A call that is not answered must not hold up the others.
        thread::spawn(move || {
            let stream = call.stream;
            let starts = call.method == "Start";
            let wire = match answer(&world, call) {
                Answer::Payload(payload) => response(stream, payload),
                Answer::Status(code, text) => status(stream, code, text),
                Answer::Wire(wire) => wire,
                Answer::Silence => return,
                Answer::Close => {
                    let writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
                    writer.shutdown(std::net::Shutdown::Both).ok();
                    return;
                }
            };
            writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(&wire).ok();
            if starts {
                // Not before the container runs.
                world.start();
            }
        });
    }
}

fn read_call(socket: &mut UnixStream) -> Option<Call> {
    let mut header = [0; 10];
    socket.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(0) as usize];
    socket.read_exact(&mut body).ok()?;
    let request = Request::parse_from_bytes(&body).ok()?;
    Some(Call { stream: word(4), method: request.method, payload: request.payload })
}

fn message(stream: u32, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(10 + body.len());
    wire.extend((body.len() as u32).to_be_bytes());
    wire.extend(stream.to_be_bytes());
    wire.extend([kind, 0]);
    wire.extend(body);
    wire
}

fn response(stream: u32, payload: Vec<u8>) -> Vec<u8> {
    let response = Response { payload, ..Default::default() };
    message(stream, RESPONSE, &response.write_to_bytes().unwrap())
}

fn status(stream: u32, code: i32, message: String) -> Vec<u8> {
    let code = protobuf::EnumOrUnknown::from_i32(code);
    let status = MessageField::some(Status { code, message, ..Default::default() });
    let response = Response { status, ..Default::default() };
    self::message(stream, RESPONSE, &response.write_to_bytes().unwrap())
}

fn answer(world: &World, call: Call) -> Answer {
    world.count(&call.method);
    if matches!(world.attack, Attack::Hang) && world.has_started() {
        return Answer::Silence;
    }
    if let Attack::Reply(method, how) = &world.attack
        && *method == call.method
    {
        return wrong(world, how, call);
    }
    honest(world, call)
}

fn wrong(world: &World, how: &How, call: Call) -> Answer {
    let stream = call.stream;
    match how {
        How::Silence => Answer::Silence,
        How::Close => Answer::Close,
        How::Garbage => Answer::Wire(message(stream, RESPONSE, &[0xff; 1000])),
        How::GarbagePayload => Answer::Payload(vec![0xff; 1000]),
        How::Huge => Answer::Payload(unknown_field(MESSAGE_MAX - 64)),
        How::Bomb => Answer::Payload(bomb(&call.method)),
        How::Oversize => {
            let mut wire = message(stream, RESPONSE, &[]);
            wire[..4].copy_from_slice(&u32::MAX.to_be_bytes());
            wire.extend(vec![0; 256 << 20]);
            Answer::Wire(wire)
        }
        How::Status(code) => Answer::Status(*code, "\x1b[2J\r\n\0no such luck ".repeat(10_000)),
        How::Half => Answer::Wire(message(stream, RESPONSE, &[0; 1000])[..500].to_vec()),
        How::Strays => {
            let mut wire = Vec::new();
            for n in 0..10_000 {
                wire.extend(response(stream.wrapping_add(2 + n * 2), vec![0; 100]));
                wire.extend(response(n * 2, vec![0; 100]));
            }
            // The first two of those may be a call to come or another one that waits.
            wire.extend(honest_wire(world, call));
            Answer::Wire(wire)
        }
        How::Data => {
            let mut wire = message(stream, DATA, &[0; 1000]).repeat(10_000);
            wire.extend(honest_wire(world, call));
            Answer::Wire(wire)
        }
    }
}

fn honest_wire(world: &World, call: Call) -> Vec<u8> {
    let stream = call.stream;
    match honest(world, call) {
        Answer::Payload(payload) => response(stream, payload),
        Answer::Status(code, text) => status(stream, code, text),
        Answer::Wire(_) | Answer::Silence | Answer::Close => Vec::new(),
    }
}

/// A field that no message has, with this many bytes in all.
fn unknown_field(bytes: usize) -> Vec<u8> {
    let len = bytes - 7;
    // Field 1000, length-delimited; the length in four bytes.
    let mut field = vec![0xc2, 0x3e];
    field.extend((0..4).map(|n| (len >> (7 * n)) as u8 & 0x7f | if n < 3 { 0x80 } else { 0 }));
    field.resize(bytes, 0);
    field
}

fn bomb(method: &str) -> Vec<u8> {
    match method {
        // Empty events.
        "Events" => [0x0a, 0x00].repeat((MESSAGE_MAX - 64) / 2),
        // Unknown fields, each with another number.
        _ => {
            let mut bytes = Vec::new();
            for field in 2_048_u32..262_144 {
                let tag = field << 3;
                bytes.extend([tag as u8 | 0x80, (tag >> 7) as u8 | 0x80, (tag >> 14) as u8 & 0x7f, 1]);
            }
            bytes
        }
    }
}

fn ok(message: &impl Message) -> Answer {
    Answer::Payload(message.write_to_bytes().unwrap())
}

fn parse<M: Message>(call: &Call) -> M {
    M::parse_from_bytes(&call.payload).unwrap()
}

fn honest(world: &World, call: Call) -> Answer {
    let empty = || Answer::Payload(Vec::new());
    match call.method.as_str() {
        "Hello" => hello(world),
        "Events" => events(world, &parse(&call)),
        "Create" => {
            let request: api::CreateTaskRequest = parse(&call);
            let options = guest::CreateOptions::parse_from_bytes(&request.options.value).unwrap();
            world.add((request.id, String::new()), args_of(&options.spec, &["process", "args"]));
            ok(&api::CreateTaskResponse { pid: 2, ..Default::default() })
        }
        "Exec" => {
            let request: api::ExecProcessRequest = parse(&call);
            world.add((request.id, request.exec_id), args_of(&request.spec.value, &["args"]));
            empty()
        }
        "Start" => {
            let request: api::StartRequest = parse(&call);
            let id = (request.id, request.exec_id);
            world.run(&id);
            if !id.1.is_empty() && world.args(&id).first().is_none_or(|arg| arg != "attack") {
                world.exit(&id, 0);
            }
            ok(&api::StartResponse { pid: 2, ..Default::default() })
        }
        "Kill" => {
            let request: api::KillRequest = parse(&call);
            if !matches!(&world.attack, Attack::Events(kind) if kind == "never") {
                world.exit(&(request.id, request.exec_id), 128 + request.signal);
            }
            empty()
        }
        "Stats" => {
            let type_url = "io.containerd.cgroups.v2.Metrics".to_owned();
            let stats = Any { type_url, ..Default::default() };
            ok(&api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
        }
        "Delete" => ok(&api::DeleteResponse { pid: 2, ..Default::default() }),
        "Shutdown" => process::exit(0),
        "PrepareSandbox" | "Update" | "ResizePty" => empty(),
        other => Answer::Status(12, format!("{other} is not implemented")),
    }
}

/// The arguments of a process, from the JSON of its spec.
fn args_of(json: &[u8], path: &[&str]) -> Vec<String> {
    let mut value: serde_json::Value = serde_json::from_slice(json).unwrap();
    for key in path {
        value = value[*key].take();
    }
    serde_json::from_value(value).unwrap()
}

fn hello(world: &World) -> Answer {
    let mut protocol: guest::Version = version::CURRENT.into();
    match world.attack {
        Attack::Version => (protocol.major, protocol.minor) = (77, 5),
        Attack::OtherGuest if world.has_started() => drop(BOOT_ID.fetch_add(1, Ordering::Relaxed)),
        _ => {}
    }
    // They go to the log.
    let text = "\x1b[2J\r\n version".repeat(1000);
    ok(&guest::HelloResponse {
        protocol: MessageField::some(protocol),
        agent_version: text.clone(),
        boot_id: BOOT_ID.load(Ordering::Relaxed),
        timeline: 5,
        kernel_release: text,
        ..Default::default()
    })
}

fn events(world: &World, request: &guest::EventsRequest) -> Answer {
    let limit = match world.attack {
        // It must be noticed soon that the attack has begun.
        Attack::OtherGuest => Duration::from_millis(100),
        _ => Duration::from_millis(request.timeout_ms.into()),
    };
    let events = world.events_after(request.after, limit);
    match &world.attack {
        Attack::OtherGuest if world.has_started() => return Answer::Close,
        Attack::Events(kind) if kind == "never" => {
            thread::sleep(limit);
            return Answer::Payload(Vec::new());
        }
        Attack::Events(kind) if world.has_started() => return attack_events(world, kind, events),
        _ => {}
    }
    ok(&guest::EventsResponse { events, ..Default::default() })
}

/// As many events as one answer may have, at once whatever was asked.
fn attack_events(world: &World, kind: &str, honest: Vec<guest::Event>) -> Answer {
    let mut events = match kind {
        "empty" => Vec::new(),
        "close" => return Answer::Close,
        "refused" => return Answer::Status(13, "\x1b[2J".into()),
        "unknown" => {
            let ids = ["nosuch", "../../c", "c\n\x1b[2J", "", "c/../..", "\u{202e}c"];
            let unknown =
                |n: usize| exit((ids[n % ids.len()].into(), "..\r\n".into()), 0, world.count("events"));
            (0..64).map(unknown).collect()
        }
        "again" => {
            let mut exits: Vec<_> = (0..64).map(|n| exit(first(), 3, u64::MAX - n)).collect();
            exits[40].sequence = 1;
            exits
        }
        "odd" => vec![exit(first(), 65_536, 1)],
        "oom" => (0..64)
            .map(|_| {
                let count = world.count("oom");
                let oom = guest::TaskOom { container_id: first().0, count, ..Default::default() };
                event(count, guest::event::Kind::Oom(oom))
            })
            .collect(),
        other => panic!("unknown events {other:?}"),
    };
    events.extend(honest);
    ok(&guest::EventsResponse { events, ..Default::default() })
}

/// The container of every test that attacks with events.
fn first() -> Id {
    ("hostile".into(), String::new())
}

fn exit((container_id, exec_id): Id, exit_status: u32, sequence: u64) -> guest::Event {
    // A century ahead.
    let exited_at_ns = now_ns() + 100 * 365 * 24 * 3600 * 1_000_000_000;
    let exit = guest::TaskExit { container_id, exec_id, exit_status, exited_at_ns, ..Default::default() };
    event(sequence, guest::event::Kind::Exit(exit))
}

fn event(sequence: u64, kind: guest::event::Kind) -> guest::Event {
    guest::Event { sequence, kind: Some(kind), ..Default::default() }
}
