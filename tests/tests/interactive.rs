//! A person at a terminal.

use std::process::ExitCode;

use cube_tests::{cases, needs::Backend, runner, scenarios::terminal};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        terminal::a_shell_on_a_terminal_feels_right,
        terminal::an_exec_on_a_terminal_feels_right,
        terminal::a_terminal_shows_the_last_byte_of_a_short_command,
    ])
}
