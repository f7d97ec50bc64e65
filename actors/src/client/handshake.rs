//! The handshake as a client sees it: from the greeting until an export is chosen.
//! Source: NBD doc/proto.md "Newstyle negotiation", "Option types".

use std::future::poll_fn;
use std::io::{self, IoSlice};

use super::connection::{self, Connection, Requests};
use super::input::Input;
use super::{Error, Headers};
use crate::device::BlockSize;
use crate::protocol::client::*;
use crate::protocol::constants::*;
use crate::protocol::handshake::{ExportQuery, MAX_OPTION_DATA, MetaContextQuery};
use crate::tls::Connector;
use crate::transport::{Gone, Transport};

/// The most data that the answer to one option may have, in bytes: a list of many thousand exports.
const MAX_ANSWER: usize = 16 * 1024 * 1024;
/// What a reply counts for beside its data, in bytes, so that empty ones are not for nothing.
const REPLY_COST: usize = 64;
/// The most data of a read or write where the server does not say. Source: NBD proto.md "Size constraints".
const DEFAULT_MAXIMUM: u32 = 32 * 1024 * 1024;

/// Which handshake a server has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// One export, and no options.
    Oldstyle,
    /// An export is asked for by its name, and that is all.
    Newstyle,
    /// Newstyle with options that are answered.
    FixedNewstyle,
}

/// One export of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name to ask for.
    pub name: Vec<u8>,
    /// A sentence for people, or empty.
    pub description: Vec<u8>,
}

/// A metadata context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// What it is called in replies. Means nothing in a list.
    pub id: u32,
    /// Its name, with the namespace.
    pub name: Vec<u8>,
}

/// What a server tells about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The name that was asked for.
    pub name: Vec<u8>,
    /// The name that the server has for it, where it says so.
    pub canonical_name: Option<Vec<u8>>,
    /// A sentence for people, where there is one.
    pub description: Option<Vec<u8>>,
    /// Bytes.
    pub size: u64,
    /// `NBD_FLAG_*`
    pub flags: u16,
    /// Where the server says so.
    pub block_size: Option<BlockSize>,
    /// The contexts that were selected, with their ids in replies.
    pub contexts: Vec<MetaContext>,
}

impl Export {
    fn new(name: &[u8], told: SizeAndFlags) -> Export {
        Export {
            name: name.to_vec(),
            canonical_name: None,
            description: None,
            size: told.size,
            flags: told.flags,
            block_size: None,
            contexts: Vec::new(),
        }
    }

    /// Whether all of `flags` (`NBD_FLAG_*`) are set.
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// The most data that one read or write may carry, in bytes.
    pub fn maximum_payload(&self) -> u32 {
        self.block_size.map_or(DEFAULT_MAXIMUM, |size| size.maximum).min(MAX_PAYLOAD)
    }
}

/// What a client would like to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// The export's name. An oldstyle server has one export, whatever the name.
    pub export_name: Vec<u8>,
    /// The most that is asked for; the server may have less.
    pub headers: Headers,
    /// The metadata contexts to select; those that the server does not have are left out.
    pub contexts: Vec<Vec<u8>>,
}

impl Wishes {
    /// The best that the server has, and `base:allocation`.
    pub fn export(name: impl Into<Vec<u8>>) -> Wishes {
        Wishes { export_name: name.into(), headers: Headers::Extended, contexts: vec![b"base:allocation".to_vec()] }
    }
}

/// Does the whole handshake. Dropped, the connection is closed.
///
/// Errors: the export is not to be had, or the server is none. That it has less than was wished for is none.
pub async fn negotiate(transport: Box<dyn Transport>, wishes: &Wishes) -> Result<Agreed, Error> {
    Handshake::begin(transport).await?.choose(wishes).await
}

/// A handshake that is under way. A dropped future of one of its methods leaves it in the middle of an answer: drop it too.
pub struct Handshake {
    transport: Box<dyn Transport>,
    input: Input,
    kind: Kind,
    headers: Headers,
    /// What was selected last, and for which export.
    contexts: Option<(Vec<u8>, Vec<MetaContext>)>,
}

enum Kind {
    Oldstyle(SizeAndFlags),
    Newstyle { fixed: bool, no_zeroes: bool },
}

impl Handshake {
    /// Hears the server's greeting and answers it. Errors: it is none.
    pub async fn begin(transport: Box<dyn Transport>) -> Result<Handshake, Error> {
        let kind = Kind::Newstyle { fixed: false, no_zeroes: false };
        let mut handshake =
            Handshake { transport, input: Input::default(), kind, headers: Headers::Simple, contexts: None };
        const WHILE: &str = "before its greeting was complete";
        Greeting::check_start(handshake.array(WHILE).await?)?;
        match Greeting::parse(handshake.array(WHILE).await?)? {
            Greeting::Oldstyle => {
                let told = SizeAndFlags::parse_oldstyle(&handshake.array::<OLDSTYLE_EXPORT>(WHILE).await?);
                handshake.kind = Kind::Oldstyle(told);
            }
            Greeting::Newstyle => {
                let flags = u16::from_be_bytes(handshake.array::<2>(WHILE).await?);
                // Those that are not known are passed over, as the specification has it.
                let known = flags & (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
                handshake.send(&u32::from(known).to_be_bytes()).await?;
                let has = |flag: u16| known & flag != 0;
                let (fixed, no_zeroes) = (has(NBD_FLAG_FIXED_NEWSTYLE), has(NBD_FLAG_NO_ZEROES));
                handshake.kind = Kind::Newstyle { fixed, no_zeroes };
            }
        }
        Ok(handshake)
    }

    /// Which handshake the server has.
    pub fn protocol(&self) -> Protocol {
        match self.kind {
            Kind::Oldstyle(_) => Protocol::Oldstyle,
            Kind::Newstyle { fixed: false, .. } => Protocol::Newstyle,
            Kind::Newstyle { fixed: true, .. } => Protocol::FixedNewstyle,
        }
    }

    /// What has been agreed on so far.
    pub fn headers(&self) -> Headers {
        self.headers
    }

    /// Asks for the best there is, up to `wanted`, and says what was agreed on.
    pub async fn ask_for_headers(&mut self, wanted: Headers) -> Result<Headers, Error> {
        let steps = [(Headers::Extended, NBD_OPT_EXTENDED_HEADERS), (Headers::Structured, NBD_OPT_STRUCTURED_REPLY)];
        if self.protocol() != Protocol::FixedNewstyle {
            return Ok(self.headers);
        }
        for (headers, option) in steps {
            if wanted < headers || self.headers >= headers {
                continue;
            }
            match self
                .ask(option, |out| {
                    plain_option(out, option);
                    Ok(())
                })
                .await
            {
                Ok(_) => self.headers = headers,
                Err(Error::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.headers)
    }

    /// Goes on over a stream that is secure. What was agreed on before counts no more. Errors: the server has no TLS (it was
    /// refused, or is impossible), and then the handshake may go on without; it failed, and the connection is over.
    pub async fn start_tls(&mut self, connector: &dyn Connector) -> Result<(), Error> {
        self.ask(NBD_OPT_STARTTLS, |out| {
            plain_option(out, NBD_OPT_STARTTLS);
            Ok(())
        })
        .await?;
        if !self.input.bytes().is_empty() {
            // Whoever sent it, it would count as if it were secure.
            let why = "plain bytes came behind the answer to NBD_OPT_STARTTLS";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why).into());
        }
        let plain = std::mem::replace(&mut self.transport, Box::new(Gone));
        let secured = connector.connect(plain).await;
        self.transport = secured.map_err(|error| io::Error::new(error.kind(), format!("TLS handshake: {error}")))?;
        (self.input, self.headers, self.contexts) = (Input::default(), Headers::Simple, None);
        Ok(())
    }

    /// Whether the stream is secure.
    pub fn is_secure(&self) -> bool {
        self.transport.security().is_some()
    }

    /// Agrees on what is wished for and chooses the export. Errors: the export is not to be had.
    pub async fn choose(mut self, wishes: &Wishes) -> Result<Agreed, Error> {
        self.ask_for_headers(wishes.headers).await?;
        if self.headers() > Headers::Simple && !wishes.contexts.is_empty() {
            match self.set_meta_contexts(&wishes.export_name, &wishes.contexts).await {
                // A server that wants TLS says so again when the export is asked for.
                Ok(_) | Err(Error::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        self.go(&wishes.export_name).await
    }

    /// The server's exports. Errors: it does not tell.
    pub async fn list(&mut self) -> Result<Vec<Listed>, Error> {
        let replies = self
            .ask(NBD_OPT_LIST, |out| {
                plain_option(out, NBD_OPT_LIST);
                Ok(())
            })
            .await?;
        let listed = replies.into_iter().filter_map(|reply| match reply {
            OptionReply::Server { name, description } => Some(Listed { name, description }),
            _ => None,
        });
        Ok(listed.collect())
    }

    /// The contexts that match `queries`, or all that there are without any.
    pub async fn list_meta_contexts(&mut self, name: &[u8], queries: &[Vec<u8>]) -> Result<Vec<MetaContext>, Error> {
        self.meta_contexts(NBD_OPT_LIST_META_CONTEXT, name, queries).await
    }

    /// Selects contexts for the export `name`, in place of what was selected before. Says which were found.
    pub async fn set_meta_contexts(&mut self, name: &[u8], queries: &[Vec<u8>]) -> Result<Vec<MetaContext>, Error> {
        self.contexts = None;
        let found = self.meta_contexts(NBD_OPT_SET_META_CONTEXT, name, queries).await?;
        self.contexts = Some((name.to_vec(), found.clone()));
        Ok(found)
    }

    async fn meta_contexts(
        &mut self,
        option: u32,
        name: &[u8],
        queries: &[Vec<u8>],
    ) -> Result<Vec<MetaContext>, Error> {
        let query = MetaContextQuery { name: name.to_vec(), queries: queries.to_vec() };
        let replies = self.ask(option, |out| meta_context_option(out, option, &query)).await?;
        let found = replies.into_iter().filter_map(|reply| match reply {
            OptionReply::MetaContext { id, name } => Some(MetaContext { id, name }),
            _ => None,
        });
        Ok(found.collect())
    }

    /// What the server tells of the export `name`, without choosing it.
    pub async fn info(&mut self, name: &[u8]) -> Result<Export, Error> {
        self.export(NBD_OPT_INFO, name).await
    }

    /// Chooses the export `name`, if need be by `NBD_OPT_EXPORT_NAME`. Errors: it is not to be had; the connection is over.
    pub async fn go(mut self, name: &[u8]) -> Result<Agreed, Error> {
        let mut export = match self.kind {
            // It has no names, and only the one export.
            Kind::Oldstyle(told) => Export::new(name, told),
            Kind::Newstyle { fixed: false, no_zeroes } => self.export_name(name, no_zeroes).await?,
            Kind::Newstyle { fixed: true, no_zeroes } => match self.export(NBD_OPT_GO, name).await {
                Err(error) if error.is_unsupported() && self.headers < Headers::Extended => {
                    self.export_name(name, no_zeroes).await?
                }
                other => other?,
            },
        };
        if let Some((of, contexts)) = self.contexts
            && of == name
        {
            export.contexts = contexts;
        }
        Ok(Agreed { export, headers: self.headers, transport: self.transport, input: self.input })
    }

    /// Says goodbye without having chosen an export.
    pub async fn abort(mut self) -> Result<(), Error> {
        if self.protocol() == Protocol::FixedNewstyle {
            let mut out = Vec::new();
            plain_option(&mut out, NBD_OPT_ABORT);
            // A server need not answer.
            self.send(&out).await?;
        }
        self.transport.finish();
        Ok(())
    }

    async fn export_name(&mut self, name: &[u8], no_zeroes: bool) -> Result<Export, Error> {
        let mut out = Vec::new();
        export_name_option(&mut out, name).map_err(Error::impossible_option)?;
        self.send(&out).await?;
        let length = SizeAndFlags::export_name_reply_length(no_zeroes);
        const WHILE: &str = "when asked for the export: it may have none of that name";
        let reply = self.receive(length, WHILE).await?;
        // As many bytes as it needs were received.
        let told = SizeAndFlags::parse_export_name_reply(&reply).ok_or(Error::Ended(WHILE))?;
        Ok(Export::new(name, told))
    }

    async fn export(&mut self, option: u32, name: &[u8]) -> Result<Export, Error> {
        let infos = vec![NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE];
        let query = ExportQuery { name: name.to_vec(), infos };
        let replies = self.ask(option, |out| export_query_option(out, option, &query)).await?;
        let mut told = None;
        let (mut canonical_name, mut description, mut block_size) = (None, None, None);
        for reply in replies {
            let OptionReply::Info(info) = reply else { continue };
            match info {
                Info::Export(export) => told = Some(export),
                Info::Name(name) => canonical_name = Some(name),
                Info::Description(text) => description = Some(text),
                Info::BlockSize(size) => block_size = Some(size),
                Info::Unknown(_) => {}
            }
        }
        let told = told.ok_or(Violation::NoExportInfo)?;
        Ok(Export { canonical_name, description, block_size, ..Export::new(name, told) })
    }

    /// Sends an option and hears its replies, to the last but not with it. Errors: it was refused, among others.
    async fn ask(
        &mut self,
        option: u32,
        encode: impl FnOnce(&mut Vec<u8>) -> Result<(), &'static str>,
    ) -> Result<Vec<OptionReply>, Error> {
        if self.protocol() != Protocol::FixedNewstyle {
            return Err(Error::impossible_option("the server knows no options: it is not of the fixed newstyle"));
        }
        let mut out = Vec::new();
        encode(&mut out).map_err(Error::impossible_option)?;
        self.send(&out).await?;
        let mut replies = Vec::new();
        let mut left = MAX_ANSWER;
        const WHILE: &str = "instead of answering an option";
        loop {
            let header = OptionReplyHeader::parse(option, &self.array::<OPTION_REPLY_HEADER>(WHILE).await?)?;
            // At most MAX_OPTION_DATA.
            let length = header.length as usize;
            left = left.checked_sub(REPLY_COST + length).ok_or(Violation::LongAnswer { option })?;
            let data = self.receive(length, WHILE).await?;
            match OptionReply::parse(header, &data)? {
                OptionReply::Ack => return Ok(replies),
                OptionReply::Error(error) => return Err(Error::Refused(error)),
                reply => replies.push(reply),
            }
        }
    }

    async fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        let mut filled = 0;
        while filled < N {
            let got = self.some(N - filled, what).await?;
            bytes[filled..filled + got.len()].copy_from_slice(got);
            filled += got.len();
        }
        Ok(bytes)
    }

    /// Receives `length` bytes, at most [`MAX_OPTION_DATA`].
    async fn receive(&mut self, length: usize, what: &'static str) -> Result<Vec<u8>, Error> {
        debug_assert!(length <= MAX_OPTION_DATA as usize);
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let got = self.some(length - bytes.len(), what).await?;
            bytes.extend_from_slice(got);
        }
        Ok(bytes)
    }

    /// Some bytes, at least one and at most `count`.
    async fn some(&mut self, count: usize, what: &'static str) -> Result<&[u8], Error> {
        if self.input.bytes().is_empty() {
            let (input, transport) = (&mut self.input, &mut *self.transport);
            poll_fn(|cx| input.poll_fill(cx, transport, &mut [])).await.map_err(|error| ended(error, what))?;
        }
        Ok(self.input.take(count))
    }

    async fn send(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let sent = poll_fn(|cx| self.transport.poll_send(cx, &[IoSlice::new(bytes)])).await;
            match sent.map_err(|error| ended(error, "in the handshake"))? {
                0 => return Err(std::io::Error::from(std::io::ErrorKind::WriteZero).into()),
                count => bytes = &bytes[count..],
            }
        }
        Ok(())
    }
}

/// A server that is gone is gone, whichever call notices.
pub(super) fn ended(error: std::io::Error, what: &'static str) -> Error {
    use std::io::ErrorKind::*;
    match error.kind() {
        UnexpectedEof | ConnectionReset | BrokenPipe => Error::Ended(what),
        _ => error.into(),
    }
}

/// An export that was chosen: what there is to know of it, and how to go on.
pub struct Agreed {
    /// What the server told.
    pub export: Export,
    /// How requests and replies look.
    pub headers: Headers,
    pub(super) transport: Box<dyn Transport>,
    pub(super) input: Input,
}

impl Agreed {
    /// Enters transmission. [`Connection::run`] is to be run on an executor; the handle is how it is spoken to.
    pub fn start(self) -> (Requests, Connection) {
        connection::new(self)
    }
}
