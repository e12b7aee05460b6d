//! Logs on disks that are full, and logs that are large.

use std::process::ExitCode;

use cube_tests::{
    cases,
    needs::Backend,
    runner,
    scenarios::{disks, large_logs, rotation},
};

fn main() -> ExitCode {
    runner::main(cases![Backend::Process =>
        disks::a_full_disk_makes_the_writer_wait_and_costs_no_byte,
        disks::a_full_disk_costs_an_attached_reader_no_byte,
        disks::a_full_disk_does_not_stall_a_writer_whose_oldest_output_is_dropped,
        disks::a_full_disk_keeps_no_container_from_being_deleted,
        disks::a_shim_that_dies_on_a_full_disk_leaves_an_exact_prefix,
        disks::a_disk_that_hangs_holds_up_no_call,
        disks::a_disk_that_breaks_makes_the_writer_wait_and_delete_succeed,
        disks::a_file_size_limit_makes_the_writer_wait_and_costs_no_byte,
        disks::a_full_disk_under_a_file_uri_costs_no_byte,
        rotation::thousands_of_rotations_leave_no_trace,
        rotation::a_follower_gets_each_byte_once_across_rotations,
        large_logs::the_ends_of_a_large_log_cost_what_those_of_a_small_one_do,
        large_logs::a_last_line_of_any_length_takes_constant_memory,
        large_logs::since_finds_its_line_among_a_million_index_records,
    ])
}
