//! `-info` and `-v`. containerd 2.2 and later asks for the former, from any directory and before any
//! container exists.

use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use super::{BootstrapError, RUNTIME};

/// Type of the features, as containerd's typeurl names the Go type.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Annotation that lists the mount types which containerd need not mount itself.
const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// File systems that the guest mounts from a block device.
const BLOCK_FILE_SYSTEMS: &str = "ext4,xfs,erofs";

pub(super) fn version() -> String {
    format!("containerd-shim-cube-v2:\n  Version: {}\n", env!("CARGO_PKG_VERSION"))
}

/// The `RuntimeInfo`, as it goes to stdout.
pub(super) fn encode() -> Result<Vec<u8>, BootstrapError> {
    // The features document of the runtime specification.
    let features = serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": [],
        "mountOptions": ["bind", "rbind", "ro", "rw", "nosuid", "nodev", "noexec", "private", "rprivate"],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false},
            "seccomp": {"enabled": false},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
        },
    });
    let features =
        Any { type_url: FEATURES_TYPE.into(), value: serde_json::to_vec(&features)?, ..Default::default() };
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        annotations: [(ALLOW_MOUNTS.to_owned(), BLOCK_FILE_SYSTEMS.to_owned())].into(),
        ..Default::default()
    };
    Ok(info.write_to_bytes()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_can_read_the_info() {
        let info = RuntimeInfo::parse_from_bytes(&encode().unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.cube.v2");
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        assert!(info.annotations[ALLOW_MOUNTS].contains("ext4"));
    }
}
