//! The runtime options that containerd passes to `start` and to Create.
//!
//! We have no options type of our own, because containerd 2.x refuses types that it does not know.

use std::path::PathBuf;

use containerd_shim_protos::{
    protobuf::{CodedInputStream, Message, well_known_types::any::Any},
    shim::oci as runc,
};

/// `ctr run --runc-*` and CRI for a runtime type that contains "runc" send these; nothing in them
/// applies to a VM but the cgroup of the shim.
const RUNC: &str = "containerd.runc.v1.Options";

/// CRI for every other runtime type, and `ctr run --runtime-config-path`. The older package name is
/// that of containerd 1.x.
const GENERIC: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];

/// Options that cannot be honoured.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// A type that we do not take.
    #[error("runtime options of type {0:?} are not supported: use {generic} with ConfigPath, or none", generic = GENERIC[0])]
    Type(String),
    /// Bytes that are not the message that the type names.
    #[error("the runtime options of type {type_url:?} cannot be decoded")]
    Decode {
        /// The type.
        type_url: String,
        /// What the decoder says.
        source: containerd_shim_protos::protobuf::Error,
    },
    /// The configuration came inline.
    #[error(
        "the runtime options carry a ConfigBody: only ConfigPath, the path of our configuration file, is supported"
    )]
    Body,
}

/// The configuration file that `options` name, if they name one.
///
/// # Errors
///
/// [`OptionsError`], with the type.
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>, OptionsError> {
    let Some(options) = options else { return Ok(None) };
    // containerd's typeurl writes bare names, protobuf's own packers put a host in front.
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    match name {
        "" if options.value.is_empty() => Ok(None),
        RUNC => Ok(None),
        _ if GENERIC.contains(&name) => generic(&options.value)
            .map_err(|source| OptionsError::Decode { type_url: options.type_url.clone(), source })?
            .into_path(),
        _ => Err(OptionsError::Type(options.type_url.clone())),
    }
}

/// The cgroup that `options` place the shim in, if they do: the path of one that exists.
///
/// # Errors
///
/// [`OptionsError::Decode`].
pub fn shim_cgroup(options: Option<&Any>) -> Result<Option<String>, OptionsError> {
    let Some(options) = options.filter(|any| any.type_url.rsplit('/').next() == Some(RUNC)) else {
        return Ok(None);
    };
    let decoded = runc::Options::parse_from_bytes(&options.value)
        .map_err(|source| OptionsError::Decode { type_url: options.type_url.clone(), source })?;
    Ok(Some(decoded.shim_cgroup).filter(|path| !path.is_empty()))
}

/// `runtimeoptions.v1.Options`: type_url = 1, config_path = 2, config_body = 3.
#[derive(Default)]
struct Generic {
    config_path: String,
    has_body: bool,
}

impl Generic {
    fn into_path(self) -> Result<Option<PathBuf>, OptionsError> {
        match self {
            Generic { has_body: true, .. } => Err(OptionsError::Body),
            Generic { config_path, .. } if config_path.is_empty() => Ok(None),
            Generic { config_path, .. } => Ok(Some(config_path.into())),
        }
    }
}

fn generic(bytes: &[u8]) -> Result<Generic, containerd_shim_protos::protobuf::Error> {
    /// Tag of a length-delimited field.
    const fn tag(field: u32) -> u32 {
        field << 3 | 2
    }
    let mut options = Generic::default();
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(found) = input.read_raw_tag_or_eof()? {
        match found {
            t if t == tag(2) => options.config_path = input.read_string()?,
            t if t == tag(3) => options.has_body = !input.read_bytes()?.is_empty(),
            t => containerd_shim_protos::protobuf::rt::skip_field_for_tag(t, &mut input)?,
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any { type_url: type_url.into(), value: value.into(), ..Default::default() }
    }

    #[test]
    fn no_options_and_those_of_runc_name_no_configuration() {
        for options in [None, Some(any("", b"")), Some(any(RUNC, b"\x48\x01"))] {
            assert_eq!(config_path(options.as_ref()).unwrap(), None, "{options:?}");
        }
    }

    #[test]
    fn the_generic_options_name_the_configuration_file() {
        let bytes = b"\x0a\x04type\x12\x09/etc/c.tl";
        for name in
            ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options", "x.io/runtimeoptions.v1.Options"]
        {
            assert_eq!(config_path(Some(&any(name, bytes))).unwrap(), Some("/etc/c.tl".into()), "{name}");
        }
    }

    #[test]
    fn those_of_runc_may_place_the_shim() {
        let placed = |options: &Any| shim_cgroup(Some(options)).unwrap();
        assert_eq!(placed(&any(RUNC, b"\x1a\x06/shims\x48\x01")).as_deref(), Some("/shims"));
        for options in [any(RUNC, b"\x48\x01"), any(GENERIC[0], b"\x1a\x01x"), any("", b"")] {
            assert_eq!(placed(&options), None, "{options:?}");
        }
        assert_eq!(shim_cgroup(None).unwrap(), None);
        assert!(matches!(shim_cgroup(Some(&any(RUNC, b"\x1a\x06/s"))), Err(OptionsError::Decode { .. })));
    }

    #[test]
    fn an_unknown_type_is_refused_by_name_and_damage_is_an_error() {
        let error = config_path(Some(&any("kata.Options", b""))).unwrap_err().to_string();
        assert!(error.contains("kata.Options"), "{error}");
        assert!(matches!(config_path(Some(&any("", b"x"))), Err(OptionsError::Type(_))));
        assert!(matches!(
            config_path(Some(&any(GENERIC[0], b"\x12\x09/et"))),
            Err(OptionsError::Decode { .. })
        ));
        assert!(matches!(config_path(Some(&any(GENERIC[0], b"\x1a\x01x"))), Err(OptionsError::Body)));
    }
}
