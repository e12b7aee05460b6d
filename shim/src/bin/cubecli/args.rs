//! The command line.

mod texts;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use nix::sys::signal::Signal;

use self::texts::{CP, EXIT_CODES, EXPORT, IMPORT, KILL, LOGS, PAUSE, RESTORE, RM, ROLLBACK, SNAPSHOT, WAIT};
use crate::time::Since;

/// Operator tool of Cubebox: containers in microVMs under containerd.
#[derive(Debug, Parser)]
#[command(name = "cubecli", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Configuration file [default: $CUBE_CONFIG, else /etc/cube/config.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Sandboxes and their containers
    Cubebox {
        #[command(subcommand)]
        command: CubeboxCommand,
    },
    /// Same as `cubecli cubebox logs`
    #[command(long_about = LOGS)]
    Logs(LogsArgs),
    /// Show versions, the VMM that would run a sandbox and why, and paths
    #[command(after_help = EXIT_CODES)]
    Info,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CubeboxCommand {
    /// List the containers of all running sandboxes
    Ls(LsArgs),
    /// Print the output of a container, running or deleted
    #[command(long_about = LOGS)]
    Logs(LogsArgs),
    /// Show a sandbox: its VM, its processes, and what has become of each byte of their output
    Status(StatusArgs),
    /// Wait until a sandbox is ready
    #[command(long_about = WAIT)]
    Wait(WaitArgs),
    /// Let a sandbox stand still, in memory or on disk
    #[command(long_about = PAUSE)]
    Pause(PauseArgs),
    /// Let a paused sandbox go on, from memory or from disk
    Resume(ResumeArgs),
    /// Copy files out of a running container, or into it
    #[command(long_about = CP)]
    Cp(CpArgs),
    /// Send a signal to a container, SIGKILL unless told otherwise
    #[command(long_about = KILL)]
    Kill(KillArgs),
    /// Remove a container, or a whole sandbox
    #[command(long_about = RM)]
    Rm(RmArgs),
    /// Take a snapshot of a sandbox, which runs on; prints the snapshot's name
    #[command(long_about = SNAPSHOT)]
    Snapshot(SnapshotArgs),
    /// Put a sandbox back to a snapshot of its own
    #[command(long_about = ROLLBACK)]
    Rollback(RollbackArgs),
    /// List the snapshots, verify one, or remove one
    Snapshots(SnapshotsArgs),
    /// Make and start a sandbox that goes on from a snapshot; prints its ID
    #[command(long_about = RESTORE)]
    Restore(RestoreArgs),
    /// Write a snapshot into an archive, for another host
    #[command(long_about = EXPORT)]
    Export(ExportArgs),
    /// Make a snapshot from an archive; prints its name
    #[command(long_about = IMPORT)]
    Import(ImportArgs),
    /// Remove what is left: logs beyond their retention, directories of sandboxes that are gone
    Gc(GcArgs),
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct LsArgs {
    /// Only containers of this containerd namespace
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
    /// Print a JSON array instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct StatusArgs {
    /// ID of a sandbox or of a container in it, or a prefix that no other one has
    pub(crate) id: String,
    /// containerd namespace of the sandbox [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
    /// Print a JSON object, with every number in full
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct WaitArgs {
    /// ID of a sandbox or of a container in it, or a prefix that no other one has
    pub(crate) id: String,
    /// What to wait for
    #[arg(long, required = true)]
    pub(crate) ready: bool,
    /// Give up after so many seconds, with exit code 1 and the reason [default: wait for ever]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=31_536_000))]
    pub(crate) timeout: Option<u64>,
    /// containerd namespace of the sandbox [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct PauseArgs {
    /// ID of a sandbox or of a container in it, or a prefix that no other one has
    pub(crate) id: String,
    /// Write the memory to disk and set it free; also for a sandbox that is paused already
    #[arg(long)]
    pub(crate) to_disk: bool,
    /// containerd namespace of the sandbox [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct ResumeArgs {
    /// ID of a sandbox or of a container in it, or a prefix that no other one has
    pub(crate) id: String,
    /// containerd namespace of the sandbox [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct CpArgs {
    /// What to copy: ID:PATH, or a local path
    pub(crate) src: String,
    /// Where to: a local path, or ID:PATH
    pub(crate) dst: String,
    /// containerd namespace of the container [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
    #[command(flatten)]
    pub(crate) containerd: ContainerdArgs,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct KillArgs {
    /// Container ID, or a prefix of it that no other container has
    pub(crate) id: String,
    /// Signal, by its name or number
    #[arg(long, short, default_value = "SIGKILL", value_parser = signal)]
    pub(crate) signal: u32,
    /// containerd namespace of the container [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
    #[command(flatten)]
    pub(crate) containerd: ContainerdArgs,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct RmArgs {
    /// Container ID, or a prefix of it that no other container has
    pub(crate) id: String,
    /// End what runs, by SIGKILL
    #[arg(long, short)]
    pub(crate) force: bool,
    /// containerd namespace of the container [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
    #[command(flatten)]
    pub(crate) containerd: ContainerdArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ContainerdArgs {
    /// Socket of containerd
    #[arg(
        long,
        value_name = "PATH",
        env = "CONTAINERD_ADDRESS",
        default_value = "/run/containerd/containerd.sock"
    )]
    pub(crate) address: PathBuf,
}

/// A signal by its name, with or without SIG, or its number.
fn signal(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| (1..=64).contains(number));
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let named = name.parse::<Signal>().ok().map(|signal| signal as u32);
    number.or(named).ok_or_else(|| "not a signal: give a name, such as SIGTERM, or a number up to 64".into())
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct SnapshotArgs {
    /// ID of a sandbox or of a container in it, or a prefix that no other one has
    pub(crate) id: String,
    /// Name of the snapshot [default: the ID and the time; of a template build the ID of the template]
    pub(crate) name: Option<String>,
    /// containerd namespace of the sandbox [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct RollbackArgs {
    /// ID of a sandbox or of a container in it, or a prefix that no other one has
    pub(crate) id: String,
    /// Name of the snapshot
    pub(crate) name: String,
    /// containerd namespace of the sandbox [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct SnapshotsArgs {
    /// Remove this snapshot; sandboxes that were restored from it go on
    #[arg(long, value_name = "NAME")]
    pub(crate) rm: Option<String>,
    /// Read all of this snapshot, and compare it with the digests in its manifest
    #[arg(long, value_name = "NAME", conflicts_with = "rm")]
    pub(crate) verify: Option<String>,
    /// Print a JSON array with the manifests instead of a table
    #[arg(long, conflicts_with_all = ["rm", "verify"])]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct RestoreArgs {
    /// Name of the snapshot
    pub(crate) name: String,
    /// ID of the new sandbox [default: the snapshot's name and the time]
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<String>,
    /// containerd namespace of the new sandbox [default: that of the snapshot's original; of a snapshot that was
    /// imported, the one that it was imported for]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
    #[command(flatten)]
    pub(crate) containerd: ContainerdArgs,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct ExportArgs {
    /// Name of the snapshot
    pub(crate) name: String,
    /// File to make, which must not exist; `-` is standard output
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct ImportArgs {
    /// Archive, or directory of a checkpoint's image_path; `-` is standard input
    pub(crate) file: PathBuf,
    /// Name of the snapshot [default: the one that it had]
    pub(crate) name: Option<String>,
    /// containerd namespace that it is for: `restore` makes sandboxes there unless told otherwise
    #[arg(long, short, value_name = "NS", env = "CONTAINERD_NAMESPACE", default_value = "default")]
    pub(crate) namespace: String,
    /// Kubernetes namespace whose pods it is for, with --namespace k8s.io, where all pods are [default: for none]
    #[arg(long, value_name = "NS", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) pod_namespace: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct GcArgs {
    /// Only say what would be removed
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct LogsArgs {
    /// Container ID, or a prefix of it that no other container has. An older log of a reused ID,
    /// `<id>.<time>`, must be named in full
    pub(crate) id: String,
    /// The ID is that of a template: print the output of its build, which runs or is over
    #[arg(long, conflicts_with = "namespace")]
    pub(crate) tpl: bool,
    /// The last N lines [default: 100, or all with --since]
    #[arg(long, value_name = "N", conflicts_with_all = ["head", "all"])]
    pub(crate) tail: Option<u64>,
    /// The first N lines
    #[arg(long, value_name = "N", conflicts_with = "all")]
    pub(crate) head: Option<u64>,
    /// All that is kept
    #[arg(long)]
    pub(crate) all: bool,
    /// Standard error instead of standard output
    #[arg(long, conflicts_with = "both")]
    pub(crate) stderr: bool,
    /// Both, line by line in the order of their times; one after the other if an index is missing
    #[arg(long)]
    pub(crate) both: bool,
    /// Print what is added, until the container is gone, or 3 s after it stopped
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only lines that began at T or later: RFC 3339, seconds since 1970, or an age such as 10m, 1h30m
    #[arg(long, value_name = "T")]
    pub(crate) since: Option<Since>,
    /// Begin each line with the time of its first byte's write (UTC), or `-` if it is not known
    #[arg(long, short)]
    pub(crate) timestamps: bool,
    /// Look in the mount namespace of process N, containerd's for example
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pid: Option<u32>,
    /// containerd namespace of the container [default: all]
    #[arg(long, short, value_name = "NS")]
    pub(crate) namespace: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_a_name_or_a_number() {
        for (text, number) in
            [("SIGTERM", 15), ("term", 15), ("9", 9), ("KILL", 9), ("64", 64), ("sigusr1", 10)]
        {
            assert_eq!(signal(text), Ok(number), "{text}");
        }
        for text in ["", "0", "65", "SIG", "-9", "nothing"] {
            signal(text).unwrap_err();
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
