//! Logs on a disk that is full.

use std::os::fd::AsRawFd;

use super::*;

/// A log on a file system of `bytes` bytes that is mounted in a namespace of its own. `None` without
/// the privilege for that.
fn small_disk(bytes: usize) -> Option<(LogDir, (TempDir, fs::File))> {
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    let point = tempfile::tempdir().unwrap();
    let path = point.path().to_owned();
    // The mount lives as long as a descriptor in it, the namespace as long as this thread.
    let disk = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).ok()?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).ok()?;
        let size = format!("size={bytes}");
        mount(Some("cube-test"), &path, Some("tmpfs"), MsFlags::empty(), Some(&*size)).ok()?;
        fs::File::open(&path).ok()
    });
    let Some(disk) = disk.join().unwrap() else {
        eprintln!("skipped: a full disk needs CAP_SYS_ADMIN");
        return None;
    };
    let path = PathBuf::from(format!("/proc/self/fd/{}/log", disk.as_raw_fd()));
    Some((LogDir::create(&path).unwrap(), (point, disk)))
}

#[test]
fn on_a_full_disk_old_segments_go_first_then_the_writer_waits_and_nothing_is_doubled() {
    let Some((dir, _point)) = small_disk(400 << 10) else { return };
    let dir = Arc::new(dir);
    let limits = Limits { segment_bytes: 64 << 10, segments: 100 };
    let mut writer = LogWriter::create(dir.clone(), "stdout", limits, 0).unwrap();
    for _ in 0..100 {
        append_pattern(&mut writer, 10_000);
    }
    assert_eq!(writer.next_offset(), 1_000_000);
    assert!(writer.retained().count() < 10, "the oldest segments made room");

    // Someone else takes the disk, and a reader holds what could be dropped.
    writer.retained().hold(0);
    let mut hog = dir.create_file("hog").unwrap();
    while io::Write::write(&mut hog, &[0; 4096]).is_ok() {}
    let bytes = pattern(writer.next_offset(), 50_000);
    let mut slices = [IoSlice::new(&bytes)];
    let mut rest = &mut slices[..];
    for _ in 0..3 {
        let stalled = writer.append(&mut rest).unwrap_err();
        assert!(matches!(&stalled, Stalled::Disk(e) if e.source.raw_os_error() == Some(libc::ENOSPC)));
        assert!(writer.next_offset() < 1_050_000);
    }
    dir.remove("hog").unwrap();
    drop(hog);
    writer.retained().release();
    writer.append(&mut rest).unwrap();
    assert_eq!(writer.next_offset(), 1_050_000);

    let retained = writer.retained();
    let Found::Dropped(mut at) = retained.read_at(0, &mut []).unwrap() else { panic!("nothing was dropped") };
    let mut buffer = vec![0; 1 << 16];
    while let Found::Bytes(n) = retained.read_at(at, &mut buffer).unwrap() {
        assert_eq!(buffer[..n], pattern(at, n)[..]);
        at += n as u64;
    }
    assert_eq!(at, 1_050_000);
}

#[test]
fn a_writer_that_dies_between_data_and_index_on_a_full_disk_leaves_a_log_that_recovers() {
    let Some((dir, _point)) = small_disk(400 << 10) else { return };
    let dir = Arc::new(dir);
    let limits = Limits { segment_bytes: 64 << 10, segments: 100 };
    let mut writer = LogWriter::create(dir.clone(), "stdout", limits, 0).unwrap();
    append_pattern(&mut writer, 100_000);
    // Fill the index's page with records, which takes less than a page of data: one per millisecond.
    while writer.current.as_ref().is_some_and(|segment| segment.index_len + RECORD_LEN as u64 <= 4096) {
        append_pattern(&mut writer, 1);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    writer.retained().hold(0);
    let data = writer.current.as_ref().unwrap().data_len;
    let mut hog = dir.create_file("hog").unwrap();
    while io::Write::write(&mut hog, &[0; 4096]).is_ok() {}
    hog.set_len(hog.metadata().unwrap().len() - 8192).unwrap();
    let bytes = pattern(writer.next_offset(), 20_000);
    let mut slices = [IoSlice::new(&bytes)];
    let stalled = writer.append(&mut &mut slices[..]).unwrap_err();
    assert!(matches!(&stalled, Stalled::Disk(e) if e.source.raw_os_error() == Some(libc::ENOSPC)));
    let end = writer.next_offset();
    let segment = writer.current.as_ref().unwrap();
    assert!(
        segment.data_len >= data + 8192 && segment.owed.is_some(),
        "the data found room, its record none"
    );
    drop(writer);

    let mut writer = LogWriter::recover(dir.clone(), "stdout", limits).unwrap();
    assert_eq!(writer.next_offset(), end);
    append_pattern(&mut writer, 10_000);
    dir.remove("hog").unwrap();
    append_pattern(&mut writer, 50_000);
    let retained = writer.retained();
    let mut buffer = vec![0; 1 << 16];
    let (mut at, first) = (0, end + 60_000 - retained.end());
    loop {
        match retained.read_at(at, &mut buffer).unwrap() {
            Found::Dropped(to) => at = to,
            Found::Bytes(n) => {
                assert_eq!(buffer[..n], pattern(first + at, n)[..]);
                at += n as u64;
            }
            Found::End => break,
        }
    }
    assert_eq!(at, retained.end());
}

#[test]
fn on_a_full_disk_a_log_goes_back_all_the_same_and_the_disk_hears_of_it_before_the_next_byte() {
    let Some((dir, _point)) = small_disk(200 << 10) else { return };
    let dir = Arc::new(dir);
    let limits = Limits { segment_bytes: 1 << 20, segments: 4 };
    let mut writer = LogWriter::create(dir.clone(), "stdout", limits, 0).unwrap();
    writer.identify(Identity { timeline: 1, epoch: 9 }).unwrap();
    append_pattern(&mut writer, 50_000);
    // A reader needs all of it, so it makes no room.
    let retained = writer.retained();
    retained.hold(0);
    let hog = dir.create_file("hog").unwrap();
    let mut at = 0;
    while hog.write_at(&[0; 4096], at).is_ok() {
        at += 4096;
    }
    assert!(matches!(writer.rewind(40_000, 2), Err(Stalled::Disk(_))));
    assert_eq!((writer.next_offset(), writer.safe_offset()), (40_000, None));
    let bytes = pattern(40_000, 10);
    assert!(writer.append(&mut &mut [IoSlice::new(&bytes)][..]).is_err());
    dir.remove("hog").unwrap();
    drop(hog);
    assert_eq!(writer.safe_offset(), Some(40_000));
    append_pattern(&mut writer, 10);
    drop(writer);
    let recovered = LogWriter::recover(dir, "stdout", limits).unwrap();
    assert_eq!((recovered.next_offset(), recovered.identity().timeline), (40_010, 2));
    let mut all = vec![0; 1 << 20];
    let Found::Bytes(n) = retained.read_at(0, &mut all).unwrap() else { panic!("it has the old timeline") };
    assert_eq!(all[..n], pattern(0, 50_000)[..]);
}
