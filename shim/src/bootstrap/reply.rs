//! What containerd sends to `start` on stdin, and the forms of the answer.

use std::path::Path;

use containerd_shim_protos::{
    TASK_API_VERSION,
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::{Message, well_known_types::any::Any},
};

use super::{BootstrapError, Flags};

/// Below this directory of its state, containerd 2 keeps the bundles of sandboxes; it expects a
/// version there, which a plain address does not have.
const SANDBOX_CONTROLLER: &str = "io.containerd.sandbox.controller.v1.shim";

/// In which form containerd wants the answer of `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// containerd 2.3 and later: a `BootstrapResult`.
    Bootstrap,
    /// The sandbox controller of containerd 2.0 to 2.2: JSON with a version.
    Json,
    /// Everybody else: the address. 1.6 and 1.7 know nothing else, and 2.0 to 2.2 cannot be told
    /// from them; they take it for version 2 of the Task API, which we serve as well.
    Address,
}

/// What `start` is asked for.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    pub(super) protocol: Protocol,
    /// Where containerd takes events, if it says so here.
    pub(super) ttrpc_address: Option<String>,
    /// Runtime options, if there are any.
    pub(super) options: Option<Any>,
}

impl Request {
    /// Reads the request from what containerd wrote to stdin.
    ///
    /// # Errors
    ///
    /// [`BootstrapError::Identity`] for parameters that are meant for another shim.
    pub(super) fn parse(input: &[u8], flags: &Flags, bundle: &Path) -> Result<Request, BootstrapError> {
        if let Some(params) = bootstrap_params(input, flags)? {
            let options = params.extensions.into_iter().find_map(|extension| {
                extension.value.into_option().filter(|any| any.type_url.ends_with("Options"))
            });
            let address = params.containerd_ttrpc_address;
            let ttrpc_address = (!address.is_empty()).then_some(address);
            return Ok(Request { protocol: Protocol::Bootstrap, ttrpc_address, options });
        }
        let controller = bundle.iter().any(|part| part == SANDBOX_CONTROLLER);
        let protocol = if controller { Protocol::Json } else { Protocol::Address };
        // The parsers of all versions before ignore what they do not understand here.
        let options = Any::parse_from_bytes(input).ok().filter(|any| !any.type_url.is_empty());
        Ok(Request { protocol, ttrpc_address: None, options })
    }
}

/// `BootstrapParams` and the `Any` of older versions have the same first two fields, so that either
/// parses as the other: what tells them apart is our own id and namespace.
fn bootstrap_params(input: &[u8], flags: &Flags) -> Result<Option<BootstrapParams>, BootstrapError> {
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else { return Ok(None) };
    if params.instance_id == flags.id && params.namespace == flags.namespace {
        return Ok(Some(params));
    }
    let has_more = !params.containerd_ttrpc_address.is_empty() || !params.containerd_version.is_empty();
    if !has_more {
        return Ok(None);
    }
    Err(BootstrapError::Identity {
        found: format!("{}/{}", params.namespace, params.instance_id),
        expected: format!("{}/{}", flags.namespace, flags.id),
    })
}

impl Protocol {
    /// The answer: `address` is where the shim listens, "unix:///...".
    pub(super) fn encode(self, address: &str) -> Result<Vec<u8>, BootstrapError> {
        let (version, protocol) = (TASK_API_VERSION, "ttrpc");
        match self {
            Protocol::Bootstrap => {
                let (address, protocol) = (address.into(), protocol.into());
                let result = BootstrapResult { version, address, protocol, ..Default::default() };
                Ok(result.write_to_bytes()?)
            }
            Protocol::Json => {
                let result =
                    serde_json::json!({"version": version, "address": address, "protocol": protocol});
                Ok(serde_json::to_vec(&result)?)
            }
            Protocol::Address => Ok(address.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::{bootstrap_api::Extension, protobuf::MessageField};

    use super::*;

    const ADDRESS: &str = "unix:///run/cube/x/shim.sock";
    const BUNDLE: &str = "/run/containerd/io.containerd.runtime.v2.task/default/c1";

    fn flags() -> Flags {
        Flags { id: "c1".into(), namespace: "default".into(), ..Default::default() }
    }

    fn parse(input: &[u8], bundle: &str) -> Request {
        Request::parse(input, &flags(), Path::new(bundle)).unwrap()
    }

    fn runc_options(value: &[u8]) -> Any {
        Any { type_url: "containerd.runc.v1.Options".into(), value: value.into(), ..Default::default() }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_version: "v2.3.0".into(),
            containerd_ttrpc_address: "/c.sock.ttrpc".into(),
            extensions: vec![Extension {
                value: MessageField::some(runc_options(b"\x48\x01")),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn containerd_2_3_gets_a_bootstrap_result() {
        let request = parse(&params().write_to_bytes().unwrap(), BUNDLE);
        assert_eq!(request.protocol, Protocol::Bootstrap);
        assert_eq!(request.ttrpc_address.as_deref(), Some("/c.sock.ttrpc"));
        assert_eq!(request.options, Some(runc_options(b"\x48\x01")));
        let result = BootstrapResult::parse_from_bytes(&request.protocol.encode(ADDRESS).unwrap()).unwrap();
        assert_eq!(
            (result.version, result.address.as_str(), result.protocol.as_str()),
            (3, ADDRESS, "ttrpc")
        );
    }

    #[test]
    fn older_ones_get_the_plain_address_whatever_their_options() {
        let options = [
            runc_options(b"").write_to_bytes().unwrap(),
            runc_options(b"\x48\x01").write_to_bytes().unwrap(),
        ];
        for input in [&b""[..], b"\xff\xfe", &options[0], &options[1]] {
            let request = parse(input, BUNDLE);
            assert_eq!(request.protocol, Protocol::Address, "{input:?}");
            assert_eq!(request.protocol.encode(ADDRESS).unwrap(), ADDRESS.as_bytes());
        }
        assert_eq!(parse(&options[1], BUNDLE).options, Some(runc_options(b"\x48\x01")));
    }

    #[test]
    fn the_sandbox_controller_gets_json_with_the_version() {
        let request = parse(b"", "/run/containerd/io.containerd.sandbox.controller.v1.shim/default/c1");
        assert_eq!(request.protocol, Protocol::Json);
        let json: serde_json::Value =
            serde_json::from_slice(&request.protocol.encode(ADDRESS).unwrap()).unwrap();
        assert_eq!(json, serde_json::json!({"version": 3, "address": ADDRESS, "protocol": "ttrpc"}));
    }

    #[test]
    fn parameters_for_another_shim_are_refused_by_name() {
        let input = BootstrapParams { instance_id: "c2".into(), ..params() }.write_to_bytes().unwrap();
        let error = Request::parse(&input, &flags(), Path::new(BUNDLE)).unwrap_err().to_string();
        assert!(error.contains("default/c2") && error.contains("default/c1"), "{error}");
    }
}
