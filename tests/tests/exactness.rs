//! Gigabytes, and readers that rest, compared byte for byte.

use std::process::ExitCode;

use cube_tests::{
    cases,
    needs::Backend,
    runner,
    scenarios::{exactness, rests},
};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        exactness::logs_and_readers_get_every_byte,
        exactness::a_rotated_log_is_the_end_of_the_stream,
        exactness::a_slow_reader_gets_every_byte,
        exactness::a_client_that_leaves_at_the_exit_has_every_byte,
        exactness::reconnects_change_nothing,
        exactness::bytes_that_are_no_lines_of_text_arrive_as_they_are,
        rests::a_client_that_rests_has_every_byte,
        rests::a_client_that_is_slow_all_the_time_has_every_byte,
        rests::the_death_of_a_resting_client_is_noticed_at_once,
        rests::an_exit_is_told_when_its_reader_has_everything,
        rests::only_a_signal_that_asks_for_the_end_ends_the_wait_for_a_reader,
        rests::a_delete_ends_the_wait_for_a_reader,
        rests::an_exit_that_waits_for_a_reader_survives_a_pause,
    ])
}
