//! Interfaces, addresses and routes, through rtnetlink(7).

use std::{io, net::IpAddr};

use cube_protocol::guest::{Interface, Route};
use futures::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder, new_connection,
    packet_route::link::{LinkAttribute, LinkMessage},
};

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
    Netlink {
        /// What was done, to what.
        action: String,
        /// Why.
        source: rtnetlink::Error,
    },
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Socket(#[source] io::Error),
}

/// Brings up lo, names and configures interfaces, and adds routes, in that order. Can be repeated.
pub async fn configure(interfaces: &[Interface], routes: &[Route]) -> Result<(), NetworkError> {
    let (connection, handle, _) = new_connection().map_err(NetworkError::Socket)?;
    let connection = tokio::spawn(connection);
    let result = apply(&handle, interfaces, routes).await;
    connection.abort();
    result
}

async fn apply(handle: &Handle, interfaces: &[Interface], routes: &[Route]) -> Result<(), NetworkError> {
    let lo = find(&links(handle).await?, "name", "lo", |link| name(link) == Some("lo"))?;
    change(handle, "bring up lo", LinkUnspec::new_with_index(lo).up().build()).await?;
    for interface in interfaces {
        set_up(handle, interface).await?;
    }
    for route in routes {
        add_route(handle, route).await?;
    }
    Ok(())
}

async fn set_up(handle: &Handle, interface: &Interface) -> Result<(), NetworkError> {
    let mac = parse_mac(&interface.mac)?;
    let index =
        find(&links(handle).await?, "MAC address", &interface.mac, |link| address(link) == Some(&mac))?;
    // A device that is up cannot be renamed.
    let mut down = LinkUnspec::new_with_index(index).down();
    if interface.mtu != 0 {
        down = down.mtu(interface.mtu);
    }
    if !interface.name.is_empty() {
        down = down.name(&interface.name);
    }
    change(handle, &format!("configure {}", interface.name), down.build()).await?;
    for address in &interface.addresses {
        let (ip, prefix) = parse_prefix("address", address)?;
        let request = handle.address().add(index, ip, prefix).replace();
        request.execute().await.map_err(netlink(format!("add address {address} to {}", interface.name)))?;
    }
    change(handle, &format!("bring up {}", interface.name), LinkUnspec::new_with_index(index).up().build())
        .await
}

async fn add_route(handle: &Handle, route: &Route) -> Result<(), NetworkError> {
    let gateway = match route.gateway.as_str() {
        "" => None,
        text => Some(text.parse::<IpAddr>().map_err(|_| NetworkError::Invalid {
            field: "gateway",
            value: text.to_owned(),
            reason: "an IP address is needed",
        })?),
    };
    let mut message = RouteMessageBuilder::<IpAddr>::new();
    if !route.destination.is_empty() {
        let (ip, prefix) = parse_prefix("destination", &route.destination)?;
        message = message.destination_prefix(ip, prefix).map_err(|_| NetworkError::Invalid {
            field: "destination",
            value: route.destination.clone(),
            reason: "the prefix is longer than the address",
        })?;
    }
    if let Some(gateway) = gateway {
        message = message.gateway(gateway).map_err(|_| NetworkError::Invalid {
            field: "gateway",
            value: route.gateway.clone(),
            reason: "destination and gateway must be of one address family",
        })?;
    }
    if !route.interface.is_empty() {
        let wanted = route.interface.as_str();
        let index = find(&links(handle).await?, "name", wanted, |link| name(link) == Some(wanted))?;
        message = message.output_interface(index);
    }
    let action = format!("add the route to {:?} by {:?}", route.destination, route.gateway);
    handle.route().add(message.build()).replace().execute().await.map_err(netlink(action))
}

async fn links(handle: &Handle) -> Result<Vec<LinkMessage>, NetworkError> {
    handle.link().get().execute().try_collect().await.map_err(netlink("list network devices".into()))
}

async fn change(handle: &Handle, action: &str, link: LinkMessage) -> Result<(), NetworkError> {
    handle.link().change(link).execute().await.map_err(netlink(action.to_owned()))
}

fn netlink(action: String) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    |source| NetworkError::Netlink { action, source }
}

fn find(
    links: &[LinkMessage],
    what: &'static str,
    value: &str,
    matches: impl Fn(&LinkMessage) -> bool,
) -> Result<u32, NetworkError> {
    let link = links.iter().find(|link| matches(link));
    link.map(|link| link.header.index).ok_or_else(|| NetworkError::NoDevice { what, value: value.to_owned() })
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn address(link: &LinkMessage) -> Option<&Vec<u8>> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => Some(address),
        _ => None,
    })
}

fn parse_mac(text: &str) -> Result<Vec<u8>, NetworkError> {
    let octets: Option<Vec<u8>> = text
        .split(':')
        .map(|octet| if octet.len() == 2 { u8::from_str_radix(octet, 16).ok() } else { None })
        .collect();
    octets.filter(|octets| octets.len() == 6).ok_or_else(|| NetworkError::Invalid {
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
