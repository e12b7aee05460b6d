//! Processes that die at the worst moment.

use std::process::ExitCode;

use cube_tests::{
    cases,
    needs::Backend,
    runner,
    scenarios::{kills, survival},
};

fn main() -> ExitCode {
    let process = cases![Backend::Process =>
        kills::shipped_programs_have_no_fault_points,
        kills::a_start_that_is_killed_leaves_nothing_for_long,
        kills::a_creation_killed_at_any_step_leaves_nothing_and_can_be_repeated,
        kills::a_shim_killed_between_any_two_steps_of_logging_loses_no_byte,
        kills::a_deletion_killed_at_any_step_is_completed,
        kills::a_clean_up_killed_at_any_step_can_be_repeated,
        kills::what_the_guest_holds_when_its_shim_dies_is_saved,
        kills::whoever_dies_whenever_leaves_nothing_but_an_exact_log,
        survival::sandboxes_outlive_a_containerd_that_is_killed,
        survival::what_a_containerd_that_is_killed_was_doing_can_be_undone,
    ];
    let vm = cases![Backend::Qemu =>
        kills::what_the_guest_holds_when_its_shim_dies_is_saved,
        kills::whoever_dies_whenever_leaves_nothing_but_an_exact_log,
        survival::sandboxes_outlive_a_containerd_that_is_killed,
    ];
    runner::main(process.into_iter().chain(vm))
}
