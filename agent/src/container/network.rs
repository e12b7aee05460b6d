//! Sockets in the network of a container that is alive.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
use tokio::net::TcpSocket;

/// A socket in the network namespace of `process`, a pidfd, of the address family of `to`.
pub(super) fn tcp_socket(process: &OwnedFd, to: SocketAddr) -> io::Result<TcpSocket> {
    let family = if to.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let make = || {
        setns(process, CloneFlags::CLONE_NEWNET)?;
        // The socket stays where it was made, whoever uses it.
        socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
    };
    // A thread enters a namespace for itself alone, setns(2): this one ends in it.
    let thread = thread::Builder::new().name("socket".to_owned());
    let made = thread::scope(|scope| thread.spawn_scoped(scope, make).map(|thread| thread.join()))?;
    let made = made.map_err(|_| io::Error::other("the thread panicked"))??;
    Ok(TcpSocket::from_std_stream(TcpStream::from(made)))
}
