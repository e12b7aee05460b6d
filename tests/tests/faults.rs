//! Connections and readers that fail.

use std::process::ExitCode;

use cube_tests::{cases, needs::Backend, runner, scenarios::faults};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        faults::connections_cut_at_random_points_cost_no_byte,
        faults::a_connection_may_be_cut_at_every_frame_boundary,
        faults::a_connection_may_be_cut_at_every_step_of_the_handshake,
        faults::however_a_connection_splits_its_bytes_they_arrive,
        faults::a_connection_that_stalls_and_goes_on_costs_only_time,
    ])
}
