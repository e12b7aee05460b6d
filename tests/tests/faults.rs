//! Connections and readers that fail.

use std::process::ExitCode;

use cube_tests::{
    cases,
    needs::Backend,
    runner,
    scenarios::faults::{self, control, readers},
};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        faults::connections_cut_at_random_points_cost_no_byte,
        faults::a_connection_may_be_cut_at_every_frame_boundary,
        faults::a_connection_may_be_cut_at_every_step_of_the_handshake,
        faults::however_a_connection_splits_its_bytes_they_arrive,
        faults::a_connection_that_stalls_and_goes_on_costs_only_time,
        faults::a_handshake_without_an_answer_is_given_up_and_tried_again,
        faults::a_stream_that_stalls_for_good_holds_up_nothing_else,
        control::calls_and_exits_survive_a_control_connection_that_is_cut,
        control::calls_to_a_guest_that_falls_silent_end_by_their_deadlines,
        readers::a_reader_that_stops_and_returns_has_every_byte,
        readers::a_reader_that_returns_too_late_has_what_is_retained,
        readers::a_log_program_that_stops_reading_has_every_byte,
        readers::a_log_program_that_dies_costs_the_log_nothing,
    ])
}
