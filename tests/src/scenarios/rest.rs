//! The guest between Quiesce and Thaw, told to the agent past its shim.

use std::{
    fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cube_protocol::guest::ThawRequest;

use crate::{
    command::{poll, start},
    direct::{Direct, ext4_mount},
    lab::Lab,
    needs::Backend,
};

const DAY: Duration = Duration::from_secs(86_400);

/// The file is in the guest's memory until it is written out; `ls` in between would not tell.
const SCRIPT: &str = "echo written > /file; while :; do date +%s; hostname; sleep 0.05; done";

/// A guest with a kernel of its own, unlike the `process` backend's.
pub fn a_guest_at_rest_has_written_its_disks_and_wakes_up_with_the_time_and_name_it_is_given(
    backend: Backend,
) {
    let lab = Lab::new(backend);
    let mut direct = Direct::new(&lab, "c", &["sh", "-c", SCRIPT]);
    let tree = direct.unpack_image();
    let image = lab.dir().join("direct/rootfs.ext4");
    let mut mke2fs = std::process::Command::new("mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("32M");
    start(&mut mke2fs).wait(lab.limit()).succeeds();
    direct.start_shim();
    direct.create(ext4_mount(&image)).unwrap();
    direct.start().unwrap();
    let log = || fs::read_to_string(lab.log_dir("c").join("stdout")).unwrap_or_default();
    assert!(poll(lab.limit(), || log().lines().count() > 4), "nothing runs: {:?}", log());

    let guest = direct.guest();
    let answer = guest.quiesce(true);
    assert!(answer.streams.iter().any(|stream| stream.stream == "stdout" && stream.epoch != 0), "{answer:?}");
    let mut debugfs = std::process::Command::new("debugfs");
    let written = start(debugfs.args(["-R", "cat /file"]).arg(&image)).wait(lab.limit()).succeeds().out();
    assert_eq!(written, "written\n");
    assert!(guest.info().quiesced);

    let tomorrow = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + DAY;
    guest.thaw(&ThawRequest {
        realtime_ns: tomorrow.as_nanos() as u64,
        entropy: vec![1; 64],
        hostname: "clone".into(),
        ..Default::default()
    });
    let seconds = |line: &str| line.parse().unwrap_or(0);
    let is_tomorrow = || log().lines().any(|line| seconds(line) >= tomorrow.as_secs());
    assert!(poll(lab.limit(), is_tomorrow), "not {}: {:?}", tomorrow.as_secs(), log());
    assert!(poll(lab.limit(), || log().contains("clone\n")), "{:?}", log());
    let names: Vec<_> = log().lines().filter(|line| seconds(line) == 0).map(str::to_owned).collect();
    assert!(names.is_sorted_by_key(|name| name == "clone"), "the name changed back: {names:?}");

    direct.kill(9).unwrap();
    assert_eq!(direct.wait().unwrap(), 137);
    direct.delete().unwrap();
    direct.finish();
    lab.nothing_is_left();
}
