//! The real shim and agent under a real containerd, without a VM.

use std::process::ExitCode;

use cube_tests::{
    cases,
    needs::Backend,
    runner,
    scenarios::{exits, isolation, lifecycle, output, pods, store, survival, walls},
};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        lifecycle::the_harness_works_with_runc,
        lifecycle::a_running_sandbox_has_what_the_leftover_check_looks_for,
        lifecycle::a_task_can_be_listed_measured_killed_and_deleted,
        lifecycle::another_process_runs_in_a_container,
        lifecycle::an_id_that_is_taken_is_refused,
        lifecycle::events_come_in_order_with_the_fields_of_containerds_own_shim,
        lifecycle::a_created_task_can_be_killed,
        output::output_lands_in_the_log_and_on_stdout,
        output::output_arrives_while_the_process_runs,
        output::stdin_is_piped_in_and_its_end_is_seen,
        output::stdin_of_an_exec_is_piped_in_and_its_end_is_seen,
        output::fifos_without_a_reader_stall_nothing,
        output::no_log_is_kept_where_none_is_wanted,
        output::a_file_uri_gets_both_streams,
        output::a_binary_uri_runs_a_log_program_as_containerds_own_shim_does,
        exits::exit_codes_arrive_as_they_are,
        exits::death_by_a_signal_is_128_and_its_number,
        exits::a_command_that_does_not_exist_fails_at_once_with_its_path,
        exits::a_grandchild_that_keeps_stdout_open_delays_an_exit_by_2_s_at_most,
        exits::orphans_are_reaped,
        isolation::a_container_sees_its_own_system,
        isolation::what_the_spec_asks_of_a_process_is_done,
        isolation::a_container_writes_to_its_own_layer_only,
        isolation::a_bind_mount_of_the_host_is_shared,
        isolation::a_container_cannot_open_a_vsock,
        survival::a_shim_that_is_killed_leaves_nothing_but_the_log,
        survival::a_task_outlives_containerd,
        survival::a_sandbox_that_dies_is_an_exit_with_137,
        survival::sandboxes_do_not_mix,
        walls::every_process_of_a_sandbox_is_behind_its_wall,
        walls::the_pid_that_clients_are_told_leads_to_no_file,
        survival::a_second_container_of_the_same_name_keeps_the_first_ones_log,
        store::a_restore_that_fails_leaves_no_container,
        pods::the_containers_of_a_pod_share_a_sandbox_and_nothing_else,
        pods::a_member_is_paused_and_resumed_alone,
        pods::deleting_the_sandbox_of_a_pod_removes_everything,
        pods::shim_delete_of_a_member_removes_that_alone,
    ])
}
