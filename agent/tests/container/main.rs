//! Real containers, as root, in a busybox rootfs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cgroups;
mod processes;
mod setup;
mod stages;
mod support;
mod walls;

use serde_json::Value;

fn push(spec: &mut Value, pointer: &str, value: Value) {
    spec.pointer_mut(pointer).unwrap().as_array_mut().unwrap().push(value);
}
