//! Interfaces, addresses and routes, through rtnetlink(7).

use std::{io, net::IpAddr};

use cube_protocol::guest::{Interface, Route};
use nix::{ifaddrs::getifaddrs, sys::socket::SockaddrStorage};

use super::netlink::{self, Link, Netlink};

/// Why the network cannot be as the host wants it.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Something that is not what its field says.
    #[error("{field} is {value:?}: {reason}")]
    Invalid {
        /// The field of the request.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        reason: &'static str,
    },
    /// No device.
    #[error("the guest has no network device with {what} {value:?}")]
    NoDevice {
        /// By what it was looked up.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// The kernel refused.
    #[error("cannot {action}")]
    System {
        /// What was done, to what.
        action: String,
        /// Why.
        source: io::Error,
    },
}

/// A network device of this namespace.
struct Device {
    name: String,
    index: u32,
    mac: Option<[u8; 6]>,
}

/// Brings up lo, names and configures interfaces, and adds routes, in that order. Can be repeated.
pub fn configure(interfaces: &[Interface], routes: &[Route]) -> Result<(), NetworkError> {
    let netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    let lo = find("name", "lo", |device| device.name == "lo")?;
    netlink.change_link(lo.index, &UP).map_err(failed("bring up lo"))?;
    interfaces.iter().try_for_each(|interface| set_up(&netlink, interface))?;
    routes.iter().try_for_each(|route| add_route(&netlink, route))
}

/// As [`configure`] for a guest that runs: the interfaces named get exactly the addresses given, and
/// lose the routes that they had. Can be repeated.
pub fn reconfigure(interfaces: &[Interface], routes: &[Route]) -> Result<(), NetworkError> {
    let netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    interfaces.iter().try_for_each(|interface| clear(&netlink, interface))?;
    interfaces.iter().try_for_each(|interface| set_up(&netlink, interface))?;
    routes.iter().try_for_each(|route| add_route(&netlink, route))
}

const UP: Link<'_> = Link { up: true, name: None, mtu: None };

fn set_up(netlink: &Netlink, interface: &Interface) -> Result<(), NetworkError> {
    let name = &interface.name;
    // IFNAMSIZ, with the zero at the end.
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        let reason = "1 to 15 bytes are needed";
        return Err(NetworkError::Invalid { field: "name", value: name.clone(), reason });
    }
    let index = find_by_mac(&interface.mac)?.index;
    let mtu = (interface.mtu != 0).then_some(interface.mtu);
    // A device that is up cannot be renamed.
    let renamed = netlink.change_link(index, &Link { up: false, name: Some(name), mtu });
    renamed.map_err(failed(format!("configure {name}")))?;
    for address in &interface.addresses {
        let (ip, prefix) = parse_prefix("address", address)?;
        let added = netlink.add_address(index, ip, prefix);
        added.map_err(failed(format!("add address {address} to {name}")))?;
    }
    netlink.change_link(index, &UP).map_err(failed(format!("bring up {name}")))
}

/// Removes the addresses of an interface. Its routes go with them, or when [`set_up`] brings it down.
fn clear(netlink: &Netlink, interface: &Interface) -> Result<(), NetworkError> {
    let device = find_by_mac(&interface.mac)?;
    let addresses =
        addresses_of(&device.name).map_err(failed(format!("list addresses of {}", device.name)))?;
    for (ip, prefix) in addresses {
        match netlink.remove_address(device.index, ip, prefix) {
            // A secondary address goes with its primary one.
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            removed => {
                removed.map_err(failed(format!("remove address {ip}/{prefix} from {}", device.name)))?;
            }
        }
    }
    Ok(())
}

fn add_route(netlink: &Netlink, route: &Route) -> Result<(), NetworkError> {
    let destination = match route.destination.as_str() {
        "" => None,
        text => Some(parse_prefix("destination", text)?),
    };
    let gateway = match route.gateway.as_str() {
        "" => None,
        text => Some(parse_gateway(text, destination.map(|(address, _)| address))?),
    };
    let interface = match route.interface.as_str() {
        "" => None,
        name => Some(find("name", name, |device| device.name == name)?.index),
    };
    let added = netlink.add_route(&netlink::Route { destination, gateway, interface });
    added.map_err(failed(format!("add the route to {:?} by {:?}", route.destination, route.gateway)))
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    |source| NetworkError::System { action: action.into(), source }
}

fn find_by_mac(text: &str) -> Result<Device, NetworkError> {
    let mac = parse_mac(text)?;
    find("MAC address", text, |device| device.mac == Some(mac))
}

fn find(what: &'static str, value: &str, matches: impl Fn(&Device) -> bool) -> Result<Device, NetworkError> {
    let devices = devices().map_err(failed("list network devices"))?;
    let device = devices.into_iter().find(matches);
    device.ok_or_else(|| NetworkError::NoDevice { what, value: value.to_owned() })
}

/// Not from /sys: on the `process` backend it shows the host's network namespace.
fn devices() -> io::Result<Vec<Device>> {
    let addresses = getifaddrs()?;
    let device = |entry: nix::ifaddrs::InterfaceAddress| {
        let link = *entry.address.as_ref()?.as_link_addr()?;
        Some(Device { name: entry.interface_name, index: link.ifindex() as u32, mac: link.addr() })
    };
    Ok(addresses.filter_map(device).collect())
}

/// Addresses with their prefix lengths.
fn addresses_of(device: &str) -> io::Result<Vec<(IpAddr, u8)>> {
    let ip = |address: &SockaddrStorage| match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(address), _) => Some(IpAddr::V4(address.ip())),
        (_, Some(address)) => Some(IpAddr::V6(address.ip())),
        _ => None,
    };
    let prefix = |mask: IpAddr| match mask {
        IpAddr::V4(mask) => mask.to_bits().leading_ones() as u8,
        IpAddr::V6(mask) => mask.to_bits().leading_ones() as u8,
    };
    let entries = getifaddrs()?.filter(|entry| entry.interface_name == device);
    Ok(entries.filter_map(|entry| Some((ip(&entry.address?)?, prefix(ip(&entry.netmask?)?)))).collect())
}

fn parse_gateway(text: &str, destination: Option<IpAddr>) -> Result<IpAddr, NetworkError> {
    let invalid = |reason| NetworkError::Invalid { field: "gateway", value: text.to_owned(), reason };
    let gateway: IpAddr = text.parse().map_err(|_| invalid("an IP address is needed"))?;
    if destination.is_some_and(|destination| destination.is_ipv4() != gateway.is_ipv4()) {
        return Err(invalid("destination and gateway must be of one address family"));
    }
    Ok(gateway)
}

fn parse_mac(text: &str) -> Result<[u8; 6], NetworkError> {
    let octets: Option<Vec<u8>> = text
        .split(':')
        .map(|octet| if octet.len() == 2 { u8::from_str_radix(octet, 16).ok() } else { None })
        .collect();
    octets.and_then(|octets| octets.try_into().ok()).ok_or_else(|| NetworkError::Invalid {
        field: "mac",
        value: text.to_owned(),
        reason: "six octets are needed, 02:00:00:00:00:01",
    })
}

fn parse_prefix(field: &'static str, text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let invalid = || NetworkError::Invalid {
        field,
        value: text.to_owned(),
        reason: "10.0.0.1/24 or fd00::1/64 is needed",
    };
    let (ip, prefix) = text.split_once('/').ok_or_else(invalid)?;
    let ip: IpAddr = ip.parse().map_err(|_| invalid())?;
    let prefix: u8 = prefix.parse().map_err(|_| invalid())?;
    if prefix > if ip.is_ipv4() { 32 } else { 128 } {
        return Err(invalid());
    }
    Ok((ip, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_need_a_prefix_that_fits() {
        assert_eq!(parse_prefix("address", "10.88.0.2/16").unwrap(), ([10, 88, 0, 2].into(), 16));
        assert_eq!(parse_prefix("address", "fd00::2/128").unwrap().1, 128);
        for bad in ["10.88.0.2", "10.88.0.2/33", "fd00::1/129", "10.88.0/8", "/8", "", "10.0.0.1/-1"] {
            let error = parse_prefix("address", bad).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }

    #[test]
    fn a_mac_address_has_six_octets() {
        assert_eq!(parse_mac("02:00:00:00:00:0a").unwrap(), [2, 0, 0, 0, 0, 10]);
        for bad in ["", "02:00:00:00:00", "02:00:00:00:00:0g", "2:0:0:0:0:1", "02:00:00:00:00:01:02"] {
            parse_mac(bad).unwrap_err();
        }
    }
}
