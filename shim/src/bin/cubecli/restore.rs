//! `cubecli cubebox restore`

use std::{fs::File, io::Write, time::Duration};

use cube_protocol::annotations::SNAPSHOT_RESTORE;
use cube_shim::{
    config::Config,
    snapshot::{Manifest, Store},
};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};

use crate::{
    args::RestoreArgs,
    containerd::{Container, Containerd, ContainerdError},
    error::{CliError, complain},
    progress::during,
    shim,
};

/// containerd's name of our runtime.
const RUNTIME: &str = "io.containerd.cube.v2";

/// What a process finds where nobody says otherwise, as with containerd's clients.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// gethostname(2): longer ids keep the host name of the original.
const HOST_NAME_MAX: usize = 64;

/// Time for a task to exit that was killed.
const KILL_LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn run(config: &Config, args: &RestoreArgs, mut output: File) -> Result<(), CliError> {
    let (manifest, _) = Store::at(&config.snapshot.dir).open(&args.name)?;
    let id = args.id.clone().unwrap_or_else(|| fresh_id(&manifest.name));
    let spec = spec(&manifest, &id)?;
    let namespace = args.namespace.as_deref().unwrap_or(&manifest.origin.namespace);
    shim::block_on(async {
        let containerd = Containerd::connect(&args.containerd.address, namespace).await?;
        let container = Container { id: &id, runtime: RUNTIME, spec: &spec };
        let mut interrupted = signal(SignalKind::interrupt()).map_err(CliError::Signal)?;
        containerd.create_container(container).await?;
        let running = tokio::select! {
            running = during("restoring the sandbox", run_task(&containerd, &id)) => running.map_err(CliError::from),
            _ = interrupted.recv() => Err(CliError::Interrupted { signal: libc::SIGINT }),
        };
        if running.is_err() {
            undo(&containerd, &id).await;
        }
        running
    })?;
    writeln!(output, "{id}").map_err(CliError::Output)
}

async fn run_task(containerd: &Containerd, id: &str) -> Result<(), ContainerdError> {
    containerd.create_task(id).await?;
    containerd.start_task(id).await
}

/// Removes what was made. There may be a task or not.
async fn undo(containerd: &Containerd, id: &str) {
    if containerd.kill_task(id, libc::SIGKILL.unsigned_abs()).await.is_ok() {
        let _ = timeout(KILL_LIMIT, containerd.wait_for_task(id)).await;
        let _ = containerd.delete_task(id).await;
    }
    if let Err(e) = containerd.delete_container(id).await {
        complain(&e);
    }
}

/// The spec of the new container `id`: that of the old one, as far as the snapshot has it, with a host name of
/// its own.
fn spec(manifest: &Manifest, id: &str) -> Result<Value, CliError> {
    let name = manifest.name.clone();
    let [container] = &manifest.containers[..] else {
        return Err(CliError::Several { name, containers: manifest.containers.len() });
    };
    if container.terminal {
        return Err(CliError::HasTerminal { name });
    }
    let mut spec = container.spec.clone();
    spec["annotations"][SNAPSHOT_RESTORE] = manifest.name.clone().into();
    if id.len() <= HOST_NAME_MAX {
        spec["hostname"] = id.into();
    }
    if spec["process"].is_object() {
        // For processes that are added to the container. Its own have what they had.
        spec["process"]["env"] = json!([PATH]);
    }
    Ok(spec)
}

/// One that no other restore of the snapshot has had.
fn fresh_id(name: &str) -> String {
    let time = Timestamp::now().strftime("%Y%m%d%H%M%S%3f").to_string();
    let name: String = name.chars().take(50).collect();
    format!("{}-{time}", name.trim_end_matches(['.', '_', '-']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_made_from_the_longest_name_is_one() {
        for name in ["a", &"x".repeat(76), &format!("{}-{}", "x".repeat(49), "y".repeat(20))] {
            let id = fresh_id(name);
            cube_shim::task::check_id("container id", &id).unwrap();
        }
    }
}
