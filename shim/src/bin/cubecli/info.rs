//! `cubecli info`

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
};

use cube_protocol::version;
use cube_shim::{
    cgroup::Hierarchy,
    config::{self, Config},
    errors::chain,
    log::locate,
    vmm,
};

use crate::{error::CliError, table};

pub(crate) fn run(config: &Config, explicit: Option<&Path>, output: File) -> Result<(), CliError> {
    let mut rows = vec![
        row("cubecli", env!("CARGO_PKG_VERSION")),
        row("guest protocol", version::CURRENT),
        file("configuration", &config_path(explicit)),
    ];
    rows.push(row("vmm", vmm::choose(config)));
    let tools = &config.tools;
    for (name, path) in [
        ("tools.cloud_hypervisor", &tools.cloud_hypervisor),
        ("tools.qemu", &tools.qemu),
        ("tools.virtiofsd", &tools.virtiofsd),
        ("tools.vhost_device_vsock", &tools.vhost_device_vsock),
        ("tools.agent", &tools.agent),
        ("tools.mkfs_erofs", &tools.mkfs_erofs),
        ("tools.mke2fs", &tools.mke2fs),
    ] {
        rows.push(program(name, path));
    }
    let guest = &config.guest;
    for (name, path) in
        [("guest.kernel", &guest.kernel), ("guest.vmlinux", &guest.vmlinux), ("guest.initrd", &guest.initrd)]
    {
        rows.push(file(name, path));
    }
    let allowed = match &config.policy.pod_annotations[..] {
        [] => "none".into(),
        some => some.join(", "),
    };
    rows.push(row("policy.pod_annotations", allowed));
    rows.push(row("limits", limits()));
    rows.push(file("run_dir", &config.run_dir));
    rows.push(file("rootfs.cache_dir", &config.rootfs.cache_dir));
    rows.push(match config.log.dir.as_os_str() == locate::BUNDLE {
        true => row("log.dir", format!("in each bundle, below {}", locate::TASK_DIR)),
        false => file("log.dir", &config.log.dir),
    });
    table::write(output, &rows)
}

fn row(name: &str, value: impl std::fmt::Display) -> [String; 2] {
    [name.into(), value.to_string()]
}

/// What of the host can be limited for a sandbox.
fn limits() -> String {
    match Hierarchy::find() {
        Err(e) => format!("none: {}", chain(&e)),
        Ok(hierarchy) => {
            let root = hierarchy.root().display();
            match &hierarchy.controllers()[..] {
                [] => {
                    format!("none: the cgroup2 at {root} has none of the controllers memory, cpu, pids, io")
                }
                some => format!("{} (cgroup2 at {root})", some.join(", ")),
            }
        }
    }
}

/// A file or directory that need not exist.
fn file(name: &str, path: &Path) -> [String; 2] {
    let state = match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => format!("{} KiB", metadata.len().div_ceil(1024)),
        Ok(_) => "exists".into(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => "does not exist".into(),
        Err(e) => e.to_string(),
    };
    row(name, format!("{} ({state})", path.display()))
}

/// A program, looked for as the shim does it. The shim's PATH is containerd's, though.
fn program(name: &str, program: &Path) -> [String; 2] {
    match vmm::program::find(program, "") {
        Ok(path) => row(name, path.display()),
        Err(_) => row(name, format!("{} (not found)", program.display())),
    }
}

fn config_path(explicit: Option<&Path>) -> PathBuf {
    let named = explicit.map(Path::to_owned).or_else(|| env::var_os(config::PATH_VARIABLE).map(Into::into));
    named.unwrap_or_else(|| config::DEFAULT_PATH.into())
}
