//! What `-v` shows of every request: each call of each layer, from the client inwards, as nbdkit writes them. A layer is traced by
//! a filter in front of it, so that without `-v` nothing is there that could cost time.
//! Source: nbdkit server/backend.c; docs/nbdkit.pod "SERVER DEBUG FLAGS".

use std::fmt;
use std::sync::Arc;

use nbdcaptive_actors::blocks::Blocks;
use nbdcaptive_actors::connection::Connection;
use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Device, Error, Export, Exports, Extents, Flags, Result, Segments,
};
use nbdcaptive_actors::filter::{Filter, FilterExports, Filtered, FilteredExports};

use crate::debug::ServerFlags;
use crate::report::Report;

/// What is shown, and to whom: to nobody by default.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// For what happens before there is a client.
    report: Option<Report>,
    calls: Calls,
}

/// Which calls are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Calls {
    control: bool,
    data: bool,
}

impl Trace {
    /// What the flags leave to be shown.
    pub fn new(flags: &ServerFlags, report: &Report) -> Trace {
        let calls = Calls { control: flags.backend_controlpath != 0, data: flags.backend_datapath != 0 };
        Trace { report: Some(report.clone()), calls }
    }

    /// Where what happens before there is a client is shown, if it is.
    pub fn report(&self) -> Option<Report> {
        self.report.clone()
    }

    /// Shows that a layer is being configured.
    pub fn configures(&self, layer: &str, step: fmt::Arguments<'_>) {
        self.report.iter().for_each(|report| report.debug(format_args!("{layer}: {step}")));
    }

    /// Puts itself in front of the layer `name`.
    pub fn over(&self, name: &'static str, next: Arc<dyn Exports>) -> Arc<dyn Exports> {
        match self.calls {
            Calls { control: false, data: false } => next,
            calls => Arc::new(FilteredExports(TracedExports { name, next, calls })),
        }
    }
}

struct TracedExports {
    name: &'static str,
    next: Arc<dyn Exports>,
    calls: Calls,
}

impl TracedExports {
    fn control(&self, client: &Client, line: fmt::Arguments<'_>) {
        if self.calls.control {
            client.connection.debug(format_args!("{}: {line}", self.name));
        }
    }
}

impl FilterExports for TracedExports {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let (readonly, tls) = (u8::from(client.read_only), u8::from(client.is_tls));
        let export = String::from_utf8_lossy(&client.export_name);
        self.control(client, format_args!("open readonly={readonly} exportname=\"{export}\" tls={tls}"));
        let next = self.next.open(client).inspect_err(|error| self.control(client, format_args!("open: {error}")))?;
        Ok(Box::new(Filtered(Traced {
            name: self.name,
            next,
            calls: self.calls,
            connection: client.connection.clone(),
        })))
    }

    fn preconnect(&self, client: &Client) -> Result<()> {
        self.control(client, format_args!("preconnect"));
        self.next.preconnect(client)
    }

    fn list(&self, client: &Client) -> Result<Vec<Export>> {
        let (readonly, tls) = (u8::from(client.read_only), u8::from(client.is_tls));
        self.control(client, format_args!("list_exports readonly={readonly} tls={tls}"));
        let list = self.next.list(client);
        match &list {
            Ok(list) => self.control(client, format_args!("list_exports returned {} names", list.len())),
            Err(_) => self.control(client, format_args!("list_exports failed")),
        }
        list
    }

    fn default_export(&self, client: &Client) -> Result<Option<Vec<u8>>> {
        let (readonly, tls) = (u8::from(client.read_only), u8::from(client.is_tls));
        self.control(client, format_args!("default_export readonly={readonly} tls={tls}"));
        self.next.default_export(client)
    }

    fn description(&self, client: &Client) -> Option<String> {
        self.control(client, format_args!("export_description"));
        self.next.description(client)
    }
}

struct Traced {
    name: &'static str,
    next: Box<dyn Device>,
    calls: Calls,
    connection: Connection,
}

impl Traced {
    fn control(&self, line: fmt::Arguments<'_>) {
        if self.calls.control {
            self.connection.debug(format_args!("{}: {line}", self.name));
        }
    }

    /// Shows a call before it is made. One that may not wait might be made again: it is not made at all where it would be shown.
    fn show(&self, wanted: bool, call: &Call, line: fmt::Arguments<'_>) -> Result<()> {
        if wanted {
            if !call.may_block() {
                return Err(Error::WouldBlock);
            }
            self.connection.debug(format_args!("{}: {line}", self.name));
        }
        Ok(())
    }

    fn data(&self, call: &Call, line: fmt::Arguments<'_>) -> Result<()> {
        self.show(self.calls.data, call, line)
    }
}

impl Filter for Traced {
    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn size(&self) -> Result<u64> {
        self.control(format_args!("get_size"));
        self.next.size()
    }

    fn capabilities(&self) -> Result<Capabilities> {
        // Asked in one question here, and in ten by nbdkit.
        for question in [
            "block_size",
            "can_write",
            "can_flush",
            "is_rotational",
            "can_trim",
            "can_zero",
            "can_fast_zero",
            "can_extents",
            "can_fua",
            "can_multi_conn",
            "can_cache",
        ] {
            self.control(format_args!("{question}"));
        }
        self.next.capabilities()
    }

    fn answers_at_once(&self) -> bool {
        !self.calls.data && self.next.answers_at_once()
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.data(call, format_args!("pread count={} offset={offset}", buffer.len()))?;
        self.next.read(buffer, offset, call)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.data(call, format_args!("pread count={length} offset={offset}"))?;
        self.next.read_segments(reply, length, offset, call)
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.data(call, format_args!("pwrite count={} offset={offset} fua={}", data.len(), u8::from(flags.fua)))?;
        self.next.write(data, offset, flags, call)
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.data(call, format_args!("pwrite count={} offset={offset} fua={}", data.len(), u8::from(flags.fua)))?;
        self.next.write_blocks(data, offset, flags, call)
    }

    fn flush(&self, call: &Call) -> Result<()> {
        self.show(self.calls.control, call, format_args!("flush"))?;
        self.next.flush(call)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.data(call, format_args!("trim count={length} offset={offset} fua={}", u8::from(flags.fua)))?;
        self.next.trim(length, offset, flags, call)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let [may_trim, fua, fast] = [flags.may_trim, flags.fua, flags.fast].map(u8::from);
        let line = format_args!("zero count={length} offset={offset} may_trim={may_trim} fua={fua} fast={fast}");
        self.data(call, line)?;
        self.next.zero(length, offset, flags, call)
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.data(call, format_args!("cache count={length} offset={offset}"))?;
        self.next.cache(length, offset, call)
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        let (count, offset, one) = (extents.length(), extents.offset(), u8::from(extents.one()));
        self.data(call, format_args!("extents count={count} offset={offset} req_one={one}"))?;
        self.next.extents(extents, call)
    }

    fn close(&self) -> Result<()> {
        self.control(format_args!("close"));
        Ok(())
    }
}
