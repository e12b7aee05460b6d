//! Template builds, as far as they need no snapshot.

use std::process::ExitCode;

use cube_tests::{cases, needs::Backend, runner, scenarios::templates};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        templates::the_log_of_a_build_is_found_by_the_id_of_its_template,
        templates::a_snapshot_of_a_build_that_exits_is_an_error_at_once,
    ])
}
