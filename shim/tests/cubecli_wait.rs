//! `cubecli cubebox wait --ready` with shims that say this and that.
#![allow(clippy::unwrap_used, reason = "test code, also in helpers")]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use cube_shim::control::{
    sandbox::{WaitReadyRequest, WaitReadyResponse},
    sandbox_ttrpc::Sandbox,
};
use support::{Host, serve};
use ttrpc::{Code, r#async::TtrpcContext};

/// Answers at once, as no shim does, with each of its answers in turn; the last is repeated.
struct Fake {
    answers: Vec<Result<&'static str, (Code, &'static str)>>,
    asked: Arc<AtomicU32>,
    /// The longest time that it was given, in milliseconds.
    longest: Arc<AtomicU32>,
}

#[async_trait]
impl Sandbox for Fake {
    async fn wait_ready(
        &self,
        _: &TtrpcContext,
        request: WaitReadyRequest,
    ) -> ttrpc::Result<WaitReadyResponse> {
        self.longest.fetch_max(request.timeout_ms, Ordering::Relaxed);
        let asked = self.asked.fetch_add(1, Ordering::Relaxed) as usize;
        // As long as it takes to see that nobody spins on it.
        tokio::time::sleep(Duration::from_millis(request.timeout_ms.min(50).into())).await;
        match self.answers[asked.min(self.answers.len() - 1)] {
            Ok(waits_for) => Ok(WaitReadyResponse {
                ready: waits_for.is_empty(),
                waits_for: waits_for.into(),
                ..Default::default()
            }),
            Err((code, text)) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))),
        }
    }
}

struct Asked {
    times: u32,
    longest_ms: u32,
    code: i32,
    message: String,
}

/// `cubecli cubebox wait --ready` with `flags`, for a sandbox whose shim gives these answers.
fn wait(answers: &[Result<&'static str, (Code, &'static str)>], flags: &[&str]) -> Asked {
    let host = Host::new();
    let dir = host.sandbox("c", host.log_dir("c"));
    let (asked, longest) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
    let fake = Fake { answers: answers.to_vec(), asked: asked.clone(), longest: longest.clone() };
    let _shim = serve(&dir.socket().unwrap(), fake);
    let args = [&["cubebox", "wait", "--ready"], flags, &["c"]].concat();
    let (code, message) = match answers.last() {
        Some(Ok("")) => (0, String::from_utf8(host.ok(&args)).unwrap()),
        _ => host.fails(&args),
    };
    let (times, longest_ms) = (asked.load(Ordering::Relaxed), longest.load(Ordering::Relaxed));
    Asked { times, longest_ms, code, message }
}

#[test]
fn it_asks_until_the_sandbox_is_ready_and_says_nothing() {
    let waited = wait(&[Ok("connection refused"), Ok("HTTP 503"), Ok("")], &[]);
    assert_eq!((waited.times, waited.code, waited.message.as_str()), (3, 0, ""));
    assert!((1..=30_000).contains(&waited.longest_ms), "{} ms", waited.longest_ms);
}

#[test]
fn at_the_end_of_its_time_it_names_the_last_reason() {
    let begun = Instant::now();
    let waited = wait(&[Ok("connection refused"), Ok("HTTP 503")], &["--timeout", "1"]);
    let expected = "default/c is not ready after 1s: HTTP 503";
    assert!(waited.code == 1 && waited.message.contains(expected), "{}", waited.message);
    assert!(begun.elapsed() >= Duration::from_secs(1) && waited.longest_ms <= 1000);
    assert_eq!(wait(&[Ok("connection refused")], &["--timeout", "0"]).times, 1);
}

#[test]
fn a_sandbox_that_cannot_become_ready_is_an_error_at_once() {
    let ended = Err((Code::FAILED_PRECONDITION, "container \"c\" has exited with status 3"));
    let waited = wait(&[Ok("connection refused"), ended], &[]);
    assert_eq!((waited.times, waited.code), (2, 1));
    let expected = "sandbox default/c: container \"c\" has exited with status 3";
    assert!(waited.message.contains(expected), "{}", waited.message);
}

#[test]
fn a_shim_of_an_older_version_is_named() {
    let waited = wait(&[Err((Code::UNIMPLEMENTED, "/cube.shim.v1.Sandbox/WaitReady"))], &[]);
    assert!(waited.code == 1 && waited.message.contains("another version"), "{}", waited.message);
}

#[test]
fn what_to_wait_for_must_be_said_and_the_sandbox_must_exist() {
    let host = Host::new();
    assert_eq!(host.fails(&["cubebox", "wait", "c"]).0, 2);
    assert_eq!(host.fails(&["cubebox", "wait", "--ready", "--timeout", "x", "c"]).0, 2);
    assert_eq!(host.fails(&["cubebox", "wait", "--ready", "nosuch"]).0, 3);
    let help = host.text(&["cubebox", "wait", "--help"]);
    for word in ["--ready", "--timeout", "cube.ready.http", "cube.ready.exec", "Exit codes"] {
        assert!(help.contains(word), "no {word:?} in:\n{help}");
    }
}
