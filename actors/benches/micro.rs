//! The parts of a request's way that are ours alone, so that a regression shows without a client, a kernel or a disk.
//!
//! `cargo bench -p nbdcaptive-actors`. Each iteration is a batch of [`BATCH`] requests, which is what travels as one message;
//! the item rate is in requests.

use std::sync::Arc;

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use nbdcaptive_actors::device::{Capabilities, Segments, Support};
use nbdcaptive_actors::protocol::constants::*;
use nbdcaptive_actors::protocol::replies::ReplyTo;
use nbdcaptive_actors::protocol::transmission::{Agreement, Contexts, Headers, REQUEST_HEADER, Request};

/// Requests in a batch: what one receive brings at depth 64.
const BATCH: usize = 64;

fn main() {
    divan::main();
}

fn agreement() -> Agreement {
    let offered = Capabilities {
        write: true,
        flush: true,
        trim: true,
        zero: Support::Native,
        fua: Support::Native,
        ..Capabilities::default()
    };
    Agreement {
        size: 1 << 30,
        offered,
        takes_any_size: false,
        headers: Headers::Structured,
        contexts: Contexts::BASE_ALLOCATION,
    }
}

/// A batch of 4 KiB reads, as a client sends it.
fn requests() -> Vec<u8> {
    let mut bytes = Vec::new();
    for index in 0..BATCH as u64 {
        bytes.extend_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&0u16.to_be_bytes());
        bytes.extend_from_slice(&NBD_CMD_READ.to_be_bytes());
        bytes.extend_from_slice(&index.to_be_bytes());
        bytes.extend_from_slice(&(index * 4096).to_be_bytes());
        bytes.extend_from_slice(&4096u32.to_be_bytes());
    }
    bytes
}

/// Bytes to checked commands.
#[divan::bench]
fn parse(bencher: Bencher<'_, '_>) {
    let (bytes, agreement) = (requests(), agreement());
    bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
        for header in black_box(&bytes).chunks_exact(REQUEST_HEADER) {
            let request = Request::parse(Headers::Structured, header).expect("it was made above");
            let _ = black_box(agreement.check(&request));
        }
    });
}

/// Replies with 4 KiB of lent memory each.
#[divan::bench(args = [Headers::Simple, Headers::Structured, Headers::Extended])]
fn assemble(bencher: Bencher<'_, '_>, headers: Headers) {
    let page: Arc<Vec<u8>> = Arc::new(vec![1; 32768]);
    bencher.counter(ItemsCount::new(BATCH)).with_inputs(Segments::default).bench_local_refs(|reply| {
        for cookie in 0..BATCH as u64 {
            ReplyTo { headers, cookie, offset: cookie * 4096 }.read(reply, 4096);
            reply.shared(page.clone(), 0..4096);
        }
        black_box(reply.len())
    });
}

/// Replies with 4 KiB copied each.
#[divan::bench]
fn assemble_by_copying(bencher: Bencher<'_, '_>) {
    let page = vec![1; 4096];
    bencher.counter(ItemsCount::new(BATCH)).with_inputs(Segments::default).bench_local_refs(|reply| {
        for cookie in 0..BATCH as u64 {
            ReplyTo { headers: Headers::Structured, cookie, offset: cookie * 4096 }.read(reply, 4096);
            reply.space(4096).copy_from_slice(&page);
        }
        black_box(reply.len())
    });
}

/// A batch to another actor on the same thread, and its answer back.
#[divan::bench]
fn hop_and_back(bencher: Bencher<'_, '_>) {
    let executor = smol::LocalExecutor::new();
    let (work, inbox) = async_channel::bounded::<Vec<u64>>(16);
    let (replies, outbox) = async_channel::bounded::<Vec<u64>>(16);
    let _backend = executor.spawn(async move {
        while let Ok(batch) = inbox.recv().await {
            if replies.send(batch).await.is_err() {
                return;
            }
        }
    });
    let mut batch = Some(vec![0; BATCH]);
    bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
        let sent = batch.take().unwrap_or_default();
        batch = smol::block_on(executor.run(async {
            work.send(sent).await.ok()?;
            outbox.recv().await.ok()
        }));
    });
}
