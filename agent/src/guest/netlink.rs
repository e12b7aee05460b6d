//! The few requests of rtnetlink(7) that a guest needs, encoded by hand.
//!
//! Not the rtnetlink crate: it decodes every message of every kind, which costs 0.4 MiB of a binary
//! that each guest keeps in memory.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};

/// Bytes of a netlink message header, and what everything in a message is padded to.
const HEADER: usize = 16;
const ALIGN: usize = 4;

/// A socket that carries out one request at a time.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
}

/// What a link is to be changed to.
#[derive(Debug, Clone, Default)]
pub(super) struct Link<'a> {
    pub(super) up: bool,
    pub(super) name: Option<&'a str>,
    pub(super) mtu: Option<u32>,
}

/// A route to add.
#[derive(Debug, Clone)]
pub(super) struct Route {
    /// `None` is the default route of the gateway's address family.
    pub(super) destination: Option<(IpAddr, u8)>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) interface: Option<u32>,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Netlink> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        // 0 is the kernel.
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Netlink { socket })
    }

    /// Changes the link with `index`: up or down, and if given its name and MTU.
    pub(super) fn change_link(&self, index: u32, link: &Link<'_>) -> io::Result<()> {
        // struct ifinfomsg: family, padding, type, index, flags, mask of the flags to change.
        let up = libc::IFF_UP as u32;
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.bytes(&[libc::AF_UNSPEC as u8, 0, 0, 0]);
        message.bytes(&index.to_ne_bytes());
        message.bytes(&(if link.up { up } else { 0 }).to_ne_bytes());
        message.bytes(&up.to_ne_bytes());
        if let Some(name) = link.name {
            message.attribute(libc::IFLA_IFNAME, &[name.as_bytes(), &[0]].concat());
        }
        if let Some(mtu) = link.mtu {
            message.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.request(message)
    }

    /// Adds an address with its prefix length; one that is there already is replaced.
    pub(super) fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let message = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        self.change_address(message, index, address, prefix)
    }

    /// Removes an address.
    pub(super) fn remove_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        self.change_address(Message::new(libc::RTM_DELADDR, 0), index, address, prefix)
    }

    fn change_address(
        &self,
        mut message: Message,
        index: u32,
        address: IpAddr,
        prefix: u8,
    ) -> io::Result<()> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        message.bytes(&[family(address), prefix, 0, libc::RT_SCOPE_UNIVERSE]);
        message.bytes(&index.to_ne_bytes());
        // The local address, and the peer's, which is the same but on a point-to-point link.
        message.attribute(libc::IFA_LOCAL, &octets(address));
        message.attribute(libc::IFA_ADDRESS, &octets(address));
        self.request(message)
    }

    /// Adds a route to the main table; one to the same destination is replaced.
    pub(super) fn add_route(&self, route: &Route) -> io::Result<()> {
        let address = route.gateway.or(route.destination.map(|(address, _)| address));
        let family = address.map_or(libc::AF_INET as u8, family);
        let prefix = route.destination.map_or(0, |(_, prefix)| prefix);
        let scope = if route.gateway.is_some() { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_LINK };
        // struct rtmsg: family, destination and source prefix length, tos, table, protocol, scope,
        // type, flags.
        let mut message = Message::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        message.bytes(&[
            family,
            prefix,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_BOOT,
            scope,
            libc::RTN_UNICAST,
        ]);
        message.bytes(&0u32.to_ne_bytes());
        if let Some((address, _)) = route.destination {
            message.attribute(libc::RTA_DST, &octets(address));
        }
        if let Some(gateway) = route.gateway {
            message.attribute(libc::RTA_GATEWAY, &octets(gateway));
        }
        if let Some(interface) = route.interface {
            message.attribute(libc::RTA_OIF, &interface.to_ne_bytes());
        }
        self.request(message)
    }

    /// Sends a request and waits for the kernel's answer, which it gives before `send` returns.
    fn request(&self, message: Message) -> io::Result<()> {
        let request = message.finish();
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        // An answer repeats the request.
        let mut answer = vec![0; HEADER + 4 + request.len()];
        let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        parse_answer(answer.get(..length).unwrap_or_default())
    }
}

/// NLMSG_ERROR: a header, then a negative errno or 0.
fn parse_answer(answer: &[u8]) -> io::Result<()> {
    let field = |range: std::ops::Range<usize>| answer.get(range);
    let kind = field(4..6).and_then(|bytes| Some(u16::from_ne_bytes(bytes.try_into().ok()?)));
    let errno = field(HEADER..HEADER + 4).and_then(|bytes| Some(i32::from_ne_bytes(bytes.try_into().ok()?)));
    match (kind.map(i32::from), errno) {
        (Some(libc::NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(libc::NLMSG_ERROR), Some(errno)) => Err(io::Error::from_raw_os_error(-errno)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is no acknowledgement")),
    }
}

/// A request under construction.
struct Message(Vec<u8>);

impl Message {
    /// struct nlmsghdr: length, type, flags, sequence number, port id.
    fn new(kind: u16, flags: libc::c_int) -> Message {
        let flags = (flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let mut message = Message(vec![0; 4]);
        message.bytes(&kind.to_ne_bytes());
        message.bytes(&flags.to_ne_bytes());
        message.bytes(&[0; 8]);
        message
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// struct rtattr: length without the padding, type; then the value, padded.
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.bytes(&(value.len() as u16 + 4).to_ne_bytes());
        self.bytes(&kind.to_ne_bytes());
        self.bytes(value);
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        let length = (self.0.len() as u32).to_ne_bytes();
        self.0.splice(..4, length);
        self.0
    }
}

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_but_their_length_is_not() {
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.attribute(libc::IFLA_IFNAME, b"ether0\0");
        let wire = message.finish();
        assert_eq!(wire.len(), HEADER + 12);
        assert_eq!(wire[..4], 28u32.to_ne_bytes());
        assert_eq!(wire[HEADER..HEADER + 2], 11u16.to_ne_bytes());
        assert_eq!(wire[HEADER + 4..], *b"ether0\0\0");
    }

    #[test]
    fn the_errno_of_the_kernel_is_the_error() {
        let netlink = Netlink::open().unwrap();
        let error = netlink.change_link(u32::MAX >> 1, &Link { up: true, ..Link::default() }).unwrap_err();
        // EPERM where the tests do not run as root.
        assert!(matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)), "{error}");
        assert_eq!(parse_answer(&[0; 3]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
