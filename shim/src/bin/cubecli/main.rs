//! cubecli
fn main() {}
