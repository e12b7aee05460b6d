//! Devices of a spec. Their numbers are the host's: in a guest another device has the same number, or none.

use std::fmt;

use serde_json::{Map, Value};

/// What a guest has under the same number and with the same meaning as its host: device numbers that Linux
/// has assigned for good (Documentation/admin-guide/devices.txt), of things that are no hardware.
const SAME: [(u64, u64, &str); 11] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (1, 11, "/dev/kmsg"),
    (5, 0, "/dev/tty"),
    (5, 1, "/dev/console"),
    (5, 2, "/dev/ptmx"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
];

/// Unix98 pseudo terminals.
const PTS: std::ops::RangeInclusive<u64> = 136..=143;

/// Rules name devices; so many of them at most are named in a message.
const NAMED: usize = 16;

/// A device of the host that no guest has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// Where the spec says so.
    pub field: String,
    /// What it is: "the character device 10:232 (/dev/kvm)".
    pub what: String,
}

/// Type and numbers; `None` is all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Device {
    block: bool,
    major: Option<u64>,
    minor: Option<u64>,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<u64>| number.map_or("*".into(), |number| number.to_string());
        let kind = if self.block { "block" } else { "character" };
        write!(f, "the {kind} device {}:{}", number(self.major), number(self.minor))
    }
}

impl Device {
    /// Of a node or a rule; `None` for what is neither character nor block device.
    fn of(entry: &Value) -> Option<Device> {
        let number = |key: &str| entry.get(key).and_then(Value::as_u64);
        let block = match entry.get("type").and_then(Value::as_str).unwrap_or("a") {
            "b" => true,
            "c" | "u" => false,
            _ => return None,
        };
        Some(Device { block, major: number("major"), minor: number("minor") })
    }

    /// Whether a guest has the same.
    fn is_in_guests(self) -> bool {
        match (self.block, self.major, self.minor) {
            (true, ..) => false,
            (false, None, _) => true,
            (false, Some(major), minor) => {
                PTS.contains(&major)
                    || SAME.iter().any(|known| known.0 == major && minor.is_none_or(|minor| known.1 == minor))
            }
        }
    }
}

/// The path in the guest of what has this number on the host, if it is the same device there.
pub fn in_guest(block: bool, major: u64, minor: u64) -> Option<&'static str> {
    SAME.iter().find(|known| !block && (known.0, known.1) == (major, minor)).map(|known| known.2)
}

/// Takes those devices out of `linux`, the part of a spec, that a privileged container gets because the host
/// has them, and names them in one text; `None` if there were none.
///
/// # Errors
///
/// A device, or a rule for one, that was asked for by itself, and that no guest has.
pub fn settle(linux: &mut Map<String, Value>) -> Result<Option<String>, Foreign> {
    let rules = linux.get("resources").and_then(|resources| resources.get("devices"));
    let rules: Vec<Value> = rules.and_then(Value::as_array).cloned().unwrap_or_default();
    let allows_all = rules.iter().any(|rule| allows(rule) && is_for_all(rule));
    let mut none = Vec::new();
    let nodes = linux.get_mut("devices").and_then(Value::as_array_mut).unwrap_or(&mut none);
    let mut left_out = Vec::new();
    let mut kept = Vec::new();
    for (index, node) in nodes.drain(..).enumerate() {
        match Device::of(&node) {
            Some(device) if !device.is_in_guests() => {
                let path = node.get("path").and_then(Value::as_str).unwrap_or_default().to_owned();
                let alone = rules.iter().any(|rule| allows(rule) && Device::of(rule) == Some(device));
                if !allows_all || alone {
                    let (field, what) = (format!("linux.devices[{index}]"), format!("{device} ({path})"));
                    return Err(Foreign { field, what });
                }
                left_out.push(path);
            }
            _ => kept.push(node),
        }
    }
    *nodes = kept;
    if !allows_all {
        check_rules(&rules)?;
    }
    let more = left_out.len().saturating_sub(NAMED);
    left_out.truncate(NAMED);
    let mut text = left_out.join(", ");
    if more > 0 {
        text = format!("{text} and {more} more");
    }
    Ok((!text.is_empty()).then_some(text))
}

/// A rule by number gives a container that can make nodes whatever has this number in the guest: its own
/// disks, for example.
fn check_rules(rules: &[Value]) -> Result<(), Foreign> {
    for (index, rule) in rules.iter().enumerate().filter(|(_, rule)| allows(rule)) {
        let device = match Device::of(rule) {
            Some(device) => device,
            // Without a type, but with a number: block devices as well.
            None if !is_for_all(rule) => Device { block: true, ..numbers(rule) },
            None => continue,
        };
        if !device.is_in_guests() {
            let field = format!("linux.resources.devices[{index}]");
            return Err(Foreign { field, what: device.to_string() });
        }
    }
    Ok(())
}

fn numbers(rule: &Value) -> Device {
    let number = |key: &str| rule.get(key).and_then(Value::as_u64);
    Device { block: false, major: number("major"), minor: number("minor") }
}

/// Whether a rule lets something be read or written. That a node may be made gives no access.
fn allows(rule: &Value) -> bool {
    let access = rule.get("access").and_then(Value::as_str).unwrap_or("rwm");
    rule.get("allow") == Some(&Value::Bool(true)) && access.contains(['r', 'w'])
}

fn is_for_all(rule: &Value) -> bool {
    Device::of(rule).is_none() && numbers(rule) == Device { block: false, major: None, minor: None }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(path: &str, kind: &str, major: u64, minor: u64) -> Value {
        json!({"path": path, "type": kind, "major": major, "minor": minor, "fileMode": 438})
    }

    fn rule(kind: &str, major: i64, minor: i64, access: &str) -> Value {
        json!({"allow": true, "type": kind, "major": major, "minor": minor, "access": access})
    }

    /// What is left of the nodes, and the text about those that are not.
    fn settled(nodes: Value, rules: Value) -> Result<(Vec<String>, Option<String>), Foreign> {
        let spec = json!({"devices": nodes, "resources": {"devices": rules}});
        let mut linux = spec.as_object().unwrap().clone();
        let text = settle(&mut linux)?;
        let nodes = linux["devices"].as_array().unwrap().iter();
        Ok((nodes.map(|node| node["path"].as_str().unwrap().to_owned()).collect(), text))
    }

    #[test]
    fn a_device_that_a_guest_does_not_have_is_refused_by_name() {
        for (asked, words) in [
            (node("/dev/vda", "b", 254, 0), "block device 254:0 (/dev/vda)"),
            (node("/dev/kvm", "c", 10, 232), "character device 10:232 (/dev/kvm)"),
            (node("/dev/mem", "c", 1, 1), "1:1 (/dev/mem)"),
            (node("/dev/ttyS0", "u", 4, 64), "4:64 (/dev/ttyS0)"),
        ] {
            let device = (asked["type"].clone(), asked["major"].clone(), asked["minor"].clone());
            let own = json!({"allow": true, "type": device.0, "major": device.1, "minor": device.2, "access": "rwm"});
            let foreign =
                settled(json!([asked]), json!([{"allow": false, "access": "rwm"}, own])).unwrap_err();
            assert!(foreign.what.contains(words), "{foreign:?}");
            // Also in a privileged container, where it was asked for by itself.
            let all = json!({"allow": true, "access": "rwm"});
            let foreign = settled(json!([asked]), json!([all, own])).unwrap_err();
            assert!(foreign.what.contains(words), "{foreign:?}");
            assert_eq!(foreign.field, "linux.devices[0]");
        }
    }

    #[test]
    fn memory_terminal_and_fuse_nodes_and_fifos_are_let_through() {
        let nodes = json!([
            node("/dev/zero", "c", 1, 5),
            node("/dev/other-name", "u", 1, 3),
            node("/dev/tty", "c", 5, 0),
            node("/dev/fuse", "c", 10, 229),
            node("/dev/net/tun", "c", 10, 200),
            node("/run/fifo", "p", 0, 0),
        ]);
        let rules = json!([
            {"allow": false, "access": "rwm"}, rule("c", 1, 5, "rwm"), rule("c", 136, -1, "rwm"),
            rule("c", 10, 229, "rwm"), rule("c", -1, -1, "m"), rule("b", -1, -1, "m"),
        ]);
        let (kept, text) = settled(nodes, rules).unwrap();
        assert_eq!((kept.len(), text), (6, None));
    }

    #[test]
    fn what_a_privileged_container_lists_of_the_host_is_left_out_and_told_once() {
        let mut nodes = vec![node("/dev/null", "c", 1, 3), node("/dev/vda", "b", 254, 0)];
        nodes.extend((0..40).map(|n| node(&format!("/dev/tty{n}"), "c", 4, n)));
        let (kept, text) = settled(json!(nodes), json!([{"allow": true, "access": "rwm"}])).unwrap();
        assert_eq!(kept, ["/dev/null"]);
        let text = text.unwrap();
        assert!(text.starts_with("/dev/vda, /dev/tty0, ") && text.ends_with(" and 25 more"), "{text}");
    }

    #[test]
    fn a_rule_by_the_number_of_a_device_of_the_host_is_refused() {
        for refused in [
            rule("b", 254, 16, "rw"),
            rule("b", -1, -1, "r"),
            rule("c", 10, 232, "w"),
            json!({"allow": true, "major": 8, "access": "rwm"}),
        ] {
            let foreign = settled(json!([]), json!([rule("c", 1, 3, "rwm"), refused])).unwrap_err();
            assert_eq!(foreign.field, "linux.resources.devices[1]", "{refused}");
            let all = json!({"allow": true, "type": "a", "major": -1, "minor": -1, "access": "rwm"});
            settled(json!([]), json!([all, refused])).unwrap();
        }
        settled(json!([]), json!([{"allow": false, "type": "b", "major": 8, "access": "rwm"}])).unwrap();
    }

    #[test]
    fn a_spec_without_devices_asks_for_none() {
        assert_eq!(settle(&mut Map::new()).unwrap(), None);
        assert_eq!(in_guest(false, 1, 3), Some("/dev/null"));
        assert_eq!((in_guest(true, 1, 3), in_guest(false, 254, 0)), (None, None));
    }
}
