//! The `cube.*` annotations of a container, checked.

mod permit;
mod probe;

use cube_protocol::{annotations as name, guest::LogMode};

pub use permit::permit;
pub use probe::Probe;

use crate::task::{ID_RULE, check_id};

/// What the annotations of one container ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotations {
    /// Whether the init process's output goes to the log.
    pub log_forwarding: bool,
    /// What happens to a writer when nobody takes its output.
    pub log_mode: LogMode,
    /// Virtual CPUs of the sandbox; `None` leaves it to the spec and the configuration.
    pub vcpus: Option<u32>,
    /// Memory of the sandbox in MiB; `None` leaves it to the spec and the configuration.
    pub memory_mib: Option<u64>,
    /// Whether a rootfs of directories is packed into disks of the VM.
    pub rootfs_block: bool,
    /// Size in bytes of the disk that such a container writes to.
    pub rootfs_size: u64,
    /// How it shows that it is ready; `None`: it is when it runs.
    pub ready: Option<Probe>,
    /// The snapshot from which the sandbox goes on: its name, or its path in the store.
    pub restore: Option<String>,
    /// Id of the template that the sandbox is built for.
    pub template: Option<String>,
}

/// Size of a writable disk that nobody has asked for. It takes what is written, not more.
const ROOTFS_SIZE: u64 = 10 << 30;

/// The smallest that mke2fs makes a useful file system of, and more than a container should have.
const ROOTFS_SIZES: std::ops::RangeInclusive<u64> = 16 << 20..=1 << 40;

impl Default for Annotations {
    fn default() -> Self {
        Annotations {
            log_forwarding: true,
            log_mode: LogMode::BLOCK,
            vcpus: None,
            memory_mib: None,
            rootfs_block: false,
            rootfs_size: ROOTFS_SIZE,
            ready: None,
            restore: None,
            template: None,
        }
    }
}

/// An annotation that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// A name below `cube.` that this version does not know.
    #[error("the annotation {0:?} is not known: this version knows {known}", known = name::KNOWN.join(", "))]
    Unknown(String),
    /// A value outside of what the annotation takes.
    #[error("the annotation {name:?} is {value:?}: it must be {rule}")]
    Value {
        /// The annotation.
        name: &'static str,
        /// The value found.
        value: String,
        /// What is allowed.
        rule: &'static str,
    },
    /// One that pods may not set here.
    #[error(
        "the annotation {name:?} is none that pods may set on this host, which are {allowed}: whoever runs the host can add it to policy.pod_annotations in Cubebox's configuration file"
    )]
    NotAllowed {
        /// The annotation.
        name: String,
        /// Those that they may.
        allowed: String,
    },
    /// More than one ready probe.
    #[error(
        "the container has more than one ready probe: it may have one of the annotations {}, {}, {}",
        name::READY_HTTP,
        name::READY_TCP,
        name::READY_EXEC
    )]
    Probes,
    /// A template build with what keeps it from having a log, or from being a build.
    #[error(
        "{} cannot be set together with {other}: a template is built from an image, and with a log",
        name::TEMPLATE_ID
    )]
    Template {
        /// The other annotation, with its value where that matters.
        other: &'static str,
    },
}

/// Reads the `cube.*` annotations among `all`, the annotations of `config.json`; others are not ours.
///
/// # Errors
///
/// [`AnnotationError`], with the name and the value. A typing error that went unnoticed would leave
/// a container running with another policy than its author believes.
pub fn parse<'a>(all: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Annotations, AnnotationError> {
    let mut parsed = Annotations::default();
    for (key, value) in all.into_iter().filter(|(key, _)| key.starts_with(name::PREFIX)) {
        match key {
            name::LOG_FORWARDING => parsed.log_forwarding = boolean(name::LOG_FORWARDING, value)?,
            name::LOG_MODE => parsed.log_mode = log_mode(value)?,
            // The agent reads it from the spec; a wrong value is refused here all the same.
            name::ALLOW_VSOCK => drop(boolean(name::ALLOW_VSOCK, value)?),
            name::VCPUS => {
                parsed.vcpus = Some(number(name::VCPUS, value, 1..=255, "a number from 1 to 255")? as u32);
            }
            name::MEMORY_MIB => {
                let rule = "a number of MiB from 64 to 16777216";
                parsed.memory_mib = Some(number(name::MEMORY_MIB, value, 64..=16 << 20, rule)?);
            }
            name::ROOTFS_MODE => parsed.rootfs_block = rootfs_block(value)?,
            name::ROOTFS_SIZE => parsed.rootfs_size = rootfs_size(value)?,
            name::READY_HTTP => parsed.add_probe(Probe::http(value)?)?,
            name::READY_TCP => parsed.add_probe(Probe::tcp(value)?)?,
            name::READY_EXEC => parsed.add_probe(Probe::exec(value)?)?,
            name::SNAPSHOT_RESTORE => parsed.restore = Some(value.into()),
            name::TEMPLATE_ID => parsed.template = Some(template_id(value)?),
            _ => return Err(AnnotationError::Unknown(key.into())),
        }
    }
    parsed.check_template()?;
    Ok(parsed)
}

impl Annotations {
    fn add_probe(&mut self, probe: Probe) -> Result<(), AnnotationError> {
        match self.ready.replace(probe) {
            None => Ok(()),
            Some(_) => Err(AnnotationError::Probes),
        }
    }

    fn check_template(&self) -> Result<(), AnnotationError> {
        match self.template {
            Some(_) if self.restore.is_some() => {
                Err(AnnotationError::Template { other: name::SNAPSHOT_RESTORE })
            }
            Some(_) if !self.log_forwarding => {
                Err(AnnotationError::Template { other: "cube.container.log_forwarding=false" })
            }
            _ => Ok(()),
        }
    }
}

/// It becomes the name of a directory and of a snapshot.
fn template_id(value: &str) -> Result<String, AnnotationError> {
    match check_id("template id", value) {
        Ok(()) => Ok(value.into()),
        Err(_) => Err(AnnotationError::Value { name: name::TEMPLATE_ID, value: value.into(), rule: ID_RULE }),
    }
}

fn boolean(name: &'static str, value: &str) -> Result<bool, AnnotationError> {
    value.parse().map_err(|_| AnnotationError::Value {
        name,
        value: value.into(),
        rule: "\"true\" or \"false\"",
    })
}

fn log_mode(value: &str) -> Result<LogMode, AnnotationError> {
    match value {
        "block" => Ok(LogMode::BLOCK),
        "drop-oldest" => Ok(LogMode::DROP_OLDEST),
        _ => Err(AnnotationError::Value {
            name: name::LOG_MODE,
            value: value.into(),
            rule: "\"block\" or \"drop-oldest\"",
        }),
    }
}

fn rootfs_block(value: &str) -> Result<bool, AnnotationError> {
    match value {
        "share" => Ok(false),
        "block" => Ok(true),
        _ => Err(AnnotationError::Value {
            name: name::ROOTFS_MODE,
            value: value.into(),
            rule: "\"share\" or \"block\"",
        }),
    }
}

/// As Kubernetes writes quantities: `512Mi`, `10Gi`.
fn rootfs_size(value: &str) -> Result<u64, AnnotationError> {
    let units = [("Mi", 20), ("Gi", 30)];
    let size = units.iter().find_map(|(unit, shift)| {
        let number: u64 = value.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(1 << shift)
    });
    size.filter(|size| ROOTFS_SIZES.contains(size)).ok_or_else(|| AnnotationError::Value {
        name: name::ROOTFS_SIZE,
        value: value.into(),
        rule: "a number with Mi or Gi, from 16Mi to 1024Gi",
    })
}

fn number(
    name: &'static str,
    value: &str,
    range: std::ops::RangeInclusive<u64>,
    rule: &'static str,
) -> Result<u64, AnnotationError> {
    let number = value.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| AnnotationError::Value { name, value: value.into(), rule })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_annotations_of_ours_the_defaults_hold() {
        assert_eq!(parse([("io.kubernetes.cri.container-type", "sandbox")]), Ok(Annotations::default()));
    }

    #[test]
    fn each_annotation_is_read() {
        let parsed = parse([
            (name::LOG_FORWARDING, "false"),
            (name::LOG_MODE, "drop-oldest"),
            (name::ALLOW_VSOCK, "true"),
            (name::VCPUS, "4"),
            (name::MEMORY_MIB, "512"),
            (name::ROOTFS_MODE, "block"),
            (name::ROOTFS_SIZE, "512Mi"),
            (name::READY_TCP, "5432"),
            (name::SNAPSHOT_RESTORE, "one"),
        ]);
        let expected = Annotations {
            log_forwarding: false,
            log_mode: LogMode::DROP_OLDEST,
            vcpus: Some(4),
            memory_mib: Some(512),
            rootfs_block: true,
            rootfs_size: 512 << 20,
            ready: Some(Probe::Tcp(([127, 0, 0, 1], 5432).into())),
            restore: Some("one".into()),
            template: None,
        };
        assert_eq!(parsed, Ok(expected));
    }

    #[test]
    fn a_container_has_one_ready_probe() {
        let error = parse([(name::READY_TCP, "1"), (name::READY_HTTP, "1")]).unwrap_err();
        assert_eq!(error, AnnotationError::Probes);
        assert!(error.to_string().contains("cube.ready.exec"), "{error}");
    }

    #[test]
    fn a_template_is_built_with_a_log_and_from_no_snapshot() {
        let id = (name::TEMPLATE_ID, "python-3.12");
        assert_eq!(parse([id]).unwrap().template.as_deref(), Some("python-3.12"));
        for other in [(name::SNAPSHOT_RESTORE, "one"), (name::LOG_FORWARDING, "false")] {
            for both in [[id, other], [other, id]] {
                let error = parse(both).unwrap_err().to_string();
                assert!(error.contains(id.0) && error.contains(other.0), "{error}");
            }
        }
    }

    #[test]
    fn an_unknown_name_and_a_wrong_value_are_refused_by_name() {
        let unknown = parse([("cube.container.log_mod", "block")]).unwrap_err().to_string();
        assert!(unknown.contains("cube.container.log_mod\""), "{unknown}");
        for (key, value) in [
            (name::LOG_FORWARDING, "yes"),
            (name::LOG_MODE, "drop"),
            (name::ALLOW_VSOCK, "1"),
            (name::VCPUS, "0"),
            (name::VCPUS, "256"),
            (name::MEMORY_MIB, "63"),
            (name::MEMORY_MIB, "-1"),
            (name::ROOTFS_MODE, "disk"),
            (name::ROOTFS_SIZE, "10"),
            (name::ROOTFS_SIZE, "15Mi"),
            (name::ROOTFS_SIZE, "1025Gi"),
            (name::ROOTFS_SIZE, "99999999999999Gi"),
            (name::TEMPLATE_ID, ""),
            (name::TEMPLATE_ID, "../etc"),
            (name::TEMPLATE_ID, "a..b"),
        ] {
            let error = parse([(key, value)]).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(&format!("{value:?}")), "{error}");
        }
    }
}
