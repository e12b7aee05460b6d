//! The sandbox's cgroup on the host.
