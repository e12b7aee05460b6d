//! `Guest.Probe`: one attempt, within its time, and never while the guest is at rest.

mod http;

use std::{io, net::SocketAddr, time::Duration};

use cube_protocol::guest::{
    NotReady, ProbeRequest, ProbeResponse, Ready, probe_request, probe_response::Outcome,
};
use nix::errno::Errno;
use tokio::time::timeout;

use self::http::PATH_MAX;
use super::{error::Error, guest::Parts};
use crate::{container::ContainerError, errors};

/// Longest time that an attempt may be given, in milliseconds.
const TIMEOUT_MAX_MS: u32 = 60_000;

/// Longest reason, in characters. Paths that the host has asked for are in some.
const REASON_MAX: usize = 200;

/// What is tried, checked.
#[derive(Debug)]
enum Attempt {
    Http { address: SocketAddr, path: String },
    Tcp { address: SocketAddr },
    Exec { args: Vec<String> },
}

/// How an attempt that could be made has ended.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Ready,
    NotReady(String),
}

/// Makes the attempt. Cancel safe.
pub(super) async fn probe(parts: &Parts, request: ProbeRequest) -> Result<ProbeResponse, Error> {
    let limit = limit(request.timeout_ms)?;
    let attempt = Attempt::parse(request.attempt)?;
    let held = parts.hub.clock().next_hold();
    let quiesced = Error::Quiesced { call: "Probe" };
    // An attempt that lasts is given up when the guest comes to rest: no call may be open when the VM is
    // snapshotted, and its time would be over when the guest goes on.
    let verdict = tokio::select! {
        biased;
        verdict = timeout(limit, attempt.make(parts, &request.container_id)) => verdict,
        () = held => return Err(quiesced),
    };
    let outcome = match verdict {
        Ok(verdict) => verdict?,
        Err(_) => Verdict::NotReady(format!("no answer within {limit:?}")),
    };
    Ok(outcome.into())
}

fn limit(timeout_ms: u32) -> Result<Duration, Error> {
    if (1..=TIMEOUT_MAX_MS).contains(&timeout_ms) {
        return Ok(Duration::from_millis(timeout_ms.into()));
    }
    let reason = "a probe takes between 1 and 60,000 ms";
    Err(Error::Invalid { field: "timeout_ms", value: timeout_ms.to_string(), reason })
}

impl Attempt {
    fn parse(attempt: Option<probe_request::Attempt>) -> Result<Attempt, Error> {
        use probe_request::Attempt as Wire;
        match attempt {
            Some(Wire::Http(http)) => {
                Ok(Attempt::Http { address: address(&http.address)?, path: path(http.path)? })
            }
            Some(Wire::Tcp(tcp)) => Ok(Attempt::Tcp { address: address(&tcp.address)? }),
            Some(Wire::Exec(exec)) if exec.args.first().is_some_and(|program| !program.is_empty()) => {
                Ok(Attempt::Exec { args: exec.args })
            }
            Some(Wire::Exec(exec)) => {
                let reason = "the first of them must name a program";
                Err(Error::Invalid { field: "exec.args", value: format!("{:?}", exec.args), reason })
            }
            // None is also what only a later version of the protocol knows.
            _ => {
                let reason = "this agent knows http, tcp and exec";
                Err(Error::Invalid { field: "attempt", value: "none that is known".into(), reason })
            }
        }
    }

    async fn make(self, parts: &Parts, container: &str) -> Result<Verdict, Error> {
        // Held until a process has been spawned: nothing is spawned into a guest at rest.
        let pass = parts.quiescence.pass().ok_or(Error::Quiesced { call: "Probe" })?;
        match self {
            Attempt::Exec { args } => match parts.tasks.probe_process(container, args).await {
                Ok(process) => {
                    drop(pass);
                    Ok(Verdict::of_exit(process.exit_status().await?))
                }
                // A program that is not there may yet come, as may an answer of its file system.
                Err(
                    error @ (Error::Container(
                        ContainerError::Stage { .. } | ContainerError::SlowStart { .. },
                    )
                    | Error::GivenUp { .. }),
                ) => Ok(Verdict::not_ready(&errors::chain(&error))),
                Err(error) => Err(error),
            },
            Attempt::Tcp { address } => {
                let socket = parts.tasks.probe_socket(container, address).await?;
                drop(pass);
                Ok(socket.connect(address).await.map_or_else(|e| Verdict::of_io(&e), |_| Verdict::Ready))
            }
            Attempt::Http { address, path } => {
                let socket = parts.tasks.probe_socket(container, address).await?;
                drop(pass);
                let answered = async {
                    let stream = socket.connect(address).await?;
                    http::status(stream, address, &path).await
                };
                Ok(answered.await.map_or_else(|e| Verdict::of_io(&e), Verdict::of_http))
            }
        }
    }
}

impl Verdict {
    fn not_ready(reason: &str) -> Verdict {
        let printable = reason.chars().map(|c| if c.is_control() { ' ' } else { c });
        Verdict::NotReady(printable.take(REASON_MAX).collect())
    }

    /// Of the errors of a connection, the words of strerror(3) are said without the number.
    fn of_io(error: &io::Error) -> Verdict {
        match error.raw_os_error() {
            Some(errno) => Verdict::not_ready(&Errno::from_raw(errno).desc().to_lowercase()),
            None => Verdict::not_ready(&error.to_string()),
        }
    }

    fn of_exit(status: u8) -> Verdict {
        match status {
            0 => Verdict::Ready,
            status => Verdict::NotReady(format!("exit status {status}")),
        }
    }

    /// As Kubernetes has it.
    fn of_http(status: u16) -> Verdict {
        match status {
            200..=399 => Verdict::Ready,
            status => Verdict::NotReady(format!("HTTP {status}")),
        }
    }
}

impl From<Verdict> for ProbeResponse {
    fn from(verdict: Verdict) -> ProbeResponse {
        let outcome = match verdict {
            Verdict::Ready => Outcome::Ready(Ready::new()),
            Verdict::NotReady(reason) => Outcome::NotReady(NotReady { reason, ..Default::default() }),
        };
        ProbeResponse { outcome: Some(outcome), ..Default::default() }
    }
}

fn address(text: &str) -> Result<SocketAddr, Error> {
    let reason = "it must be an IP address with a port";
    let invalid = || Error::Invalid { field: "address", value: format!("{text:?}"), reason };
    text.parse().ok().filter(|address: &SocketAddr| address.port() != 0).ok_or_else(invalid)
}

fn path(path: String) -> Result<String, Error> {
    // Anything else could end the line of the request.
    let printable = path.bytes().all(|byte| byte.is_ascii_graphic());
    if path.starts_with('/') && printable && path.len() <= PATH_MAX {
        return Ok(path);
    }
    let reason = "it must be visible ASCII that begins with a slash, of at most 4,096 bytes";
    Err(Error::Invalid { field: "path", value: format!("{path:?}"), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_from_200_to_399_are_ready() {
        for (status, ready) in
            [(199, false), (200, true), (302, true), (399, true), (400, false), (503, false)]
        {
            assert_eq!(Verdict::of_http(status) == Verdict::Ready, ready, "{status}");
        }
    }

    #[test]
    fn what_could_become_another_request_is_refused() {
        for bad in ["", "healthz", "/a b", "/a\r\nX: y", "/\u{e4}", &format!("/{}", "x".repeat(PATH_MAX))] {
            assert!(path(bad.to_owned()).is_err(), "{bad:?}");
        }
        assert_eq!(path("/healthz?full=1".to_owned()).unwrap(), "/healthz?full=1");
        for bad in ["", "8080", "localhost:80", "127.0.0.1:0", "127.0.0.1", "::1:80"] {
            assert!(address(bad).is_err(), "{bad:?}");
        }
        assert!(address("[::1]:80").is_ok());
    }

    #[test]
    fn a_reason_is_one_short_printable_line() {
        let Verdict::NotReady(reason) = Verdict::not_ready(&"a\n\u{1b}[31m".repeat(1000)) else { panic!() };
        assert!(reason.chars().count() == REASON_MAX && !reason.contains(char::is_control), "{reason:?}");
    }
}
