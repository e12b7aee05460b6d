//! Whether KVM can run a virtual CPU here.
//!
//! That /dev/kvm opens says little: in many a cloud VM it is there, and running a guest fails, never
//! returns, or is emulated instruction by instruction until the emulator meets one that it does not
//! know. So a virtual CPU is run, and its first instruction is one of the kind that only a processor
//! knows.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    time::Duration,
};

use super::pidfd;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

/// What a virtual CPU that works needs a few microseconds for.
const LIMIT: Duration = Duration::from_secs(2);

// From linux/kvm.h; the numbers are ABI.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xae04;
const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
const KVM_RUN: libc::c_ulong = 0xae80;
const API_VERSION: libc::c_int = 12;
const KVM_EXIT_HLT: u32 = 5;
/// Offset of `exit_reason` in `struct kvm_run`.
const EXIT_REASON: usize = 8;

const PAGE: usize = 4096;
/// The page with the reset vector, 0xfffffff0, where an x86 CPU begins, and the vector's offset in it.
const RESET_PAGE: u64 = 0xffff_f000;
const RESET_OFFSET: usize = 0xff0;
/// `fld1; hlt`. Every x86-64 CPU loads a floating point constant right after its reset; the kernel's
/// instruction emulator (arch/x86/kvm/emulate.c) has no arithmetic of the x87.
const PROGRAM: [u8; 3] = [0xd9, 0xe8, 0xf4];

/// `struct kvm_userspace_memory_region`.
#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device, or no right to open it.
    #[error("/dev/kvm cannot be opened ({0})")]
    Open(io::Error),
    /// A step on the way to a running virtual CPU failed.
    #[error("KVM cannot {step} here")]
    Step {
        /// "create a VM", "run a virtual CPU".
        step: &'static str,
    },
    /// The virtual CPU did not come to its first instruction.
    #[error("KVM did not run a virtual CPU within {LIMIT:?}")]
    Hangs,
    /// The attempt could not be made.
    #[error("KVM could not be tried ({0})")]
    Attempt(io::Error),
}

/// Steps of the attempt; the number is the exit status of the process that makes it.
const STEPS: [&str; 5] = [
    "tell its version",
    "create a VM",
    "give memory to a VM",
    "create a virtual CPU",
    "run a virtual CPU in hardware",
];

/// Runs a virtual CPU, in a child process that is killed if it hangs. Takes milliseconds, blocks for
/// two seconds at most. The result is not kept: modules come and go, and so do permissions.
pub fn probe() -> Result<(), KvmError> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(KvmError::Open)?;
    // SAFETY: the child makes system calls only, and ends with _exit.
    let child = match unsafe { fork() }.map_err(|errno| KvmError::Attempt(errno.into()))? {
        ForkResult::Child => {
            let status = attempt(&kvm).err().map_or(0, |step| step as libc::c_int + 1);
            // SAFETY: ends this process without running anything of the parent's.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => child,
    };
    if !wait_for_exit(child, LIMIT).map_err(KvmError::Attempt)? {
        let _ = kill(child, Signal::SIGKILL);
        // A process that is stuck in the kernel does not die, and must not take this one along.
        if wait_for_exit(child, Duration::from_secs(1)).is_ok_and(|ended| ended) {
            let _ = waitpid(child, None);
        }
        return Err(KvmError::Hangs);
    }
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, 0)) => Ok(()),
        Ok(WaitStatus::Exited(_, status)) => {
            let step = usize::try_from(status - 1).ok().and_then(|n| STEPS.get(n));
            Err(KvmError::Step { step: step.copied().unwrap_or("be tried") })
        }
        Ok(_) => Err(KvmError::Step { step: "run a virtual CPU in hardware" }),
        Err(errno) => Err(KvmError::Attempt(errno.into())),
    }
}

/// Whether the child ended in time. Does not reap it.
pub(crate) fn wait_for_exit(child: Pid, limit: Duration) -> io::Result<bool> {
    let pidfd = pidfd::open(child)?;
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO);
    loop {
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(count) => return Ok(count > 0),
            Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// In the child: on failure, the index in [`STEPS`].
fn attempt(kvm: &File) -> Result<(), usize> {
    let kvm = kvm.as_raw_fd();
    if ioctl(kvm, KVM_GET_API_VERSION, 0) != API_VERSION {
        return Err(0);
    }
    let vm = ioctl(kvm, KVM_CREATE_VM, 0);
    let run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if vm < 0 || run_size < PAGE as libc::c_int {
        return Err(1);
    }
    let page = map(PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).ok_or(2_usize)?;
    // SAFETY: the page was just mapped, writable, and is nobody else's; the program fits behind the offset.
    unsafe { page.add(RESET_OFFSET).copy_from_nonoverlapping(PROGRAM.as_ptr(), PROGRAM.len()) };
    let region = MemoryRegion {
        slot: 0,
        flags: 0,
        guest_phys_addr: RESET_PAGE,
        memory_size: PAGE as u64,
        userspace_addr: page as u64,
    };
    if ioctl(vm, KVM_SET_USER_MEMORY_REGION, &raw const region as libc::c_ulong) < 0 {
        return Err(2);
    }
    let vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    if vcpu < 0 {
        return Err(3);
    }
    let run = map(run_size as usize, libc::MAP_SHARED, vcpu).ok_or(3_usize)?;
    let ran = ioctl(vcpu, KVM_RUN, 0);
    // SAFETY: `struct kvm_run` is mapped at `run`, at least a page long, and aligned to one.
    let reason = unsafe { run.add(EXIT_REASON).cast::<u32>().read_volatile() };
    if ran == 0 && reason == KVM_EXIT_HLT { Ok(()) } else { Err(4) }
}

fn ioctl(fd: RawFd, request: libc::c_ulong, argument: libc::c_ulong) -> libc::c_int {
    // SAFETY: every request used here takes a number, or a pointer that the caller made from a
    // reference to what the request reads.
    unsafe { libc::ioctl(fd, request, argument) }
}

fn map(size: usize, flags: libc::c_int, fd: RawFd) -> Option<*mut u8> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    (address != libc::MAP_FAILED).then_some(address.cast())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_probe_answers_in_time_and_leaves_no_child() {
        let begin = Instant::now();
        let result = probe();
        println!("{result:?} after {:?}", begin.elapsed());
        assert!(begin.elapsed() < LIMIT + Duration::from_secs(5));
        if let Err(error) = result {
            assert!(error.to_string().to_lowercase().contains("kvm"), "{error}");
        }
    }
}
