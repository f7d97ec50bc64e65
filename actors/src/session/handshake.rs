//! The handshake of one client: from the greeting until an export is chosen.
//! Source: NBD doc/proto.md "Newstyle negotiation"; nbdkit server/protocol-handshake-newstyle.c.

use std::borrow::Cow;
use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smol::future::or;
use smol::lock::MutexGuardArc;

use super::{Common, End, Input, Opened, SessionId, Surroundings, receive, send_all};
use crate::backend::{Turn, calmly, open};
use crate::coordinator::Message;
use crate::device::{Client, Connection, Error, Exports, MetaContext, Result as DeviceResult};
use crate::log::Speaker;
use crate::protocol::constants::*;
use crate::protocol::handshake::*;
use crate::protocol::transmission::{Agreement, BASE_ALLOCATION, Contexts, Headers};
use crate::tls::{Names, Security};
use crate::transport::{Gone, Transport};

/// How many options a client may send before it chooses an export, and as many again for each export it was listed.
/// Source: nbdkit server/protocol-handshake-newstyle.c `MAX_NR_OPTIONS`.
const MAX_OPTIONS: usize = 32;
/// What is received at a time in a handshake, in bytes.
const INPUT: usize = 4096;
/// The most data of an option that is read over; a client that announces more has lost its way.
const MAX_SKIP: u32 = MAX_PAYLOAD;

/// How long a TLS handshake may take, even where a client may take all the time it wants to negotiate. Source: GnuTLS
/// `GNUTLS_DEFAULT_HANDSHAKE_TIMEOUT`, by which nbdkit ends it.
const TLS_HANDSHAKE: Duration = Duration::from_secs(40);
/// How long a device may take to come back that was told for the last time that nobody waits for it.
const COME_BACK: Duration = Duration::from_secs(1);
/// How much of a long answer is put together before it is sent, in bytes.
const OUTPUT: usize = 64 * 1024;

/// A handshake that ended with an export.
pub(super) struct Agreed {
    pub opened: Opened,
    pub agreement: Agreement,
    /// What the client sent on before it could know that it had succeeded.
    pub left_over: Input,
    /// Held to the session's end where clients are served one after another.
    pub turn: Option<MutexGuardArc<()>>,
}

struct Handshake<'a> {
    transport: &'a mut Box<dyn Transport>,
    surroundings: &'a Surroundings,
    connection: &'a Connection,
    speaker: &'a Speaker,
    input: Input,
    output: Vec<u8>,
    headers: Headers,
    /// The export for which contexts were selected, and which.
    contexts: Option<(Vec<u8>, Contexts)>,
    options_left: usize,
    /// The exports were listed, for which it may send more options.
    listed: bool,
    /// When the client has had its time.
    deadline: Option<Instant>,
    /// Where the first device that could not be closed is noted.
    failure: &'a mut Option<String>,
    id: SessionId,
}

/// What became of an option.
enum Next {
    Another,
    Chosen(Box<Agreed>),
}

/// Negotiates, until the server is told to drain or the client has taken too long. Whatever device was opened is then
/// closed, unless it is in what is returned; dropped before, it is not. `failure` is set if that fails.
pub(super) async fn run(
    transport: &mut Box<dyn Transport>,
    surroundings: &Surroundings,
    connection: &Connection,
    speaker: &Speaker,
    id: SessionId,
    failure: &mut Option<String>,
) -> Result<Agreed, End> {
    let handshake = Handshake {
        transport,
        surroundings,
        connection,
        speaker,
        input: Input::default(),
        output: Vec::new(),
        headers: Headers::Simple,
        contexts: None,
        options_left: MAX_OPTIONS,
        listed: false,
        deadline: surroundings.rules.handshake_timeout.and_then(|limit| surroundings.world.now().checked_add(limit)),
        id,
        failure,
    };
    // Boxed: it is large, and gone as soon as an export is chosen.
    Box::pin(handshake.negotiate()).await
}

impl Handshake<'_> {
    async fn negotiate(mut self) -> Result<Agreed, End> {
        if self.surroundings.exports.looks_at_clients() {
            let anybody = self.client(Vec::new());
            let looked = self.ask(anybody, |exports, client| exports.preconnect(client)).await?;
            looked.map_err(|error| End::Broken(error.to_string()))?;
            self.check_not_cut()?;
        }
        if self.surroundings.rules.oldstyle {
            let (agreed, flags) = self.open(Vec::new()).await?.map_err(End::Broken)?;
            self.speaker.debug(format_args!("oldstyle negotiation: flags: global 0x0 export 0x{flags:x}"));
            self.output = oldstyle_greeting(agreed.agreement.size, flags);
            return self.choose(agreed).await;
        }
        let flags = (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES) & self.surroundings.rules.handshake_flags;
        self.speaker.debug(format_args!("newstyle negotiation: flags: global 0x{flags:x}"));
        self.output.extend_from_slice(&greeting(flags));
        let client_flags = u32::from_be_bytes(self.take().await?);
        self.speaker.debug(format_args!("newstyle negotiation: client flags: 0x{client_flags:x}"));
        if client_flags & !u32::from(flags) != 0 {
            return Err(End::Broken(format!("unknown client flags 0x{client_flags:x}")));
        }
        let fixed = client_flags & u32::from(NBD_FLAG_FIXED_NEWSTYLE) != 0;
        let no_zeroes = client_flags & u32::from(NBD_FLAG_NO_ZEROES) != 0;
        while self.options_left > 0 {
            self.options_left -= 1;
            let Some(header) = OptionHeader::parse(&self.take().await?) else {
                return Err(End::Broken("an option does not start with the option magic".into()));
            };
            if let Next::Chosen(agreed) = self.option(header, fixed, no_zeroes).await? {
                return self.choose(*agreed).await;
            }
            self.check_not_cut()?;
        }
        // The last option is answered like any other.
        self.flush().await?;
        Err(End::Broken("client spent too much time negotiating without selecting an export".into()))
    }

    /// The device has had enough of the client.
    fn check_not_cut(&self) -> Result<(), End> {
        if self.connection.is_cut() { Err(End::Cut) } else { Ok(()) }
    }

    async fn option(&mut self, header: OptionHeader, fixed: bool, no_zeroes: bool) -> Result<Next, End> {
        let OptionHeader { option, length } = header;
        if length > MAX_OPTION_DATA {
            if option == NBD_OPT_EXPORT_NAME || length > MAX_SKIP {
                return Err(End::Broken(format!("client option data too long ({length})")));
            }
            self.skip(length).await?;
            // A selection that fails clears the one before it.
            if option == NBD_OPT_SET_META_CONTEXT {
                self.contexts = None;
            }
            self.refuse(option, NBD_REP_ERR_TOO_BIG, "the option's data is too long");
            return Ok(Next::Another);
        }
        let data = self.data(length as usize).await?;
        // Without the fixed bit a client knows no replies to options.
        if !fixed && option != NBD_OPT_EXPORT_NAME {
            self.refuse(option, NBD_REP_ERR_INVALID, "only NBD_OPT_EXPORT_NAME without fixed newstyle");
            return Ok(Next::Another);
        }
        if self.needs_tls() && ![NBD_OPT_ABORT, NBD_OPT_STARTTLS].contains(&option) {
            // There is no other reply to this one.
            if option == NBD_OPT_EXPORT_NAME {
                return Err(End::Broken("non-TLS client tried to connect in --tls=require mode".into()));
            }
            self.refuse(option, NBD_REP_ERR_TLS_REQD, "TLS must be negotiated first");
            return Ok(Next::Another);
        }
        let parsed = match HandshakeOption::parse(option, &data) {
            Ok(parsed) => parsed,
            Err(malformed) if option == NBD_OPT_EXPORT_NAME => return Err(End::Broken(malformed.why.into())),
            Err(Malformed { reply, why }) => {
                // A selection that fails clears the one before it.
                if option == NBD_OPT_SET_META_CONTEXT {
                    self.contexts = None;
                }
                self.refuse(option, reply, why);
                return Ok(Next::Another);
            }
        };
        match parsed {
            HandshakeOption::ExportName(name) => return self.export_name(name, no_zeroes).await,
            HandshakeOption::Go(query) => return self.export(NBD_OPT_GO, query).await,
            HandshakeOption::Info(query) => return self.export(NBD_OPT_INFO, query).await,
            HandshakeOption::Abort => {
                self.reply(option, NBD_REP_ACK, &[]);
                // The client need not wait for the reply.
                let _ = self.flush().await;
                return Err(End::Disconnected);
            }
            HandshakeOption::List => self.list().await?,
            HandshakeOption::StartTls => self.start_tls().await?,
            HandshakeOption::StructuredReply if !self.surroundings.rules.structured_replies => {
                self.refuse(option, NBD_REP_ERR_UNSUP, "structured replies are disabled");
            }
            HandshakeOption::ExtendedHeaders if !self.surroundings.rules.structured_replies => {
                self.refuse(option, NBD_REP_ERR_UNSUP, "structured replies are disabled");
            }
            HandshakeOption::ExtendedHeaders if !self.surroundings.rules.extended_headers => {
                self.refuse(option, NBD_REP_ERR_UNSUP, "extended headers are disabled");
            }
            HandshakeOption::ExtendedHeaders if self.headers == Headers::Extended => {
                self.refuse(option, NBD_REP_ERR_INVALID, "extended headers are in use already");
            }
            HandshakeOption::ExtendedHeaders => {
                self.headers = Headers::Extended;
                self.reply(option, NBD_REP_ACK, &[]);
            }
            HandshakeOption::StructuredReply if self.headers == Headers::Extended => {
                self.refuse(option, NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are in use already");
            }
            HandshakeOption::StructuredReply if self.headers == Headers::Structured => {
                self.refuse(option, NBD_REP_ERR_INVALID, "structured replies are in use already");
            }
            HandshakeOption::StructuredReply => {
                self.headers = Headers::Structured;
                self.reply(option, NBD_REP_ACK, &[]);
            }
            HandshakeOption::ListMetaContext(query) => self.list_meta_context(&query).await?,
            HandshakeOption::SetMetaContext(query) => self.set_meta_context(query).await?,
            HandshakeOption::Unknown => self.refuse(option, NBD_REP_ERR_UNSUP, "unknown option"),
        }
        Ok(Next::Another)
    }

    /// Whether nothing but TLS is of any use.
    fn needs_tls(&self) -> bool {
        self.surroundings.rules.tls.as_ref().is_some_and(|tls| tls.is_required) && !self.is_secure()
    }

    fn is_secure(&self) -> bool {
        self.transport.security().is_some()
    }

    /// Source: NBD doc/proto.md "TLS support".
    async fn start_tls(&mut self) -> Result<(), End> {
        let option = NBD_OPT_STARTTLS;
        let Some(tls) = &self.surroundings.rules.tls else {
            self.refuse(option, NBD_REP_ERR_POLICY, "TLS is not enabled");
            return Ok(());
        };
        if self.is_secure() {
            self.refuse(option, NBD_REP_ERR_INVALID, "TLS is in use already");
            return Ok(());
        }
        // Whoever sent them, it may not have been the client: they would count as if they were secure.
        if !self.input.bytes().is_empty() {
            return Err(End::Broken("plain bytes came behind NBD_OPT_STARTTLS, before it was answered".into()));
        }
        self.reply(option, NBD_REP_ACK, &[]);
        self.flush().await?;
        self.speaker.debug(format_args!("starting TLS handshake"));
        let world = &self.surroundings.world;
        let patience = world.now().checked_add(TLS_HANDSHAKE);
        let deadline = self.deadline.into_iter().chain(patience).min();
        let plain = std::mem::replace(self.transport, Box::new(Gone));
        let accepting = tls.acceptor.accept(plain);
        let accepted = in_time(self.surroundings, deadline, async { Ok(accepting.await) }).await?;
        *self.transport = accepted.map_err(|error| End::Insecure(error.to_string()))?;
        if let Some(Security { summary, names }) = self.transport.security() {
            self.speaker.debug(format_args!("TLS handshake completed: {summary}"));
            if let Some(Names { subject, issuer }) = names {
                self.speaker.debug(format_args!("TLS client certificate: {subject}, issued by {issuer}"));
            }
        }
        // What was agreed before may have been somebody else's word.
        self.headers = Headers::Simple;
        self.contexts = None;
        self.input = Input::default();
        Ok(())
    }

    async fn export_name(&mut self, name: Vec<u8>, no_zeroes: bool) -> Result<Next, End> {
        if self.headers == Headers::Extended {
            return Err(End::Broken("NBD_OPT_EXPORT_NAME after extended headers".into()));
        }
        // The specification has no reply for a refused export here; the connection just ends.
        let (agreed, flags) = self.open(name).await?.map_err(End::Broken)?;
        self.output.extend_from_slice(&export_name_reply(agreed.agreement.size, flags, no_zeroes));
        Ok(Next::Chosen(Box::new(agreed)))
    }

    /// Enters transmission, if the client still takes the word for it.
    async fn choose(mut self, agreed: Agreed) -> Result<Agreed, End> {
        // Before the client can know: what happens next, it may have brought about, and it is one who is served to its end.
        self.connection.let_in();
        self.surroundings.coordinator.tell(Message::SessionNegotiated(self.id));
        match self.flush().await {
            Ok(()) => Ok(Agreed { left_over: self.input, ..agreed }),
            Err(end) => {
                self.close(agreed).await;
                Err(end)
            }
        }
    }

    async fn close(&mut self, agreed: Agreed) {
        if let Err(error) = agreed.opened.close().await {
            self.note(&error);
        }
    }

    /// A device could not be closed.
    fn note(&mut self, error: &Error) {
        self.speaker.error(format_args!("closing the device: {error}"));
        self.failure.get_or_insert_with(|| error.to_string());
    }

    /// Waits for what the device was asked. That cannot be taken back, and the exports are unloaded only after it, so it is waited
    /// for although the server is ending; but the client, who was promised nothing, sees the end of the connection at once. The
    /// device is told in time that it is to come back ([`Connection::recall`]), and is left behind if it does not.
    async fn of_the_device<T>(&mut self, call: impl Future<Output = T>) -> Result<T, End> {
        let mut call = pin!(call);
        let Common { orders, world, .. } = &*self.surroundings.common;
        let draining = async {
            orders.draining().await;
            None
        };
        // The answer wins, so that it is taken where both are there.
        if let Some(answer) = or(async { Some(call.as_mut().await) }, draining).await {
            return Ok(answer);
        }
        self.transport.finish();
        let left_behind = async {
            orders.giving_up().await;
            world.after(COME_BACK).await;
            Err(End::LeftBehind)
        };
        or(async { Ok(call.await) }, left_behind).await
    }

    /// The turn to ask the device for something, where calls are made one by one. Nobody asks any more who is to drain.
    async fn turn(&mut self) -> Result<Option<Turn>, End> {
        let gates = &self.surroundings.gates;
        in_time(self.surroundings, self.deadline, async { Ok(gates.alone().await) }).await
    }

    async fn export(&mut self, option: u32, query: ExportQuery) -> Result<Next, End> {
        let client = self.client(query.name.clone());
        let (agreed, flags) = match self.open(query.name).await? {
            Ok(opened) => opened,
            Err(why) => {
                self.refuse(option, NBD_REP_ERR_UNKNOWN, &why);
                return Ok(Next::Another);
            }
        };
        // Always sent, asked for or not.
        self.reply(option, NBD_REP_INFO, &[&info_export(agreed.agreement.size, flags)]);
        if let Err(end) = self.inform(option, &query.infos, client, &agreed).await {
            self.close(agreed).await;
            return Err(end);
        }
        self.reply(option, NBD_REP_ACK, &[]);
        if option == NBD_OPT_INFO {
            self.close(agreed).await;
            return Ok(Next::Another);
        }
        Ok(Next::Chosen(Box::new(agreed)))
    }

    /// Replies with what was asked for about an export that was opened. Each once, however often it is asked for; others are not
    /// known, and the specification lets a server pass over those.
    async fn inform(&mut self, option: u32, infos: &[u16], client: Client, agreed: &Agreed) -> Result<(), End> {
        for info in [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE] {
            if !infos.contains(&info) {
                continue;
            }
            match info {
                NBD_INFO_NAME => {
                    let name = if client.export_name.is_empty() {
                        self.ask(client.clone(), |exports, client| exports.default_export(client)).await?.ok().flatten()
                    } else {
                        Some(client.export_name.clone())
                    };
                    if let Some(name) = name {
                        self.reply(option, NBD_REP_INFO, &[&NBD_INFO_NAME.to_be_bytes(), cut(&name)]);
                    }
                }
                NBD_INFO_DESCRIPTION => {
                    let text = self.ask(client.clone(), |exports, client| Ok(exports.description(client))).await?;
                    if let Ok(Some(text)) = text {
                        let parts: [&[u8]; 2] = [&NBD_INFO_DESCRIPTION.to_be_bytes(), cut(text.as_bytes())];
                        self.reply(option, NBD_REP_INFO, &parts);
                    }
                }
                _ => {
                    if let Some(size) = agreed.opened.offered.block_size {
                        self.reply(option, NBD_REP_INFO, &[&info_block_size(size)]);
                    }
                }
            }
        }
        Ok(())
    }

    fn client(&self, export_name: Vec<u8>) -> Client {
        Client {
            export_name,
            read_only: self.surroundings.rules.read_only,
            is_tls: self.is_secure(),
            tls_names: self.transport.security().and_then(|security| security.names.clone()),
            peer: self.transport.peer(),
            peer_label: self.transport.peer_label(),
            connection: self.connection.clone(),
        }
    }

    /// Opens the export `name` and says what was agreed about it; or why it is not to be had.
    async fn open(&mut self, name: Vec<u8>) -> Result<Result<(Agreed, u16), String>, End> {
        let shown = String::from_utf8_lossy(&name);
        self.speaker.debug(format_args!("newstyle negotiation: client requested export '{shown}'"));
        let gates = &self.surroundings.gates;
        let turn = in_time(self.surroundings, self.deadline, async { Ok(gates.enter().await) }).await?;
        let contexts = self.contexts.as_ref().filter(|(export, _)| *export == name).map(|(_, contexts)| *contexts);
        let exports = Arc::clone(&self.surroundings.exports);
        let alone = self.turn().await?;
        let opening = open(exports, self.client(name), gates.clone(), alone, self.surroundings.coordinator.clone());
        let opened = match self.of_the_device(opening).await? {
            Ok(opened) if self.connection.is_cut() => {
                if let Err(error) = opened.close().await {
                    self.note(&error);
                }
                return Err(End::Cut);
            }
            Ok(opened) => opened,
            Err(error) => {
                self.speaker.error(format_args!("{error}"));
                return Ok(Err(error.to_string()));
            }
        };
        let agreement = Agreement {
            size: opened.size,
            offered: opened.offered,
            takes_any_size: opened.takes_any_size,
            headers: self.headers,
            contexts: contexts.unwrap_or_default(),
        };
        let flags = agreement.flags(gates.multi_conn());
        self.speaker.debug(format_args!("newstyle negotiation: flags: export 0x{flags:x}"));
        Ok(Ok((Agreed { opened, agreement, left_over: Input::default(), turn }, flags)))
    }

    /// Asks the exports something on a thread that may wait.
    async fn ask<T: Send + 'static>(
        &mut self,
        client: Client,
        question: impl FnOnce(&dyn Exports, &Client) -> DeviceResult<T> + Send + 'static,
    ) -> Result<DeviceResult<T>, End> {
        let alone = self.turn().await?;
        let exports = Arc::clone(&self.surroundings.exports);
        let coordinator = self.surroundings.coordinator.clone();
        let gates = &self.surroundings.gates;
        let asking = gates.within(alone, move || calmly(&coordinator, || question(&*exports, &client)));
        self.of_the_device(asking).await
    }

    async fn list(&mut self) -> Result<(), End> {
        let anybody = self.client(Vec::new());
        match self.ask(anybody, |exports, client| exports.list(client)).await? {
            Ok(exports) => {
                if !std::mem::replace(&mut self.listed, true) {
                    self.options_left += MAX_OPTIONS * exports.len();
                }
                for export in exports {
                    let name = cut(&export.name);
                    let length = (name.len() as u32).to_be_bytes();
                    let parts = [&length[..], name, cut(export.description.as_bytes())];
                    self.reply(NBD_OPT_LIST, NBD_REP_SERVER, &parts);
                    if self.output.len() > OUTPUT {
                        self.flush().await?;
                    }
                }
                self.reply(NBD_OPT_LIST, NBD_REP_ACK, &[]);
            }
            Err(error) => {
                self.speaker.error(format_args!("{error}"));
                self.refuse(NBD_OPT_LIST, NBD_REP_ERR_PLATFORM, &error.to_string());
            }
        }
        Ok(())
    }

    async fn list_meta_context(&mut self, query: &MetaContextQuery) -> Result<(), End> {
        let option = NBD_OPT_LIST_META_CONTEXT;
        if !self.surroundings.rules.meta_contexts {
            self.refuse(option, NBD_REP_ERR_UNSUP, "metadata contexts are disabled");
            return Ok(());
        }
        // A namespace and a colon stand for all that is in it.
        let is_wanted = |name: &str| {
            let namespace = &name.as_bytes()[..name.find(':').map_or(0, |colon| colon + 1)];
            query.queries.is_empty() || query.queries.iter().any(|query| query == name.as_bytes() || query == namespace)
        };
        for (_, name) in self.contexts_of(query).await? {
            if is_wanted(&name) {
                self.reply(option, NBD_REP_META_CONTEXT, &[&0u32.to_be_bytes(), cut(name.as_bytes())]);
            }
        }
        self.reply(option, NBD_REP_ACK, &[]);
        Ok(())
    }

    async fn set_meta_context(&mut self, query: MetaContextQuery) -> Result<(), End> {
        let option = NBD_OPT_SET_META_CONTEXT;
        self.contexts = None;
        if !self.surroundings.rules.meta_contexts {
            self.refuse(option, NBD_REP_ERR_UNSUP, "metadata contexts are disabled");
            return Ok(());
        }
        if self.headers == Headers::Simple {
            self.refuse(option, NBD_REP_ERR_INVALID, "structured replies must be negotiated first");
            return Ok(());
        }
        let mut contexts = Contexts::default();
        for (context, name) in self.contexts_of(&query).await? {
            if query.queries.iter().any(|query| query == name.as_bytes()) && contexts.select(context) {
                let id = Contexts::id(context).to_be_bytes();
                self.reply(option, NBD_REP_META_CONTEXT, &[&id, cut(name.as_bytes())]);
            }
        }
        self.contexts = Some((query.name, contexts));
        self.reply(option, NBD_REP_ACK, &[]);
        Ok(())
    }

    /// The contexts that the export of `query` has for this client, with their numbers. The device is asked only where the client
    /// does not ask for `base:` alone.
    async fn contexts_of(&mut self, query: &MetaContextQuery) -> Result<Vec<(u32, Cow<'static, str>)>, End> {
        let mut contexts = vec![(0, Cow::Borrowed(BASE_ALLOCATION))];
        let is_base = |query: &Vec<u8>| query.starts_with(b"base:");
        if !query.queries.is_empty() && query.queries.iter().all(is_base) {
            return Ok(contexts);
        }
        let client = self.client(query.name.clone());
        match self.ask(client, |exports, client| exports.meta_contexts(client)).await? {
            Ok(own) => {
                let is_extended = self.headers == Headers::Extended;
                let usable = |(_, context): &(u32, MetaContext)| is_extended || !context.is_wide;
                contexts.extend((1..).zip(own).filter(usable).map(|(number, context)| (number, context.name)));
            }
            // No such export, say: it has none then, and its opening will tell.
            Err(error) => self.speaker.debug(format_args!("newstyle negotiation: metadata contexts: {error}")),
        }
        Ok(contexts)
    }

    fn reply(&mut self, option: u32, reply: u32, parts: &[&[u8]]) {
        self.speaker.debug(format_args!("newstyle negotiation: replying to option {option} with 0x{reply:x}"));
        option_reply(&mut self.output, option, reply, parts);
    }

    fn refuse(&mut self, option: u32, reply: u32, why: &str) {
        self.reply(option, reply, &[cut(why.as_bytes())]);
    }

    async fn flush(&mut self) -> Result<(), End> {
        let sending = send_all(&mut **self.transport, &self.output);
        let sent = in_time(self.surroundings, self.deadline, sending).await;
        self.output.clear();
        sent
    }

    /// Receives more; what was said before goes out first, since the client may be waiting for it.
    async fn more(&mut self) -> Result<(), End> {
        if !self.output.is_empty() {
            self.flush().await?;
        }
        let input = &mut self.input;
        if input.start == input.end {
            (input.start, input.end) = (0, 0);
        }
        if input.end == input.buffer.len() {
            input.buffer.copy_within(input.start..input.end, 0);
            (input.start, input.end) = (0, input.end - input.start);
            if input.end + INPUT > input.buffer.len() {
                input.buffer.resize(input.end + INPUT, 0);
            }
        }
        let receiving = receive(&mut **self.transport, &mut input.buffer[input.end..]);
        match in_time(self.surroundings, self.deadline, receiving).await? {
            0 if input.start == input.end => Err(End::Disconnected),
            0 => Err(End::Lost(io::ErrorKind::UnexpectedEof.into())),
            count => {
                input.end += count;
                Ok(())
            }
        }
    }

    async fn take<const N: usize>(&mut self) -> Result<[u8; N], End> {
        loop {
            if let Some(bytes) = self.input.bytes().first_chunk::<N>() {
                let bytes = *bytes;
                self.input.start += N;
                return Ok(bytes);
            }
            self.more().await?;
        }
    }

    /// `length` is at most [`MAX_OPTION_DATA`].
    async fn data(&mut self, length: usize) -> Result<Vec<u8>, End> {
        while self.input.bytes().len() < length {
            self.more().await.map_err(inside)?;
        }
        let data = self.input.bytes()[..length].to_vec();
        self.input.start += length;
        Ok(data)
    }

    async fn skip(&mut self, length: u32) -> Result<(), End> {
        let mut left = length as usize;
        loop {
            let here = self.input.bytes().len().min(left);
            self.input.start += here;
            left -= here;
            if left == 0 {
                return Ok(());
            }
            self.more().await.map_err(inside)?;
        }
    }
}

/// Waits for the client, or for its turn, as long as there is time: a client that has not negotiated was promised nothing
/// yet, and is closed when the server is told to drain. What waits is dropped then, so it must be safe to drop. Only here is
/// a handshake cut short: where it waits for the device, the device decides how long.
async fn in_time<T>(
    surroundings: &Surroundings,
    deadline: Option<Instant>,
    waiting: impl Future<Output = io::Result<T>>,
) -> Result<T, End> {
    let Common { orders, world, .. } = &*surroundings.common;
    let drained = async {
        orders.draining().await;
        Err(End::Drained)
    };
    let late = async {
        match deadline {
            Some(deadline) => world.after(deadline.saturating_duration_since(world.now())).await,
            None => pending().await,
        }
        Err(End::TooSlow)
    };
    or(drained, or(async { waiting.await.map_err(End::Lost) }, late)).await
}

/// An end inside an option is no orderly one.
fn inside(end: End) -> End {
    match end {
        End::Disconnected => End::Lost(io::ErrorKind::UnexpectedEof.into()),
        end => end,
    }
}

/// A string of the server's own, no longer than strings may be.
fn cut(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(NBD_MAX_STRING)]
}
