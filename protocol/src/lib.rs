//! Everything that crosses the boundary between a Cubebox host and its guest, and nothing else.
//!
//! The host dials, the guest listens. Two vsock ports: [`ports::CONTROL`] carries ttrpc with
//! containerd's Task API and the [`guest`] service, [`ports::STREAM`] carries stdio in [`frame`]s.
//! On hybrid vsock (Cloud Hypervisor, vhost-device-vsock, and the `process` backend) a connection
//! begins with the [`hybrid`] handshake. `docs/protocol.md` is the specification in prose.

pub mod annotations;
pub mod environment;
pub mod frame;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod hybrid;
pub mod ports;
pub mod spec;
pub mod version;

/// Messages of `proto/guest.proto`.
#[allow(warnings, clippy::all, clippy::restriction)]
pub mod guest {
    include!(concat!(env!("OUT_DIR"), "/proto/guest.rs"));
}

/// Client and server of the Guest service of `proto/guest.proto`.
#[allow(warnings, clippy::all, clippy::restriction)]
pub mod guest_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/proto/guest_ttrpc.rs"));
}

/// Bodies of the frames of the stream port, `proto/stream.proto`.
#[allow(warnings, clippy::all, clippy::restriction)]
pub mod stream {
    include!(concat!(env!("OUT_DIR"), "/proto/stream.rs"));
}
