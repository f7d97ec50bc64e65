//! The connection that a device was opened for, as far as a device may know of it: waiting that ends with it, ending it, and a
//! line about it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use event_listener::{Event, listener};
use smol::future::or;

use crate::coordinator::Orders;
use crate::device::{Call, Error, ErrorCode, Result};
use crate::log::Speaker;
use crate::world::World;

/// A connection, or none: the default knows of no client and of no server, and never ends. Cheap to clone.
///
/// A device that makes a client wait (`delay`, `rate`, `pause`) waits here and nowhere else. Otherwise the client that it
/// serves could have gone, or the server be ending, and both would have to wait for it.
/// Source: nbdkit server/public.c `nbdkit_nanosleep`, `nbdkit_disconnect`.
#[derive(Clone, Default)]
pub struct Connection(Option<Arc<Inner>>);

struct Inner {
    /// [`OPEN`], then [`CUT`] perhaps, then [`OVER`].
    state: AtomicU8,
    /// Nothing more is asked of the device for the client.
    refuses: AtomicBool,
    /// The client was let in, or it is nobody's own: what is asked of the device is owed to somebody.
    owes: AtomicBool,
    ended: Event,
    orders: Orders,
    speaker: Speaker,
    world: World,
}

const OPEN: u8 = 0;
/// The device wants the connection to end.
const CUT: u8 = 1;
/// The client has gone, has said that it goes, or was cut off.
const OVER: u8 = 2;

impl Connection {
    pub(crate) fn new(orders: Orders, speaker: Speaker, world: World) -> Connection {
        let (state, refuses, ended) = (AtomicU8::new(OPEN), AtomicBool::new(false), Event::new());
        let owes = AtomicBool::new(false);
        Connection(Some(Arc::new(Inner { state, refuses, owes, ended, orders, speaker, world })))
    }

    /// For a device that outlives the client it was opened for: ends with the server and not before.
    pub fn of_the_server(&self) -> Connection {
        match &self.0 {
            Some(inner) => {
                let lasting = Connection::new(inner.orders.clone(), inner.speaker.clone(), inner.world.clone());
                // Other clients' requests may be made with it, which are owed an answer.
                lasting.let_in();
                lasting
            }
            None => Connection::default(),
        }
    }

    /// As [`Connection::of_the_server`], for a device that is opened by `open`: what that waits for is recalled as if it were for this
    /// client alone, and what is asked later is not.
    pub fn outlived<T>(&self, open: impl FnOnce(Connection) -> T) -> T {
        let Some(inner) = &self.0 else { return open(Connection::default()) };
        let lasting = Connection::new(inner.orders.clone(), inner.speaker.clone(), inner.world.clone());
        if inner.owes.load(Ordering::SeqCst) {
            lasting.let_in();
        }
        let opened = open(lasting.clone());
        lasting.let_in();
        opened
    }

    /// What tells a call that is being made now that nobody wants its answer. `None` if it is owed one: a client that was let in
    /// gets an answer to what it has asked, however long that takes.
    ///
    /// For a call that waits for something which may have begun what a close would end, a program say, and is better left to
    /// finish than given up with the drain, as [`Connection::wait`] does.
    pub fn recall(&self) -> Option<Recall> {
        let inner = self.0.as_ref().filter(|inner| !inner.owes.load(Ordering::SeqCst))?;
        Some(Recall(inner.orders.clone()))
    }

    /// The client has heard, or is about to, that it was let in.
    pub(crate) fn let_in(&self) {
        if let Some(inner) = &self.0 {
            inner.owes.store(true, Ordering::SeqCst);
        }
    }

    /// Waits for `what`, in a call that may. Errors: [`Error::WouldBlock`] in one that may not; [`ErrorCode::Shutdown`] as soon
    /// as the client leaves or the server ends. `what` is then dropped.
    pub fn wait<T>(&self, call: &Call, what: impl Future<Output = T>) -> Result<T> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        let Some(inner) = &self.0 else { return Ok(smol::block_on(what)) };
        let over = async {
            listener!(inner.ended => listener);
            if inner.state.load(Ordering::SeqCst) == OPEN {
                listener.await;
            }
            Err("aborting sleep because of connection close or error")
        };
        let ending = async {
            inner.orders.draining().await;
            Err("aborting sleep because of server shut down")
        };
        let waited = smol::block_on(or(or(ending, over), async { Ok(what.await) }));
        waited.map_err(|why| Error::failed(ErrorCode::Shutdown, why))
    }

    /// As [`Connection::wait`], for some time to pass.
    pub fn sleep(&self, call: &Call, time: Duration) -> Result<()> {
        let world = self.0.as_ref().map(|inner| inner.world.clone()).unwrap_or_default();
        self.wait(call, async { world.after(time).await })
    }

    /// Closes the connection as soon as the request that this is called in returns. What the client has asked for beside it is
    /// not answered.
    pub fn disconnect(&self) {
        if let Some(inner) = &self.0 {
            let _ = inner.state.compare_exchange(OPEN, CUT, Ordering::SeqCst, Ordering::SeqCst);
            inner.ended.notify(usize::MAX);
        }
    }

    /// Answers what the client asks for from now on with [`ErrorCode::Shutdown`], without the device. What is under way is done
    /// and answered, the client may stay as long as it likes, and the device is flushed and closed as ever.
    pub fn refuse(&self) {
        if let Some(inner) = &self.0 {
            inner.refuses.store(true, Ordering::SeqCst);
        }
    }

    /// What to know it again by. `None` for that of no client.
    pub fn key(&self) -> Option<ConnectionKey> {
        self.0.as_ref().map(|inner| {
            let inner: Weak<Inner> = Arc::downgrade(inner);
            ConnectionKey(inner)
        })
    }

    /// A line for `-v`.
    pub fn debug(&self, line: fmt::Arguments<'_>) {
        if let Some(inner) = &self.0 {
            inner.speaker.debug(line);
        }
    }

    /// A line about something that failed and that the client is not told of.
    pub fn error(&self, line: fmt::Arguments<'_>) {
        if let Some(inner) = &self.0 {
            inner.speaker.error(line);
        }
    }

    /// Whether the device has asked for the end.
    pub(crate) fn is_cut(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.state.load(Ordering::SeqCst) == CUT)
    }

    /// Whether the device wants to be asked for nothing more.
    pub(crate) fn refuses(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.refuses.load(Ordering::SeqCst))
    }

    /// Nobody waits for replies any more.
    pub(crate) fn end(&self) {
        if let Some(inner) = &self.0
            && inner.state.swap(OVER, Ordering::SeqCst) != OVER
        {
            inner.ended.notify(usize::MAX);
        }
    }
}

/// Tells a call of the server's end, that was made for a client in the handshake.
#[derive(Clone, Debug)]
pub struct Recall(Orders);

impl Recall {
    /// Ends when the call is to come back: the server has been ending for a while (two seconds, or the grace period if that is
    /// less), and the client has gone. Dropped, it has done nothing.
    pub async fn recalled(&self) {
        self.0.recalling().await;
    }

    /// Ends a grace period after that. A call that has not come back in another second is left behind: the exports are unloaded
    /// beside it, and a device that it opens is closed at once.
    pub async fn given_up(&self) {
        self.0.giving_up().await;
    }
}

/// Names a connection without holding on to it, for what a device keeps of one beyond its own opening.
#[derive(Clone, Debug)]
pub struct ConnectionKey(Weak<dyn std::any::Any + Send + Sync>);

impl ConnectionKey {
    /// Whether it is this one.
    pub fn is(&self, connection: &Connection) -> bool {
        connection.0.as_ref().is_some_and(|inner| std::ptr::addr_eq(self.0.as_ptr(), Arc::as_ptr(inner)))
    }

    /// Whether nobody knows the connection any more; another is never taken for it.
    pub fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// Ends a connection when it is dropped.
pub(crate) struct Ends(pub Connection);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Two are the same if they are one and the same connection.
impl PartialEq for Connection {
    fn eq(&self, other: &Connection) -> bool {
        match (&self.0, &other.0) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        }
    }
}

impl Eq for Connection {}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("known", &self.0.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use std::thread;

    /// A connection, and what keeps its server from ending.
    fn connection() -> (Connection, crate::coordinator::Coordinator) {
        let speaker = Speaker::new(Arc::new(crate::log::Silent));
        let limits = crate::coordinator::Limits { grace: Duration::ZERO, drain: Duration::ZERO };
        let nothing = Arc::new(crate::device::Same::new(Nothing));
        let (coordinator, ends) =
            crate::coordinator::Coordinator::new(nothing, limits, speaker.clone(), false, World::default());
        (Connection::new(ends.orders, speaker, World::default()), coordinator)
    }

    struct Nothing;

    impl crate::device::Device for Nothing {
        fn size(&self) -> Result<u64> {
            Ok(0)
        }
        fn read(&self, _buffer: &mut [u8], _offset: u64, _call: &Call) -> Result<()> {
            Ok(())
        }
    }

    fn code<T: std::fmt::Debug>(result: Result<T>) -> ErrorCode {
        result.expect_err("it fails").code()
    }

    #[test]
    fn waits_for_what_comes() {
        let (connection, _server) = connection();
        assert_eq!(connection.wait(&Call::BLOCKING, async { 5 }).unwrap(), 5);
        connection.sleep(&Call::BLOCKING, Duration::from_millis(1)).unwrap();
        Connection::default().sleep(&Call::BLOCKING, Duration::from_millis(1)).unwrap();
    }

    #[test]
    fn does_not_wait_in_a_call_that_may_not() {
        let (connection, _server) = connection();
        assert!(matches!(connection.sleep(&Call::AT_ONCE, Duration::ZERO), Err(Error::WouldBlock)));
    }

    #[test]
    fn a_wait_ends_with_the_client_the_device_or_the_server() {
        let endings: [fn(Connection, crate::coordinator::Coordinator); 3] = [
            |connection, server| {
                connection.end();
                drop(server);
            },
            |connection, _| connection.disconnect(),
            |_, server| drop(server),
        ];
        for end in endings {
            let (connection, server) = connection();
            let waits = connection.clone();
            let waiting = thread::spawn(move || waits.wait(&Call::BLOCKING, pending::<()>()));
            end(connection.clone(), server);
            assert_eq!(code(waiting.join().expect("it does not panic")), ErrorCode::Shutdown);
            // Also one that only begins now.
            assert_eq!(code(connection.wait(&Call::BLOCKING, pending::<()>())), ErrorCode::Shutdown);
        }
    }

    #[test]
    fn a_call_may_be_recalled_until_its_client_was_let_in() {
        assert!(Connection::default().recall().is_none());
        let (connection, _server) = connection();
        assert!(connection.recall().is_some() && connection.of_the_server().recall().is_none());
        let lasting = connection.outlived(|lasting| {
            assert!(lasting.recall().is_some());
            lasting
        });
        assert!(lasting.recall().is_none(), "other clients use it now");
        connection.let_in();
        assert!(connection.recall().is_none() && connection.outlived(|lasting| lasting.recall().is_none()));
    }

    #[test]
    fn what_is_the_servers_outlives_the_client() {
        let (connection, server) = connection();
        let lasting = connection.of_the_server();
        connection.end();
        lasting.sleep(&Call::BLOCKING, Duration::ZERO).unwrap();
        drop(server);
        assert_eq!(code(lasting.wait(&Call::BLOCKING, pending::<()>())), ErrorCode::Shutdown);
    }
}
