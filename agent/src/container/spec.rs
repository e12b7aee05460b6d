//! What of a spec is honoured. Everything else is refused by name: a container must never run with less
//! isolation, or in another way, than its author asked for.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    Hooks, Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespaceType, LinuxPersonality,
    LinuxPersonalityDomain, LinuxResources, Mount, Process, Spec,
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{ContainerError, cgroup, mount_options::MountOptions, namespaces};

/// Reads config.json, or the process of an exec. A field that the specification's types do not have is
/// refused as well: it may be of a later version, and serde would drop it in silence.
pub fn parse<T: DeserializeOwned + Serialize>(json: &[u8]) -> Result<T, ContainerError> {
    let given: Value = serde_json::from_slice(json).map_err(ContainerError::Json)?;
    let parsed: T = serde_json::from_slice(json).map_err(ContainerError::Json)?;
    // Through the same serializer as the instructions of the init stage: a second one for a type
    // of this size would show in the size of the agent.
    let kept = serde_json::to_vec(&parsed).map_err(ContainerError::Json)?;
    let kept: Value = serde_json::from_slice(&kept).map_err(ContainerError::Json)?;
    match dropped(&given, &kept) {
        Some(field) => Err(ContainerError::unsupported(field)),
        None => Ok(parsed),
    }
}

/// Path of the first field of `given` that has no counterpart in `kept`. `null` asks for nothing.
fn dropped(given: &Value, kept: &Value) -> Option<String> {
    match (given, kept) {
        (Value::Object(given), Value::Object(kept)) => given.iter().find_map(|(name, value)| {
            let below = match kept.get(name) {
                None if value.is_null() => return None,
                None => String::new(),
                Some(counterpart) => dropped(value, counterpart)?,
            };
            let dot = if below.is_empty() || below.starts_with('[') { "" } else { "." };
            Some(format!("{name}{dot}{below}"))
        }),
        (Value::Array(given), Value::Array(kept)) => {
            let mut pairs = given.iter().zip(kept).enumerate();
            pairs.find_map(|(index, (given, kept))| Some(format!("[{index}].{}", dropped(given, kept)?)))
        }
        _ => None,
    }
}

/// Fields that are refused when set, each with whether it is, and what to do.
type Refusals<'a> = &'a [(&'a str, bool, Option<&'static str>)];

fn refuse(prefix: &str, refusals: Refusals<'_>) -> Result<(), ContainerError> {
    match refusals.iter().find(|(_, set, _)| *set) {
        Some((field, _, hint)) => {
            Err(ContainerError::Unsupported { field: format!("{prefix}{field}"), hint: *hint })
        }
        None => Ok(()),
    }
}

fn some_text(field: &Option<String>) -> bool {
    field.as_ref().is_some_and(|text| !text.is_empty())
}

/// Whether a list or map is there and not empty.
fn some_items<T>(field: &Option<T>) -> bool
where
    for<'a> &'a T: IntoIterator,
{
    field.as_ref().is_some_and(|items| items.into_iter().next().is_some())
}

/// Unix98 pseudo terminals.
const PTS_MAJOR: i64 = 136;

/// Makes the destinations of mounts absolute and without `.` and `..`, as runc does: by their text, and never
/// above the root.
pub(super) fn clean(spec: &mut Spec) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        // An empty one is refused.
        if !mount.destination().as_os_str().is_empty() {
            let destination = lexically_clean(mount.destination());
            mount.set_destination(destination);
        }
    }
}

/// Looks whether the guest has the devices of the spec: a node without a driver is no device. A privileged
/// container, which may use all, goes without those that are not there.
pub(super) fn settle_devices(spec: &mut Spec) -> Result<(), ContainerError> {
    const KNOWN: &str = "/sys/dev/char";
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().clone());
    let is_for_all = |rule: &LinuxDeviceCgroup| {
        let of_all_kinds = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        let any = |number: Option<i64>| matches!(number, None | Some(-1));
        rule.allow() && of_all_kinds && any(rule.major()) && any(rule.minor())
    };
    let privileged = rules.iter().flatten().any(is_for_all);
    let Some(devices) = linux.devices_mut() else { return Ok(()) };
    let is_missing = |device: &LinuxDevice| {
        let character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
        let number = format!("{KNOWN}/{}:{}", device.major(), device.minor());
        // Pseudo terminals come and go, and are not in sysfs.
        character && device.major() != PTS_MAJOR && Path::new(KNOWN).exists() && !Path::new(&number).exists()
    };
    if privileged {
        devices.retain(|device| {
            let missing = is_missing(device);
            if missing {
                log::warn!("{} is left out: the guest has no such device", device.path().display());
            }
            !missing
        });
        return Ok(());
    }
    match devices.iter().enumerate().find(|(_, device)| is_missing(device)) {
        Some((index, device)) => Err(ContainerError::Unsupported {
            field: format!("linux.devices[{index}] ({})", device.path().display()),
            hint: Some(
                "the guest's kernel has no such device; a module can be added with build-guest --module",
            ),
        }),
        None => Ok(()),
    }
}

fn lexically_clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Checks a whole spec, and gives its process.
pub(super) fn check(spec: &Spec) -> Result<&Process, ContainerError> {
    refuse(
        "",
        &[
            ("windows", spec.windows().is_some(), None),
            ("solaris", spec.solaris().is_some(), None),
            ("vm", spec.vm().is_some(), None),
            ("zos", spec.zos().is_some(), None),
        ],
    )?;
    if let Some(hooks) = spec.hooks() {
        check_hooks(hooks)?;
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(index, mount)?;
    }
    check_uts(spec)?;
    if let Some(linux) = spec.linux() {
        check_linux(linux)?;
        check_sysctls(spec, linux)?;
    }
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| ContainerError::invalid("process", "", "a container needs a process to run"))?;
    check_process(process)?;
    Ok(process)
}

fn check_hooks(hooks: &Hooks) -> Result<(), ContainerError> {
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    let hint = Some("hooks are programs of the host, and the container runs in a guest");
    refuse(
        "hooks.",
        &[
            ("prestart", some_items(prestart), hint),
            ("createRuntime", some_items(hooks.create_runtime()), hint),
            ("createContainer", some_items(hooks.create_container()), hint),
            ("startContainer", some_items(hooks.start_container()), hint),
            ("poststart", some_items(hooks.poststart()), hint),
            ("poststop", some_items(hooks.poststop()), hint),
        ],
    )
}

/// Checks a process, of a container or of an exec.
pub(super) fn check_process(process: &Process) -> Result<(), ContainerError> {
    let lsm = Some("the guest has no such security module; the container is isolated by its virtual machine");
    refuse(
        "process.",
        &[
            ("commandLine", some_text(process.command_line()), None),
            ("apparmorProfile", some_text(process.apparmor_profile()), lsm),
            ("selinuxLabel", some_text(process.selinux_label()), lsm),
            ("ioPriority", process.io_priority().is_some(), None),
            ("scheduler", process.scheduler().is_some(), None),
            ("execCPUAffinity", process.exec_cpu_affinity().is_some(), None),
            ("user.username", some_text(process.user().username()), Some("give uid and gid")),
        ],
    )?;
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(ContainerError::invalid("process.args", args.join(" "), "it names no program"));
    }
    if !process.cwd().is_absolute() {
        let reason = "the working directory must be an absolute path";
        return Err(ContainerError::invalid("process.cwd", process.cwd().display(), reason));
    }
    let env = process.env().as_deref().unwrap_or_default();
    for (field, texts) in [("process.args", args), ("process.env", env)] {
        if let Some(text) = texts.iter().find(|text| text.contains('\0')) {
            return Err(ContainerError::invalid(field, text.escape_debug(), "it contains a zero byte"));
        }
    }
    Ok(())
}

fn check_linux(linux: &Linux) -> Result<(), ContainerError> {
    let user_namespace = Some("user namespaces come with a later version");
    let seccomp = Some("seccomp profiles come with a later version; run without one (unconfined)");
    refuse(
        "linux.",
        &[
            ("uidMappings", some_items(linux.uid_mappings()), user_namespace),
            ("gidMappings", some_items(linux.gid_mappings()), user_namespace),
            ("seccomp", linux.seccomp().is_some(), seccomp),
            ("mountLabel", some_text(linux.mount_label()), None),
            ("intelRdt", linux.intel_rdt().is_some(), None),
            ("memoryPolicy", linux.memory_policy().is_some(), None),
            ("personality", linux.personality().as_ref().is_some_and(is_foreign), None),
            ("timeOffsets", some_items(linux.time_offsets()), None),
            ("netDevices", some_items(linux.net_devices()), None),
        ],
    )?;
    propagation(linux)?;
    for (index, device) in linux.devices().iter().flatten().enumerate() {
        if device.typ() == LinuxDeviceType::A {
            let field = format!("linux.devices[{index}].type");
            return Err(ContainerError::invalid(field, "a", "a device node is of type c, b, u or p"));
        }
        if !device.path().is_absolute() {
            let field = format!("linux.devices[{index}].path");
            return Err(ContainerError::invalid(field, device.path().display(), "it must be absolute"));
        }
    }
    linux.resources().as_ref().map_or(Ok(()), check_resources)
}

fn is_foreign(personality: &LinuxPersonality) -> bool {
    personality.domain() != LinuxPersonalityDomain::PerLinux || some_items(personality.flags())
}

/// Checks limits, of a new container or of an update.
pub(super) fn check_resources(resources: &LinuxResources) -> Result<(), ContainerError> {
    let network = resources.network().as_ref();
    refuse(
        "linux.resources.",
        &[
            ("rdma", some_items(resources.rdma()), None),
            ("network.classID", network.and_then(|n| n.class_id()).is_some_and(|id| id != 0), None),
            ("network.priorities", network.is_some_and(|n| some_items(n.priorities())), None),
        ],
    )?;
    cgroup::check(resources)
}

/// The `MS_…` flags of `linux.rootfsPropagation`, if it is set.
pub(super) fn propagation(linux: &Linux) -> Result<Option<nix::mount::MsFlags>, ContainerError> {
    use nix::mount::MsFlags;
    let Some(name) = linux.rootfs_propagation().as_deref().filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    match name {
        "private" => Ok(Some(MsFlags::MS_PRIVATE)),
        "rprivate" => Ok(Some(MsFlags::MS_PRIVATE | MsFlags::MS_REC)),
        "slave" => Ok(Some(MsFlags::MS_SLAVE)),
        "rslave" => Ok(Some(MsFlags::MS_SLAVE | MsFlags::MS_REC)),
        "shared" => Ok(Some(MsFlags::MS_SHARED)),
        "rshared" => Ok(Some(MsFlags::MS_SHARED | MsFlags::MS_REC)),
        "unbindable" => Ok(Some(MsFlags::MS_UNBINDABLE)),
        "runbindable" => Ok(Some(MsFlags::MS_UNBINDABLE | MsFlags::MS_REC)),
        _ => Err(ContainerError::invalid(
            "linux.rootfsPropagation",
            name,
            "it must be private, slave, shared or unbindable, or one of these with an r in front",
        )),
    }
}

fn check_mount(index: usize, mount: &Mount) -> Result<(), ContainerError> {
    let prefix = format!("mounts[{index}].");
    refuse(
        &prefix,
        &[
            ("uidMappings", some_items(mount.uid_mappings()), None),
            ("gidMappings", some_items(mount.gid_mappings()), None),
        ],
    )?;
    let destination = mount.destination();
    if destination.as_os_str().is_empty() {
        let field = format!("{prefix}destination");
        return Err(ContainerError::invalid(field, "", "it must be a path"));
    }
    let options = MountOptions::parse(index, mount)?;
    if options.bind && !mount.source().as_ref().is_some_and(|source| source.is_absolute()) {
        let source = mount.source().as_ref().map(|source| source.display().to_string()).unwrap_or_default();
        let reason = "the source of a bind mount must be an absolute path in the guest";
        return Err(ContainerError::invalid(format!("{prefix}source"), source, reason));
    }
    Ok(())
}

fn check_uts(spec: &Spec) -> Result<(), ContainerError> {
    for (field, value) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        if let Some(value) = value.as_deref().filter(|value| !value.is_empty())
            && !namespaces::is_listed(spec, LinuxNamespaceType::Uts)
        {
            let reason = "it needs a uts namespace, or it would rename the guest";
            return Err(ContainerError::invalid(field, value, reason));
        }
    }
    Ok(())
}

/// A sysctl that no namespace of the container contains would change the guest for all its containers.
fn check_sysctls(spec: &Spec, linux: &Linux) -> Result<(), ContainerError> {
    const IPC: [&str; 8] = [
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    for name in linux.sysctl().iter().flat_map(|sysctls| sysctls.keys()) {
        let path = sysctl_path(name);
        let contained_by = if path.starts_with("net/") {
            LinuxNamespaceType::Network
        } else if path.starts_with("fs/mqueue/") || IPC.contains(&path.as_str()) {
            LinuxNamespaceType::Ipc
        } else if path == "kernel/domainname" {
            LinuxNamespaceType::Uts
        } else {
            return Err(ContainerError::Unsupported {
                field: format!("linux.sysctl[{name:?}]"),
                hint: Some("only sysctls that a net, ipc or uts namespace contains can be set"),
            });
        };
        if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return Err(ContainerError::invalid("linux.sysctl", name, "it names no sysctl"));
        }
        if !namespaces::is_listed(spec, contained_by) {
            let reason = format!("it needs a {contained_by} namespace in linux.namespaces");
            return Err(ContainerError::invalid("linux.sysctl", name, reason));
        }
    }
    Ok(())
}

/// Path of a sysctl below /proc/sys. As in sysctl(8), whichever of `.` and `/` comes first in the name
/// is the separator, and the other one is part of a component with its meaning swapped.
pub(super) fn sysctl_path(name: &str) -> String {
    let dots_separate = name.find(['.', '/']).is_none_or(|at| name[at..].starts_with('.'));
    if !dots_separate {
        return name.to_owned();
    }
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    name.chars().map(swap).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn minimal() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "network"}]},
        })
    }

    fn outcome(pointer: &str, value: Value) -> String {
        let mut spec = minimal();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        let spec: Spec = serde_json::from_value(spec).unwrap();
        match check(&spec).and_then(|_| namespaces::Namespaces::from_spec(&spec)) {
            Ok(_) => "accepted".into(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_is_not_honoured_is_refused_by_its_name() {
        let hook = json!([{"path": "/bin/true"}]);
        let id_map = json!([{"hostID": 1, "containerID": 0, "size": 1}]);
        for (pointer, value, named) in [
            ("/hooks", json!({"prestart": hook}), "hooks.prestart"),
            ("/hooks", json!({"poststop": hook}), "hooks.poststop"),
            ("/process/apparmorProfile", json!("docker-default"), "process.apparmorProfile"),
            ("/process/selinuxLabel", json!("system_u"), "process.selinuxLabel"),
            ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_RT", "priority": 0}), "process.ioPriority"),
            ("/linux/uidMappings", id_map.clone(), "linux.uidMappings"),
            ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ERRNO"}), "linux.seccomp"),
            ("/linux/mountLabel", json!("x"), "linux.mountLabel"),
            ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
            ("/linux/personality", json!({"domain": "LINUX32"}), "linux.personality"),
            ("/linux/timeOffsets", json!({"monotonic": {"secs": 1}}), "linux.timeOffsets"),
            ("/linux/namespaces", json!([{"type": "mount"}, {"type": "user"}]), "linux.namespaces[1]"),
            ("/linux/namespaces", json!([{"type": "time"}]), "linux.namespaces[0]"),
            ("/linux/namespaces", json!([{"type": "pid"}]), "without a mount namespace"),
            ("/linux/rootfsPropagation", json!("mostly"), "linux.rootfsPropagation"),
            ("/linux/sysctl", json!({"vm.swappiness": "1"}), "linux.sysctl[\"vm.swappiness\"]"),
            ("/linux/resources", json!({"rdma": {"x": {"hcaHandles": 1}}}), "linux.resources.rdma"),
            ("/linux/resources", json!({"memory": {"kernel": 4096}}), "linux.resources.memory.kernel"),
            ("/linux/resources", json!({"memory": {"swappiness": 3}}), "linux.resources.memory.swappiness"),
            (
                "/linux/resources",
                json!({"cpu": {"realtimeRuntime": 3}}),
                "linux.resources.cpu.realtimeRuntime",
            ),
            (
                "/mounts",
                json!([{"destination": "/a", "type": "bind", "source": "/", "options": ["idmap"]}]),
                "idmap",
            ),
            (
                "/mounts",
                json!([{"destination": "/a", "type": "tmpfs", "uidMappings": id_map}]),
                "mounts[0].uidMappings",
            ),
            ("/hostname", json!("elsewhere"), "hostname"),
            ("/process/args", json!([]), "process.args"),
            ("/process/cwd", json!("tmp"), "process.cwd"),
        ] {
            let outcome = outcome(pointer, value.clone());
            assert!(outcome.contains(named), "{pointer} = {value}: {outcome}");
        }
    }

    #[test]
    fn a_field_of_another_version_is_refused_by_its_name() {
        let mut spec = minimal();
        spec["linux"]["quantumState"] = json!("both");
        let error = parse::<Spec>(spec.to_string().as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "linux.quantumState is not supported");
        spec = minimal();
        spec["linux"]["namespaces"][1]["color"] = json!(1);
        let error = parse::<Spec>(spec.to_string().as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "linux.namespaces[1].color is not supported");
        spec = minimal();
        spec["later"] = Value::Null;
        parse::<Spec>(spec.to_string().as_bytes()).unwrap();
        assert_eq!(parse::<Spec>(minimal().to_string().as_bytes()).unwrap().version(), "1.0.2");
    }

    #[test]
    fn what_is_no_json_is_an_error_that_says_where() {
        let error = parse::<Spec>(b"{\"process\": {\"args\": 3}}").unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("line 1 column"), "{source}");
        assert!(parse::<Spec>(b"not json").is_err());
        assert!(parse::<Spec>(b"{} trailing").is_err());
    }

    #[test]
    fn empty_fields_ask_for_nothing() {
        for (pointer, value) in [
            ("/hooks", json!({"prestart": []})),
            ("/process/apparmorProfile", json!("")),
            ("/linux/seccomp", Value::Null),
            ("/linux/uidMappings", json!([])),
            ("/linux/personality", json!({"domain": "LINUX"})),
            ("/linux/resources", json!({"memory": {"disableOOMKiller": false}, "cpu": {"shares": 0}})),
            ("/linux/sysctl", json!({"net.ipv4.ip_unprivileged_port_start": "0", "kernel.shmmni": "100"})),
        ] {
            assert_eq!(outcome(pointer, value.clone()), "accepted", "{pointer} = {value}");
        }
    }

    #[test]
    fn destinations_are_cleaned_by_their_text_and_stay_below_the_root() {
        for (given, expected) in [
            ("/a/../b", "/b"),
            ("/../../etc/x", "/etc/x"),
            ("relative/./path", "/relative/path"),
            ("/proc/", "/proc"),
            ("/..", "/"),
        ] {
            assert_eq!(lexically_clean(Path::new(given)), Path::new(expected), "{given}");
        }
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2", "mounts": [{"destination": "/x/../dev", "type": "tmpfs"}],
        }))
        .unwrap();
        clean(&mut spec);
        assert_eq!(spec.mounts().as_ref().unwrap()[0].destination(), Path::new("/dev"));
    }

    #[test]
    fn a_device_that_the_guest_does_not_have_is_refused_and_left_out_of_a_privileged_container() {
        let device =
            |minor: i64| json!({"path": format!("/dev/d{minor}"), "type": "c", "major": 10, "minor": minor});
        let spec = |privileged: bool| {
            let rules = if privileged { json!([{"allow": true, "access": "rwm"}]) } else { json!([]) };
            let mut spec = minimal();
            // No kernel has this one.
            spec["linux"]["devices"] =
                json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}, device(999_999)]);
            spec["linux"]["resources"] = json!({"devices": rules});
            serde_json::from_value::<Spec>(spec).unwrap()
        };
        let error = settle_devices(&mut spec(false)).unwrap_err().to_string();
        assert!(error.contains("linux.devices[1] (/dev/d999999)"), "{error}");
        let mut privileged = spec(true);
        settle_devices(&mut privileged).unwrap();
        let kept = privileged.linux().as_ref().unwrap().devices().as_ref().unwrap();
        assert_eq!((kept.len(), kept[0].path().as_path()), (1, Path::new("/dev/null")));
    }

    #[test]
    fn the_first_separator_of_a_sysctl_name_decides() {
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.forwarding"), "net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/forwarding"), "net/ipv4/conf/eth0.1/forwarding");
    }
}
