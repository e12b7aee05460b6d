//! `cubecli cubebox snapshot` and `cubecli cubebox snapshots`

use std::{
    fs::File,
    io::{IsTerminal, Write, stderr},
    time::{Duration, Instant},
};

use cube_shim::{
    config::Config,
    control::sandbox::{SnapshotRequest, SnapshotResponse},
    snapshot::{Listed, Store},
};
use tokio::time::interval;

use crate::{
    args::{SnapshotArgs, SnapshotsArgs},
    error::CliError,
    sandboxes, shim, table, time,
};

/// Time for a snapshot: the shim has deadlines for each step, by the size of the memory.
const DEADLINE: Duration = Duration::from_secs(3600);

pub(crate) fn take(config: &Config, args: &SnapshotArgs, mut output: File) -> Result<(), CliError> {
    let sandbox = sandboxes::find(&config.run_dir, args.namespace.as_deref(), &args.id)?;
    let name = args.name.clone().unwrap_or_default();
    let taken = shim::block_on(async {
        let request = SnapshotRequest { name, ..Default::default() };
        let shim = shim::Shim::connect(&sandbox).await?;
        let call =
            shim.call(DEADLINE, |client, context| async move { client.snapshot(context, &request).await });
        with_progress(call).await
    })?;
    let SnapshotResponse { name, .. } = taken;
    writeln!(output, "{name}").map_err(CliError::Output)
}

/// Shows on a terminal that something happens, once it takes longer than a second.
async fn with_progress<T>(work: impl Future<Output = T>) -> T {
    let (begun, terminal) = (Instant::now(), stderr().is_terminal());
    let mut ticks = interval(Duration::from_secs(1));
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => {
                if terminal {
                    eprint!("\r\x1b[K");
                }
                return done;
            }
            _ = ticks.tick(), if terminal => match begun.elapsed().as_secs() {
                0 => {}
                seconds => eprint!("\rtaking the snapshot, {seconds} s"),
            },
        }
    }
}

pub(crate) fn list(config: &Config, args: &SnapshotsArgs, mut output: File) -> Result<(), CliError> {
    let store = Store::at(&config.snapshot.dir);
    if let Some(name) = &args.rm {
        return Ok(store.remove(name)?);
    }
    let (listed, failed): (Vec<_>, Vec<_>) = store.list()?.into_iter().partition(Result::is_ok);
    for error in failed.iter().filter_map(|failed| failed.as_ref().err()) {
        eprintln!("cubecli: {}", cube_shim::errors::chain(error));
    }
    let listed: Vec<Listed> = listed.into_iter().flatten().collect();
    if args.json {
        let values: Vec<_> = listed
            .iter()
            .map(|listed| serde_json::json!({"disk_bytes": listed.disk_bytes, "manifest": listed.manifest}))
            .collect();
        let text = serde_json::to_string_pretty(&values).map_err(|e| CliError::Output(e.into()))?;
        return writeln!(output, "{text}").map_err(CliError::Output);
    }
    let mut rows = vec![["NAME", "OF", "CREATED", "SIZE"].map(String::from)];
    rows.extend(listed.into_iter().map(|Listed { manifest, disk_bytes }| {
        let of = format!("{}/{}", manifest.origin.namespace, manifest.origin.sandbox);
        let size = format!("{:.1} MiB", disk_bytes as f64 / f64::from(1 << 20));
        [manifest.name, of, time::rfc3339(manifest.created_ns), size]
    }));
    table::write(output, &rows)
}
