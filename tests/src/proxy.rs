//! Stands between a shim and its guest, and cuts their connections.

use std::{
    fs,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// Cuts every connection to a socket after some bytes, another number each time and never at the
/// end of a frame but by chance. Connections that were there before it go on.
#[derive(Debug)]
pub struct Scissors {
    cuts: Arc<AtomicU64>,
}

impl Scissors {
    /// Takes the place of the socket at `path`, which stays beside it under another name.
    pub fn at(path: &Path) -> Scissors {
        let real = path.with_extension("real");
        fs::rename(path, &real).unwrap();
        let listener = UnixListener::bind(path).unwrap();
        let cuts = Arc::new(AtomicU64::new(0));
        let counter = cuts.clone();
        thread::spawn(move || {
            for (n, near) in listener.incoming().flatten().enumerate() {
                let (real, counter) = (real.clone(), counter.clone());
                thread::spawn(move || relay(near, &real, n as u64, &counter));
            }
        });
        Scissors { cuts }
    }

    /// Connections that were cut.
    pub fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::Relaxed)
    }
}

fn relay(near: UnixStream, real: &PathBuf, n: u64, cuts: &AtomicU64) {
    let Ok(far) = UnixStream::connect(real) else { return };
    let allowed = 20 + n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 700_001;
    let ends = [(near.try_clone(), far.try_clone()), (far.try_clone(), near.try_clone())];
    let copies = ends.map(|ends| {
        thread::spawn(move || match ends {
            (Ok(from), Ok(to)) => copy(from, to, allowed),
            _ => false,
        })
    });
    let cut = copies.map(|copy| copy.join().unwrap_or(false));
    if cut.contains(&true) {
        cuts.fetch_add(1, Ordering::Relaxed);
    }
}

/// Copies at most `allowed` bytes, then ends both directions. Whether it was that which ended them.
fn copy(mut from: UnixStream, mut to: UnixStream, allowed: u64) -> bool {
    let mut buffer = [0; 8 << 10];
    let mut left = allowed;
    let cut = loop {
        if left == 0 {
            break true;
        }
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match from.read(&mut buffer[..most]) {
            Ok(n) if n > 0 && to.write_all(&buffer[..n]).is_ok() => left -= n as u64,
            _ => break false,
        }
    };
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
    cut
}
