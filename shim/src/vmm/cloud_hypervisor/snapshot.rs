//! Writing a snapshot, and what one consists of.

use std::{
    fs::{self, File},
    io::{self, BufReader, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::Path,
    time::Duration,
};

use serde::de::IgnoredAny;
use serde_json::json;
use tokio::task::spawn_blocking;

use super::{
    super::{VmmError, WRITTEN_BY},
    api::Api,
};
use crate::snapshot::WrittenBy;

/// The configuration of the VM, as of vm.create with every default filled in.
pub(super) const CONFIG: &str = "config.json";
/// The state of processors and devices.
pub(super) const STATE: &str = "state.json";
/// The guest's memory from its first byte to its last, with holes where it never wrote.
pub(super) const MEMORY: &str = "memory-ranges";

/// How long memory may take to get to a file or back: a disk does 32 MiB/s on a bad day.
pub(super) fn limit(memory_bytes: u64) -> Duration {
    Duration::from_secs(20 + memory_bytes / (32 << 20))
}

/// A directory as Cloud Hypervisor wants it named.
pub(super) fn url(dir: &Path) -> Result<String, VmmError> {
    let path = dir.to_str().ok_or_else(|| VmmError::Io {
        action: "Cloud Hypervisor takes only UTF-8 paths, not",
        path: dir.into(),
        source: io::ErrorKind::InvalidInput.into(),
    })?;
    Ok(format!("file://{path}"))
}

/// Lets the paused VM behind `api` write its memory and state. See [`Vmm::snapshot`](super::super::Vmm::snapshot).
pub(super) async fn ask(api: &Api, dir: &Path, memory_bytes: u64) -> Result<(), VmmError> {
    let request = json!({"destination_url": url(dir)?});
    let asked = api.put("vm.snapshot", Some(&request), limit(memory_bytes)).await;
    asked.map_err(|source| VmmError::Snapshot { dir: dir.into(), source: Box::new(source) })
}

/// Checks what Cloud Hypervisor `version` has written, lets `group` read it, and says who has written it.
pub(super) async fn complete(
    version: &str,
    dir: &Path,
    memory_bytes: u64,
    group: u32,
) -> Result<(), VmmError> {
    let failed = |source| VmmError::Snapshot { dir: dir.into(), source: Box::new(source) };
    let (written, version) = (dir.to_owned(), version.to_owned());
    let completed = spawn_blocking(move || {
        check(&written, memory_bytes, group)?;
        sign(&written, version)
    });
    match completed.await {
        Ok(checked) => checked.map_err(failed),
        Err(error) => Err(error.into()),
    }
}

/// Says who has written it.
fn sign(dir: &Path, version: String) -> Result<(), VmmError> {
    let path = dir.join(WRITTEN_BY);
    let by = WrittenBy { name: "cloud-hypervisor".into(), version };
    let written = serde_json::to_vec(&by).map_err(io::Error::from).and_then(|text| {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(&text)
    });
    written.map_err(|source| VmmError::Io { action: "cannot write", path, source })
}

/// Whether all is there. Cloud Hypervisor (up to 54 at least) writes the JSON files with one write(2)
/// each and does not look at how much of them the file system took.
fn check(dir: &Path, memory_bytes: u64, group: u32) -> Result<(), VmmError> {
    for (name, check) in [(CONFIG, is_json as fn(&File) -> io::Result<()>), (STATE, is_json)] {
        check_file(dir, name, group, check)?;
    }
    check_file(dir, MEMORY, group, |file| match file.metadata()?.len() {
        len if len == memory_bytes => Ok(()),
        len => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{len} bytes for {memory_bytes} bytes of memory"),
        )),
    })
}

fn check_file(
    dir: &Path,
    name: &str,
    group: u32,
    check: impl Fn(&File) -> io::Result<()>,
) -> Result<(), VmmError> {
    let path = dir.join(name);
    // Whoever has written it may have made anything of that name.
    let open = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
    let result = open.and_then(|file| {
        let meta = file.metadata()?;
        if !meta.is_file() || meta.nlink() != 1 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no file of its own"));
        }
        fchown(&file, Some(0), Some(group))?;
        file.set_permissions(fs::Permissions::from_mode(0o640))?;
        check(&file)
    });
    result.map_err(|source| VmmError::Incomplete { path, source })
}

fn is_json(file: &File) -> io::Result<()> {
    serde_json::from_reader::<_, IgnoredAny>(BufReader::new(file))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;
    use crate::errors::chain;

    const MEMORY_BYTES: u64 = 64 << 20;

    /// What a VMM does that writes `state` and answers `reply`.
    async fn write_with(
        state: &'static str,
        reply: &'static str,
    ) -> (tempfile::TempDir, Result<(), VmmError>) {
        let dir = tempfile::tempdir().unwrap();
        let (socket, target) = (dir.path().join("api.sock"), dir.path().join("snapshot"));
        fs::create_dir(&target).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let files = target.clone();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let count = stream.read(&mut [0; 4096]).await.unwrap();
            assert_ne!(count, 0);
            fs::write(files.join(CONFIG), "{}").unwrap();
            fs::write(files.join(STATE), state).unwrap();
            File::create_new(files.join(MEMORY)).unwrap().set_len(MEMORY_BYTES).unwrap();
            stream.write_all(reply.as_bytes()).await.unwrap();
        });
        let result = match ask(&Api::new(socket), &target, MEMORY_BYTES).await {
            Ok(()) => complete("v54.0", &target, MEMORY_BYTES, 4321).await,
            failed => failed,
        };
        server.await.unwrap();
        (dir, result)
    }

    #[tokio::test]
    async fn a_snapshot_is_for_root_and_the_group_of_vmms() {
        let (dir, result) = write_with("{}", "HTTP/1.1 204 \r\n\r\n").await;
        result.unwrap();
        for name in [CONFIG, STATE, MEMORY] {
            let meta = fs::metadata(dir.path().join("snapshot").join(name)).unwrap();
            assert_eq!(
                (meta.permissions().mode() & 0o777, meta.uid(), meta.gid()),
                (0o640, 0, 4321),
                "{name}"
            );
        }
    }

    #[tokio::test]
    async fn a_file_that_was_cut_short_is_no_success_whatever_the_vmm_says() {
        let (_dir, result) = write_with("{\"cpus\": [", "HTTP/1.1 204 \r\n\r\n").await;
        let error = chain(&result.unwrap_err());
        assert!(error.contains("snapshot/state.json is not complete") && error.contains("full"), "{error}");
    }

    #[tokio::test]
    async fn a_full_disk_is_named_with_the_directory() {
        let reply = "HTTP/1.1 500 \r\ncontent-length: 56\r\n\r\n[\"cannot send\",\"No space left on device (os error 28)\"] ";
        let (dir, result) = write_with("", reply).await;
        let error = chain(&result.unwrap_err());
        let target = dir.path().join("snapshot");
        assert!(error.contains(target.to_str().unwrap()), "{error}");
        assert!(error.contains("No space left on device"), "{error}");
    }

    #[test]
    fn more_memory_has_more_time() {
        assert_eq!(limit(256 << 20), Duration::from_secs(28));
        assert_eq!(limit(64 << 30), Duration::from_secs(2068));
    }
}
