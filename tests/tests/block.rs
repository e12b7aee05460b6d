//! `cube.rootfs.mode=block` in a QEMU guest, and where there is none.

use std::process::ExitCode;

use cube_tests::{
    cases,
    needs::Backend,
    runner,
    scenarios::{block, layers},
};

fn main() -> ExitCode {
    let vm = cases![Backend::Qemu =>
        block::an_image_becomes_disks_and_needs_no_share,
        block::sandboxes_of_an_image_share_one_file_that_was_packed_once,
        block::a_packer_that_is_killed_leaves_nothing_that_hurts,
        block::a_create_that_is_killed_ends_its_packer,
        block::disks_whose_making_is_killed_at_any_step_are_removed,
        block::a_snapshot_that_may_change_is_packed_for_its_sandbox_only,
        block::the_cache_limit_evicts_only_what_no_sandbox_uses,
        block::a_full_disk_of_the_host_is_an_error_in_the_guest_and_no_standstill,
        block::disks_that_outlived_a_reboot_are_removed,
        layers::files_of_all_kinds_arrive_as_the_layers_have_them,
        layers::layers_without_a_snapshot_are_a_read_only_rootfs,
    ];
    let process = cases![Backend::Process => block::without_a_vm_it_is_refused_by_name];
    runner::main(vm.into_iter().chain(process))
}
