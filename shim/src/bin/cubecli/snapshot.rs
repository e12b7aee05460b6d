//! `cubecli cubebox snapshot` and `cubecli cubebox snapshots`

use std::{fs::File, io::Write, time::Duration};

use cube_shim::{
    config::Config,
    control::sandbox::{SnapshotRequest, SnapshotResponse},
    snapshot::{Listed, Store},
    text::printable_json,
};

use crate::{
    args::{SnapshotArgs, SnapshotsArgs},
    error::{CliError, complain},
    progress::{Progress, during},
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
        during("writing the snapshot", call).await
    })?;
    let SnapshotResponse { name, .. } = taken;
    writeln!(output, "{name}").map_err(CliError::Output)
}

pub(crate) fn list(config: &Config, args: &SnapshotsArgs, mut output: File) -> Result<(), CliError> {
    let store = Store::at(&config.snapshot.dir);
    if let Some(name) = &args.rm {
        return Ok(store.remove(name)?);
    }
    if let Some(name) = &args.verify {
        let progress = Progress::of(format!("verifying {name}"));
        return Ok(store.verify(name, &mut |done, total| progress.told(done, total))?);
    }
    let (listed, failed): (Vec<_>, Vec<_>) = store.list()?.into_iter().partition(Result::is_ok);
    for error in failed.iter().filter_map(|failed| failed.as_ref().err()) {
        complain(error);
    }
    let listed: Vec<Listed> = listed.into_iter().flatten().collect();
    if args.json {
        let values: Vec<_> = listed
            .iter()
            .map(|listed| serde_json::json!({"disk_bytes": listed.disk_bytes, "manifest": listed.manifest}))
            .collect();
        let text = serde_json::to_string_pretty(&values).map_err(|e| CliError::Output(e.into()))?;
        return writeln!(output, "{}", printable_json(&text)).map_err(CliError::Output);
    }
    let mut rows = vec![["NAME", "OF", "CREATED", "SIZE"].map(String::from)];
    rows.extend(listed.into_iter().map(|Listed { manifest, disk_bytes }| {
        let of = format!("{}/{}", manifest.origin.namespace, manifest.origin.sandbox);
        let size = format!("{:.1} MiB", disk_bytes as f64 / f64::from(1 << 20));
        [manifest.name, of, time::rfc3339(manifest.created_ns), size]
    }));
    table::write(output, &rows)
}
