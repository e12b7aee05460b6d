//! Who this guest is: random ids, host name, name servers.

use std::{fs, io, path::Path};

use nix::sys::utsname::uname;

/// Chosen when the agent starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Tells this boot from any other.
    pub boot_id: u64,
    /// The unbroken run that this guest is on, until a Thaw begins another.
    pub timeline: u64,
}

impl Identity {
    /// Random ids, never 0, which stands for "unknown" in the protocol. Waits until the kernel's
    /// generator is seeded, which takes about a second where the CPU has no generator of its own.
    pub fn random() -> io::Result<Identity> {
        Ok(Identity { boot_id: random()?, timeline: random()? })
    }
}

fn random() -> io::Result<u64> {
    loop {
        let id = getrandom::u64()?;
        if id != 0 {
            return Ok(id);
        }
    }
}

/// `uname -r`.
pub fn kernel_release() -> String {
    uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// The host name of the agent's uts namespace.
pub fn hostname() -> io::Result<String> {
    Ok(nix::unistd::gethostname()?.to_string_lossy().into_owned())
}

/// Sets the host name of the agent's uts namespace, which containers inherit or replace.
pub fn set_hostname(name: &str) -> io::Result<()> {
    Ok(nix::unistd::sethostname(name)?)
}

/// Writes resolv.conf(5) to `path`; nothing if there are no servers, searches and options.
pub fn write_resolv_conf(
    path: &Path,
    servers: &[String],
    searches: &[String],
    options: &[String],
) -> io::Result<()> {
    match resolv_conf(servers, searches, options) {
        text if text.is_empty() => Ok(()),
        text => {
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(path, text)
        }
    }
}

fn resolv_conf(servers: &[String], searches: &[String], options: &[String]) -> String {
    let mut text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    for (keyword, values) in [("search", searches), ("options", options)] {
        if !values.is_empty() {
            text.push_str(&format!("{keyword} {}\n", values.join(" ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_written_as_resolv_conf_has_them() {
        let list = |words: &[&str]| words.iter().map(|word| word.to_string()).collect::<Vec<_>>();
        let text = resolv_conf(&list(&["10.0.0.1", "::1"]), &list(&["a.b", "b"]), &list(&["ndots:5"]));
        assert_eq!(text, "nameserver 10.0.0.1\nnameserver ::1\nsearch a.b b\noptions ndots:5\n");
        assert_eq!(resolv_conf(&[], &[], &[]), "");
    }

    #[test]
    fn two_guests_have_different_ids() {
        let (one, other) = (Identity::random().unwrap(), Identity::random().unwrap());
        assert_ne!(one.boot_id, other.boot_id);
        assert_ne!(one.boot_id, one.timeline);
    }
}
