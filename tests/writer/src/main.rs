//! What tests run inside of a container where busybox has no command for it. Static, so that it
//! runs in any image.

use std::{
    env,
    ffi::CString,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    str::FromStr,
    time::Duration,
};

use cube_test_writer::{fill, write_sizes};
use sha2::{Digest, Sha256};

const USAGE: &str = "usage:
  cube-test-writer stream SEED BYTES [SEED BYTES]   pseudo-random bytes to stdout [and at once to stderr]
  cube-test-writer until FILE SEED                  such bytes until FILE exists; their number to stderr
  cube-test-writer until FILE SEED SEED TOTALS      the same to stdout and stderr; their numbers to the file TOTALS
  cube-test-writer converse SEED BYTES              the same to stdout, while stdin is copied to stderr
  cube-test-writer repeat HEX BYTES                 the pattern, as often as it takes
  cube-test-writer blocks SIZE BYTES                that many bytes, SIZE in each write
  cube-test-writer lines N MICROSECONDS             N lines, a pause after each, that tell CLOCK_MONOTONIC
  cube-test-writer sha256 SEED FROM TO              digest of a range of a stream
  cube-test-writer vsock CID PORT                   connect; tells whether that was refused
  cube-test-writer io-uring                         io_uring_setup(2); tells whether that was refused
  cube-test-writer hog MIB                          use that much memory, then say so
  cube-test-writer forks N                          N processes at once; tells how many there could be
  cube-test-writer xattr FILE NAME                  an extended attribute, in hexadecimal";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("cube-test-writer: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> io::Result<()> {
    match *args {
        ["stream", seed, bytes] => stream(&mut io::stdout(), number(seed)?, number(bytes)?),
        ["stream", seed, bytes, error_seed, error_bytes] => {
            let (seed, bytes) = (number(seed)?, number(bytes)?);
            let (error_seed, error_bytes) = (number(error_seed)?, number(error_bytes)?);
            std::thread::scope(|scope| {
                let errors = scope.spawn(move || stream(&mut io::stderr(), error_seed, error_bytes));
                stream(&mut RawStdout, seed, bytes)?;
                errors.join().map_err(|_| io::Error::other("the writer of stderr panicked"))?
            })
        }
        ["until", file, seed] => {
            let bytes = until(&mut RawStdout, Path::new(file), number(seed)?)?;
            eprintln!("{bytes}");
            Ok(())
        }
        ["until", file, seed, error_seed, totals] => {
            let (file, seed, error_seed) = (Path::new(file), number(seed)?, number(error_seed)?);
            let (bytes, errors) = std::thread::scope(|scope| {
                let errors = scope.spawn(move || until(&mut io::stderr(), file, error_seed));
                let bytes = until(&mut RawStdout, file, seed)?;
                let errors = errors.join().map_err(|_| io::Error::other("the writer of stderr panicked"))?;
                io::Result::Ok((bytes, errors?))
            })?;
            std::fs::write(totals, format!("{bytes} {errors}\n"))
        }
        ["converse", seed, bytes] => {
            let (seed, bytes) = (number(seed)?, number(bytes)?);
            std::thread::scope(|scope| {
                let echo = scope.spawn(|| io::copy(&mut io::stdin(), &mut io::stderr()));
                stream(&mut RawStdout, seed, bytes)?;
                echo.join().map_err(|_| io::Error::other("the copier of stdin panicked"))??;
                Ok(())
            })
        }
        ["repeat", hex, bytes] => repeat(&pattern(hex)?, number(bytes)?),
        ["blocks", size, bytes] => blocks(number(size)?, number(bytes)?),
        ["lines", n, pause] => lines(number(n)?, Duration::from_micros(number(pause)?)),
        ["sha256", seed, from, to] => sha256(number(seed)?, number(from)?, number(to)?),
        ["vsock", cid, port] => report("connect", vsock(number(cid)?, number(port)?)),
        ["io-uring"] => report("io_uring_setup", io_uring()),
        ["hog", mib] => hog(number(mib)?),
        ["forks", n] => forks(number(n)?),
        ["xattr", file, name] => xattr(file, name),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, USAGE)),
    }
}

fn number<T: FromStr>(text: &str) -> io::Result<T> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is not a number in range")))
}

/// stdout without the line buffer of the standard library: the sizes of the writes are the test.
struct RawStdout;

impl Write for RawStdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the pointer and length are those of a live slice.
        let n = unsafe { libc::write(1, bytes.as_ptr().cast(), bytes.len()) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn stream(out: &mut impl Write, seed: u64, bytes: u64) -> io::Result<()> {
    write_while(out, seed, |offset| bytes - offset)?;
    out.flush()
}

/// Gives the number of bytes written.
fn until(out: &mut impl Write, file: &Path, seed: u64) -> io::Result<u64> {
    write_while(out, seed, |_| if file.exists() { 0 } else { u64::MAX })
}

/// Writes a stream as long as `left` gives more than 0 bytes that may follow the offset. Gives its length.
fn write_while(out: &mut impl Write, seed: u64, left: impl Fn(u64) -> u64) -> io::Result<u64> {
    let mut buffer = vec![0; 128 << 10];
    let mut offset = 0;
    for size in write_sizes(seed) {
        let size = size.min(usize::try_from(left(offset)).unwrap_or(usize::MAX));
        if size == 0 {
            break;
        }
        fill(seed, offset, &mut buffer[..size]);
        out.write_all(&buffer[..size])?;
        offset += size as u64;
    }
    Ok(offset)
}

fn pattern(hex: &str) -> io::Result<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        hex.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
    match digits {
        Some(digits) if !digits.is_empty() && digits.len() % 2 == 0 => {
            Ok(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
        }
        _ => Err(io::Error::other(format!("{hex:?} is not a string of bytes in hexadecimal"))),
    }
}

fn repeat(pattern: &[u8], bytes: usize) -> io::Result<()> {
    let unit: Vec<u8> = pattern.iter().copied().cycle().take(pattern.len() * 65_521).collect();
    let mut left = bytes;
    while left > 0 {
        let n = left.min(unit.len());
        RawStdout.write_all(&unit[..n])?;
        left -= n;
    }
    Ok(())
}

fn blocks(size: usize, bytes: usize) -> io::Result<()> {
    let block = vec![b'.'; size];
    let mut left = bytes;
    while left > 0 {
        let n = left.min(size);
        RawStdout.write_all(&block[..n])?;
        left -= n;
    }
    Ok(())
}

fn lines(count: u64, pause: Duration) -> io::Result<()> {
    for _ in 0..count {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is to a live timespec.
        check(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) })?;
        RawStdout.write_all(format!("{}\n", now.tv_sec * 1_000_000_000 + now.tv_nsec).as_bytes())?;
        std::thread::sleep(pause);
    }
    Ok(())
}

fn sha256(seed: u64, from: u64, to: u64) -> io::Result<()> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut offset = from;
    while offset < to {
        let n = buffer.len().min(usize::try_from(to - offset).unwrap_or(usize::MAX));
        fill(seed, offset, &mut buffer[..n]);
        digest.update(&buffer[..n]);
        offset += n as u64;
    }
    for byte in digest.finalize() {
        print!("{byte:02x}");
    }
    println!();
    Ok(())
}

fn report(call: &str, result: io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) => println!("{call} succeeded"),
        Err(e) => println!("{call} was refused: {e}"),
    }
    Ok(())
}

fn vsock(cid: u32, port: u32) -> io::Result<()> {
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })?;
    // SAFETY: every field of sockaddr_vm may be zero.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_vm of that length.
    check(unsafe { libc::connect(fd, (&raw const address).cast(), len) })?;
    Ok(())
}

fn io_uring() -> io::Result<()> {
    let mut params = [0_u8; 120];
    // SAFETY: struct io_uring_params has 120 bytes, and zeros are valid.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    check(fd as libc::c_int).map(|_| ())
}

fn hog(mib: usize) -> io::Result<()> {
    let mut blocks = Vec::new();
    for _ in 0..mib {
        // Every page is written: untouched ones cost no memory.
        blocks.push(std::hint::black_box(vec![0x55_u8; 1 << 20]));
    }
    println!("used {} MiB", blocks.len());
    Ok(())
}

fn forks(wanted: usize) -> io::Result<()> {
    let mut children = Vec::new();
    let mut refusal = None;
    while children.len() < wanted {
        // SAFETY: this process has one thread, and the child only waits for a signal.
        match check(unsafe { libc::fork() }) {
            Ok(0) => loop {
                // SAFETY: takes no pointers.
                unsafe { libc::pause() };
            },
            Ok(pid) => children.push(pid),
            Err(e) => {
                refusal = Some(e);
                break;
            }
        }
    }
    println!("{} processes{}", children.len(), refusal.map(|e| format!(", then {e}")).unwrap_or_default());
    for pid in children {
        // SAFETY: takes no pointers; the pid is of a child that was not reaped.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    Ok(())
}

fn xattr(file: &str, name: &str) -> io::Result<()> {
    let (file, name) = (CString::new(file)?, CString::new(name)?);
    let mut value = [0_u8; 256];
    // SAFETY: the names end with a zero, and the length is that of the buffer.
    let n = unsafe { libc::lgetxattr(file.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    let digits: String = value[..n].iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{digits}");
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
