//! One client's view of its connection: what it has sent, what came back, and whether that is an answer. Written from the
//! specification and not from the server, whose types it does not use: what both misread alike nobody would find.
//! Source: NBD doc/proto.md.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use crate::disk::Setting;
use crate::model::Model;

const NBD_OPT_EXPORT_NAME: u32 = 1;
const NBD_OPT_ABORT: u32 = 2;
const NBD_OPT_LIST: u32 = 3;
const NBD_OPT_INFO: u32 = 6;
const NBD_OPT_GO: u32 = 7;
const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
const NBD_OPT_SET_META_CONTEXT: u32 = 10;
const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

const NBD_CMD_READ: u16 = 0;
const NBD_CMD_WRITE: u16 = 1;
const NBD_CMD_DISC: u16 = 2;
const NBD_CMD_FLUSH: u16 = 3;
const NBD_CMD_TRIM: u16 = 4;
const NBD_CMD_CACHE: u16 = 5;
const NBD_CMD_WRITE_ZEROES: u16 = 6;
const NBD_CMD_BLOCK_STATUS: u16 = 7;

const NBD_CMD_FLAG_DF: u16 = 1 << 2;
const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// From here on an option's data may be too much for the server.
const LONG_OPTION: usize = 64 * 1024;
/// From here on a payload may be more than the server is ready to read over.
const LONG_PAYLOAD: u64 = 64 << 20;
/// How many options a server has to take.
const MANY_OPTIONS: usize = 32;

/// A client's disk, shared by all clients of a server.
pub type SharedModel = Rc<RefCell<Model>>;

/// See the module.
pub struct Conversation {
    setting: Setting,
    model: Option<SharedModel>,
    /// What was sent and not yet understood.
    sent: VecDeque<u8>,
    received: VecDeque<u8>,
    phase: Phase,
    /// What was sent is a reason to hang up.
    may_close: bool,
    /// There are other reasons.
    may_close_anyway: bool,
    /// One of them is that the server ends, at once perhaps.
    is_ending: bool,
}

enum Phase {
    Greeting,
    Flags(u16),
    Options(Options),
    Transmission(Transmission),
    /// What follows has no meaning.
    Over,
}

#[derive(Default)]
struct Options {
    no_zeroes: bool,
    structured: bool,
    extended: bool,
    count: usize,
    current: Option<Current>,
    /// The export for which contexts were selected, and their ids.
    selected: Option<(Vec<u8>, Vec<u64>)>,
}

/// An option that waits for its reply.
struct Current {
    option: u32,
    data: Vec<u8>,
    /// `NBD_INFO_EXPORT`: size and flags.
    export: Option<(u64, u16)>,
    /// The ids of the contexts that have come.
    contexts: Vec<u64>,
    /// Information that has come, by type.
    told: [bool; 4],
}

struct Transmission {
    structured: bool,
    extended: bool,
    /// The ids of the contexts that were selected.
    selected: Vec<u64>,
    size: u64,
    read_only: bool,
    asked: Vec<Asked>,
    /// Data of a request that has failed already.
    skipping: u64,
    /// What was sent after this is not read: it said goodbye, or lost the thread.
    stopped: bool,
    orderly: bool,
    reading: Option<Reading>,
}

struct Asked {
    cookie: u64,
    kind: u16,
    flags: u16,
    offset: u64,
    length: u64,
    payload: Vec<u8>,
    payload_left: u64,
    /// In the model.
    name: Option<u64>,
    /// What has been answered of a read.
    parts: Vec<(u64, u64)>,
    failed: bool,
    /// It was under way when the server was asked to end.
    promised: bool,
}

/// The data of a read, while it comes.
struct Reading {
    asked: usize,
    offset: u64,
    left: u64,
    is_last: bool,
}

impl Conversation {
    /// A client that has just connected.
    pub fn new(setting: Setting, model: Option<SharedModel>) -> Conversation {
        Conversation {
            setting,
            model,
            sent: VecDeque::new(),
            received: VecDeque::new(),
            phase: Phase::Greeting,
            may_close: false,
            may_close_anyway: false,
            is_ending: false,
        }
    }

    /// The client has sent this.
    pub fn sent(&mut self, bytes: &[u8]) {
        self.sent.extend(bytes);
        self.digest();
        // The server may carry out what the client does not yet know to be a request.
        let magics = [&0x2560_9513u32.to_be_bytes()[..], &0x21e4_1c71u32.to_be_bytes()];
        if !self.is_transmission()
            && let Some(model) = &self.model
            && self.sent.make_contiguous().windows(4).any(|bytes| magics.contains(&bytes))
        {
            model.borrow_mut().give_up();
        }
    }

    /// The server has sent this.
    pub fn received(&mut self, bytes: &[u8]) {
        self.received.extend(bytes);
        self.digest();
    }

    /// From now on the server may hang up.
    pub fn may_close(&mut self) {
        self.may_close_anyway = true;
    }

    /// Whether what was sent behind an option that waits for its reply is a reason to hang up: the reply is lost with it.
    fn has_lost_its_way(&self) -> bool {
        let mut next = Conversation::new(self.setting, None);
        let Phase::Options(Options { current: Some(_), count, .. }) = self.phase else { return false };
        next.sent.clone_from(&self.sent);
        next.phase = Phase::Options(Options { count, ..Options::default() });
        while next.next_option() && !next.may_close {
            if let Phase::Options(options) = &mut next.phase {
                options.current = None;
            }
        }
        next.may_close
    }

    /// The server is about to be asked to end: what is under way is to be answered.
    pub fn promise(&mut self) {
        (self.may_close_anyway, self.is_ending) = (true, true);
        if let Phase::Transmission(transmission) = &mut self.phase {
            for asked in transmission.asked.iter_mut().filter(|asked| asked.payload_left == 0) {
                asked.promised = true;
            }
        }
    }

    /// The server has hung up, and all was received.
    pub fn closed(&self) {
        assert!(self.may_close || self.may_close_anyway || self.has_lost_its_way(), "the server hung up for no reason");
        if let Phase::Transmission(transmission) = &self.phase
            && transmission.orderly
            && !self.is_ending
        {
            assert!(transmission.reading.is_none(), "half a reply");
            assert!(transmission.asked.is_empty(), "requests before NBD_CMD_DISC were not answered");
        }
    }

    /// Whether all that was under way when the server was asked to end has been answered; or the client has since then sent
    /// something that ends the connection at once.
    pub fn kept_its_promise(&self) -> bool {
        match &self.phase {
            Phase::Transmission(transmission) => {
                let is_lost = transmission.stopped && !transmission.orderly;
                let is_half = !self.sent.is_empty() || transmission.asked.iter().any(|asked| asked.payload_left > 0);
                is_lost || is_half || transmission.asked.iter().all(|asked| !asked.promised)
            }
            _ => true,
        }
    }

    /// Whether the client has got a whole answer to everything it has asked for.
    pub fn is_answered(&self) -> bool {
        match &self.phase {
            Phase::Greeting => false,
            Phase::Flags(_) | Phase::Over => true,
            Phase::Options(options) => options.current.is_none() && self.received.is_empty(),
            Phase::Transmission(transmission) => {
                self.received.is_empty() && transmission.asked.iter().all(|asked| asked.payload_left > 0)
            }
        }
    }

    /// Whether an export was chosen.
    pub fn is_transmission(&self) -> bool {
        matches!(self.phase, Phase::Transmission(_))
    }

    /// Whether every byte of data comes as a byte, as far as is known.
    pub fn is_simple(&self) -> bool {
        match &self.phase {
            Phase::Options(options) => !options.structured && !options.extended,
            Phase::Transmission(transmission) => !transmission.structured && !transmission.extended,
            Phase::Over => false,
            Phase::Greeting | Phase::Flags(_) => true,
        }
    }

    /// Whether requests and replies have long headers.
    pub fn is_extended(&self) -> bool {
        matches!(&self.phase, Phase::Transmission(transmission) if transmission.extended)
    }

    fn digest(&mut self) {
        while self.step() {}
    }

    /// Understands one thing more. Whether there was one.
    fn step(&mut self) -> bool {
        match &mut self.phase {
            Phase::Greeting => self.greeting(),
            Phase::Flags(offered) => {
                let offered = *offered;
                let Some(flags) = take(&mut self.sent, 4) else {
                    assert!(self.received.is_empty(), "something came before the client's flags");
                    return false;
                };
                let flags = number(&flags) as u32;
                if flags & !u32::from(offered) != 0 {
                    return self.over();
                }
                self.phase = Phase::Options(Options { no_zeroes: flags & 2 != 0, ..Options::default() });
                true
            }
            Phase::Options(options) if options.current.is_none() => self.next_option(),
            Phase::Options(_) => self.option_reply(),
            Phase::Transmission(_) => self.next_request() || self.reply(),
            Phase::Over => {
                self.received.clear();
                self.sent.clear();
                false
            }
        }
    }

    fn over(&mut self) -> bool {
        self.may_close = true;
        self.phase = Phase::Over;
        true
    }

    fn greeting(&mut self) -> bool {
        let oldstyle = self.setting.oldstyle();
        let Some(greeting) = take(&mut self.received, if oldstyle { 152 } else { 18 }) else { return false };
        if oldstyle {
            assert_eq!(greeting[..16], *b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53");
            assert!(greeting[24..26] == [0; 2] && greeting[28..] == [0; 124]);
            self.phase = Phase::Options(Options::default());
            self.transmission(&[], (number(&greeting[16..24]), number(&greeting[26..28]) as u16));
            return true;
        }
        assert_eq!(greeting[..16], *b"NBDMAGICIHAVEOPT");
        let flags = number(&greeting[16..]) as u16;
        assert_eq!(flags & !3, 0, "unknown handshake flags");
        self.phase = Phase::Flags(flags);
        true
    }

    fn next_option(&mut self) -> bool {
        let Phase::Options(options) = &mut self.phase else { return false };
        let Some(header) = peek(&self.sent, 16) else {
            assert!(self.received.is_empty(), "a reply to no option");
            return false;
        };
        let (magic, option, length) = (&header[..8], number(&header[8..12]) as u32, number(&header[12..]) as usize);
        if magic != b"IHAVEOPT" || length > LONG_OPTION && option == NBD_OPT_EXPORT_NAME || length > 1 << 26 {
            return self.over();
        }
        if self.sent.len() < 16 + length {
            assert!(self.received.is_empty(), "a reply before the option was there");
            return false;
        }
        self.sent.drain(..16);
        let data = self.sent.drain(..length).collect();
        options.count += 1;
        let last = options.count >= MANY_OPTIONS;
        options.current = Some(Current { option, data, export: None, contexts: Vec::new(), told: [false; 4] });
        self.may_close |= last || matches!(option, NBD_OPT_EXPORT_NAME | NBD_OPT_ABORT);
        true
    }

    fn option_reply(&mut self) -> bool {
        let Phase::Options(options) = &mut self.phase else { return false };
        let Some(current) = &mut options.current else { return false };
        if current.option == NBD_OPT_EXPORT_NAME {
            let Some(reply) = take(&mut self.received, if options.no_zeroes { 10 } else { 134 }) else { return false };
            assert!(reply[10..].iter().all(|byte| *byte == 0), "not only zeroes behind the flags");
            let export = (number(&reply[..8]), number(&reply[8..10]) as u16);
            let name = std::mem::take(&mut current.data);
            self.transmission(&name, export);
            return true;
        }
        let Some(header) = peek(&self.received, 20) else { return false };
        assert_eq!(number(&header[..8]), 0x0003_e889_0455_65a9, "no option reply magic");
        assert_eq!(number(&header[8..12]) as u32, current.option, "a reply to another option");
        let kind = number(&header[12..16]) as u32;
        let length = number(&header[16..]) as usize;
        assert!(length <= 2 * 4096 + 4, "an option reply of {length} bytes");
        let Some(data) = peek(&self.received, 20 + length).map(|reply| reply[20..].to_vec()) else { return false };
        self.received.drain(..20 + length);
        let option = current.option;
        match (kind, option) {
            // NBD_REP_ACK
            (1, _) => {
                assert!(data.is_empty());
                let Some(done) = options.current.take() else { return false };
                match option {
                    NBD_OPT_GO => {
                        let export = done.export.expect("NBD_INFO_EXPORT comes before the end of NBD_OPT_GO");
                        self.transmission(name_in(&done.data), export);
                    }
                    NBD_OPT_INFO => assert!(done.export.is_some(), "no NBD_INFO_EXPORT"),
                    NBD_OPT_ABORT => return self.over(),
                    NBD_OPT_STRUCTURED_REPLY => options.structured = true,
                    NBD_OPT_EXTENDED_HEADERS => options.extended = true,
                    NBD_OPT_SET_META_CONTEXT => {
                        options.selected = Some((name_in(&done.data).to_vec(), done.contexts));
                    }
                    NBD_OPT_LIST | NBD_OPT_LIST_META_CONTEXT => {}
                    _ => panic!("the option {option} was acknowledged"),
                }
            }
            // NBD_REP_SERVER
            (2, NBD_OPT_LIST) => {
                let name = number(data.get(..4).expect("the length of a name")) as usize;
                assert!(name <= 4096 && data.len() >= 4 + name);
            }
            // NBD_REP_INFO
            (3, NBD_OPT_INFO | NBD_OPT_GO) => {
                let info = number(&data[..2]);
                let told = current.told.get_mut(info as usize).expect("information of a known type");
                assert!(!std::mem::replace(told, true), "the same information twice");
                match (info, data.len()) {
                    (0, 12) => {
                        let (size, flags) = (number(&data[2..10]), number(&data[10..]) as u16);
                        assert!(size == self.setting.size() && flags & 1 != 0);
                        current.export = Some((size, flags));
                    }
                    (3, 14) => {
                        let sizes: Vec<_> = data[2..].chunks(4).map(number).collect();
                        assert!(sizes[0].is_power_of_two() && sizes[1].is_power_of_two() && sizes[0] <= sizes[1]);
                    }
                    (1 | 2, _) => assert!(data.len() <= 2 + 4096),
                    (kind, length) => panic!("information {kind} of {length} bytes"),
                }
            }
            // NBD_REP_META_CONTEXT
            (4, NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT) => {
                let id = number(&data[..4]);
                match &data[4..] {
                    b"base:allocation" | b"x-fuzz:narrow" => {}
                    b"x-fuzz:wide" => assert!(options.extended, "a context that takes extended headers"),
                    name => panic!("a context called {}", String::from_utf8_lossy(name)),
                }
                let is_new = option == NBD_OPT_LIST_META_CONTEXT || !current.contexts.contains(&id);
                assert!(is_new && current.contexts.len() < 3, "one context twice");
                current.contexts.push(id);
            }
            (kind, _) if kind & 1 << 31 != 0 => {
                assert!(data.len() <= 4096);
                if option == NBD_OPT_SET_META_CONTEXT {
                    options.selected = None;
                }
                options.current = None;
                if option == NBD_OPT_ABORT {
                    return self.over();
                }
            }
            (kind, option) => panic!("a reply of type {kind:#x} to option {option}"),
        }
        true
    }

    fn transmission(&mut self, name: &[u8], (size, flags): (u64, u16)) {
        let Phase::Options(options) = &self.phase else { return };
        assert_eq!(size, self.setting.size());
        assert_eq!(flags & 2 != 0, self.setting.read_only(), "NBD_FLAG_READ_ONLY");
        let selected = options.selected.as_ref().filter(|(export, _)| export == name);
        let selected = selected.map(|(_, ids)| ids.clone()).unwrap_or_default();
        self.may_close = false;
        self.phase = Phase::Transmission(Transmission {
            structured: options.structured,
            extended: options.extended,
            selected,
            size,
            read_only: flags & 2 != 0,
            asked: Vec::new(),
            skipping: 0,
            stopped: false,
            orderly: false,
            reading: None,
        });
    }

    fn next_request(&mut self) -> bool {
        let Phase::Transmission(transmission) = &mut self.phase else { return false };
        if transmission.stopped {
            return false;
        }
        if transmission.skipping > 0 {
            let count = self.sent.len().min(usize::try_from(transmission.skipping).unwrap_or(usize::MAX));
            self.sent.drain(..count);
            transmission.skipping -= count as u64;
            return count > 0;
        }
        if let Some(filling) = transmission.asked.last_mut().filter(|asked| asked.payload_left > 0) {
            let count = self.sent.len().min(usize::try_from(filling.payload_left).unwrap_or(usize::MAX));
            filling.payload.extend(self.sent.drain(..count));
            filling.payload_left -= count as u64;
            return count > 0;
        }
        let extended = transmission.extended;
        let Some(header) = take(&mut self.sent, if extended { 32 } else { 28 }) else { return false };
        if number(&header[..4]) != if extended { 0x21e4_1c71 } else { 0x2560_9513 } {
            transmission.stopped = true;
            self.may_close = true;
            return true;
        }
        let (flags, kind) = (number(&header[4..6]) as u16, number(&header[6..8]) as u16);
        let (cookie, offset, length) = (number(&header[8..16]), number(&header[16..24]), number(&header[24..]));
        if kind == NBD_CMD_DISC {
            (transmission.stopped, transmission.orderly) = (true, true);
            self.may_close = true;
            return true;
        }
        // The flag is left out by some for a write, and what goes with it is not.
        let has_payload = kind == NBD_CMD_WRITE || extended && flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0;
        let payload_left = if has_payload { length } else { 0 };
        self.may_close |= payload_left > LONG_PAYLOAD;
        let changes = matches!(kind, NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES);
        let name = self.model.as_ref().filter(|_| changes || kind == NBD_CMD_READ);
        let name = name.and_then(|model| model.borrow_mut().begin(offset, length, changes));
        transmission.asked.push(Asked {
            cookie,
            kind,
            flags,
            offset,
            length,
            payload: Vec::new(),
            payload_left,
            name,
            parts: Vec::new(),
            failed: false,
            promised: false,
        });
        true
    }

    fn reply(&mut self) -> bool {
        let Phase::Transmission(transmission) = &mut self.phase else { return false };
        if let Some(reading) = &mut transmission.reading {
            let count = self.received.len().min(usize::try_from(reading.left).unwrap_or(usize::MAX));
            if let (Some(model), Some(name)) = (&self.model, transmission.asked[reading.asked].name) {
                model.borrow().check(name, reading.offset, &self.received.make_contiguous()[..count]);
            }
            self.received.drain(..count);
            reading.offset += count as u64;
            reading.left -= count as u64;
            if reading.left > 0 {
                return false;
            }
            let (asked, is_last) = (reading.asked, reading.is_last);
            transmission.reading = None;
            if is_last {
                self.answered(asked);
            }
            return true;
        }
        let Some(magic) = peek(&self.received, 4) else { return false };
        match number(&magic) {
            0x6744_6698 => self.simple_reply(),
            0x668e_33ef => self.chunk(20),
            0x6e8a_278c => self.chunk(32),
            magic => panic!("no reply starts with {magic:#x}"),
        }
    }

    /// The request that a reply is for. `None`: it cannot be known, and neither can anything that follows.
    fn which(&mut self, cookie: u64) -> Option<usize> {
        let Phase::Transmission(transmission) = &self.phase else { return None };
        let mut candidates = transmission.asked.iter().enumerate().filter(|(_, asked)| asked.cookie == cookie);
        let Some((first, _)) = candidates.next() else { panic!("a reply to no request, with cookie {cookie:#x}") };
        if candidates.next().is_some() && !self.setting.in_order() {
            self.over();
            return None;
        }
        Some(first)
    }

    fn simple_reply(&mut self) -> bool {
        let Some(reply) = take(&mut self.received, 16) else { return false };
        let Some(index) = self.which(number(&reply[8..])) else { return true };
        let Phase::Transmission(transmission) = &mut self.phase else { return false };
        let asked = &mut transmission.asked[index];
        assert!(!transmission.extended, "a simple reply among extended ones");
        assert!(!transmission.structured || asked.kind != NBD_CMD_READ, "a simple reply to a read");
        let failed = number(&reply[4..8]) != 0;
        if asked.kind == NBD_CMD_READ && !failed {
            asked.parts.push((asked.offset, asked.offset.saturating_add(asked.length)));
            transmission.reading =
                Some(Reading { asked: index, offset: asked.offset, left: asked.length, is_last: true });
            return true;
        }
        assert!(failed || asked.kind != NBD_CMD_BLOCK_STATUS, "a block status without extents");
        asked.failed = failed;
        self.answered(index);
        true
    }

    fn chunk(&mut self, header_length: usize) -> bool {
        let Some(header) = peek(&self.received, header_length) else { return false };
        let extended = header_length == 32;
        let (flags, kind) = (number(&header[4..6]) as u16, number(&header[6..8]) as u16);
        let (cookie, length) =
            (number(&header[8..16]), number(&header[header_length - if extended { 8 } else { 4 }..]));
        let Some(index) = self.which(cookie) else { return true };
        let Phase::Transmission(transmission) = &mut self.phase else { return false };
        let asked = &mut transmission.asked[index];
        assert_eq!(extended, transmission.extended, "a chunk of the wrong kind");
        assert!(extended || transmission.structured, "structured replies were not agreed on");
        assert!(!extended || number(&header[16..24]) == asked.offset, "a reply to another offset");
        assert_eq!(flags & !1, 0, "unknown reply flags");
        let is_last = flags & 1 != 0;
        // NBD_REPLY_TYPE_OFFSET_DATA, whose data need not be there whole.
        if kind == 1 {
            let Some(start) = peek(&self.received, header_length + 8) else { return false };
            self.received.drain(..header_length + 8);
            let offset = number(&start[header_length..]);
            assert!(length > 8, "a chunk without data");
            asked.part(offset, length - 8);
            transmission.reading = Some(Reading { asked: index, offset, left: length - 8, is_last });
            return true;
        }
        assert!(length <= 8 + 16 * 65536, "a chunk of type {kind} and {length} bytes");
        let Some(chunk) = take(&mut self.received, header_length + length as usize) else { return false };
        let data = &chunk[header_length..];
        match kind {
            0 => assert!(data.is_empty() && is_last, "a chunk of nothing"),
            2 => {
                assert_eq!(data.len(), 12);
                let (offset, length) = (number(&data[..8]), number(&data[8..]));
                asked.part(offset, length);
                if let (Some(model), Some(name)) = (&self.model, asked.name) {
                    model.borrow().check(name, offset, &vec![0; length as usize]);
                }
            }
            5 | 6 => {
                assert_eq!(asked.kind, NBD_CMD_BLOCK_STATUS, "nobody asked for extents");
                assert_eq!(kind == 6, extended);
                let (start, half) = if extended { (8, 8) } else { (4, 4) };
                let list: Vec<u64> = data[start..].chunks(2 * half).map(|extent| number(&extent[..half])).collect();
                assert!((data.len() - start).is_multiple_of(2 * half) && !list.is_empty());
                assert!(!extended || number(&data[4..8]) == list.len() as u64);
                assert!(list.iter().all(|length| *length > 0), "an extent of nothing");
                let before: u64 = list[..list.len() - 1].iter().sum();
                let length = asked.effect();
                assert!(before < length, "extents that nobody asked for");
                let one = asked.flags & NBD_CMD_FLAG_REQ_ONE != 0;
                assert!(!one || list.len() == 1 && list[0] <= length, "more than one extent");
                let id = number(&data[..4]);
                assert!(transmission.selected.contains(&id), "a context that was not selected");
                assert!(!asked.parts.contains(&(id, id)), "one context twice");
                asked.parts.push((id, id));
            }
            kind if kind & 1 << 15 != 0 => {
                let message = number(&data[4..6]) as usize;
                assert!(number(&data[..4]) != 0 && data.len() >= 6 + message && message <= 4096);
                asked.failed = true;
            }
            kind => panic!("a chunk of type {kind}"),
        }
        if is_last {
            self.answered(index);
        }
        true
    }

    fn answered(&mut self, index: usize) {
        let Phase::Transmission(transmission) = &mut self.phase else { return };
        let mut asked = transmission.asked.remove(index);
        let end = asked.offset.checked_add(asked.length);
        if !asked.failed {
            assert!(asked.payload_left == 0, "a write succeeded before its data was there");
            let changes = matches!(asked.kind, NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES);
            assert!(!(changes && transmission.read_only), "a read-only export was written to");
            match asked.kind {
                NBD_CMD_FLUSH => {}
                NBD_CMD_READ | NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_CACHE | NBD_CMD_WRITE_ZEROES => {
                    assert!(end.is_some_and(|end| end <= transmission.size), "a success past the end");
                }
                NBD_CMD_BLOCK_STATUS => {
                    let end = asked.offset.checked_add(asked.effect());
                    assert!(end.is_some_and(|end| end <= transmission.size), "extents past the end");
                    let wanted = match asked.payload.get(8..) {
                        None => transmission.selected.clone(),
                        Some(ids) => ids.chunks(4).map(number).collect(),
                    };
                    let all = wanted.iter().all(|id| asked.parts.contains(&(*id, *id)));
                    assert!(
                        all && asked.parts.len() == wanted.len() && !wanted.is_empty(),
                        "not the contexts asked for"
                    );
                }
                kind => panic!("a success of request type {kind}"),
            }
            if asked.kind == NBD_CMD_READ {
                let got: u64 = asked.parts.iter().map(|(start, end)| end - start).sum();
                assert_eq!(got, asked.length, "a read of another length");
                assert!(asked.flags & NBD_CMD_FLAG_DF == 0 || asked.parts.len() <= 1, "a fragmented read");
            }
        }
        if let (Some(model), Some(name)) = (&self.model, asked.name) {
            if asked.kind == NBD_CMD_WRITE_ZEROES {
                asked.payload = vec![0; asked.length as usize];
            }
            let written = matches!(asked.kind, NBD_CMD_WRITE | NBD_CMD_WRITE_ZEROES) && !asked.failed;
            model.borrow_mut().end(name, written.then_some(&asked.payload));
        }
        // It failed early; the rest of its data is read over.
        transmission.skipping += asked.payload_left;
    }
}

impl Asked {
    /// How many bytes of the export it is about.
    fn effect(&self) -> u64 {
        if self.kind == NBD_CMD_BLOCK_STATUS && !self.payload.is_empty() {
            return self.payload.get(..8).map_or(0, number);
        }
        self.length
    }

    fn part(&mut self, offset: u64, length: u64) {
        assert_eq!(self.kind, NBD_CMD_READ, "data for something else than a read");
        let end = offset.checked_add(length).expect("the end of a chunk");
        let asked_end = self.offset.saturating_add(self.length);
        assert!(length > 0 && offset >= self.offset && end <= asked_end, "a chunk outside of what was asked for");
        assert!(self.parts.iter().all(|part| end <= part.0 || part.1 <= offset), "one chunk over another");
        self.parts.push((offset, end));
    }
}

/// The export's name at the start of an option's data.
fn name_in(data: &[u8]) -> &[u8] {
    let length = data.get(..4).map_or(0, |length| number(length) as usize);
    data.get(4..4 + length).unwrap_or_default()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn peek(from: &VecDeque<u8>, count: usize) -> Option<Vec<u8>> {
    (from.len() >= count).then(|| from.range(..count).copied().collect())
}

fn take(from: &mut VecDeque<u8>, count: usize) -> Option<Vec<u8>> {
    let taken = peek(from, count)?;
    from.drain(..count);
    Some(taken)
}
