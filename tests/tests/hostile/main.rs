//! A guest that does everything it must not: a stand-in for the agent (`cube-hostile-agent`) attacks the
//! shim. Beside it an honest sandbox of the same containerd runs, and must notice nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "all of this is tests")]

mod arena;
mod control;
mod deadlines;
mod events;
mod streams;

use std::process::ExitCode;

use cube_tests::{cases, needs::Backend, runner};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        streams::a_forbidden_frame_closes_its_connection_and_costs_no_byte,
        streams::random_bytes_are_no_frames,
        streams::a_stream_that_is_refused_or_stuck_holds_no_exec_up,
        streams::an_acknowledgement_that_cannot_be_right_costs_no_byte_of_stdin,
        streams::connections_that_end_at_once_are_dialled_at_a_bounded_rate,
        streams::output_without_end_stays_in_its_log_and_in_its_memory,
        control::an_answer_that_makes_no_sense_is_an_error_that_says_so,
        control::an_error_of_any_length_is_told_in_a_line,
        control::another_guest_behind_the_same_socket_is_the_end_of_the_sandbox,
        control::a_console_without_end_costs_a_bounded_memory,
        events::events_without_end_are_taken_at_a_bounded_rate,
        events::an_exit_that_cannot_be_true_is_told_as_far_as_it_can_be,
        events::out_of_memory_a_hundred_thousand_times_is_a_handful_of_events,
        deadlines::every_call_to_a_hung_guest_returns_by_its_deadline,
        deadlines::a_guest_that_lies_about_a_kill_is_killed,
    ])
}
