//! What a server may say to our client: any bytes in any pieces, while the client does all that it can.

use std::sync::Arc;

use nbdcaptive_actors::client::{Error, Handshake, Headers, Requests};
use nbdcaptive_actors::device::Flags;
use nbdcaptive_actors::transport::Transport;
use smol::{Executor, Task};

use crate::stage::{Stage, Wire};
use crate::streams::Pieces;

/// From a server to a client. The first byte says what the client would like to have, the second what it asks in the
/// handshake, the third the lengths of the pieces; the others are what the server sends, from its greeting on.
pub fn client(data: &[u8]) {
    let Some((&[wish, questions, split], data)) = data.split_first_chunk::<3>() else { return };
    let stage = Stage::new();
    let (wire, transport) = Wire::new(1 << 20);
    let script = run(Arc::clone(&stage.executor), Box::new(transport), wish, questions);
    let script = stage.executor.spawn(script);
    stage.settle();
    for piece in Pieces::new(data, split) {
        wire.send(piece);
        stage.settle();
        // What the client sends nobody reads, but the wire must not be full of it.
        wire.take(usize::MAX);
        stage.settle();
    }
    assert!(wire.all_taken() || wire.is_closed(), "the client does not listen");
    wire.finish();
    stage.settle();
    assert!(script.is_finished(), "the server has closed the connection, and the client waits for it");
    smol::future::block_on(script);
    assert!(stage.executor.is_empty(), "something of the client goes on after its end");
}

async fn run(executor: Arc<Executor<'static>>, transport: Box<dyn Transport>, wish: u8, questions: u8) {
    let error = match talk(&executor, transport, wish, questions).await {
        Ok(()) => return,
        Err(error) => error,
    };
    let line = error.to_string();
    assert!(!line.is_empty() && line.len() < 20_000, "not a line for people: {line}");
    let _ = error.code();
}

async fn talk(
    executor: &Arc<Executor<'static>>,
    transport: Box<dyn Transport>,
    wish: u8,
    questions: u8,
) -> Result<(), Error> {
    let mut handshake = Handshake::begin(transport).await?;
    let wanted = [Headers::Simple, Headers::Structured, Headers::Extended, Headers::Extended][usize::from(wish & 3)];
    let headers = handshake.ask_for_headers(wanted).await?;
    assert!(headers <= wanted && headers == handshake.headers());
    let name: &[u8] = if wish & 4 == 0 { b"" } else { b"name" };
    let queries = [b"base:allocation".to_vec(), b"x-fuzz:wide".to_vec()];
    let asks = |bit: u32| questions & 1 << bit != 0;
    // That it refuses an option is no reason to go.
    let refused = |error: Error| match error {
        Error::Refused(_) | Error::Impossible { .. } => Ok(()),
        error => Err(error),
    };
    if asks(0) {
        handshake.list().await.map(drop).or_else(refused)?;
    }
    if asks(1) {
        handshake.list_meta_contexts(name, &queries).await.map(drop).or_else(refused)?;
    }
    if asks(2) {
        handshake.info(name).await.map(drop).or_else(refused)?;
    }
    if !asks(3) {
        handshake.set_meta_contexts(name, &queries).await.map(drop).or_else(refused)?;
    }
    if asks(4) {
        return handshake.abort().await;
    }
    let agreed = handshake.go(name).await?;
    assert!(agreed.export.maximum_payload() <= 64 << 20);
    let (requests, connection) = agreed.start();
    let connection = executor.spawn(connection.run());
    let mut under_way = Vec::new();
    for round in 0..if asks(5) { 1 } else { 3 } {
        under_way.extend((0..10).map(|which| executor.spawn(request(requests.clone(), which, round))));
        if asks(6) {
            wait(&mut under_way).await;
        }
    }
    if asks(7) {
        // Whoever waits is told, though nobody has said goodbye.
        drop(connection);
        wait(&mut under_way).await;
        return Ok(());
    }
    wait(&mut under_way).await;
    let goodbye = requests.disconnect().await;
    drop(requests);
    let end = connection.await;
    assert_eq!(goodbye.is_ok(), end.is_ok(), "{goodbye:?} {end:?}");
    end
}

async fn wait(tasks: &mut Vec<Task<()>>) {
    for task in tasks.drain(..) {
        task.await;
    }
}

async fn request(requests: Requests, which: u64, round: u64) {
    let offset = 4096 * round;
    let flags = Flags { fua: which == 9, may_trim: true, fast: false };
    match which {
        0 | 8 => {
            let length = if which == 0 { 8192 } else { 1 };
            if let Ok(data) = requests.read(offset, length).await {
                assert_eq!(data.len(), length as usize);
            }
        }
        1 | 9 => drop(requests.write(vec![7; 512], offset, flags).await),
        2 => drop(requests.flush().await),
        3 => drop(requests.trim(offset, 4096, Flags::default()).await),
        4 => drop(requests.write_zeroes(offset, 1 << 33, flags).await),
        5 | 6 => {
            let (one, length) = (which == 6, 65536);
            for status in requests.block_status(offset, length, one).await.iter().flatten() {
                assert!(!status.extents.is_empty() && status.extents.iter().all(|extent| extent.length > 0));
                assert!(!one || status.extents.len() == 1);
                assert!(requests.export().contexts.iter().any(|context| context.id == status.id));
            }
        }
        _ => drop(requests.cache(offset, 4096).await),
    }
}
