//! `cubecli cubebox pause`, `resume` and `rollback` with shims that say this and that.
#![allow(clippy::unwrap_used, reason = "test code, also in helpers")]

mod support;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use cube_shim::control::{
    sandbox::{
        PauseRequest, PauseResponse, ResumeRequest, ResumeResponse, RollbackRequest, RollbackResponse,
    },
    sandbox_ttrpc::Sandbox,
};
use support::{Host, serve};
use ttrpc::{Code, r#async::TtrpcContext};

/// Notes what it is asked.
struct Fake {
    asked: Arc<Mutex<Vec<&'static str>>>,
    refuses: Option<(Code, &'static str)>,
}

impl Fake {
    fn answer<T: Default>(&self, word: &'static str) -> ttrpc::Result<T> {
        self.asked.lock().unwrap().push(word);
        match self.refuses {
            None => Ok(T::default()),
            Some((code, text)) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))),
        }
    }
}

#[async_trait]
impl Sandbox for Fake {
    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<PauseResponse> {
        self.answer(if request.to_disk { "to disk" } else { "pause" })
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<ResumeResponse> {
        self.answer("resume")
    }

    async fn rollback(&self, _: &TtrpcContext, request: RollbackRequest) -> ttrpc::Result<RollbackResponse> {
        assert_eq!(request.snapshot, "warm");
        self.answer("rollback")
    }
}

/// A host with a sandbox `c1`, and what its shim is asked.
struct Lab {
    host: Host,
    asked: Arc<Mutex<Vec<&'static str>>>,
    _shim: tokio::sync::oneshot::Sender<()>,
}

impl Lab {
    fn new(refuses: Option<(Code, &'static str)>) -> Lab {
        let host = Host::new();
        let dir = host.sandbox("c1", host.log_dir("c1"));
        let asked = Arc::<Mutex<Vec<_>>>::default();
        let shim = serve(&dir.socket().unwrap(), Fake { asked: asked.clone(), refuses });
        Lab { host, asked, _shim: shim }
    }
}

#[test]
fn each_is_one_call_to_the_shim_and_silent() {
    let lab = Lab::new(None);
    assert_eq!(lab.host.text(&["cubebox", "pause", "c1"]), "");
    assert_eq!(lab.host.text(&["cubebox", "pause", "--to-disk", "c"]), "");
    assert_eq!(lab.host.text(&["cubebox", "resume", "--namespace", "default", "c1"]), "");
    assert_eq!(lab.host.text(&["cubebox", "rollback", "c1", "warm"]), "");
    assert_eq!(*lab.asked.lock().unwrap(), ["pause", "to disk", "resume", "rollback"]);
}

#[test]
fn a_refusal_is_told_as_the_shim_says_it() {
    let text = "the qemu backend cannot snapshot this sandbox: set vmm = \"cloud-hypervisor\"";
    let lab = Lab::new(Some((Code::FAILED_PRECONDITION, text)));
    let commands = [
        &["cubebox", "pause", "--to-disk", "c1"][..],
        &["cubebox", "resume", "c1"],
        &["cubebox", "rollback", "c1", "warm"],
    ];
    for words in commands {
        let (code, message) = lab.host.fails(words);
        assert!(code == 1 && message.contains(&format!("sandbox default/c1: {text}")), "{message}");
    }
}

#[test]
fn a_shim_of_an_older_version_is_named() {
    let lab = Lab::new(Some((Code::UNIMPLEMENTED, "/cube.shim.v1.Sandbox/Pause")));
    let (code, message) = lab.host.fails(&["cubebox", "pause", "c1"]);
    assert!(code == 1 && message.contains("another version"), "{message}");
}

#[test]
fn a_sandbox_that_does_not_exist_is_no_success_and_help_says_what_to_disk_takes() {
    let host = Host::new();
    assert_eq!(host.fails(&["cubebox", "pause", "nosuch"]).0, 3);
    assert_eq!(host.fails(&["cubebox", "resume", "nosuch"]).0, 3);
    let help = host.text(&["cubebox", "pause", "--help"]);
    for word in ["--to-disk", "cube.rootfs.mode=block", "cubecli cubebox resume", "Exit codes"] {
        assert!(help.contains(word), "no {word:?} in:\n{help}");
    }
    assert!(host.text(&["cubebox", "resume", "--help"]).contains("Exit codes"));
    assert_eq!(host.fails(&["cubebox", "rollback", "nosuch", "warm"]).0, 3);
    assert_eq!(host.fails(&["cubebox", "rollback", "c1"]).0, 2, "to which snapshot?");
    let help = host.text(&["cubebox", "rollback", "--help"]);
    assert!(help.contains("status 137") && help.contains("Exit codes"), "{help}");
}
