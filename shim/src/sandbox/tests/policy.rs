//! What the authors of pods may ask for, and what a user of containerd may.

use std::sync::atomic::Ordering;

use super::*;
use crate::{
    cgroup::Limits,
    config::Policy,
    sandbox::SnapshotRequest,
    snapshot::{Manifest, Store},
    tenant::Tenant,
};

/// The spec of a pod's sandbox container in this Kubernetes namespace, with annotations of its author.
fn pod(namespace: &str, annotations: &[(&str, &str)]) -> Value {
    let mut spec = spec();
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": "c1",
        "io.kubernetes.cri.sandbox-namespace": namespace,
        "io.kubernetes.cri.sandbox-memory": "67108864",
        "cube.container.log_forwarding": "false",
    });
    for (name, value) in annotations {
        spec["annotations"][name] = (*value).into();
    }
    spec
}

/// The spec of a container that somebody makes with `ctr`.
fn ctr(annotations: &[(&str, &str)]) -> Value {
    let mut spec = spec();
    for (name, value) in annotations {
        spec["annotations"][name] = (*value).into();
    }
    spec
}

fn allowing(annotations: &[&str]) -> Policy {
    let mut policy = Policy::default();
    policy.pod_annotations.extend(annotations.iter().map(|name| (*name).to_owned()));
    policy
}

/// A sandbox with this policy, a guest that is at rest, and a snapshot "one" of this owner.
async fn with_snapshot(policy: Policy, owner: Option<Tenant>) -> Lab {
    let lab = Lab::with_policy(Guest::new(), true, policy).await;
    lab.guest().quiesced.store(true, Ordering::Relaxed);
    let draft = Store::at(&lab.dir.path().join("snapshots")).begin("one").unwrap();
    let manifest = Manifest { owner, ..super::restore::manifest(&[("old", false)]) };
    draft.finish(manifest, &[]).unwrap();
    lab
}

fn of_pod(namespace: &str) -> Option<Tenant> {
    Some(Tenant { namespace: "default".into(), pod_namespace: Some(namespace.into()) })
}

impl Lab {
    async fn try_create(&self, spec: Value) -> Result<u32, Error> {
        within(self.sandbox.create(self.request("c1", spec))).await
    }

    fn made_nothing(&self) -> bool {
        !self.run_dir.path().exists() && self.host.chosen.lock().unwrap().is_empty()
    }
}

#[tokio::test]
async fn a_pod_gets_what_the_operator_allows_and_is_told_what_not() {
    for (name, value) in [
        ("cube.sandbox.memory_mib", "1024"),
        ("cube.sandbox.vcpus", "64"),
        ("cube.rootfs.size", "512Gi"),
        ("cube.container.allow_vsock", "true"),
        ("cube.snapshot.restore", "one"),
        ("cube.template.id", "t"),
    ] {
        let lab = Lab::new().await;
        let error = lab.try_create(pod("team-a", &[(name, value)])).await.unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(error.code(), Code::INVALID_ARGUMENT);
        assert!(lab.made_nothing(), "{name}");
    }
    let lab = Lab::new().await;
    let harmless = [("cube.container.log_mode", "drop-oldest"), ("cube.ready.tcp", "80")];
    lab.try_create(pod("team-a", &harmless)).await.unwrap();
    assert_eq!(*lab.host.size.lock().unwrap(), (1, 64 + 96), "the limits of the pod");
}

#[tokio::test]
async fn what_a_pod_is_allowed_to_ask_for_ends_at_its_limits() {
    let allowed = allowing(&["cube.sandbox.*"]);
    let asked = [("cube.sandbox.memory_mib", "1024"), ("cube.sandbox.vcpus", "64")];
    let lab = Lab::with_policy(Guest::new(), true, allowed).await;
    lab.try_create(pod("team-a", &asked)).await.unwrap();
    assert_eq!(*lab.host.size.lock().unwrap(), (4, 64 + 96));
}

#[tokio::test]
async fn a_user_of_containerd_may_ask_for_anything() {
    let lab =
        Lab::with_policy(Guest::new(), true, Policy { pod_annotations: vec![], ..Default::default() }).await;
    let asked = [("cube.sandbox.memory_mib", "8192"), ("cube.sandbox.vcpus", "64")];
    lab.try_create(ctr(&asked)).await.unwrap();
    assert_eq!(*lab.host.size.lock().unwrap(), (64, 8192));
    for owner in [None, of_pod("team-a")] {
        let lab = with_snapshot(Policy::default(), owner).await;
        lab.try_create(ctr(&[("cube.snapshot.restore", "one")])).await.unwrap();
    }
}

#[tokio::test]
async fn a_pod_goes_on_from_snapshots_of_its_own_namespace_and_learns_nothing_of_others() {
    let restore = |name| pod("team-a", &[("cube.snapshot.restore", name)]);
    let allowed = allowing(&["cube.snapshot.restore"]);
    let own = with_snapshot(allowed.clone(), of_pod("team-a")).await;
    own.try_create(restore("one")).await.unwrap();

    let default = Tenant { namespace: "default".into(), pod_namespace: None };
    for owner in [None, Some(default), of_pod("team-b"), of_pod("")] {
        let lab = with_snapshot(allowed.clone(), owner.clone()).await;
        // One that is there, and one that is not.
        let refused = async |name| {
            let error = lab.try_create(restore(name)).await.unwrap_err();
            assert_eq!(error.code(), Code::NOT_FOUND);
            assert!(lab.guest().calls.lock().unwrap().is_empty() && lab.made_nothing());
            error.to_string().replace(name, "NAME")
        };
        let seen = refused("one").await;
        assert!(seen.contains("belongs to default/team-a"), "{owner:?}: {seen}");
        let lab = with_snapshot(allowed.clone(), owner.clone()).await;
        let error = lab.try_create(restore("other")).await.unwrap_err();
        assert_eq!(error.to_string().replace("other", "NAME"), seen);
    }
}

#[tokio::test]
async fn a_checkpoint_opens_no_other_door_to_a_pod() {
    let from_checkpoint =
        |lab: &Lab| CreateRequest { restore: Some("one".into()), ..lab.request("c1", pod("team-a", &[])) };
    let lab = with_snapshot(Policy::default(), of_pod("team-a")).await;
    let error = within(lab.sandbox.create(from_checkpoint(&lab))).await.unwrap_err();
    assert!(error.to_string().contains("cube.snapshot.restore"), "{error}");
    let lab = with_snapshot(allowing(&["cube.snapshot.restore"]), of_pod("team-b")).await;
    let error = within(lab.sandbox.create(from_checkpoint(&lab))).await.unwrap_err();
    assert!(error.to_string().contains("belongs to default/team-a"), "{error}");
}

#[tokio::test]
async fn a_vm_that_is_larger_than_a_pod_may_have_is_not_restored_in_it() {
    let config = json!({"cpus": {"boot_vcpus": 1}, "memory": {"size": 512 << 20}});
    let restore = [("cube.snapshot.restore", "one")];
    for (spec, allowed) in [(pod("team-a", &restore), false), (ctr(&restore), true)] {
        let lab = Lab::with_policy(Guest::new(), true, allowing(&["cube.snapshot.restore"])).await;
        lab.guest().quiesced.store(true, Ordering::Relaxed);
        let draft = Store::at(&lab.dir.path().join("snapshots")).begin("one").unwrap();
        fs::write(draft.vm_dir().join("config.json"), config.to_string()).unwrap();
        let manifest = Manifest { owner: of_pod("team-a"), ..super::restore::manifest(&[("old", false)]) };
        draft.finish(manifest, &[]).unwrap();
        let created = lab.try_create(spec).await;
        match allowed {
            true => {
                created.unwrap();
                assert_eq!(*lab.host.size.lock().unwrap(), (1, 512));
            }
            false => {
                let error = created.unwrap_err();
                assert!(error.to_string().contains("512 MiB, and this pod may have 4 and 160"), "{error}");
                assert!(lab.made_nothing());
            }
        }
    }
}

#[tokio::test]
async fn a_sandbox_has_limits_on_the_host_before_its_vm_begins() {
    let lab = Lab::new().await;
    lab.try_create(ctr(&[("cube.sandbox.memory_mib", "640"), ("cube.sandbox.vcpus", "3")])).await.unwrap();
    let limits = lab.host.limits.lock().unwrap().clone();
    // The fake host says 100 MiB beside the VM.
    assert_eq!(limits, [Limits::of(3, 640, 100, &[])]);
    let status = within(lab.sandbox.status()).await.unwrap();
    let limited = status.vm.unwrap().limited.unwrap();
    assert_eq!(limited.memory_bytes, Some(limits[0].memory_bytes));
}

#[tokio::test]
async fn a_snapshot_belongs_to_whom_its_sandbox_does() {
    let root = Tenant { namespace: "default".into(), pod_namespace: None };
    for (spec, owner) in [(ctr(&[]), Some(root)), (pod("team-a", &[]), of_pod("team-a"))] {
        let lab = Lab::new().await;
        lab.try_create(spec).await.unwrap();
        lab.sandbox.start(init("c1")).await.unwrap();
        let request = SnapshotRequest { name: Some("one".into()), ..Default::default() };
        let taken = within(lab.sandbox.snapshot(request)).await.unwrap();
        assert_eq!(taken.manifest.owner, owner);
        let (manifest, _) = Store::at(&lab.dir.path().join("snapshots")).open("one").unwrap();
        assert_eq!(manifest.owner, owner);
    }
}
