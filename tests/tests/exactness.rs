//! Gigabytes, compared byte for byte.

use std::process::ExitCode;

use cube_tests::{cases, needs::Backend, runner, scenarios::exactness};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        exactness::logs_and_readers_get_every_byte,
        exactness::a_rotated_log_is_the_end_of_the_stream,
        exactness::a_slow_reader_gets_every_byte,
        exactness::a_client_that_leaves_at_the_exit_has_every_byte,
        exactness::reconnects_change_nothing,
        exactness::bytes_that_are_no_lines_of_text_arrive_as_they_are,
    ])
}
