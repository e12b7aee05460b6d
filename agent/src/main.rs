//! cube-agent: PID 1 of a Cubebox guest.

fn main() {
    if std::env::args().nth(1).as_deref() == Some("init") {
        cube_agent::container::init_stage()
    }
}
