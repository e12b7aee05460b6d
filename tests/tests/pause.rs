//! Sandboxes that are paused and resumed.

use std::process::ExitCode;

use cube_tests::{
    cases,
    needs::Backend,
    runner,
    scenarios::{pause, pauses, restore, suspend},
};

fn main() -> ExitCode {
    let mut cases = cases![Backend::Process =>
        pause::a_paused_task_stands_still_until_it_is_resumed,
        pause::a_paused_task_can_be_killed_and_deleted,
        pause::a_signal_waits_for_the_resume,
        pause::a_shim_that_is_killed_while_its_sandbox_is_paused_leaves_nothing,
        pause::pauses_in_full_flow_cost_and_double_no_byte,
        restore::what_cannot_be_snapshotted_or_restored_says_why,
        suspend::cubecli_pauses_and_resumes_like_containerd,
        suspend::what_cannot_be_paused_to_disk_says_why_and_runs_on,
        pauses::pause_upon_pause_costs_no_byte,
        pauses::execs_come_and_go_between_pauses,
        pauses::readers_that_read_nothing_do_not_hold_a_pause_up,
    ];
    cases.extend(cases![Backend::Qemu =>
        pause::a_paused_task_stands_still_until_it_is_resumed,
        pause::a_paused_task_can_be_killed_and_deleted,
        pause::a_shim_that_is_killed_while_its_sandbox_is_paused_leaves_nothing,
        pause::pauses_in_full_flow_cost_and_double_no_byte,
        suspend::cubecli_pauses_and_resumes_like_containerd,
        suspend::what_cannot_be_paused_to_disk_says_why_and_runs_on,
        pauses::pause_upon_pause_costs_no_byte,
        pauses::execs_come_and_go_between_pauses,
        pauses::readers_that_read_nothing_do_not_hold_a_pause_up,
        pauses::after_a_long_pause_the_guest_goes_on_with_the_time_of_day,
    ]);
    runner::main(cases)
}
