//! Reads every byte that the server sends to a client, the moment that it is sent, and holds it against what the client asked,
//! what the device did and what the specification says.

use std::sync::OnceLock;

use nbdcaptive_actors::device::Support;

use crate::codec::*;
use crate::universe::*;

/// What became of the front of what was sent.
enum Heard {
    /// A message of so many bytes.
    Message(usize),
    /// Not whole yet.
    Part,
    /// Nothing that can be understood.
    Nonsense(String),
}

pub fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: OnceLock<Vec<u8>> = OnceLock::new();
    let zeroes = ZEROES.get_or_init(|| vec![0; 64 << 10]);
    bytes.chunks(zeroes.len()).all(|chunk| *chunk == zeroes[..chunk.len()])
}

/// Neighbours of one kind become one, and what is over `length` is left out.
fn runs(extents: &[(u64, u64)], mut length: u64) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (count, flags) in extents {
        let count = (*count).min(length);
        length -= count;
        match all.last_mut() {
            Some(last) if last.1 == *flags => last.0 += count,
            _ if count > 0 => all.push((count, *flags)),
            _ => {}
        }
    }
    all
}

impl Universe {
    /// The server has received more from this client.
    pub fn has_taken(&mut self, id: usize) {
        let covers = self.disk.acknowledged.len();
        let clock = self.clock;
        let client = &mut self.clients[id];
        while let Some(request) = client.requests.get_mut(client.next_taken)
            && request.end <= client.taken
        {
            request.taken = Some(clock);
            request.covers = covers;
            client.next_taken += 1;
        }
        self.check_memory(id);
    }

    /// What the server holds for a client is bounded, as far as can be seen from outside.
    pub fn check_memory(&mut self, id: usize) {
        let client = &self.clients[id];
        // What is taken after the server has finished is thrown away.
        if client.stage != Stage::Transmission || !client.alive || client.finished {
            return;
        }
        // One request more than may be owed, and one reply that was sent in part.
        let most = MAX_OWED + 2 * client.largest + UNSEEN;
        // At the end the data of requests that are refused is read over.
        let taken = if self.may_drain() { 0 } else { client.taken };
        let requests = taken.saturating_sub(client.transmission + client.settled);
        let data = client.produced - client.delivered;
        if requests > most || data > most {
            let why = format!("{requests} bytes of its requests and {data} bytes of its replies are held");
            self.break_promise(Some(id), why);
        } else if client.begun > MAX_REQUESTS {
            self.break_promise(Some(id), format!("{} of its requests are under way", self.clients[id].begun));
        }
    }

    /// The server has sent these bytes.
    pub fn hear(&mut self, id: usize, bytes: &[u8]) {
        let clock = self.clock;
        let client = &mut self.clients[id];
        if client.inbox.is_empty() {
            client.reply_began = clock;
        }
        client.inbox.extend_from_slice(bytes);
        client.sent += bytes.len() as u64;
        let mut inbox = std::mem::take(&mut client.inbox);
        let mut at = 0;
        while at < inbox.len() {
            match self.message(id, &inbox[at..]) {
                Heard::Message(length) => {
                    at += length;
                    self.clients[id].reply_began = clock;
                }
                Heard::Part => break,
                Heard::Nonsense(why) => {
                    self.break_promise(Some(id), why);
                    at = inbox.len();
                }
            }
        }
        inbox.drain(..at);
        self.clients[id].inbox = inbox;
    }

    fn message(&mut self, id: usize, bytes: &[u8]) -> Heard {
        match self.clients[id].stage {
            Stage::Greeting => self.greeting(id, bytes),
            Stage::Options => self.option_reply(id, bytes),
            Stage::Transmission => self.reply(id, bytes),
        }
    }

    fn greeting(&mut self, id: usize, bytes: &[u8]) -> Heard {
        if self.config.oldstyle {
            return self.oldstyle_greeting(id, bytes);
        }
        if bytes.len() < 18 {
            return Heard::Part;
        }
        let mut reader = Reader(bytes);
        let magics = (reader.u64(), reader.u64());
        let flags = reader.u16();
        if magics != (NBD_MAGIC, IHAVEOPT) || flags != self.config.handshake_flags & (FIXED_NEWSTYLE | NO_ZEROES) {
            return Heard::Nonsense(format!("a greeting of {magics:?} with the flags {flags}"));
        }
        self.clients[id].stage = Stage::Options;
        Heard::Message(18)
    }

    fn oldstyle_greeting(&mut self, id: usize, bytes: &[u8]) -> Heard {
        if bytes.len() < 152 {
            return Heard::Part;
        }
        let mut reader = Reader(bytes);
        let magics = (reader.u64(), reader.u64());
        let (size, global, flags) = (reader.u64(), reader.u16(), reader.u16());
        if magics != (NBD_MAGIC, OLDSTYLE) || global != 0 || !is_zero(reader.bytes(124)) {
            return Heard::Nonsense(format!("an oldstyle greeting of {magics:?} with the flags {global}"));
        }
        if let Err(why) = self.export(id, (size, flags)) {
            return Heard::Nonsense(why);
        }
        let end = self.end_of(id, bytes, 152);
        self.negotiated(id, end);
        Heard::Message(152)
    }

    /// Where the message that is being looked at ends in the server's stream.
    fn end_of(&self, id: usize, bytes: &[u8], length: usize) -> u64 {
        self.clients[id].sent - (bytes.len() - length) as u64
    }

    fn option_reply(&mut self, id: usize, bytes: &[u8]) -> Heard {
        let Some((asked, end)) = self.clients[id].asked.front().copied() else {
            return Heard::Nonsense("an answer to no option".into());
        };
        if self.clients[id].taken < end {
            return Heard::Nonsense(format!("{asked:?} is answered before it was sent"));
        }
        if asked == Asked::ExportName {
            return self.export_name_reply(id, bytes);
        }
        if bytes.len() < 20 {
            return Heard::Part;
        }
        let mut reader = Reader(bytes);
        let (magic, option, reply, length) = (reader.u64(), reader.u32(), reader.u32(), reader.u32() as usize);
        if magic != OPTION_REPLY || length > 64 << 10 {
            return Heard::Nonsense(format!("no option reply: {magic:x}, {length} bytes"));
        }
        if reader.0.len() < length {
            return Heard::Part;
        }
        let data = reader.bytes(length);
        let length = 20 + length;
        self.note(Some(id), "an option is answered", u64::from(option), u64::from(reply));
        if option != asked.number() {
            return Heard::Nonsense(format!("an answer to the option {option} instead of {asked:?}"));
        }
        if let Err(why) = self.option_fact(id, asked, reply, data) {
            return Heard::Nonsense(format!("{asked:?} is answered with 0x{reply:x}: {why}"));
        }
        let is_final = reply == REP_ACK || reply >> 31 == 1;
        let end = self.end_of(id, bytes, length);
        let client = &mut self.clients[id];
        client.replies_to_option += 1;
        if is_final {
            client.asked.pop_front();
            client.replies_to_option = 0;
            client.told = end;
            if matches!(asked, Asked::Go { .. }) && reply == REP_ACK {
                self.negotiated(id, end);
            }
        }
        Heard::Message(length)
    }

    /// Looks at one reply to an option.
    fn option_fact(&mut self, id: usize, asked: Asked, reply: u32, data: &[u8]) -> Result<(), String> {
        let drains = self.may_drain() || self.end.event_fired;
        let Config { structured, contexts, open_fails, own_contexts, .. } = self.config;
        let client = &mut self.clients[id];
        let chunks = client.structured || client.extended;
        let usable = if client.extended { own_contexts } else { own_contexts.saturating_sub(1) };
        let named = |data: &[u8]| (0..=usable).find(|number| data.get(4..) == Some(context_name(*number).as_bytes()));
        let good = match (asked, reply) {
            (_, REP_ERR_SHUTDOWN) => drains,
            (Asked::Structured, REP_ACK) => {
                let good = structured && data.is_empty() && !client.extended;
                client.structured = true;
                good
            }
            (Asked::Structured, REP_ERR_INVALID) => client.structured,
            (Asked::Structured, REP_ERR_EXT_HEADER_REQD) => client.extended,
            (Asked::Structured, REP_ERR_UNSUP) => !structured,
            (Asked::Extended, REP_ACK) => {
                let good = structured && data.is_empty() && !client.extended;
                client.extended = true;
                good
            }
            (Asked::Extended, REP_ERR_INVALID) => client.extended,
            (Asked::Extended, REP_ERR_UNSUP) => !structured,
            (Asked::List, REP_SERVER) => {
                let length = data.first_chunk().map_or(usize::MAX, |length| u32::from_be_bytes(*length) as usize);
                data.len() >= 4 && data.len() - 4 >= length
            }
            (Asked::List, REP_ACK) => client.replies_to_option == 2,
            (Asked::ListContexts, REP_META_CONTEXT) => contexts && named(data).is_some(),
            (Asked::ListContexts, REP_ACK) => contexts && client.replies_to_option == usable + 1,
            (Asked::ListContexts, REP_ERR_INVALID) => !chunks,
            (Asked::ListContexts, REP_ERR_UNSUP) => !contexts,
            (Asked::SetContext { own, wanted }, REP_META_CONTEXT) => {
                if client.replies_to_option == 0 {
                    client.contexts.clear();
                }
                client.contexts_are_own = own;
                let id = data.first_chunk().map(|id| u32::from_be_bytes(*id));
                let fresh = |other: &(u32, usize)| Some(other.0) != id && Some(other.1) != named(data);
                let good = contexts && chunks && client.contexts.iter().all(fresh);
                let is_wanted = named(data).is_some_and(|number| wanted & 1 << number != 0);
                client.contexts.extend(id.zip(named(data)));
                good && is_wanted
            }
            (Asked::SetContext { own, wanted }, REP_ACK) => {
                if client.replies_to_option == 0 {
                    client.contexts.clear();
                }
                // Of another export, which is not there, nobody knows but what all have.
                let there = (0..=usable).filter(|number| wanted & 1 << number != 0 && (own || *number == 0));
                contexts && chunks && client.replies_to_option == there.count()
            }
            (Asked::SetContext { .. }, REP_ERR_INVALID | REP_ERR_UNSUP) => {
                client.contexts.clear();
                (reply == REP_ERR_INVALID && !chunks) || (reply == REP_ERR_UNSUP && !contexts)
            }
            (Asked::Info | Asked::Go { .. }, REP_INFO) => return self.info(id, data),
            (Asked::Info | Asked::Go { .. }, REP_ACK) => client.export.is_some() && asked != Asked::Go { own: false },
            (Asked::Go { own: false }, REP_ERR_UNKNOWN) => true,
            (Asked::Info | Asked::Go { .. }, REP_ERR_UNKNOWN) => open_fails > 0,
            (Asked::Unknown, REP_ERR_UNSUP) => true,
            (Asked::TooBig, REP_ERR_TOO_BIG) => true,
            (Asked::Malformed(option), REP_ERR_INVALID | REP_ERR_UNSUP) => {
                if option == OPT_SET_META_CONTEXT {
                    client.contexts.clear();
                }
                true
            }
            (Asked::Abort, REP_ACK) => true,
            // Without fixed newstyle there is only one option.
            (_, REP_ERR_INVALID | REP_ERR_UNSUP) => client.client_flags & u32::from(FIXED_NEWSTYLE) == 0,
            (_, REP_ERR_PLATFORM) => self.end.panicked,
            _ => false,
        };
        if good { Ok(()) } else { Err(format!("with {} bytes, reply {}", data.len(), client.replies_to_option)) }
    }

    fn info(&mut self, id: usize, data: &[u8]) -> Result<(), String> {
        let Some(kind) = data.first_chunk().map(|kind| u16::from_be_bytes(*kind)) else {
            return Err("an information of no kind".into());
        };
        let mut reader = Reader(&data[2..]);
        match (kind, reader.0.len()) {
            (INFO_EXPORT, 10) => {
                let export = (reader.u64(), reader.u16());
                return self.export(id, export);
            }
            (INFO_BLOCK_SIZE, 12) => {
                let told = (reader.u32(), reader.u32(), reader.u32());
                let limits = self.config.capabilities.block_size;
                let good = limits.map(|limits| (limits.minimum, limits.preferred, limits.maximum));
                if good.is_some_and(|good| good != told) {
                    return Err(format!("the block sizes are said to be {told:?}"));
                }
            }
            (INFO_EXPORT | INFO_BLOCK_SIZE, length) => return Err(format!("{length} bytes of information")),
            _ => {}
        }
        Ok(())
    }

    fn export(&mut self, id: usize, told: (u64, u16)) -> Result<(), String> {
        let client = &mut self.clients[id];
        let flags = self.config.flags(client.structured || client.extended, client.may_narrow());
        client.export = Some(told);
        let want = (self.config.size, flags);
        if told == want { Ok(()) } else { Err(format!("the export is said to be {told:?} and not {want:?}")) }
    }

    fn export_name_reply(&mut self, id: usize, bytes: &[u8]) -> Heard {
        let zeroes = if self.clients[id].client_flags & u32::from(NO_ZEROES) == 0 { 124 } else { 0 };
        if bytes.len() < 10 + zeroes {
            return Heard::Part;
        }
        let mut reader = Reader(bytes);
        let told = (reader.u64(), reader.u16());
        if !is_zero(reader.bytes(zeroes)) {
            return Heard::Nonsense("the 124 zeroes are none".into());
        }
        if let Err(why) = self.export(id, told) {
            return Heard::Nonsense(why);
        }
        let end = self.end_of(id, bytes, 10 + zeroes);
        self.clients[id].asked.pop_front();
        self.negotiated(id, end);
        Heard::Message(10 + zeroes)
    }

    fn negotiated(&mut self, id: usize, end: u64) {
        self.note(Some(id), "has negotiated", 0, 0);
        self.end.any_served = true;
        let client = &mut self.clients[id];
        client.stage = Stage::Transmission;
        client.told = end;
    }

    fn reply(&mut self, id: usize, bytes: &[u8]) -> Heard {
        let client = &self.clients[id];
        if bytes.len() < 16 {
            return Heard::Part;
        }
        let mut reader = Reader(bytes);
        let magic = reader.u32();
        let header = match magic {
            SIMPLE_REPLY if !client.extended => 16,
            STRUCTURED_REPLY if client.structured && !client.extended => 20,
            EXTENDED_REPLY if client.extended => 32,
            _ => return Heard::Nonsense(format!("a reply that starts with 0x{magic:x}")),
        };
        if bytes.len() < header {
            return Heard::Part;
        }
        let (mut error, mut flags, mut kind) = (0, DONE, TYPE_NONE);
        if magic == SIMPLE_REPLY {
            error = reader.u32();
        } else {
            (flags, kind) = (reader.u16(), reader.u16());
        }
        let cookie = reader.u64();
        let Some(index) = client.open.get(&cookie).copied() else {
            return Heard::Nonsense(format!(
                "a reply to {cookie:x}, a request that was not made or is answered already"
            ));
        };
        let request = &client.requests[index];
        // An error may come before the rest of a write's data.
        if client.taken < request.start + if client.extended { 32 } else { 28 } {
            return Heard::Nonsense("a reply to a request that the server has not received".into());
        }
        let data = match magic {
            SIMPLE_REPLY if request.kind == READ && error == 0 => request.length,
            SIMPLE_REPLY => 0,
            STRUCTURED_REPLY => u64::from(reader.u32()),
            _ => {
                if reader.u64() != request.offset {
                    return Heard::Nonsense("an extended reply with another offset".into());
                }
                reader.u64()
            }
        };
        if data > request.length + 8 && data > 300 << 10 {
            return Heard::Nonsense(format!("a reply of {data} bytes"));
        }
        if (reader.0.len() as u64) < data {
            return Heard::Part;
        }
        let data = reader.bytes(data as usize);
        let length = header + data.len();
        let judged = if magic == SIMPLE_REPLY {
            self.simple(id, index, error, data)
        } else {
            self.chunk(id, index, kind, flags, data)
        };
        let end = self.end_of(id, bytes, length);
        match judged.and_then(|()| if flags & DONE != 0 { self.answered(id, index, end) } else { Ok(()) }) {
            Ok(()) => Heard::Message(length),
            Err(why) => {
                let request = &self.clients[id].requests[index];
                Heard::Nonsense(format!("{why}: {request:?}"))
            }
        }
    }

    fn simple(&mut self, id: usize, index: usize, error: u32, data: &[u8]) -> Result<(), String> {
        let client = &mut self.clients[id];
        let request = &mut client.requests[index];
        if client.structured && request.kind == READ {
            return Err("a simple reply to a read".into());
        }
        if request.kind == BLOCK_STATUS && error == 0 {
            return Err("a simple reply to a block status".into());
        }
        if error != 0 {
            request.error = Some(error);
        } else if request.kind == READ {
            let offset = request.offset;
            self.content(id, index, offset, data)?;
        }
        Ok(())
    }

    fn content(&mut self, id: usize, index: usize, offset: u64, data: &[u8]) -> Result<(), String> {
        let request = &mut self.clients[id].requests[index];
        let (start, end) = (offset, offset.saturating_add(data.len() as u64));
        if start < request.offset || end > request.offset + request.length {
            return Err(format!("data at {start} to {end}"));
        }
        if request.content.iter().any(|other| other.start < end && start < other.end) {
            return Err(format!("data at {start} to {end} twice"));
        }
        if request.kind != READ || (request.flags & DF != 0 && !request.content.is_empty()) {
            return Err("one piece of data too many".into());
        }
        let from = ((start - request.offset) as usize).min(request.given.0.len());
        let known = (request.given.0.len() - from).min(data.len());
        if data[..known] != request.given.0[from..from + known] || !is_zero(&data[known..]) {
            return Err("other data than the device gave".into());
        }
        request.content.push(start..end);
        Ok(())
    }

    fn chunk(&mut self, id: usize, index: usize, kind: u16, flags: u16, data: &[u8]) -> Result<(), String> {
        let client = &mut self.clients[id];
        let request = &mut client.requests[index];
        let mut reader = Reader(data);
        if flags & !DONE != 0 {
            return Err(format!("a chunk with the flags {flags:x}"));
        }
        match kind {
            TYPE_NONE if data.is_empty() && flags & DONE != 0 => Ok(()),
            TYPE_OFFSET_DATA if data.len() > 8 => {
                let offset = reader.u64();
                self.content(id, index, offset, reader.0)
            }
            TYPE_OFFSET_HOLE if data.len() == 12 => {
                let (offset, length) = (reader.u64(), reader.u32() as usize);
                if length == 0 || length as u64 > request.length {
                    return Err(format!("a hole of {length} bytes"));
                }
                self.content(id, index, offset, &vec![0; length])
            }
            TYPE_ERROR | TYPE_ERROR_OFFSET if data.len() >= 6 => {
                let (error, length) = (reader.u32(), usize::from(reader.u16()));
                let rest = if kind == TYPE_ERROR { 0 } else { 8 };
                if error == 0 || reader.0.len() != length + rest || length > 4096 {
                    return Err(format!("an error {error} with a message of {length} in {} bytes", data.len()));
                }
                if std::str::from_utf8(reader.bytes(length)).is_err() {
                    return Err("an error message that is not UTF-8".into());
                }
                request.error = Some(error);
                Ok(())
            }
            TYPE_BLOCK_STATUS | TYPE_BLOCK_STATUS_EXT if request.kind == BLOCK_STATUS && data.len() >= 8 => {
                let extended = kind == TYPE_BLOCK_STATUS_EXT;
                let context = reader.u32();
                let number = client.contexts.iter().find(|known| known.0 == context).map(|known| known.1);
                let number = number.filter(|number| request.contexts.contains(number));
                let Some(number) = number.filter(|number| !request.described.contains(number)) else {
                    return Err(format!("a block status for the context {context}"));
                };
                if extended != client.extended {
                    return Err("a block status of another kind".into());
                }
                let (head, each) = if extended { (8, 16) } else { (4, 8) };
                let count = (data.len() - head) / each;
                if count == 0 || count * each != data.len() - head || (extended && reader.u32() as usize != count) {
                    return Err(format!("a block status of {} bytes", data.len()));
                }
                let pair = |reader: &mut Reader<'_>| {
                    if extended { (reader.u64(), reader.u64()) } else { (reader.u32().into(), reader.u32().into()) }
                };
                let told: Vec<(u64, u64)> = (0..count).map(|_| pair(&mut reader)).collect();
                request.described.push(number);
                self.described(id, index, number, &told)
            }
            _ => Err(format!("a chunk of the type {kind:x} and {} bytes", data.len())),
        }
    }

    /// Source: proto.md `NBD_REPLY_TYPE_BLOCK_STATUS`.
    fn described(&mut self, id: usize, index: usize, number: usize, told: &[(u64, u64)]) -> Result<(), String> {
        let request = &self.clients[id].requests[index];
        let total: u64 = told.iter().map(|(length, _)| length).sum();
        let last = told.last().map_or(0, |(length, _)| *length);
        let unit = self.config.min_block();
        if told.iter().any(|(length, _)| *length == 0 || length % unit != 0)
            || total - last >= request.length
            || (request.flags & REQ_ONE != 0 && (told.len() != 1 || total > request.length))
        {
            return Err(format!("a block status of {told:?}"));
        }
        let map = request.maps.iter().find(|(context, _)| *context == number);
        let plain = [(request.length, 0)];
        let known = map.map_or(&plain[..], |(_, map)| map);
        if runs(told, request.length) != runs(known, total.min(request.length)) {
            return Err(format!("a block status of {told:?} where the device said {known:?}"));
        }
        Ok(())
    }

    /// What is wrong with a request, as the errors that the specification has for it.
    pub fn faults(&self, id: usize, index: usize) -> Vec<u32> {
        let client = &self.clients[id];
        let request = &client.requests[index];
        let Request { kind, flags, offset, length, .. } = *request;
        let told = self.config.flags(client.structured || client.extended, client.may_narrow());
        let has = |flag: u16| told & flag != 0;
        let mut faults = Vec::new();
        if kind > BLOCK_STATUS || kind == DISC || request.stray {
            faults.push(EINVAL);
        }
        let changes = matches!(kind, WRITE | TRIM | WRITE_ZEROES);
        if changes && has(READ_ONLY) {
            faults.push(EPERM);
        }
        if kind == FLUSH && (offset, length) != (0, 0) {
            faults.push(EINVAL);
        }
        if kind != FLUSH && (length == 0 || offset.checked_add(length).is_none_or(|end| end > self.config.size)) {
            faults.push(EINVAL);
            if matches!(kind, WRITE | WRITE_ZEROES) {
                faults.push(ENOSPC);
            }
        }
        let mut allowed = if has(SEND_FUA) { FUA } else { 0 };
        allowed |= match kind {
            READ if client.structured || client.extended => DF,
            WRITE if client.extended => PAYLOAD_LEN,
            WRITE_ZEROES if has(SEND_FAST_ZERO) => NO_HOLE | FAST_ZERO,
            WRITE_ZEROES => NO_HOLE,
            BLOCK_STATUS if has(BLOCK_STATUS_PAYLOAD) => REQ_ONE | PAYLOAD_LEN,
            BLOCK_STATUS => REQ_ONE,
            _ => 0,
        };
        if flags & !allowed != 0 {
            faults.push(EINVAL);
        }
        let offered = match kind {
            FLUSH => has(SEND_FLUSH),
            TRIM => has(SEND_TRIM),
            CACHE => has(SEND_CACHE),
            WRITE_ZEROES => has(SEND_WRITE_ZEROES),
            BLOCK_STATUS => !client.usable_contexts().is_empty(),
            _ => true,
        };
        if !offered {
            faults.push(EINVAL);
        }
        if matches!(kind, READ | WRITE) && length > self.config.max_payload() {
            faults.extend([EINVAL, EOVERFLOW]);
        }
        if offset % self.config.min_block() != 0 || length % self.config.min_block() != 0 {
            faults.push(EINVAL);
        }
        faults
    }

    /// The last of a reply was sent: it must be what became of the request.
    fn answered(&mut self, id: usize, index: usize, end: u64) -> Result<(), String> {
        self.note(Some(id), "a request is answered", self.clients[id].requests[index].cookie, 0);
        let faults = self.faults(id, index);
        let drains = self.may_drain();
        let client = &mut self.clients[id];
        let began = client.reply_began;
        let request = &client.requests[index];
        client.open.remove(&request.cookie);
        client.begun -= usize::from(request.called != Called::No);
        let range = (request.kind, request.offset);
        if let Some(known) = client.ranges.get_mut(&range) {
            known.retain(|other| *other != index);
            if known.is_empty() {
                client.ranges.remove(&range);
            }
        }
        client.unread.push_back(end);
        client.settled += request.end - request.start;
        let Request { kind, flags, length, covers, taken, .. } = *request;
        let emulated_zero = self.config.capabilities.zero == Support::Emulate;
        // What the device does not do itself is not done for hours.
        let hours = length > u64::from(u32::MAX) && matches!(kind, CACHE | WRITE_ZEROES);
        let is_mapped = self.config.capabilities.extents || request.contexts.iter().any(|context| *context > 0);
        let called = request.called;
        match request.error {
            Some(ESHUTDOWN) if drains && called == Called::No => return Ok(()),
            Some(error) if !faults.is_empty() => {
                return if faults.contains(&error) { Ok(()) } else { Err(format!("not one of {faults:?}")) };
            }
            None if !faults.is_empty() => return Err(format!("it should have failed with one of {faults:?}")),
            Some(EINVAL) if hours && called == Called::No => return Ok(()),
            Some(ENOTSUP) if kind == WRITE_ZEROES && flags & FAST_ZERO != 0 && emulated_zero => return Ok(()),
            Some(error) if kind == FLUSH => return self.take_flush(id, taken, Err(error)),
            Some(error) if called == Called::Returned(Err(error)) => return Ok(()),
            Some(_) => return Err("the device has not failed so".into()),
            None => {}
        }
        // From here on it has succeeded.
        if taken.is_none() {
            return Err("it succeeded before the server had all of it".into());
        }
        let effects = request.effects.clone();
        if kind == FLUSH {
            self.take_flush(id, taken, Ok(()))?;
        } else if length > 0 && called != Called::Returned(Ok(())) && (kind != BLOCK_STATUS || is_mapped) {
            return Err("it succeeded and the device has not done it".into());
        }
        if kind == READ {
            let covered: u64 = request_content(&self.clients[id].requests[index]);
            if covered != length {
                return Err(format!("data for {covered} bytes"));
            }
            self.clients[id].delivered += length;
        }
        let request = &self.clients[id].requests[index];
        if kind == BLOCK_STATUS && request.described.len() != request.contexts.len() {
            return Err("not as many block statuses as contexts".into());
        }
        let is_durable = |universe: &Universe, effect: &usize| {
            universe.disk.effects[*effect].durable.is_some_and(|durable| durable <= began)
        };
        if flags & FUA != 0 && !effects.iter().all(|effect| is_durable(self, effect)) {
            return Err("FUA, and it is not on stable storage".into());
        }
        if kind == FLUSH {
            let several = self.config.flags(false, false) & CAN_MULTI_CONN != 0;
            let lost = self.disk.acknowledged[..covers]
                .iter()
                .find(|effect| (several || self.disk.effects[**effect].client == id) && !is_durable(self, effect));
            if let Some(lost) = lost {
                return Err(format!("the flush has not covered {:?}", self.disk.effects[*lost]));
            }
        }
        self.disk.acknowledged.extend(effects);
        Ok(())
    }

    /// Finds the device's flush for one that is answered: the first that began when the server had the request.
    fn take_flush(&mut self, id: usize, taken: Option<u64>, result: Result<(), u32>) -> Result<(), String> {
        let flushes = &mut self.clients[id].flushes;
        let fits = |(began, became): &(u64, Result<(), u32>)| Some(*began) >= taken && *became == result;
        match flushes.iter().position(fits) {
            Some(index) => {
                let _ = flushes.remove(index);
                Ok(())
            }
            None => Err("the device has not flushed so".into()),
        }
    }
}

fn request_content(request: &Request) -> u64 {
    request.content.iter().map(|range| range.end - range.start).sum()
}

impl Asked {
    pub fn number(self) -> u32 {
        match self {
            Asked::Structured => OPT_STRUCTURED_REPLY,
            Asked::Extended => OPT_EXTENDED_HEADERS,
            Asked::List => OPT_LIST,
            Asked::ListContexts => OPT_LIST_META_CONTEXT,
            Asked::SetContext { .. } => OPT_SET_META_CONTEXT,
            Asked::Info => OPT_INFO,
            Asked::Go { .. } => OPT_GO,
            Asked::ExportName => OPT_EXPORT_NAME,
            Asked::Unknown => 99,
            Asked::TooBig => OPT_LIST,
            Asked::Malformed(option) => option,
            Asked::Abort => OPT_ABORT,
        }
    }
}
