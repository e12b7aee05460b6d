//! A connection from the host: counted against a bound, and closed if its peer never says anything.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
    time::{Instant, Sleep, sleep_until},
};

/// How long a peer may take for its first byte. A `CONNECT` that the host gave up while the VM was
/// paused arrives later as a connection on which nothing ever comes.
pub const FIRST_BYTE_LIMIT: Duration = Duration::from_secs(10);

/// See the module. Gives its permit back when dropped.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    _permit: OwnedSemaphorePermit,
    /// `None` once a byte has come.
    silence: Option<Pin<Box<Sleep>>>,
}

impl<S> Connection<S> {
    /// Wraps a connection that has just been accepted.
    pub fn new(stream: S, permit: OwnedSemaphorePermit) -> Connection<S> {
        let silence = Some(Box::pin(sleep_until(Instant::now() + FIRST_BYTE_LIMIT)));
        Connection { stream, _permit: permit, silence }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Poll::Ready(result) = Pin::new(&mut this.stream).poll_read(cx, buf) {
            this.silence = None;
            return Poll::Ready(result);
        }
        if let Some(silence) = &mut this.silence {
            ready!(silence.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        sync::Semaphore,
    };

    use super::*;

    async fn connection() -> (impl AsyncWriteExt, Connection<tokio::io::DuplexStream>, Arc<Semaphore>) {
        let permits = Arc::new(Semaphore::new(1));
        let permit = permits.clone().try_acquire_owned().unwrap();
        let (host, guest) = duplex(64);
        (host, Connection::new(guest, permit), permits)
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_given_up_after_the_limit() {
        let (_host, mut guest, permits) = connection().await;
        let started = Instant::now();
        let error = guest.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(started.elapsed().as_secs(), FIRST_BYTE_LIMIT.as_secs());
        drop(guest);
        assert_eq!(permits.available_permits(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_has_spoken_may_be_silent_for_ever() {
        let (mut host, mut guest, _permits) = connection().await;
        host.write_u8(1).await.unwrap();
        assert_eq!(guest.read_u8().await.unwrap(), 1);
        let wait = tokio::time::timeout(FIRST_BYTE_LIMIT * 10, guest.read_u8()).await;
        assert!(wait.is_err(), "{wait:?}");
    }
}
