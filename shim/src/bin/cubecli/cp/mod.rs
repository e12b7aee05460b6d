//! `cubecli cubebox cp`: a tar stream from or to the container's own tar.
//!
//! That is how kubectl does it. It needs nothing of the guest beyond an exec, so it works with every agent and with
//! the files as the container sees them: mounts, users, all. What the container sends is not trusted: see
//! [`unpack`].

mod exec;
mod unpack;

use std::{
    fs::{self, File},
    io::{self, IsTerminal, Read, Write, stdin},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use cube_shim::config::Config;
use tar::{Builder, HeaderMode};

use self::{
    exec::{Guest, Work},
    unpack::Unpack,
};
use crate::{args::CpArgs, containerd::Containerd, error::CliError, progress::during, sandboxes, shim};

/// Stands for standard input or output.
const STANDARD: &str = "-";

const TAR: &str = "tar";

pub(crate) fn run(config: &Config, args: &CpArgs, output: File) -> Result<(), CliError> {
    let sides = (remote(&args.src), remote(&args.dst));
    let (id, path) = match sides {
        (Some(side), None) | (None, Some(side)) => side,
        _ => return Err(CliError::CopySides),
    };
    let (sandbox, id) = sandboxes::find_container(&config.run_dir, args.namespace.as_deref(), id)?;
    if sides.0.is_some() && args.dst == STANDARD && output.is_terminal() {
        return Err(CliError::Terminal);
    }
    shim::block_on(async {
        let containerd = Containerd::of(config, &sandbox, &args.containerd.address).await?;
        let guest = Guest::new(containerd, &sandbox, &id, &config.run_dir).await?;
        match sides.0 {
            Some(_) => during("copying", copy_out(&guest, path, &args.dst, output)).await,
            None => during("copying", copy_in(&guest, &args.src, path)).await,
        }
    })
}

/// ID and path of a side in a container. A local path with a colon begins with `/` or `.`.
fn remote(side: &str) -> Option<(&str, &str)> {
    if side.starts_with(['/', '.']) { None } else { side.split_once(':') }
}

async fn copy_out(guest: &Guest<'_>, path: &str, local: &str, mut output: File) -> Result<(), CliError> {
    let (dir, name) = split(path);
    let argv = [TAR, "-c", "-f", "-", "-C", dir, &format!("./{name}")];
    if local == STANDARD {
        let pass = move |mut from: File| io::copy(&mut from, &mut output).map(drop).map_err(CliError::Output);
        return guest.run(&argv, Work::Take(Box::new(pass))).await;
    }
    let unpack = Unpack::new(Path::new(local), name)?;
    guest.run(&argv, Work::Take(Box::new(move |from| unpack.all(from)))).await
}

async fn copy_in(guest: &Guest<'_>, local: &str, path: &str) -> Result<(), CliError> {
    // Before a process is started for it.
    if local == STANDARD {
        let input = stdin().as_fd().try_clone_to_owned().map(File::from);
        let mut input = input.map_err(|source| CliError::Send { path: local.into(), source })?;
        let pass = move |mut to: File| {
            io::copy(&mut input, &mut to)
                .map(drop)
                .map_err(|source| CliError::Send { path: "-".into(), source })
        };
        return guest.run(&extract_to(absolute(path)), Work::Give(Box::new(pass))).await;
    }
    let source = PathBuf::from(local);
    fs::symlink_metadata(&source).map_err(|e| CliError::File {
        action: "find",
        path: source.clone(),
        source: e,
    })?;
    let (dir, name) = match guest.has_dir(absolute(path)).await? {
        true => (absolute(path), own_name(&source)),
        false => {
            let (dir, name) = split(path.trim_end_matches('/'));
            (dir, name.to_owned())
        }
    };
    let send = move |to: File| {
        pack(&source, &name, to).map_err(|e| CliError::Send { path: source.clone(), source: e })
    };
    guest.run(&extract_to(dir), Work::Give(Box::new(send))).await
}

fn extract_to(dir: &str) -> [&str; 7] {
    [TAR, "-x", "-p", "-f", "-", "-C", dir]
}

/// Paths in a container begin at its root.
fn absolute(path: &str) -> &str {
    if path.is_empty() { "/" } else { path }
}

/// The directory that a path is in, and its name there, "." for all that is in the directory.
fn split(path: &str) -> (&str, &str) {
    let path = absolute(path);
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() {
        return ("/", ".");
    }
    match trimmed.rsplit_once('/') {
        Some((dir, name)) if [".", ".."].contains(&name) => {
            (if name == "." { absolute(dir) } else { trimmed }, ".")
        }
        Some((dir, name)) => (absolute(dir), name),
        None if [".", ".."].contains(&trimmed) => (trimmed, "."),
        None => ("/", trimmed),
    }
}

/// Under what name a local path is sent: its own, "." for what is in it.
fn own_name(path: &Path) -> String {
    // Path leaves out a dot at the end.
    let is_inside = path.as_os_str().as_encoded_bytes().ends_with(b"/.") || path.as_os_str() == ".";
    let name = path.file_name().filter(|_| !is_inside);
    name.map_or_else(|| ".".into(), |name| name.to_string_lossy().into_owned())
}

/// Writes `source` as a tar stream in which it is `name`. Links are not followed.
fn pack(source: &Path, name: &str, to: impl Write) -> io::Result<()> {
    let mut builder = Builder::new(to);
    builder.mode(HeaderMode::Complete);
    builder.follow_symlinks(false);
    // Not every tar reads sparse files.
    builder.sparse(false);
    match fs::symlink_metadata(source)?.is_dir() {
        true => builder.append_dir_all(name, source)?,
        false => builder.append_path_with_name(source, name)?,
    }
    builder.into_inner()?.flush()
}

/// Reads to the end, so that whoever writes is not interrupted.
fn drain(mut from: impl Read) -> io::Result<()> {
    io::copy(&mut from, &mut io::sink()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_in_a_container_has_a_colon_and_is_no_path() {
        assert_eq!(remote("web:/etc/hosts"), Some(("web", "/etc/hosts")));
        assert_eq!(remote("web:"), Some(("web", "")));
        for local in ["-", "/a:b", "./a:b", "../a:b", "name"] {
            assert_eq!(remote(local), None, "{local}");
        }
    }

    #[test]
    fn a_path_is_a_directory_and_a_name_in_it() {
        for (path, parts) in [
            ("/etc/hosts", ("/etc", "hosts")),
            ("/etc/", ("/", "etc")),
            ("etc", ("/", "etc")),
            ("a/b", ("a", "b")),
            ("/", ("/", ".")),
            ("", ("/", ".")),
            ("/etc/.", ("/etc", ".")),
            ("/etc/a/..", ("/etc/a/..", ".")),
            ("-x", ("/", "-x")),
        ] {
            assert_eq!(split(path), parts, "{path}");
        }
        for (path, name) in [("a/b", "b"), ("a/b/", "b"), ("a/b/.", "."), (".", "."), ("..", "."), ("/", ".")]
        {
            assert_eq!(own_name(Path::new(path)), name, "{path}");
        }
    }

    #[test]
    fn what_is_packed_can_be_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir_all(source.join("sub")).unwrap();
        fs::write(source.join("sub/file"), "text").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", source.join("link")).unwrap();
        let mut stream = Vec::new();
        pack(&source, "new", &mut stream).unwrap();
        let names = |stream: &[u8]| {
            let mut archive = tar::Archive::new(stream);
            let entries = archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned());
            let mut names: Vec<_> = entries.map(|path| path.display().to_string()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&stream), ["new/", "new/link", "new/sub", "new/sub/file"]);
        let target = dir.path().join("target");
        Unpack::new(&target, "new").unwrap().all(&stream[..]).unwrap();
        assert_eq!(fs::read(target.join("sub/file")).unwrap(), b"text");
        assert_eq!(fs::read_link(target.join("link")).unwrap(), Path::new("/etc/passwd"));
    }
}
