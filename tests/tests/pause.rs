//! Sandboxes that are paused and resumed.

use std::process::ExitCode;

use cube_tests::{cases, needs::Backend, runner, scenarios::pause};

fn main() -> ExitCode {
    let mut cases = cases![Backend::Process =>
        pause::a_paused_task_stands_still_until_it_is_resumed,
        pause::a_paused_task_can_be_killed_and_deleted,
        pause::a_signal_waits_for_the_resume,
        pause::a_shim_that_is_killed_while_its_sandbox_is_paused_leaves_nothing,
        pause::pauses_in_full_flow_cost_and_double_no_byte,
    ];
    cases.extend(cases![Backend::Qemu =>
        pause::a_paused_task_stands_still_until_it_is_resumed,
        pause::a_paused_task_can_be_killed_and_deleted,
        pause::a_shim_that_is_killed_while_its_sandbox_is_paused_leaves_nothing,
        pause::pauses_in_full_flow_cost_and_double_no_byte,
    ]);
    runner::main(cases)
}
