//! The kernel's random generator, random(4).

use std::{fs::File, io, os::fd::AsRawFd};

/// Fewest bytes that make two clones' generators differ beyond guessing: the generator's key has 32.
pub const LEAST: usize = 32;

/// Most bytes in one request; the generator hashes more than its key down to it.
pub const MOST: usize = 512;

/// struct rand_pool_info of <linux/random.h> with room for [`MOST`] bytes.
#[repr(C)]
struct PoolInfo {
    /// Bits to credit.
    entropy_count: libc::c_int,
    /// Bytes in `buffer`.
    len: libc::c_int,
    buffer: [u8; MOST],
}

mod ioctl {
    use super::PoolInfo;

    // The size in the request is that of the struct without its flexible array.
    nix::ioctl_write_ptr_bad!(
        add_entropy,
        nix::request_code_write!(b'R', 0x03, 2 * size_of::<nix::libc::c_int>()),
        PoolInfo
    );
    nix::ioctl_none!(reseed, b'R', 0x07);
}

/// Adds `bytes`, at most [`MOST`], credits all of their bits, and has the generator draw a new key.
pub fn add(bytes: &[u8]) -> io::Result<()> {
    let mut info = PoolInfo { entropy_count: 0, len: 0, buffer: [0; MOST] };
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, format!("at most {MOST} bytes are taken"));
    info.buffer.get_mut(..bytes.len()).ok_or_else(too_long)?.copy_from_slice(bytes);
    info.len = bytes.len() as libc::c_int;
    info.entropy_count = info.len * 8;
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads the header and `len` bytes after it, which are in `info`.
    unsafe { ioctl::add_entropy(random.as_raw_fd(), &info) }?;
    // SAFETY: takes no argument.
    unsafe { ioctl::reseed(random.as_raw_fd()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_what_it_is_given() {
        let mut bytes = [0; LEAST];
        getrandom::fill(&mut bytes).unwrap();
        match add(&bytes) {
            Ok(()) => {}
            // CAP_SYS_ADMIN is needed, which tests may lack.
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
        }
    }

    #[test]
    fn more_than_fits_is_refused() {
        assert_eq!(add(&[0; MOST + 1]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
