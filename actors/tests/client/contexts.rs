//! Metadata contexts of a device's own, beside `base:allocation`.

use nbdcaptive_actors::Server;
use nbdcaptive_actors::client::{Handshake, Headers, Wishes, negotiate};
use nbdcaptive_actors::device::{self, Call, Capabilities, Client, Device, Exports, Extents, MetaContext};
use smol::Executor;

use super::rig::*;

const SIZE: u64 = 1 << 50;
const COLOUR: &str = "x-test:colour";
const AGE: &str = "x-test:age";

/// A disk of two colours, whose second half is older than 32 bits can say.
struct Painted;

impl Exports for Painted {
    fn open(&self, _client: &Client) -> device::Result<Box<dyn Device>> {
        Ok(Box::new(Painted))
    }
    fn meta_contexts(&self, client: &Client) -> device::Result<Vec<MetaContext>> {
        let own = [(COLOUR, false), (AGE, true)].map(|(name, is_wide)| MetaContext { name: name.into(), is_wide });
        Ok(if client.export_name == b"plain" { Vec::new() } else { own.into() })
    }
}

impl Device for Painted {
    fn size(&self) -> device::Result<u64> {
        Ok(SIZE)
    }
    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities { extents: true, ..Capabilities::default() })
    }
    fn answers_at_once(&self) -> bool {
        true
    }
    fn read(&self, buffer: &mut [u8], _offset: u64, _call: &Call) -> device::Result<()> {
        buffer.fill(0);
        Ok(())
    }
    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            // After the chunk of another context has been put together already.
            return Err(device::Error::WouldBlock);
        }
        let (first, second) = if context == 0 { (1, 2) } else { (7, 1 << 40) };
        extents.add(0, SIZE / 2, first);
        extents.add(SIZE / 2, SIZE / 2, second);
        Ok(())
    }
}

fn with_painted<T>(
    client: impl AsyncFnOnce(&Executor<'static>, Box<dyn nbdcaptive_actors::transport::Transport>) -> T,
) -> T {
    with_exports(Painted, |server: Server| server, client)
}

fn names(contexts: &[nbdcaptive_actors::client::MetaContext]) -> Vec<&str> {
    contexts.iter().map(|context| std::str::from_utf8(&context.name).expect("as it was given")).collect()
}

fn queries(names: &[&str]) -> Vec<Vec<u8>> {
    names.iter().map(|name| name.as_bytes().to_vec()).collect()
}

#[test]
fn contexts_are_listed_by_name_and_by_namespace_for_the_export_that_has_them() {
    with_painted(async |_executor, transport| {
        let mut handshake = Handshake::begin(transport).await.expect("it is a server");
        handshake.ask_for_headers(Headers::Extended).await.expect("it has them");
        let mut list = async |name: &str, wanted: &[&str]| {
            let listed = handshake.list_meta_contexts(name.as_bytes(), &queries(wanted)).await.expect("it lists");
            names(&listed).join(" ")
        };
        assert_eq!(list("", &[]).await, "base:allocation x-test:colour x-test:age");
        assert_eq!(list("", &["x-test:"]).await, "x-test:colour x-test:age");
        assert_eq!(list("", &["x-test:age", "base:"]).await, "base:allocation x-test:age");
        assert_eq!(list("", &["x-tes", "x-test:ag", "x-other:", "nothing"]).await, "");
        assert_eq!(list("plain", &[]).await, "base:allocation");
        handshake.abort().await.expect("nothing is in its way");
    });
}

#[test]
fn a_context_that_needs_64_bits_needs_extended_headers() {
    with_painted(async |executor, transport| {
        let contexts = queries(&[AGE, COLOUR, "x-test:"]);
        let wishes = Wishes { headers: Headers::Structured, contexts, ..Wishes::export("") };
        let agreed = negotiate(transport, &wishes).await.expect("the export is there");
        let (requests, connection) = agreed.start();
        let task = executor.spawn(connection.run());
        // Nor does a namespace select anything.
        assert_eq!(names(&requests.export().contexts), [COLOUR]);
        let status = requests.block_status(0, 1 << 30, false).await.expect("it is known");
        assert_eq!(status.len(), 1);
        // All of the stretch that was asked into, as far as 32 bits tell it.
        assert_eq!((status[0].extents[0].length, status[0].extents[0].status), (0xffff_0000, 1));
        requests.disconnect().await.expect("nothing is in its way");
        task.await.expect("it was we who ended it");
    });
}

#[test]
fn each_selected_context_is_answered_and_a_request_may_ask_for_some() {
    with_painted(async |executor, transport| {
        let contexts = queries(&[AGE, "base:allocation", COLOUR]);
        let wishes = Wishes { contexts, ..Wishes::export("") };
        let agreed = negotiate(transport, &wishes).await.expect("the export is there");
        let (requests, connection) = agreed.start();
        let task = executor.spawn(connection.run());
        let id = |name: &str| {
            let known = requests.export().contexts.iter().find(|context| context.name == name.as_bytes());
            known.expect("it was selected").id
        };
        // More than 32 bits of length, and of flags.
        let status = requests.block_status(4096, SIZE - 4096, false).await.expect("it is known");
        let of = |name: &str| {
            let found = status.iter().find(|status| status.id == id(name)).expect("each has an answer");
            found.extents.iter().map(|extent| (extent.length, extent.status)).collect::<Vec<_>>()
        };
        assert_eq!(status.len(), 3);
        assert_eq!(of("base:allocation"), [(SIZE - 4096, 0)]);
        assert_eq!(of(COLOUR), [(SIZE / 2 - 4096, 1), (SIZE / 2, 2)]);
        assert_eq!(of(AGE), [(SIZE / 2 - 4096, 7), (SIZE / 2, 1 << 40)]);
        let one = requests.block_status_of(&[id(AGE)], 0, SIZE, true).await.expect("it is known");
        assert_eq!(one.len(), 1);
        assert_eq!((one[0].id, one[0].extents.len()), (id(AGE), 1));
        requests.disconnect().await.expect("nothing is in its way");
        task.await.expect("it was we who ended it");
    });
}
