//! `cubecli cubebox export` and `cubecli cubebox import`

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal, Write, stdin},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use cube_shim::{config::Config, snapshot::Store};

use crate::{
    args::{ExportArgs, ImportArgs},
    error::CliError,
    progress::Progress,
};

/// Stands for standard input or output.
const STANDARD: &str = "-";

pub(crate) fn export(config: &Config, args: &ExportArgs, output: File) -> Result<(), CliError> {
    let store = Store::at(&config.snapshot.dir);
    let (name, file) = (&args.name, &args.file);
    let progress = Progress::of(format!("exporting {name}"));
    let mut told = |done, total| progress.told(done, total);
    if file == Path::new(STANDARD) {
        return match output.is_terminal() {
            true => Err(CliError::Terminal),
            false => Ok(store.export(name, output, &mut told)?),
        };
    }
    let failed = |action| move |source| CliError::File { action, path: file.clone(), source };
    // Of a snapshot that is not there, there is no file either.
    store.open(name)?;
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    let made = made.map_err(failed("make"))?;
    let exported = store.export(name, &made, &mut told).map_err(CliError::from);
    let complete = exported.and_then(|()| made.sync_all().map_err(failed("write out")));
    complete.inspect_err(|_| drop(fs::remove_file(file)))
}

pub(crate) fn import(config: &Config, args: &ImportArgs, mut output: File) -> Result<(), CliError> {
    let store = Store::at(&config.snapshot.dir);
    let (file, name) = (&args.file, args.name.as_deref());
    let progress = Progress::of("importing");
    let mut told = |done, total| progress.told(done, total);
    let imported = match file {
        _ if file == Path::new(STANDARD) => store.import(stdin().lock(), name, &mut told)?,
        _ if file.is_dir() => store.import_dir(file, name, &mut told)?,
        _ => {
            let failed = |source: io::Error| CliError::File { action: "open", path: file.clone(), source };
            store.import(File::open(file).map_err(failed)?, name, &mut told)?
        }
    };
    drop(progress);
    writeln!(output, "{}", imported.manifest.name).map_err(CliError::Output)
}
