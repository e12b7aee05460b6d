//! containerd-shim-cube-v2
fn main() {}
