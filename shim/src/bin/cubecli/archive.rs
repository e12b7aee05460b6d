//! `cubecli cubebox export` and `cubecli cubebox import`

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal, Write, stdin},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
};

use cube_shim::{
    config::Config,
    snapshot::{Import, Store},
    task::check_id,
};

use crate::{
    args::{ExportArgs, ImportArgs},
    error::CliError,
    interrupt::Interrupts,
    progress::Progress,
};

/// Stands for standard input or output.
const STANDARD: &str = "-";

pub(crate) fn export(config: &Config, args: &ExportArgs, output: File) -> Result<(), CliError> {
    let store = Store::at(&config.snapshot.dir);
    let (name, file) = (&args.name, &args.file);
    if file == Path::new(STANDARD) {
        if output.is_terminal() {
            return Err(CliError::Terminal);
        }
        let progress = Progress::of(format!("exporting {name}"));
        return Ok(store.export(name, output, &mut |done, total| progress.told(done, total))?);
    }
    let failed = |action| move |source| CliError::File { action, path: file.clone(), source };
    // Of a snapshot that is not there, there is no file either.
    store.open(name)?;
    let interrupts = Interrupts::watch()?;
    let progress = Progress::of(format!("exporting {name}"));
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    let made = made.map_err(failed("make"))?;
    let mut told = |done, total| {
        progress.bytes(done, total);
        interrupts.check()
    };
    let exported = store.export(name, &made, &mut told).map_err(|e| interrupts.explain(e));
    let complete = exported.and_then(|()| made.sync_all().map_err(failed("write out")));
    complete.inspect_err(|_| drop(fs::remove_file(file)))
}

pub(crate) fn import(config: &Config, args: &ImportArgs, mut output: File) -> Result<(), CliError> {
    let store = Store::at(&config.snapshot.dir);
    check_id("namespace", &args.namespace).map_err(|_| CliError::NoNamespace(args.namespace.clone()))?;
    let limit = config.snapshot.import_limit;
    let (name, pod_namespace) = (args.name.as_deref(), args.pod_namespace.as_deref());
    let import = Import { name, namespace: &args.namespace, pod_namespace, limit };
    let file = &args.file;
    // A FIFO is waited for here, when there is nothing yet to be removed.
    let input = match file == Path::new(STANDARD) {
        true => stdin().as_fd().try_clone_to_owned().map(File::from),
        false => File::open(file),
    };
    let input = input.map_err(|source| CliError::File { action: "open", path: file.clone(), source })?;
    let is_dir = input.metadata().is_ok_and(|meta| meta.is_dir());
    let interrupts = Interrupts::watch()?;
    let progress = Progress::of("importing");
    let mut told = |done, total| -> io::Result<()> {
        progress.bytes(done, total);
        interrupts.check()
    };
    let imported = match is_dir {
        true => store.import_dir(file, import, &mut told),
        false => store.import(interrupts.input(input), import, &mut told),
    };
    drop(progress);
    let imported = imported.map_err(|e| interrupts.explain(e))?;
    writeln!(output, "{}", imported.manifest.name).map_err(CliError::Output)
}
