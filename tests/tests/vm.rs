//! The scenarios in a QEMU guest: emulated where there is no KVM.

use std::process::ExitCode;

use cube_tests::{
    cases,
    needs::Backend,
    runner,
    scenarios::{
        exactness, exits, isolation, lifecycle, machines, memory, output, pods, rest, survival, terminal,
        walls,
    },
};

fn main() -> ExitCode {
    runner::main(cases![Backend::Qemu =>
        lifecycle::a_running_sandbox_has_what_the_leftover_check_looks_for,
        lifecycle::a_task_can_be_listed_measured_killed_and_deleted,
        lifecycle::another_process_runs_in_a_container,
        lifecycle::an_id_that_is_taken_is_refused,
        lifecycle::events_come_in_order_with_the_fields_of_containerds_own_shim,
        output::output_lands_in_the_log_and_on_stdout,
        output::output_arrives_while_the_process_runs,
        output::stdin_is_piped_in_and_its_end_is_seen,
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
        survival::a_kernel_that_panics_is_an_exit_with_137,
        memory::running_out_of_memory_is_an_event_and_137,
        memory::a_fork_bomb_under_a_pids_limit_leaves_the_agent_answering,
        memory::an_ext4_rootfs_is_a_block_device_of_the_vm,
        machines::a_pause_in_which_the_host_goes_on_to_connect_ends_like_any_other,
        machines::a_disk_that_is_added_to_a_running_vm_appears_in_the_guest,
        machines::a_vm_without_snapshots_says_which_have_them,
        rest::a_guest_at_rest_has_written_its_disks_and_wakes_up_with_the_time_and_name_it_is_given,
        terminal::a_shell_on_a_terminal_feels_right,
        exactness::logs_and_readers_get_every_byte,
        exactness::a_client_that_leaves_at_the_exit_has_every_byte,
        exactness::reconnects_change_nothing,
        exactness::a_rotated_log_is_the_end_of_the_stream,
        pods::the_containers_of_a_pod_share_a_sandbox_and_nothing_else,
        pods::a_member_is_paused_and_resumed_alone,
    ])
}
