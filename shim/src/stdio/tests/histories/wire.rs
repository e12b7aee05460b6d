//! The way between host and guest, which can do to a connection what happens to connections.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use cube_agent::stdio::Hub;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    sync::{Notify, watch},
    time::sleep,
};

use crate::agent::{Dial, DialError};

/// Bytes that are on their way at once; not a divisor of a frame.
const PIECE: usize = 9_973;

/// What a dial comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// The connection ends after so many bytes to the guest or to the host.
    Connected { to_guest: usize, to_host: usize },
    /// The guest does not listen.
    Refused,
    /// The guest is not reached, and nobody says so.
    Silence,
}

impl Fate {
    const GOOD: Fate = Fate::Connected { to_guest: usize::MAX, to_host: usize::MAX };
}

/// The way to one guest.
pub(super) struct Wire {
    hub: Mutex<Arc<Hub>>,
    /// Of the next dials; those after them have a good one.
    fates: Mutex<VecDeque<Fate>>,
    cut: Notify,
    held: watch::Sender<bool>,
    /// What each piece takes.
    delay: Mutex<Duration>,
}

impl Wire {
    pub(super) fn new(hub: Arc<Hub>) -> Arc<Wire> {
        let (fates, delay) = (Mutex::default(), Mutex::default());
        Arc::new(Wire {
            hub: Mutex::new(hub),
            fates,
            cut: Notify::new(),
            held: watch::Sender::new(false),
            delay,
        })
    }

    /// What comes of a dial after those that have a fate already.
    pub(super) fn fate(&self, fate: Fate) {
        self.fates.lock().unwrap().push_back(fate);
    }

    /// Every connection ends, whatever is on its way.
    pub(super) fn cut(&self) {
        self.cut.notify_waiters();
    }

    /// The next dials reach another guest.
    pub(super) fn lead_to(&self, hub: &Arc<Hub>) {
        *self.hub.lock().unwrap() = Arc::clone(hub);
    }

    /// Nothing moves, until it does again.
    pub(super) fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    pub(super) fn delay(&self, delay: Duration) {
        *self.delay.lock().unwrap() = delay;
    }

    /// All is well from now on.
    pub(super) fn mend(&self) {
        self.fates.lock().unwrap().clear();
        self.hold(false);
        self.delay(Duration::ZERO);
    }

    async fn carry(self: Arc<Self>, host: UnixStream, guest: UnixStream, to_guest: usize, to_host: usize) {
        let ((mut from_host, mut to_the_host), (mut from_guest, mut to_the_guest)) =
            (host.into_split(), guest.into_split());
        tokio::select! {
            _ = self.pump(&mut from_host, &mut to_the_guest, to_guest) => {}
            _ = self.pump(&mut from_guest, &mut to_the_host, to_host) => {}
            () = self.cut.notified() => {}
        }
    }

    /// Nothing is ever half-closed: the end of one direction is that of the other.
    async fn pump<R, W>(&self, from: &mut R, to: &mut W, mut left: usize) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut held = self.held.subscribe();
        let mut piece = vec![0; PIECE];
        while left > 0 {
            let most = PIECE.min(left);
            let read = from.read(&mut piece[..most]).await?;
            if read == 0 {
                break;
            }
            let delay = *self.delay.lock().unwrap();
            if !delay.is_zero() {
                sleep(delay).await;
            }
            let _ = held.wait_for(|held| !held).await;
            to.write_all(&piece[..read]).await?;
            left -= read;
        }
        Ok(())
    }
}

/// [`Dial`] over a [`Wire`].
pub(super) struct Dialled(pub(super) Arc<Wire>);

#[async_trait]
impl Dial for Dialled {
    async fn dial(&self, _port: u32) -> Result<UnixStream, DialError> {
        let fate = self.0.fates.lock().unwrap().pop_front().unwrap_or(Fate::GOOD);
        let failed = |source| DialError::Connect { path: "wire".into(), source };
        match fate {
            Fate::Refused => Err(failed(io::ErrorKind::ConnectionRefused.into())),
            Fate::Silence => std::future::pending().await,
            Fate::Connected { to_guest, to_host } => {
                let (host, host_end) = UnixStream::pair().map_err(failed)?;
                let (guest, guest_end) = UnixStream::pair().map_err(failed)?;
                tokio::spawn(Arc::clone(&self.0.hub.lock().unwrap()).serve(guest));
                tokio::spawn(Arc::clone(&self.0).carry(host_end, guest_end, to_guest, to_host));
                Ok(host)
            }
        }
    }
}
