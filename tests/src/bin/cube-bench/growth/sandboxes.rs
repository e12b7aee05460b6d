//! Sandboxes on one host, each with a container that only waits.

use std::{thread, time::Duration};

use cube_tests::{lab::Lab, needs::Backend};
use nix::unistd::Pid;

use crate::{
    cost::{MIB, proportional, resident},
    pipeline::timed,
    table::{Samples, Table},
    throughput::relays,
};

const POPULATIONS: [usize; 3] = [1, 20, 100];

pub(crate) fn measure(table: &mut Table) {
    table.group("cost of many sandboxes, process backend, each with one idle container");
    let lab = Lab::new(Backend::Process);
    let mut ids = Vec::new();
    for population in POPULATIONS {
        let mut create = Samples::new();
        while ids.len() < population {
            let id = format!("c{}", ids.len());
            create.push(timed(|| lab.detached(&id, &["sleep", "3600"])).0 * 1e3);
            ids.push(id);
        }
        // What starting took is given back.
        thread::sleep(Duration::from_secs(3));
        let pids: Vec<[Pid; 2]> = ids.iter().map(|id| relays(&lab, id)).collect();
        let sum = |which: usize, memory: fn(Pid) -> u64| {
            pids.iter().map(|pids| memory(pids[which])).sum::<u64>() as f64 / MIB
        };
        let of = format!("{population} sandboxes");
        table.add(format!("{of}: ctr run --detach of the last"), "ms", create);
        table.add(format!("{of}: agents, RSS"), "MiB", sum(0, resident));
        table.add(format!("{of}: shims, RSS"), "MiB", sum(1, resident));
        let each = (sum(0, proportional) + sum(1, proportional)) / population as f64;
        table.add(format!("{of}: agent and shim of one, PSS"), "MiB", each);
    }
    ids.iter().for_each(|id| lab.remove(id));
}
