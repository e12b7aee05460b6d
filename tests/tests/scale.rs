//! Many of everything, for long.

use std::process::ExitCode;

use cube_tests::{cases, needs::Backend, runner, scenarios::scale};

fn main() -> ExitCode {
    let process = cases![Backend::Process =>
        scale::many_sandboxes_come_and_go,
        scale::a_late_reader_gets_its_output_when_inotify_is_exhausted,
        scale::execs_leave_neither_memory_nor_descriptors_behind,
        scale::one_id_lives_again_and_again,
    ];
    let vm = cases![Backend::Qemu =>
        scale::many_sandboxes_come_and_go,
        scale::execs_leave_neither_memory_nor_descriptors_behind,
    ];
    runner::main(process.into_iter().chain(vm))
}
