//! Sizes: of the agent's program, and of agent and shim while a container only waits.

use std::{fs, thread, time::Duration};

use cube_tests::{guest::Guest, needs::Backend, paths, scenarios};

use crate::{
    cost::{MIB, resident},
    table::Table,
};

pub(crate) fn measure(table: &mut Table, backends: &[Backend]) {
    table.group("memory and size");
    let agent = fs::metadata(paths::agent()).unwrap().len();
    table.add("agent binary", "MiB", agent as f64 / MIB).at_most(3.0).binding();
    for backend in backends {
        let lab = scenarios::lab_with_waiting_container(*backend);
        // What starting took is given back.
        thread::sleep(Duration::from_secs(3));
        let agent = Guest::of(&lab, "c").info().agent_rss_bytes as f64;
        let shim = resident(lab.shim_pid("c")) as f64;
        lab.remove("c");
        lab.nothing_is_left();
        let name = |what| format!("idle {what} ({}), RSS", backend.name());
        table.add(name("agent"), "MiB", agent / MIB).at_most(3.0).binding();
        table.add(name("shim"), "MiB", shim / MIB).at_most(12.0).binding();
    }
}
