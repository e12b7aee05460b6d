//! `/proc/self/mountinfo`, as proc_pid_mountinfo(5) describes it.
//!
//! It tells what kinds of file systems there are, and where. It is no way to find out whether something is mounted
//! at a path: its paths have no links, those of others may. [`files`](crate::files) asks the kernel.

use std::{ffi::OsString, fs, io, os::unix::ffi::OsStringExt, path::PathBuf};

/// One mount of this process's mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Where it is mounted, relative to the process's root.
    pub mount_point: PathBuf,
    /// "cgroup2", "overlay", ...
    pub fs_type: String,
    /// `shared:N` is among the optional fields: mounts below it propagate to other namespaces.
    pub shared: bool,
}

/// Every mount of this process's mount namespace, in the order in which they were made.
pub fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// Lines that make no sense are left out: the kernel writes none.
fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: any number of
/// optional fields between the sixth and the hyphen.
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let hyphen = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    Some(MountEntry {
        mount_point: unescape(fields.get(4)?),
        fs_type: String::from_utf8_lossy(fields.get(hyphen + 1)?).into_owned(),
        shared: fields.get(6..hyphen)?.iter().any(|field| field.starts_with(b"shared:")),
    })
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| {
            u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok().filter(|_| byte == b'\\')
        });
        match octal {
            Some(value) => {
                path.push(value);
                rest = &tail[3..];
            }
            None => {
                path.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn optional_fields_may_be_absent_or_many() {
        let entries = parse(
            b"36 35 98:0 /mnt1 /mnt2 rw,noatime - ext3 /dev/root rw\n\
              41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 master:1 propagate_from:2 - cgroup2 cgroup2 rw\n",
        );
        let expected = [("/mnt2", "ext3", false), ("/sys/fs/cgroup/unified", "cgroup2", true)];
        let found: Vec<_> =
            entries.iter().map(|e| (e.mount_point.to_str().unwrap(), e.fs_type.as_str(), e.shared)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn escaped_characters_are_the_characters_themselves() {
        let entries = parse(b"1 2 0:3 / /a\\040b\\134c\\012\\xyz rw - tmpfs tmpfs rw\n");
        assert_eq!(entries[0].mount_point, Path::new("/a b\\c\n\\xyz"));
    }

    #[test]
    fn a_torn_line_is_left_out() {
        assert_eq!(parse(b"1 2 0:3 / /a rw\n\n1 2 0:3 / /a rw -\n"), []);
    }

    #[test]
    fn this_process_has_a_root() {
        assert!(read().unwrap().iter().any(|e| e.mount_point == Path::new("/")));
    }
}
