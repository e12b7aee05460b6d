//! The contract of the owner, with everything around it fake.

use std::{fs, path::Path, time::Duration};

use containerd_shim_protos::{
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, well_known_types::any::Any},
};
use cube_protocol::version::{self, Version};
use serde_json::{Value, json};
use tokio::time::timeout;
use ttrpc::Code;

use self::lab::{LIMIT, Lab, exec, init, spec, within};
use super::{
    CreateRequest, ExecRequest, KillRequest, ProcessId, Status, Stdio,
    fakes::{Fault, Guest, PID},
};
use crate::errors::{Error, chain};

mod lab;
mod member;
mod pause;
mod ready;
mod restore;
mod rollback;
mod snapshot;
mod suspend;
mod template;

#[tokio::test]
async fn a_container_goes_through_its_life_and_leaves_nothing() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    assert_eq!(lab.sandbox.state(init("c1")).await.unwrap().status, Status::Running);
    let state = lab.run_dir.load().unwrap().unwrap();
    assert_eq!((state.vmm_pid, state.backend.as_str(), state.timeline), (PID, "fake", 2));
    assert_eq!(*lab.host.size.lock().unwrap(), (1, 256));

    lab.guest().exit("c1", "", 3);
    assert_eq!(lab.wait(init("c1")).await, 3);
    let deleted = within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert_eq!((deleted.pid, deleted.exit.status), (PID, 3));
    assert!(!lab.run_dir.path().exists() && !lab.host.vmm.is_alive());
    assert_eq!(lab.events().await, ["create", "start", "exit", "delete"]);
    assert!(matches!(lab.sandbox.pid("c1".into()).await, Err(Error::NotFound { .. })));

    lab.sandbox.shutdown().await.unwrap();
    within(lab.over).await.unwrap();
}

#[tokio::test]
async fn shutdown_does_nothing_while_a_container_is_left() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.sandbox.shutdown().await.unwrap();
    assert_eq!(lab.sandbox.pid("c1".into()).await.unwrap(), PID);
}

#[tokio::test]
async fn an_exit_is_told_after_the_start_though_the_guest_reports_it_first() {
    let lab = Lab::new().await;
    lab.create("c1").await.unwrap();
    lab.guest().fault("Start", Fault::ExitFirst(0));
    lab.sandbox.start(init("c1")).await.unwrap();
    assert_eq!(lab.wait(init("c1")).await, 0);
    assert_eq!(lab.events().await, ["create", "start", "exit"]);
}

#[tokio::test]
async fn an_exec_that_comes_before_the_start_is_answered_waits_for_it() {
    let lab = Lab::new().await;
    lab.create("c1").await.unwrap();
    let request =
        ExecRequest { process: exec("c1", "e1"), spec: Default::default(), stdio: Stdio::default() };
    let (started, added) = within(async {
        // In this order: the owner has both before the guest can have answered the first.
        tokio::join!(biased; lab.sandbox.start(init("c1")), lab.sandbox.exec(request))
    })
    .await;
    assert_eq!((started.unwrap(), added.unwrap()), (PID, ()));
    assert_eq!(lab.events().await, ["create", "start", "exec-added"]);
}

#[tokio::test]
async fn a_start_that_fails_keeps_the_guests_code_and_the_container_can_be_deleted() {
    let lab = Lab::new().await;
    lab.create("c1").await.unwrap();
    let status = ttrpc::get_status(Code::NOT_FOUND, "exec /bin/nosuch: No such file or directory");
    lab.guest().fault("Start", Fault::Refuse(status));
    let error = lab.sandbox.start(init("c1")).await.unwrap_err();
    assert_eq!(error.code(), Code::NOT_FOUND);
    assert!(chain(&error).contains("/bin/nosuch"));
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert_eq!(lab.events().await, ["create", "exit", "delete"]);
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing() {
    let lab = Lab::new().await;
    let status = ttrpc::get_status(Code::INVALID_ARGUMENT, "linux.seccomp is not supported");
    lab.guest().fault("Create", Fault::Refuse(status));
    let error = lab.create("c1").await.unwrap_err();
    assert_eq!(error.code(), Code::INVALID_ARGUMENT);
    assert!(!lab.run_dir.path().exists() && !lab.host.vmm.is_alive());
    assert!(lab.events().await.is_empty());
    lab.sandbox.shutdown().await.unwrap();
    within(lab.over).await.unwrap();
}

#[tokio::test]
async fn a_request_that_fits_no_message_is_refused_and_costs_no_connection() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    let resources = Any { value: vec![b' '; 5 << 20], ..Default::default() };
    let error = lab.sandbox.update("c1".into(), resources).await.unwrap_err();
    assert_eq!(error.code(), Code::INVALID_ARGUMENT);
    assert!(error.to_string().contains("Update has 5242"), "{error}");
    assert_eq!(lab.sandbox.status().await.unwrap().vm.unwrap().link.reconnects, 0);
}

#[tokio::test]
async fn every_process_of_the_guest_is_listed_and_those_that_were_started_if_it_does_not_answer() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    *lab.guest().pids.lock().unwrap() = vec![17, 21, 22];
    let pids = lab.sandbox.pids("c1".into()).await.unwrap();
    assert_eq!((pids.reported, pids.guest), (PID, vec![17, 21, 22]));
    lab.guest().fault("Pids", Fault::Hang);
    assert_eq!(lab.sandbox.pids("c1".into()).await.unwrap().guest, [17]);
    lab.sandbox.pause("c1".into()).await.unwrap();
    assert_eq!(lab.sandbox.pids("c1".into()).await.unwrap().guest, [17]);
    assert!(matches!(lab.sandbox.pids("c2".into()).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn metrics_that_the_guest_does_not_give_are_empty_and_never_absent() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    let stats = lab.sandbox.stats("c1".into()).await.unwrap();
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert!(metrics.pids.is_some() && metrics.cpu.is_some() && metrics.memory.is_some(), "{metrics:?}");
    assert!(metrics.io.is_some() && metrics.rdma.is_some() && metrics.memory_events.is_some(), "{metrics:?}");
}

#[tokio::test]
async fn an_agent_of_another_protocol_is_refused_and_both_versions_are_named() {
    let guest = Guest::speaking(Version { major: 9, minor: 1 });
    let lab = Lab::with(guest, true).await;
    let text = chain(&within(lab.create("c1")).await.unwrap_err());
    assert!(text.contains("9.1") && text.contains(&version::CURRENT.to_string()), "{text}");
}

#[tokio::test]
async fn sigkill_ends_a_creation_that_hangs() {
    let lab = Lab::with(Guest::new(), false).await;
    let request = lab.request("c1", spec());
    let sandbox = lab.sandbox.clone();
    let create = tokio::spawn(async move { sandbox.create(request).await });
    // The state is written when the owner has taken the request.
    within(async {
        while lab.run_dir.load().unwrap().is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    lab.kill(init("c1"), 9).await.unwrap();
    assert!(matches!(within(create).await.unwrap(), Err(Error::Killed)));
    assert!(!lab.run_dir.path().exists());
}

#[tokio::test]
async fn sigkill_of_a_hung_guest_kills_its_vm() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.guest().fault("Kill", Fault::Hang);
    lab.guest().fault("Delete", Fault::Hang);
    lab.kill(init("c1"), 9).await.unwrap();
    assert_eq!(lab.wait(init("c1")).await, 137);
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert!(!lab.run_dir.path().exists());
}

#[tokio::test]
async fn a_question_is_answered_while_a_call_to_the_guest_hangs() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    let stats = lab.sandbox.stats("c1".into()).await.unwrap();
    for method in ["Start", "Exec", "Stats"] {
        lab.guest().fault(method, Fault::Hang);
    }
    let (sandbox, request) = (lab.sandbox.clone(), exec("c1", "e1"));
    let hanging = tokio::spawn(async move {
        sandbox
            .exec(ExecRequest { process: request, spec: Default::default(), stdio: Stdio::default() })
            .await
    });
    assert_eq!(lab.sandbox.pid("c1".into()).await.unwrap(), PID);
    assert_eq!(lab.sandbox.state(init("c1")).await.unwrap().pid, PID);
    // The guest does not answer, so these are the last known ones.
    assert_eq!(within(lab.sandbox.stats("c1".into())).await.unwrap(), stats);
    assert!(!hanging.is_finished());
}

#[tokio::test]
async fn every_process_ends_with_137_when_the_vm_dies() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    let request =
        ExecRequest { process: exec("c1", "e1"), spec: Default::default(), stdio: Stdio::default() };
    lab.sandbox.exec(request).await.unwrap();
    lab.sandbox.start(exec("c1", "e1")).await.unwrap();
    lab.host.vmm.die();
    assert_eq!(lab.wait(init("c1")).await, 137);
    assert_eq!(lab.wait(exec("c1", "e1")).await, 137);
    assert!(matches!(lab.kill(init("c1"), 9).await, Err(Error::NotFound { .. })));
    assert_eq!(lab.sandbox.pid("c1".into()).await.unwrap(), PID);
    within(lab.sandbox.delete(exec("c1", "e1"))).await.unwrap();
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    let events = ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"];
    assert_eq!(lab.events().await, events);
}

#[tokio::test]
async fn calls_that_do_not_fit_the_state_are_refused_with_the_right_code() {
    let lab = Lab::new().await;
    let code = |result: Result<(), Error>| result.unwrap_err().code();
    assert_eq!(code(lab.kill(init("c1"), 15).await), Code::NOT_FOUND);
    lab.run("c1").await;
    assert_eq!(code(lab.create("c1").await.map(drop)), Code::ALREADY_EXISTS);
    assert_eq!(code(lab.sandbox.start(init("c1")).await.map(drop)), Code::FAILED_PRECONDITION);
    assert_eq!(code(lab.sandbox.delete(init("c1")).await.map(drop)), Code::FAILED_PRECONDITION);
    assert_eq!(code(lab.sandbox.delete(exec("c1", "e1")).await.map(drop)), Code::NOT_FOUND);
    lab.guest().exit("c1", "", 0);
    lab.wait(init("c1")).await;
    assert_eq!(code(lab.kill(init("c1"), 15).await), Code::NOT_FOUND);
    let request =
        ExecRequest { process: exec("c1", "e1"), spec: Default::default(), stdio: Stdio::default() };
    assert_eq!(code(lab.sandbox.exec(request).await), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn kill_of_a_created_container_releases_who_waits_for_it() {
    let lab = Lab::new().await;
    lab.create("c1").await.unwrap();
    let sandbox = lab.sandbox.clone();
    let waiting = tokio::spawn(async move { sandbox.wait(init("c1")).await });
    lab.kill(init("c1"), 9).await.unwrap();
    assert_eq!(within(waiting).await.unwrap().unwrap().status, 137);
    assert_eq!(lab.events().await, ["create", "exit"]);
}

#[tokio::test]
async fn events_go_on_after_the_connection_to_the_guest_was_cut() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    let ids = ["e1", "e2", "e3"].map(|id| exec("c1", id));
    for process in ids.clone() {
        let request =
            ExecRequest { process: process.clone(), spec: Default::default(), stdio: Stdio::default() };
        lab.sandbox.exec(request).await.unwrap();
        lab.sandbox.start(process).await.unwrap();
    }
    for (round, process) in ids.iter().enumerate() {
        lab.guest().cut_connections();
        lab.guest().exit("c1", &process.exec, 0);
        if round == 1 {
            lab.guest().cut_connections();
        }
    }
    lab.guest().exit("c1", "", 1);
    assert_eq!(lab.wait(init("c1")).await, 1);
    // Each once, though every cut made us ask again.
    let exits = lab.events().await.iter().filter(|event| *event == "exit").count();
    assert_eq!(exits, 4);
}

#[tokio::test]
async fn out_of_memory_again_and_again_is_told_once_in_a_while() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    for _ in 0..200 {
        lab.guest().oom("c1");
    }
    lab.guest().exit("c1", "", 137);
    assert_eq!(lab.wait(init("c1")).await, 137);
    let told = lab.events().await.iter().filter(|event| *event == "oom").count();
    assert!((1..=5).contains(&told), "{told} events");
}

#[tokio::test]
async fn a_guest_that_refuses_sigkill_is_killed() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.guest().fault("Kill", Fault::Refuse(ttrpc::get_status(Code::INTERNAL, "I will not")));
    assert_eq!(lab.kill(init("c1"), 15).await.unwrap_err().code(), Code::INTERNAL);
    lab.kill(init("c1"), 9).await.unwrap();
    assert_eq!(lab.wait(init("c1")).await, 137);
}

#[tokio::test]
async fn a_delete_that_the_guest_fails_is_repeated() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.run("c2").await;
    lab.kill(init("c2"), 9).await.unwrap();
    assert_eq!(lab.wait(init("c2")).await, 137);
    lab.guest().fault("Delete", Fault::Refuse(ttrpc::get_status(Code::DEADLINE_EXCEEDED, "not dead yet")));
    let sandbox = lab.sandbox.clone();
    let delete = tokio::spawn(async move { sandbox.delete(init("c2")).await });
    let deletes = || lab.guest().calls.lock().unwrap().iter().filter(|call| *call == "Delete c2").count();
    within(async {
        while deletes() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    lab.guest().faults.lock().unwrap().clear();
    within(delete).await.unwrap().unwrap();
    lab.run("c2").await;
}

#[tokio::test]
async fn a_member_of_a_pod_comes_and_goes_alone_and_the_pod_takes_all_with_it() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    let mut joins = spec();
    joins["linux"]["namespaces"] = json!([
        {"type": "network", "path": format!("/proc/{PID}/ns/net")},
        {"type": "ipc", "path": format!("/proc/{PID}/ns/ipc")},
    ]);
    for id in ["m1", "m2"] {
        lab.sandbox.create(lab.request(id, joins.clone())).await.unwrap();
        lab.sandbox.start(init(id)).await.unwrap();
    }
    let expected = json!([{"type": "network"}, {"type": "ipc", "path": "/proc/17/ns/ipc"}]);
    assert_eq!(lab.guest().specs.lock().unwrap()[1]["linux"]["namespaces"], expected);

    lab.kill(init("m1"), 15).await.unwrap();
    assert_eq!(lab.wait(init("m1")).await, 143);
    within(lab.sandbox.delete(init("m1"))).await.unwrap();
    assert_eq!(*lab.host.released.lock().unwrap(), ["m1"]);
    let left: Vec<String> = lab.run_dir.load().unwrap().unwrap().containers.into_keys().collect();
    assert_eq!(left, ["c1", "m2"]);

    lab.kill(init("c1"), 9).await.unwrap();
    lab.wait(init("c1")).await;
    within(lab.sandbox.delete(init("c1"))).await.unwrap();
    assert!(!lab.run_dir.path().exists() && !lab.host.vmm.is_alive());
    assert!(matches!(lab.sandbox.pid("m2".into()).await, Err(Error::NotFound { .. })));
    let events = lab.events().await;
    assert_eq!(events.iter().filter(|topic| *topic == "delete").count(), 3, "{events:?}");
}

#[tokio::test]
async fn packed_layers_are_refused_for_who_joins_a_vm_that_has_booted() {
    let lab = Lab::new().await;
    lab.run("s").await;
    let mut block = spec();
    block["annotations"]["cube.rootfs.mode"] = "block".into();
    let refused = lab.sandbox.create(lab.request("m", block)).await.unwrap_err();
    assert!(refused.to_string().contains("cube.rootfs.mode=block"), "{refused}");
    assert_eq!(refused.code(), ttrpc::Code::UNIMPLEMENTED);
    // The name is free, and the sandbox is as it was.
    lab.create("m").await.unwrap();
}

#[tokio::test]
async fn concurrent_calls_are_each_answered() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    let execs = (0..50).map(|n| {
        let sandbox = lab.sandbox.clone();
        tokio::spawn(async move {
            let process = exec("c1", &format!("e{n}"));
            let (spec, stdio) = (Default::default(), Stdio::default());
            sandbox.exec(ExecRequest { process: process.clone(), spec, stdio }).await?;
            sandbox.start(process.clone()).await?;
            sandbox.kill(KillRequest { process: process.clone(), signal: 15, all: false }).await?;
            let exit = sandbox.wait(process.clone()).await?;
            sandbox.delete(process).await?;
            Ok::<u32, Error>(exit.status)
        })
    });
    for exec in execs.collect::<Vec<_>>() {
        assert_eq!(within(exec).await.unwrap().unwrap(), 143);
    }
}

#[tokio::test]
async fn a_shim_whose_sandbox_was_removed_behind_its_back_ends() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    // What `shim delete` does.
    lab.host.vmm.die();
    fs::remove_dir_all(lab.run_dir.path()).unwrap();
    within(lab.over).await.unwrap();
}

#[tokio::test]
async fn a_bundle_that_cannot_be_read_is_an_error_with_its_path() {
    let lab = Lab::new().await;
    let request = CreateRequest { bundle: Path::new("/no/such").into(), ..lab.request("c1", spec()) };
    let text = chain(&lab.sandbox.create(request).await.unwrap_err());
    assert!(text.contains("/no/such/config.json"), "{text}");
    let mut unknown = spec();
    unknown["annotations"]["cube.container.log_mod"] = "block".into();
    let error = lab.sandbox.create(lab.request("c1", unknown)).await.unwrap_err();
    assert!(matches!(error, Error::Annotation(_)), "{error}");
    // Neither took the id.
    lab.run("c1").await;
}

#[tokio::test]
async fn a_status_is_told_in_every_state_from_memory() {
    let lab = Lab::new().await;
    let status = || async { within(lab.sandbox.status()).await.unwrap() };
    let new = status().await;
    assert_eq!((new.state, new.vm.is_none(), new.processes.len()), ("creating", true, 0));

    lab.create("c1").await.unwrap();
    lab.guest().fault("Start", Fault::Hang);
    let hanging = tokio::spawn({
        let sandbox = lab.sandbox.clone();
        async move { sandbox.start(init("c1")).await }
    });
    while status().await.processes[0].state != "starting" {
        tokio::task::yield_now().await;
    }
    let booted = status().await;
    let vm = booted.vm.unwrap();
    assert_eq!((booted.state, vm.pid, vm.backend.as_str(), vm.timeline), ("running", PID, "fake", 2));
    assert!(vm.link.connected && vm.link.reconnects == 0 && booted.agent.is_some());

    lab.host.vmm.die();
    assert_eq!(lab.wait(init("c1")).await, 137);
    let ended = status().await;
    let (process, vm) = (&ended.processes[0], ended.vm.unwrap());
    assert_eq!((ended.state, process.state, process.guest_pid), ("stopped", "stopped", 17));
    assert_eq!(process.exit.map(|exit| exit.status), Some(137));
    assert!(!vm.link.connected && vm.pid == PID && ended.agent.is_none());
    assert_eq!(vm.uptime(), vm.uptime(), "it stands still");
    assert!(within(hanging).await.unwrap().is_err());
}

#[tokio::test]
async fn a_status_counts_events_and_what_became_of_the_control_connection() {
    let lab = Lab::new().await;
    lab.run("c1").await;
    lab.guest().cut_connections();
    lab.guest().exit("c1", "", 7);
    assert_eq!(lab.wait(init("c1")).await, 7);
    assert!(lab.publisher.flush(LIMIT).await);
    let status = lab.sandbox.status().await.unwrap();
    let link = status.vm.unwrap().link;
    assert_eq!((link.connected, link.reconnects, link.last_event), (true, 1, 1));
    assert_eq!((status.events.waiting, status.events.lost), (0, 0));
}
