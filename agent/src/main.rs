//! cube-agent: PID 1 of a Cubebox guest.

fn main() {}
