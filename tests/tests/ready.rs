//! Sandboxes that take their time until they are ready.

use std::process::ExitCode;

use cube_tests::{cases, needs::Backend, runner, scenarios::ready};

fn main() -> ExitCode {
    let mut cases = cases![Backend::Process =>
        ready::a_web_server_that_comes_up_late_is_waited_for_through_a_pause,
        ready::a_page_that_is_missing_is_not_ready,
        ready::a_port_that_takes_connections_is_ready,
        ready::a_program_that_ends_with_0_is_ready,
        ready::a_container_that_exits_before_it_is_ready_is_an_error,
        ready::without_a_probe_a_container_that_runs_is_ready,
        ready::a_probe_that_makes_no_sense_is_refused,
    ];
    cases.extend(cases![Backend::Qemu =>
        ready::a_web_server_that_comes_up_late_is_waited_for_through_a_pause,
        ready::a_port_that_takes_connections_is_ready,
        ready::a_program_that_ends_with_0_is_ready,
        ready::a_container_that_exits_before_it_is_ready_is_an_error,
    ]);
    runner::main(cases)
}
