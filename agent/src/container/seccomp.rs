//! The agent's own system call filter, for every process of a container.
//!
//! It keeps containers from the agent and the host, which listen on vsock, and closes the two ways
//! around a check of system call arguments: io_uring, which makes sockets without a system call, and
//! system calls of another architecture, whose numbers mean something else. It is written as classic BPF
//! because filter compilers only compare whole system call numbers, and x32 is a bit in the number.

use nix::errno::Errno;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// Marks system calls of the x32 ABI, which share the architecture number of x86_64.
const X32_SYSCALL_BIT: u32 = 0x4000_0000;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_GREATER_OR_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

// Offsets in struct seccomp_data.
const NR: u32 = 0;
const ARCH: u32 = 4;
/// Low half of the first argument. socket(2) takes an int: the upper half plays no part, and a filter
/// that looked at it could be evaded.
const FIRST_ARGUMENT: u32 = if cfg!(target_endian = "little") { 16 } else { 20 };

const fn instruction(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

const fn refuse(errno: Errno) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

/// jt and jf count the instructions to skip.
static FILTER: [libc::sock_filter; 13] = [
    instruction(LOAD, ARCH, 0, 0),
    instruction(JUMP_EQUAL, AUDIT_ARCH, 1, 0),
    instruction(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
    instruction(LOAD, NR, 0, 0),
    // A kernel built without x32 and without io_uring answers ENOSYS as well: programs know that.
    instruction(JUMP_GREATER_OR_EQUAL, X32_SYSCALL_BIT, 7, 0),
    instruction(JUMP_EQUAL, libc::SYS_io_uring_setup as u32, 6, 0),
    instruction(JUMP_EQUAL, libc::SYS_socket as u32, 1, 0),
    instruction(JUMP_EQUAL, libc::SYS_socketpair as u32, 0, 3),
    instruction(LOAD, FIRST_ARGUMENT, 0, 0),
    instruction(JUMP_EQUAL, libc::AF_VSOCK as u32, 0, 1),
    instruction(RETURN, refuse(Errno::EPERM), 0, 0),
    instruction(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    instruction(RETURN, refuse(Errno::ENOSYS), 0, 0),
];

/// Installs the filter for the calling thread and all that it executes. It needs `CAP_SYS_ADMIN` or
/// `no_new_privs`.
pub(super) fn install() -> nix::Result<()> {
    let program = libc::sock_fprog { len: FILTER.len() as u16, filter: FILTER.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the program, which it does not write to, during the call.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn verdict(arch: u32, nr: u32, first_argument: u64) -> u32 {
        let mut data = [0u8; 64];
        data[0..4].copy_from_slice(&nr.to_ne_bytes());
        data[4..8].copy_from_slice(&arch.to_ne_bytes());
        data[16..24].copy_from_slice(&first_argument.to_ne_bytes());
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = FILTER[at];
            at += 1;
            match code {
                LOAD => accumulator = u32::from_ne_bytes(data[k as usize..][..4].try_into().unwrap()),
                JUMP_EQUAL => at += usize::from(if accumulator == k { jt } else { jf }),
                JUMP_GREATER_OR_EQUAL => at += usize::from(if accumulator >= k { jt } else { jf }),
                RETURN => return k,
                code => panic!("instruction {code}"),
            }
        }
    }

    #[test]
    fn vsock_is_refused_whatever_the_upper_half_of_the_argument_says() {
        for nr in [libc::SYS_socket, libc::SYS_socketpair] {
            for family in [libc::AF_VSOCK as u64, libc::AF_VSOCK as u64 | 1 << 32] {
                assert_eq!(verdict(AUDIT_ARCH, nr as u32, family), refuse(Errno::EPERM));
            }
            assert_eq!(verdict(AUDIT_ARCH, nr as u32, libc::AF_INET as u64), libc::SECCOMP_RET_ALLOW);
        }
    }

    #[test]
    fn what_evades_the_check_of_arguments_is_refused() {
        let socket = libc::SYS_socket as u32;
        assert_eq!(verdict(AUDIT_ARCH, libc::SYS_io_uring_setup as u32, 0), refuse(Errno::ENOSYS));
        assert_eq!(
            verdict(AUDIT_ARCH, socket | X32_SYSCALL_BIT, libc::AF_VSOCK as u64),
            refuse(Errno::ENOSYS)
        );
        assert_eq!(verdict(0x4000_0003, 359, libc::AF_VSOCK as u64), libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn all_other_calls_are_allowed() {
        for nr in [libc::SYS_read, libc::SYS_execve, libc::SYS_openat2, libc::SYS_bind] {
            assert_eq!(verdict(AUDIT_ARCH, nr as u32, libc::AF_VSOCK as u64), libc::SECCOMP_RET_ALLOW);
        }
    }
}
