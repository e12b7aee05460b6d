//! Where the cgroup of a sandbox is.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use super::{CgroupError, SandboxCgroup, VM, failed, limits::LIMITING, scope};
use crate::rootfs::mountinfo;

/// Directory of all sandboxes that are not placed by their spec, below the cgroup2 mount.
const PARENT: &str = "cube";

/// Slice of a container whose spec names none, as runc has it.
const SLICE: &str = "system.slice";

/// The cgroup2 file system of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    root: PathBuf,
}

impl Hierarchy {
    /// The one that is mounted.
    ///
    /// # Errors
    ///
    /// [`CgroupError::NotMounted`].
    pub fn find() -> Result<Hierarchy, CgroupError> {
        let mounts = mountinfo::read().map_err(failed("cannot read", Path::new("/proc/self/mountinfo")))?;
        let mount = mounts.into_iter().find(|m| m.fs_type == "cgroup2").ok_or(CgroupError::NotMounted)?;
        Ok(Hierarchy { root: mount.mount_point })
    }

    /// Where it is mounted.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Those of the controllers of a sandbox's limits that it has. In a hybrid layout, version 1 may have all.
    pub fn controllers(&self) -> Vec<&'static str> {
        let available = fs::read_to_string(self.root.join("cgroup.controllers")).unwrap_or_default();
        LIMITING.into_iter().filter(|name| available.split_whitespace().any(|word| word == *name)).collect()
    }

    /// The cgroup of the sandbox with this key, a name that nobody else has. Where the hierarchy has controllers, it
    /// is below the parent of `spec_path`, the spec's `linux.cgroupsPath`: what limits that limits the sandbox.
    /// Elsewhere there is nothing to be limited by, and all are in one place. Makes nothing.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Path`], and [`CgroupError::NoSystemd`] for a path that is systemd's where that does not run.
    pub fn place(&self, key: &str, spec_path: Option<&str>) -> Result<SandboxCgroup, CgroupError> {
        let spec_path = spec_path.filter(|path| !path.is_empty() && !self.controllers().is_empty());
        let Some(path) = spec_path else { return Ok(self.default_place(key)) };
        let wrong = |rule| CgroupError::Path { path: path.into(), rule };
        let sandbox = match path.split(':').collect::<Vec<_>>()[..] {
            [_] => {
                let path = self.below(path).ok_or_else(|| wrong("a path without .. in it"))?;
                path.parent()
                    .filter(|parent| parent.starts_with(&self.root))
                    .unwrap_or(&self.root)
                    .join(name(key))
            }
            [slice, _, _] => {
                let slice = if slice.is_empty() { SLICE } else { slice };
                let parent =
                    expand(slice).ok_or_else(|| wrong("slice:prefix:name with the name of a slice"))?;
                if !scope::systemd_runs() {
                    return Err(CgroupError::NoSystemd { path: path.into() });
                }
                self.root.join(parent).join(format!("{}{}", name(key), scope::SUFFIX))
            }
            _ => return Err(wrong("a path, or slice:prefix:name")),
        };
        Ok(SandboxCgroup::at(sandbox.join(VM)))
    }

    pub(super) fn default_place(&self, key: &str) -> SandboxCgroup {
        SandboxCgroup::at(self.root.join(PARENT).join(key).join(VM))
    }

    /// The cgroup with this path, whether it begins with a slash or not.
    ///
    /// # Errors
    ///
    /// `None` for one that leads elsewhere.
    pub fn below(&self, path: &str) -> Option<PathBuf> {
        let path = Path::new(path.trim_start_matches('/'));
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        plain.then(|| self.root.join(path))
    }

    /// The cgroup that this process is in, if it can be seen here.
    pub fn own(&self) -> Option<PathBuf> {
        let listing = fs::read_to_string("/proc/self/cgroup").ok()?;
        let path = listing.lines().find_map(|line| line.strip_prefix("0::"))?;
        self.below(path).filter(|dir| dir.join("cgroup.procs").exists())
    }
}

fn name(key: &str) -> String {
    format!("cube-{key}")
}

/// The path of a slice: `a-b.slice` is below `a.slice`. See systemd.slice(5).
fn expand(slice: &str) -> Option<PathBuf> {
    let stem = slice.strip_suffix(".slice")?;
    if stem == "-" {
        return Some(PathBuf::new());
    }
    let plain = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.:\\@".contains(&byte))
    };
    let parts: Vec<_> = stem.split('-').collect();
    parts
        .iter()
        .all(|part| plain(part))
        .then(|| (1..=parts.len()).map(|count| format!("{}.slice", parts[..count].join("-"))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef0123";

    fn hierarchy(controllers: &str) -> (tempfile::TempDir, Hierarchy) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), controllers).unwrap();
        let root = dir.path().to_owned();
        (dir, Hierarchy { root })
    }

    fn placed(controllers: &str, path: Option<&str>) -> Result<String, CgroupError> {
        let (dir, hierarchy) = hierarchy(controllers);
        let placed = hierarchy.place(KEY, path)?;
        Ok(placed.dir().strip_prefix(dir.path()).unwrap().display().to_string())
    }

    #[test]
    fn it_is_below_the_parent_of_the_specs_path_where_that_can_limit_it() {
        let all = "cpuset cpu io memory hugetlb pids";
        for (path, parent) in [
            ("/kubepods/burstable/podx/c1", "kubepods/burstable/podx/"),
            ("/default/c1", "default/"),
            ("default/c1", "default/"),
            ("/c1", ""),
            ("//a//c1", "a/"),
        ] {
            assert_eq!(placed(all, Some(path)).unwrap(), format!("{parent}cube-{KEY}/vm"), "{path}");
        }
        for path in [None, Some("")] {
            assert_eq!(placed(all, path).unwrap(), format!("cube/{KEY}/vm"));
        }
    }

    #[test]
    fn without_controllers_all_are_in_one_place_whatever_the_spec_says() {
        for path in [None, Some("/default/c1"), Some("a.slice:b:c"), Some("/../x")] {
            for controllers in ["", "hugetlb rdma"] {
                assert_eq!(placed(controllers, path).unwrap(), format!("cube/{KEY}/vm"));
            }
        }
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_refused_by_name() {
        for path in ["/../c1", "a/../../c1", "a:b", "a:b:c", "../x.slice:a:b", "a--b.slice:c:d", ".slice:c:d"]
        {
            let text = placed("memory", Some(path)).unwrap_err().to_string();
            assert!(text.contains(&format!("{path:?}")), "{text}");
        }
    }

    #[test]
    fn a_path_of_systemd_needs_systemd() {
        let placed = placed("memory", Some("kubepods-podx.slice:cri-containerd:c1"));
        match scope::systemd_runs() {
            true => {
                let expected = format!("kubepods.slice/kubepods-podx.slice/cube-{KEY}.scope/vm");
                assert_eq!(placed.unwrap(), expected);
            }
            false => {
                let text = placed.unwrap_err().to_string();
                assert!(text.contains("\"kubepods-podx.slice:cri-containerd:c1\""), "{text}");
            }
        }
    }

    #[test]
    fn a_slice_is_below_those_that_its_name_begins_with() {
        let path = |slice| expand(slice).map(|path| path.display().to_string());
        let pod = "kubepods-burstable-podab_c.slice";
        assert_eq!(path(pod).unwrap(), format!("kubepods.slice/kubepods-burstable.slice/{pod}"));
        assert_eq!(path("system.slice").unwrap(), "system.slice");
        assert_eq!(path("-.slice").unwrap(), "");
        for wrong in ["system", "a--b.slice", "-a.slice", "a-.slice", "a/b.slice", ".slice"] {
            assert_eq!(path(wrong), None, "{wrong}");
        }
    }
}
