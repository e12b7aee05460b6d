//! `cubecli cubebox cp`.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
    process::Stdio,
};

use nix::sys::signal::{Signal, kill};

use super::lab_with_waiting_container;
use crate::{
    command::{poll, start},
    lab::Lab,
    needs::Backend,
};

/// What the container's shell says.
fn said(lab: &Lab, script: &str) -> String {
    lab.exec("c", &["sh", "-c", script]).succeeds().out()
}

/// A tree goes in and comes back out as it was.
pub fn a_tree_goes_into_a_container_and_out_again(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let tree = lab.dir().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    fs::write(tree.join("sub/large"), &bytes).unwrap();
    fs::write(tree.join("script"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(tree.join("script"), fs::Permissions::from_mode(0o751)).unwrap();
    chown(tree.join("script"), Some(1234), Some(4321)).unwrap();
    symlink("script", tree.join("link")).unwrap();
    let path = tree.to_str().unwrap();
    let cp = |src: &str, dst: &str| {
        let copied = lab.cubecli(&["cubebox", "cp", src, dst]).succeeds();
        assert_eq!((copied.out().as_str(), copied.err().as_str()), ("", ""));
    };
    // Into a directory that is there, under a name that is not, and what is in it.
    cp(path, "c:/tmp");
    cp(path, "c:/tmp/new");
    cp(&format!("{path}/."), "c:/tmp/new/sub");
    cp(&format!("{path}/script"), "c:/tmp/renamed");
    assert_eq!(
        said(&lab, "/tmp/tree/link; /tmp/new/link; /tmp/new/sub/link; /tmp/renamed"),
        "ran\n".repeat(4)
    );
    assert_eq!(
        said(&lab, "stat -c '%a %u:%g' /tmp/tree/script; readlink /tmp/new/link"),
        "751 1234:4321\nscript\n"
    );

    let back = lab.dir().join("back");
    fs::create_dir(&back).unwrap();
    cp("c:/tmp/tree", back.to_str().unwrap());
    cp("c:/tmp/tree", back.join("new").to_str().unwrap());
    cp("c:/tmp/tree/script", back.join("renamed").to_str().unwrap());
    for copy in ["tree", "new"] {
        let copy = back.join(copy);
        assert!(fs::read(copy.join("sub/large")).unwrap() == bytes, "another content");
        let script = fs::metadata(copy.join("script")).unwrap();
        assert_eq!((script.mode() & 0o7777, script.uid(), script.gid()), (0o751, 1234, 4321));
        assert_eq!(fs::read_link(copy.join("link")).unwrap(), Path::new("script"));
    }
    assert_eq!(fs::read(back.join("renamed")).unwrap(), b"#!/bin/sh\necho ran\n");

    // A tar stream, as it is.
    let stream = lab.cubecli(&["cubebox", "cp", "c:/tmp/tree", "-"]).succeeds();
    said(&lab, "rm -r /tmp/tree");
    let mut feed = lab.cubecli_command(&["cubebox", "cp", "-", "c:/tmp"]);
    let mut feed = start(feed.stdin(Stdio::piped()));
    feed.feed(stream.stdout);
    feed.wait(lab.limit()).succeeds();
    assert_eq!(said(&lab, "/tmp/tree/link"), "ran\n");

    lab.cubecli(&["cubebox", "cp", "c:/no/such/file", path]).fails_with(&["tar", "no such file"]);
    lab.cubecli(&["cubebox", "cp", "/no/such/file", "c:/tmp"]).fails_with(&["/no/such/file"]);
    lab.cubecli(&["cubebox", "cp", path, "c:/no/such/dir"]).fails_with(&["tar", "status"]);
    lab.cubecli(&["cubebox", "cp", path, path]).exits_with(2);
    lab.cubecli(&["cubebox", "cp", "nobody:/x", path]).exits_with(3);
    lab.remove("c");
    lab.nothing_is_left();
}

/// Out of a container whose tar never comes to an end, and into one from a stream that does not.
pub fn a_copy_that_is_interrupted_leaves_nothing(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let runs = |what: &str| poll(lab.limit(), || said(&lab, "ps -o args").contains(what));
    let mut into = lab.cubecli_command(&["cubebox", "cp", "-", "c:/tmp"]);
    let mut into = start(into.stdin(Stdio::piped()));
    let _stdin = into.stdin();
    assert!(runs("tar -x"), "no tar runs");
    kill(into.pid(), Signal::SIGTERM).unwrap();
    into.wait(lab.limit()).exits_with(143);
    said(&lab, "rm -f /bin/tar; printf '#!/bin/sh\\nexec sleep 100001\\n' > /bin/tar; chmod 755 /bin/tar");
    let out = start(&mut lab.cubecli_command(&["cubebox", "cp", "c:/etc", "/tmp"]));
    assert!(runs("sleep 100001"), "no tar runs");
    kill(out.pid(), Signal::SIGINT).unwrap();
    out.wait(lab.limit()).exits_with(130).fails_with(&["interrupted"]);
    let left = said(&lab, "ps -o args");
    assert!(!left.contains("100001") && !left.contains("tar -x"), "{left}");
    lab.remove("c");
    lab.nothing_is_left();
}

/// It sends what it likes in place of what it was asked for. Nothing outside of the target is touched.
pub fn a_hostile_container_writes_nowhere_else(backend: Backend) {
    let lab = lab_with_waiting_container(backend);
    let target = lab.dir().join("target");
    fs::create_dir(&target).unwrap();
    let outside = lab.dir().join("outside");
    fs::write(&outside, "untouched").unwrap();
    let to = target.to_str().unwrap();
    // /bin/tar may be a link to all that there is.
    said(&lab, "cp /bin/busybox /tmp/busybox; ln -s .. /tmp/x; /tmp/busybox tar -cf /tmp/1 -C /tmp ./x");
    said(
        &lab,
        "rm /tmp/x; mkdir /tmp/x; echo evil > /tmp/x/outside; /tmp/busybox tar -cf /tmp/2 -C /tmp ./x/outside",
    );
    said(&lab, "dd if=/tmp/1 of=/tmp/3 bs=512 count=1; cat /tmp/2 >> /tmp/3; rm -f /bin/tar");
    said(&lab, "printf '#!/bin/sh\\ncat /tmp/3\\n' > /bin/tar; chmod 755 /bin/tar");
    lab.cubecli(&["cubebox", "cp", "c:/x", to]).fails_with(&["leads through a link"]);
    assert_eq!(fs::read(&outside).unwrap(), b"untouched");
    lab.cubecli(&["cubebox", "cp", "c:/y", to]).fails_with(&["is not what was asked for"]);
    said(&lab, "printf '#!/bin/sh\\nwhile :; do echo nonsense; done\\n' > /bin/tar");
    lab.cubecli(&["cubebox", "cp", "c:/y", to]).exits_with(1);
    said(&lab, "rm /bin/tar");
    lab.cubecli(&["cubebox", "cp", "c:/y", to]).fails_with(&["no program \"tar\""]);
    said(&lab, "rm -f /bin/test /usr/bin/test");
    lab.cubecli(&["cubebox", "cp", to, "c:/y"]).fails_with(&["no program \"test\""]);
    lab.remove("c");
    lab.nothing_is_left();
}
