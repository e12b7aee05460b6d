//! `cube.ready.*`: how a container shows that it is ready.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use cube_protocol::{
    annotations as name,
    guest::{ExecProbe, HttpProbe, TcpProbe, probe_request::Attempt},
};

use super::AnnotationError;

/// Port of a URL that names none.
const HTTP_PORT: u16 = 80;

/// Longest path, in bytes; the agent takes no longer one.
const PATH_MAX: usize = 4096;

/// A ready probe. The addresses are those of the container's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// A GET of `path` is answered with a status from 200 to 399.
    Http {
        /// Of the server.
        address: SocketAddr,
        /// With the query, beginning with a slash.
        path: String,
    },
    /// A connection is taken.
    Tcp(SocketAddr),
    /// A program, with its arguments, ends with 0.
    Exec(Vec<String>),
}

impl Probe {
    pub(super) fn http(value: &str) -> Result<Probe, AnnotationError> {
        let rule = "a port with a path as in \"8080/healthz\", or a URL with localhost or an IP address as in \
                    \"http://127.0.0.1:8080/healthz\"";
        let (url, rest) = match value.strip_prefix("http://") {
            Some(rest) => (true, rest),
            None => (false, value),
        };
        let at = rest.find('/').unwrap_or(rest.len());
        let (server, path) = rest.split_at(at);
        let address = if url { url_address(server) } else { address(server) };
        let path = if path.is_empty() { "/" } else { path };
        let path =
            Some(path).filter(|path| path.len() <= PATH_MAX && path.bytes().all(|b| b.is_ascii_graphic()));
        match (address, path) {
            (Some(address), Some(path)) => Ok(Probe::Http { address, path: path.into() }),
            _ => Err(AnnotationError::Value { name: name::READY_HTTP, value: value.into(), rule }),
        }
    }

    pub(super) fn tcp(value: &str) -> Result<Probe, AnnotationError> {
        let rule =
            "a port as in \"5432\", or localhost or an IP address with a port as in \"127.0.0.1:5432\"";
        address(value).map(Probe::Tcp).ok_or_else(|| AnnotationError::Value {
            name: name::READY_TCP,
            value: value.into(),
            rule,
        })
    }

    pub(super) fn exec(value: &str) -> Result<Probe, AnnotationError> {
        let rule = "a JSON array with a program and its arguments, as in [\"/bin/check\",\"-q\"]";
        let args: Option<Vec<String>> = serde_json::from_str(value).ok();
        let runs = |args: &Vec<String>| {
            args.first().is_some_and(|program| !program.is_empty())
                && !args.iter().any(|arg| arg.contains('\0'))
        };
        args.filter(runs).map(Probe::Exec).ok_or_else(|| AnnotationError::Value {
            name: name::READY_EXEC,
            value: value.into(),
            rule,
        })
    }

    /// How the agent is asked for it.
    pub fn attempt(&self) -> Attempt {
        match self {
            Probe::Http { address, path } => Attempt::Http(HttpProbe {
                address: address.to_string(),
                path: path.clone(),
                ..Default::default()
            }),
            Probe::Tcp(address) => {
                Attempt::Tcp(TcpProbe { address: address.to_string(), ..Default::default() })
            }
            Probe::Exec(args) => Attempt::Exec(ExecProbe { args: args.clone(), ..Default::default() }),
        }
    }
}

/// As an annotation could have it, behind the kind.
impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Probe::Http { address, path } => write!(f, "http {address}{path}"),
            Probe::Tcp(address) => write!(f, "tcp {address}"),
            Probe::Exec(args) => write!(f, "exec {}", serde_json::json!(args)),
        }
    }
}

/// `8080`, `localhost:8080`, `127.0.0.1:8080` or `[::1]:8080`.
fn address(text: &str) -> Option<SocketAddr> {
    let here = |port: &str| port.parse().ok().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let address = match text.strip_prefix("localhost:") {
        Some(port) => here(port),
        None => here(text).or_else(|| text.parse().ok()),
    };
    address.filter(|address| address.port() != 0)
}

/// The same in a URL, where it is the port that may be missing.
fn url_address(text: &str) -> Option<SocketAddr> {
    let host = match text {
        "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        _ => text.trim_matches(['[', ']']).parse().ok(),
    };
    match host {
        Some(host) => Some(SocketAddr::from((host, HTTP_PORT))),
        None => Some(text).filter(|text| text.contains(':')).and_then(address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(probe: Result<Probe, AnnotationError>) -> String {
        probe.unwrap().to_string()
    }

    #[test]
    fn a_server_is_named_as_briefly_as_one_likes() {
        for (value, meant) in [
            ("8080", "http 127.0.0.1:8080/"),
            ("8080/healthz?full=1", "http 127.0.0.1:8080/healthz?full=1"),
            ("localhost:80/x", "http 127.0.0.1:80/x"),
            ("10.0.0.2:80", "http 10.0.0.2:80/"),
            ("http://127.0.0.1:8080/healthz", "http 127.0.0.1:8080/healthz"),
            ("http://localhost/healthz", "http 127.0.0.1:80/healthz"),
            ("http://[::1]:8080", "http [::1]:8080/"),
            ("http://[::1]/x", "http [::1]:80/x"),
        ] {
            assert_eq!(shown(Probe::http(value)), meant, "{value}");
        }
        for (value, meant) in [
            ("5432", "tcp 127.0.0.1:5432"),
            ("localhost:5432", "tcp 127.0.0.1:5432"),
            ("[::1]:5432", "tcp [::1]:5432"),
        ] {
            assert_eq!(shown(Probe::tcp(value)), meant, "{value}");
        }
        assert_eq!(shown(Probe::exec(r#"["/bin/check", "-q"]"#)), r#"exec ["/bin/check","-q"]"#);
    }

    #[test]
    fn what_cannot_be_probed_is_refused_with_what_could() {
        for value in [
            "",
            "/healthz",
            "0",
            "65536",
            "https://127.0.0.1/",
            "http://web/",
            "web:80",
            "http://8080/",
            "8080/a b",
            "8080/\r\n",
            "127.0.0.1",
            "http://",
            "-1",
        ] {
            let error = Probe::http(value).unwrap_err().to_string();
            assert!(error.contains(&format!("{value:?}")) && error.contains("8080/healthz"), "{error}");
        }
        for value in ["", "0", "5432/", "web:5432", "127.0.0.1", "tcp://127.0.0.1:1", "::1:5432"] {
            let error = Probe::tcp(value).unwrap_err().to_string();
            assert!(error.contains(&format!("{value:?}")) && error.contains("127.0.0.1:5432"), "{error}");
        }
        for value in ["", "/bin/check", "[]", "[\"\"]", "[1]", "{}", "[\"/bin/check\", \"a\\u0000\"]", "null"]
        {
            let error = Probe::exec(value).unwrap_err().to_string();
            assert!(error.contains(&format!("{value:?}")) && error.contains("/bin/check"), "{error}");
        }
    }
}
