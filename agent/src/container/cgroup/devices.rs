//! The device rules of a container, as an eBPF program (`BPF_PROG_TYPE_CGROUP_DEVICE`): version 2 of
//! cgroups has no files for them.
//!
//! The kernel runs the program for every mknod(2) and open(2) of a device with the type, the kind of
//! access, major and minor number. As with version 1, the last rule that matches decides, for each kind
//! of access by itself; what no rule mentions is denied. So the program goes through the rules from the
//! last to the first and strikes out each kind of access that a rule allows; it allows the access once
//! none is left, and denies it at the first rule that denies one that is.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::container::ContainerError;

/// An instruction: opcode, registers (source << 4 | destination), jump offset, immediate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Instruction {
    opcode: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

// linux/bpf_common.h and linux/bpf.h: class | size or operation | mode or source.
const LOAD_WORD: u8 = 0x61;
const AND_IMMEDIATE: u8 = 0x57;
const SHIFT_RIGHT_IMMEDIATE: u8 = 0x77;
const MOVE_IMMEDIATE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

// Registers.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

// struct bpf_cgroup_dev_ctx: access_type (access << 16 | type), major, minor.
const ACCESS_TYPE_OFFSET: i16 = 0;
const MAJOR_OFFSET: i16 = 4;
const MINOR_OFFSET: i16 = 8;

const ACCESS_MKNOD: i32 = 1;
const ACCESS_READ: i32 = 2;
const ACCESS_WRITE: i32 = 4;
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// A rule of the spec, checked. `None` matches everything.
#[derive(Debug, Clone, Copy)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What runc allows whatever the spec says: making nodes (which gives no access), and the devices that
/// every container has.
const DEFAULT_RULES: [Rule; 10] = {
    const fn make(kind: i32) -> Rule {
        Rule { allow: true, kind: Some(kind), major: None, minor: None, access: ACCESS_MKNOD }
    }
    const fn all(major: i32, minor: Option<i32>) -> Rule {
        let access = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;
        Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access }
    }
    [
        make(CHARACTER),
        make(BLOCK),
        all(1, Some(3)), // null
        all(1, Some(5)), // zero
        all(1, Some(7)), // full
        all(1, Some(8)), // random
        all(1, Some(9)), // urandom
        all(5, Some(0)), // tty
        all(5, Some(2)), // ptmx
        all(136, None),  // pts
    ]
};

impl Rule {
    fn parse(index: usize, rule: &LinuxDeviceCgroup) -> Result<Self, ContainerError> {
        let field = |name: &str| format!("linux.resources.devices[{index}].{name}");
        let number = |name: &str, value: Option<i64>| match value {
            // -1 is how runc writes "all of them".
            None | Some(-1) => Ok(None),
            Some(value) => i32::try_from(value)
                .ok()
                .filter(|value| *value >= 0)
                .map(Some)
                .ok_or_else(|| ContainerError::invalid(field(name), value, "it is no device number")),
        };
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            Some(LinuxDeviceType::P) => {
                return Err(ContainerError::invalid(field("type"), "p", "it must be a, b or c"));
            }
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
            access |= match letter {
                'm' => ACCESS_MKNOD,
                'r' => ACCESS_READ,
                'w' => ACCESS_WRITE,
                letter => {
                    return Err(ContainerError::invalid(field("access"), letter, "it must be of r, w and m"));
                }
            };
        }
        let (major, minor) = (number("major", rule.major())?, number("minor", rule.minor())?);
        Ok(Self { allow: rule.allow(), kind, major, minor, access })
    }
}

/// The program for the rules of a spec.
pub(super) fn program(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Instruction>, ContainerError> {
    let rules = rules.iter().enumerate().map(|(index, rule)| Rule::parse(index, rule));
    let rules: Vec<Rule> = rules.chain(DEFAULT_RULES.map(Ok)).collect::<Result<_, _>>()?;
    Ok(assemble(&rules))
}

fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    let mut code = vec![
        load(KIND, ACCESS_TYPE_OFFSET),
        immediate(AND_IMMEDIATE, KIND, 0xffff),
        load(ACCESS, ACCESS_TYPE_OFFSET),
        immediate(SHIFT_RIGHT_IMMEDIATE, ACCESS, 16),
        load(MAJOR, MAJOR_OFFSET),
        load(MINOR, MINOR_OFFSET),
    ];
    for rule in rules.iter().rev() {
        code.extend(block(rule));
    }
    code.extend(answer(0));
    code
}

/// The instructions of one rule; where it does not decide, they run on into the next one's.
fn block(rule: &Rule) -> Vec<Instruction> {
    let mut decision = if rule.allow {
        vec![immediate(AND_IMMEDIATE, ACCESS, !rule.access), jump(JUMP_UNLESS_EQUAL, ACCESS, 0, 2)]
    } else {
        vec![
            Instruction { opcode: MOVE_REGISTER, registers: ACCESS << 4 | SCRATCH, offset: 0, immediate: 0 },
            immediate(AND_IMMEDIATE, SCRATCH, rule.access),
            jump(JUMP_IF_EQUAL, SCRATCH, 0, 2),
        ]
    };
    decision.extend(answer(i32::from(rule.allow)));

    let conditions = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
    let conditions: Vec<(u8, i32)> =
        conditions.into_iter().filter_map(|(register, value)| Some((register, value?))).collect();
    let count = conditions.len();
    let jumps = conditions.into_iter().enumerate().map(|(index, (register, value))| {
        // Over the conditions that follow and the decision: eight instructions at most.
        let over = count - index - 1 + decision.len();
        jump(JUMP_UNLESS_EQUAL, register, value, over as i16)
    });
    jumps.chain(decision.iter().copied()).collect()
}

fn load(register: u8, offset: i16) -> Instruction {
    Instruction { opcode: LOAD_WORD, registers: CONTEXT << 4 | register, offset, immediate: 0 }
}

fn immediate(opcode: u8, register: u8, immediate: i32) -> Instruction {
    Instruction { opcode, registers: register, offset: 0, immediate }
}

fn jump(opcode: u8, register: u8, immediate: i32, offset: i16) -> Instruction {
    Instruction { opcode, registers: register, offset, immediate }
}

fn answer(value: i32) -> [Instruction; 2] {
    [immediate(MOVE_IMMEDIATE, RESULT, value), immediate(EXIT, 0, 0)]
}

// The parts of union bpf_attr that are used; the kernel takes the rest for zeros. See bpf(2).
#[derive(Default)]
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

#[derive(Default)]
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Programs of cgroups below run as well, and all must allow: a container may restrict its own parts.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Attaches the program to the cgroup that is open as `cgroup`. It stays for as long as the cgroup.
pub(super) fn attach(cgroup: &OwnedFd, program: &[Instruction]) -> nix::Result<()> {
    let load = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    let loaded = bpf(BPF_PROG_LOAD, &load)?;
    // SAFETY: BPF_PROG_LOAD has just made this descriptor.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded as RawFd) };
    let attach = AttachAttributes {
        target: cgroup.as_raw_fd() as u32,
        program: loaded.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attach).map(drop)
}

/// The verifier gives up with EAGAIN when a signal arrives, SIGCHLD for example; as often as libbpf does,
/// it gets another chance.
const BPF_ATTEMPTS: usize = 5;

fn bpf<T>(command: libc::c_int, attributes: &T) -> nix::Result<libc::c_long> {
    let call = || {
        let attributes = std::ptr::from_ref(attributes);
        // SAFETY: the size is that of the attributes, and the pointers in them are to things that outlive
        // the call. The kernel writes to none of them.
        Errno::result(unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) })
    };
    let mut result = call();
    for _ in 1..BPF_ATTEMPTS {
        if result != Err(Errno::EAGAIN) {
            break;
        }
        result = call();
    }
    result
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Runs a program as the kernel would.
    fn allows(program: &[Instruction], kind: i32, major: i32, minor: i32, access: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0i64; 7];
        let mut at = 0usize;
        loop {
            let Instruction { opcode, registers: both, offset, immediate } = program[at];
            let (target, source) = (usize::from(both & 15), usize::from(both >> 4));
            let mut next = at as i64 + 1;
            match opcode {
                LOAD_WORD => registers[target] = i64::from(context[offset as usize / 4] as u32),
                AND_IMMEDIATE => registers[target] &= i64::from(immediate),
                SHIFT_RIGHT_IMMEDIATE => registers[target] >>= immediate,
                MOVE_IMMEDIATE => registers[target] = i64::from(immediate),
                MOVE_REGISTER => registers[target] = registers[source],
                JUMP_IF_EQUAL if registers[target] == i64::from(immediate) => next += i64::from(offset),
                JUMP_UNLESS_EQUAL if registers[target] != i64::from(immediate) => next += i64::from(offset),
                JUMP_IF_EQUAL | JUMP_UNLESS_EQUAL => {}
                EXIT => return registers[0] != 0,
                opcode => panic!("instruction {opcode:#x}"),
            }
            at = next as usize;
        }
    }

    fn rules(json: Value) -> Vec<Instruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).unwrap();
        program(&rules).unwrap()
    }

    const RW: i32 = ACCESS_READ | ACCESS_WRITE;

    #[test]
    fn without_rules_only_the_usual_devices_can_be_used() {
        let program = rules(json!([]));
        assert!(allows(&program, CHARACTER, 1, 3, RW));
        assert!(allows(&program, CHARACTER, 136, 77, RW));
        assert!(!allows(&program, CHARACTER, 1, 1, ACCESS_READ));
        assert!(!allows(&program, BLOCK, 1, 3, RW));
        assert!(allows(&program, BLOCK, 254, 0, ACCESS_MKNOD));
        assert!(!allows(&program, BLOCK, 254, 0, ACCESS_READ));
    }

    #[test]
    fn a_rule_for_everything_is_overruled_by_a_later_one() {
        let allow_all = rules(json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]));
        assert!(allows(&allow_all, BLOCK, 254, 0, RW | ACCESS_MKNOD));
        let but_one = rules(json!([
            {"allow": true, "access": "rwm"},
            {"allow": false, "type": "b", "major": 254, "access": "w"},
        ]));
        assert!(allows(&but_one, BLOCK, 254, 0, ACCESS_READ));
        assert!(!allows(&but_one, BLOCK, 254, 0, RW));
        assert!(allows(&but_one, BLOCK, 8, 0, RW));
    }

    #[test]
    fn kinds_of_access_may_be_allowed_by_different_rules() {
        let program = rules(json!([
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"},
            {"allow": true, "type": "c", "major": 10, "access": "w"},
        ]));
        assert!(allows(&program, CHARACTER, 10, 229, RW));
        assert!(!allows(&program, CHARACTER, 10, 228, RW));
        assert!(allows(&program, CHARACTER, 10, 228, ACCESS_WRITE));
    }

    #[test]
    fn a_rule_that_makes_no_sense_is_refused_by_its_name() {
        for (rule, named) in [
            (json!({"allow": true, "access": "x"}), "devices[0].access"),
            (json!({"allow": true, "major": -7}), "devices[0].major"),
            (json!({"allow": true, "minor": 1i64 << 40}), "devices[0].minor"),
            (json!({"allow": true, "type": "p"}), "devices[0].type"),
        ] {
            let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(json!([rule])).unwrap();
            let error = program(&rules).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
