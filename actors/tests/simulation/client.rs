//! What clients do: random handshakes and requests, most of them legal, as the specification has it.

use std::io::ErrorKind;
use std::time::Duration;

use crate::chance::Chance;
use crate::codec::{self, *};
use crate::universe::*;

/// What a client is going to ask before it chooses its export.
fn plan(chance: &mut Chance, config: &Config) -> Vec<Asked> {
    let mut plan = Vec::new();
    if config.oldstyle {
        return Vec::new();
    }
    if config.handshake_flags & FIXED_NEWSTYLE == 0 {
        return vec![Asked::ExportName];
    }
    let wants_extended = chance.one_in(3);
    let wants_structured = !chance.one_in(3);
    let some = |chance: &mut Chance, plan: &mut Vec<Asked>| {
        while chance.one_in(4) {
            let wanted = chance.between(0, 15) as u32;
            plan.push(chance.pick(&[
                Asked::List,
                Asked::ListContexts,
                Asked::SetContext { own: true, wanted },
                Asked::SetContext { own: false, wanted },
                Asked::Extended,
                Asked::Info,
                Asked::Structured,
                Asked::Unknown,
                Asked::TooBig,
                Asked::Malformed(OPT_GO),
                Asked::Malformed(OPT_SET_META_CONTEXT),
                Asked::Malformed(OPT_STRUCTURED_REPLY),
                Asked::Malformed(OPT_LIST),
                Asked::Go { own: false },
            ]));
        }
    };
    some(chance, &mut plan);
    if wants_structured {
        plan.push(Asked::Structured);
    }
    if wants_extended {
        plan.push(Asked::Extended);
    }
    if chance.one_in(2) {
        let wanted = chance.pick(&[1, 1, 15, 15, 2, 5]);
        plan.push(Asked::SetContext { own: true, wanted });
    }
    some(chance, &mut plan);
    if chance.one_in(24) {
        plan.push(Asked::Abort);
    } else if !plan.contains(&Asked::Extended) && chance.one_in(6) {
        plan.push(Asked::ExportName);
    } else {
        // Again, in case that it fails.
        plan.extend([Asked::Go { own: true }; 3]);
    }
    plan
}

impl Universe {
    /// A client that is about to connect.
    pub fn new_client(&mut self) -> usize {
        let (config, chance) = (&self.config, &mut self.chance);
        let id = self.clients.len();
        let floods = chance.one_in(config.floods);
        let most = chance.pick(&[40, 400, 4000, 400_000]);
        let cut_up = chance.one_in(config.cuts).then(|| chance.between(0, most));
        let cut_down = (cut_up.is_none() && chance.one_in(config.cuts))
            .then(|| (chance.between(1, most), chance.pick(&[ErrorKind::BrokenPipe, ErrorKind::ConnectionReset])));
        let plan = plan(chance, config);
        let client_flags = match chance.below(40) {
            0 => 0,
            1 => u32::from(NO_ZEROES),
            2 => 1 << 9,
            3..=20 => u32::from(FIXED_NEWSTYLE),
            _ => u32::from(FIXED_NEWSTYLE | NO_ZEROES),
        };
        let unknown = client_flags & !u32::from(config.handshake_flags & (FIXED_NEWSTYLE | NO_ZEROES)) != 0;
        // A client obeys what it is offered, nearly always.
        let client_flags = if unknown && !chance.one_in(20) {
            client_flags & u32::from(config.handshake_flags & (FIXED_NEWSTYLE | NO_ZEROES))
        } else {
            client_flags
        };
        let large = floods || chance.one_in(6);
        let left = if chance.one_in(12) { 0 } else { chance.pick(&[3, 10, 30, 100, 300]) };
        self.clients.push(Client {
            name: if config.oldstyle { Vec::new() } else { format!("disk {id}").into_bytes() },
            up: Default::default(),
            arrived: 0,
            taken: 0,
            capacity: if floods {
                1 << 20
            } else if large {
                128 << 10
            } else {
                chance.pick(&[40, 500, 4096, 256 << 10])
            },
            room: if floods { chance.pick(&[64, 4096, 128 << 10]) } else { usize::MAX },
            leaving: None,
            over: None,
            cut_up,
            receiver: None,
            receive_due: false,
            low_water: 1,
            heeds_low_water: chance.one_in(2),
            sent: 0,
            read: 0,
            cut_down,
            broken_pipe: None,
            sender: None,
            send_due: false,
            worth_sending: chance.pick(&[1, 48 << 10, 1 << 20]),
            polled: false,
            finished: false,
            alive: true,
            since: Duration::ZERO,
            plan: plan.into(),
            hasty: chance.one_in(8),
            flagged: config.oldstyle,
            client_flags,
            depth: if floods { 4000 } else { chance.pick(&[1, 2, 8, 32]) },
            left: if floods { chance.pick(&[200, 3000]) } else { left },
            large,
            goodbye: chance.pick(&[Goodbye::Polite, Goodbye::Early, Goodbye::Eof, Goodbye::Reset, Goodbye::Never]),
            said_goodbye: false,
            lost_its_way: false,
            floods,
            flooded: floods,
            stalled: false,
            stall_at: chance.one_in(config.stalls).then(|| chance.between(0, 3000)),
            may_be_closed: config.oldstyle && config.open_fails > 0,
            inbox: Vec::new(),
            reply_began: 0,
            stage: Stage::Greeting,
            asked: Default::default(),
            options_asked: 0,
            told: 0,
            replies_to_option: 0,
            structured: false,
            extended: false,
            contexts: Vec::new(),
            contexts_are_own: false,
            export: None,
            transmission: 0,
            settled: 0,
            produced: 0,
            delivered: 0,
            largest: 0,
            requests: Vec::new(),
            next_taken: 0,
            open: Default::default(),
            ranges: Default::default(),
            begun: 0,
            unread: Default::default(),
            flushes: Vec::new(),
        });
        id
    }

    /// The client does the next thing of its own accord. Whether there was one.
    pub fn think(&mut self, id: usize) -> bool {
        let client = &mut self.clients[id];
        if !client.alive || client.stalled || client.said_goodbye || client.over.is_some() {
            return false;
        }
        if client.stall_at.is_some_and(|at| client.taken + client.sent >= at) {
            client.stalled = true;
            self.note(Some(id), "stalls for ever", 0, 0);
            return true;
        }
        // A flood is as large as the server lets it be, and so much waits to be sent.
        if client.up.len() > 4 << 20 {
            return false;
        }
        if !client.flagged {
            if client.read < 18 && !client.hasty {
                return false;
            }
            client.flagged = true;
            let flags = client.client_flags;
            let offered = u32::from(self.config.handshake_flags & (FIXED_NEWSTYLE | NO_ZEROES));
            client.may_be_closed |= flags & !offered != 0;
            client.write(&flags.to_be_bytes());
            if flags & u32::from(FIXED_NEWSTYLE) == 0 {
                // The only option that there is for it.
                client.plan = [Asked::ExportName].into();
            }
            return true;
        }
        // A client in a hurry does not wait to hear that it was let in, where nothing speaks against it.
        let is_sure = client.hasty
            && self.config.open_fails == 0
            && client.asked.len() == 1
            && client.asked[0].0 == Asked::Go { own: true };
        match client.stage {
            Stage::Transmission if client.read < client.told && client.transmission == 0 => false,
            stage if stage == Stage::Transmission || is_sure => {
                if client.transmission == 0 {
                    // What was planned for the case that the export was refused.
                    client.plan.clear();
                    client.transmission = client.written();
                }
                // A flood comes quickly.
                let most = if self.clients[id].floods { 100 } else { 1 };
                (0..most).take_while(|_| self.ask_for_something(id)).count() > 0
            }
            _ => !self.config.oldstyle && self.negotiate(id),
        }
    }

    fn negotiate(&mut self, id: usize) -> bool {
        let client = &mut self.clients[id];
        let waits = !client.asked.is_empty() || client.read < client.told;
        let is_last = matches!(client.asked.back(), Some((Asked::Go { own: true } | Asked::ExportName, _)));
        if waits && (!client.hasty || is_last) {
            return false;
        }
        let Some(asked) = client.plan.pop_front() else {
            client.said_goodbye = true;
            client.leaving = Some(Over::Eof);
            client.may_be_closed = true;
            return true;
        };
        let name = client.name.clone();
        let own = |own: bool| if own { name.clone() } else { b"another".to_vec() };
        let data = match asked {
            Asked::SetContext { own: is_own, wanted } => {
                // One that nobody has, too.
                let wanted = (0..5).filter(|number| wanted & 1 << number != 0).map(context_name);
                let queries: Vec<_> = wanted.chain((id % 2 == 1).then(|| "other:thing".to_owned())).collect();
                context_query(&own(is_own), &queries.iter().map(|query| query.as_bytes()).collect::<Vec<_>>())
            }
            Asked::ListContexts => context_query(&own(true), &[]),
            Asked::Info => export_query(&own(true), &[1, 2, 3, 77]),
            Asked::Go { own: is_own } => export_query(&own(is_own), if self.chance.one_in(2) { &[3] } else { &[] }),
            Asked::ExportName => own(true),
            Asked::TooBig => vec![0; (64 << 10) + 1],
            Asked::Malformed(OPT_SET_META_CONTEXT) => vec![0, 0, 0, 1, b'x', 0, 0, 0, 9],
            Asked::Malformed(_) => vec![1],
            Asked::Unknown => vec![7; self.chance.below(10)],
            _ => Vec::new(),
        };
        let client = &mut self.clients[id];
        client.write(&option(asked.number(), &data));
        let end = client.written();
        client.asked.push_back((asked, end));
        client.options_asked += 1;
        let number = u64::from(asked.number());
        client.may_be_closed |= client.options_asked > 30
            || asked == Asked::Abort
            || (asked == Asked::ExportName && self.config.open_fails > 0);
        client.said_goodbye |= asked == Asked::Abort;
        self.note(Some(id), "asks for an option", number, 0);
        true
    }

    fn ask_for_something(&mut self, id: usize) -> bool {
        let client = &mut self.clients[id];
        let early = client.goodbye == Goodbye::Early;
        if client.left == 0 && (client.in_flight() == 0 || early || client.goodbye == Goodbye::Eof) {
            let over = match client.goodbye {
                Goodbye::Never => return false,
                Goodbye::Reset if client.in_flight() > 0 => return false,
                Goodbye::Reset => Some(Over::Reset),
                Goodbye::Eof => Some(Over::Eof),
                Goodbye::Polite | Goodbye::Early => None,
            };
            client.said_goodbye = true;
            client.may_be_closed = true;
            client.leaving = over;
            if over.is_none() {
                let request = codec::request(client.extended, 0, DISC, 0, 0, 0);
                client.write(&request);
            }
            self.note(Some(id), "says goodbye", u64::from(over.is_some()), 0);
            return true;
        }
        if client.left == 0 || client.in_flight() >= client.depth {
            return false;
        }
        client.left -= 1;
        let illegal = self.config.illegal;
        if self.chance.one_in(illegal) {
            self.illegal(id);
        } else {
            self.legal(id);
        }
        true
    }

    /// A request, unless there is one under way that the device could not tell from it.
    fn send(&mut self, id: usize, mut request: Request) {
        let client = &mut self.clients[id];
        let range = (request.kind, request.offset);
        let alike = |index: &usize| {
            client.requests[*index].length == request.length || matches!(request.kind, CACHE | WRITE_ZEROES)
        };
        if request.kind != FLUSH && client.ranges.get(&range).is_some_and(|known| known.iter().any(alike)) {
            return;
        }
        request.start = client.written();
        let Request { flags, kind, cookie, offset, .. } = request;
        // The length of the payload, where there is one.
        let length = if request.payload.is_empty() { request.length } else { request.payload.len() as u64 };
        client.write(&codec::request(client.extended, flags, kind, cookie, offset, length));
        client.write(&PATTERN[request.data.clone()]);
        client.write(&request.payload);
        request.end = client.written();
        client.largest = client.largest.max(request.end - request.start).max(length.min(MAX_PAYLOAD));
        let index = client.requests.len();
        client.open.insert(cookie, index);
        if kind != FLUSH {
            client.ranges.entry(range).or_default().push(index);
        }
        client.requests.push(request);
        self.note(Some(id), "asks", u64::from(kind) << 16 | u64::from(flags), cookie);
        self.note(Some(id), "  for the range", offset, length);
    }

    fn new_request(&mut self, id: usize, kind: u16, flags: u16, offset: u64, length: u64) -> Request {
        let client = &self.clients[id];
        let mut cookie = self.chance.number();
        while client.open.contains_key(&cookie) {
            cookie = self.chance.number();
        }
        let data = if kind == WRITE { length.min(200 << 10) as usize } else { 0 };
        let start = self.chance.below(PATTERN.len() - data);
        Request {
            cookie,
            kind,
            flags,
            offset,
            length,
            data: start..start + data,
            payload: Vec::new(),
            stray: false,
            contexts: self.clients[id].usable_contexts().iter().map(|context| context.1).collect(),
            start: 0,
            end: 0,
            taken: None,
            called: Called::No,
            progress: 0,
            effects: Vec::new(),
            covers: 0,
            given: Bytes::default(),
            maps: Vec::new(),
            content: Vec::new(),
            error: None,
            described: Vec::new(),
        }
    }

    /// A range of the disk that a request may be for: of at most `most` bytes, among the first `within`.
    fn range(&mut self, most: u64, within: u64) -> (u64, u64) {
        let unit = self.config.min_block();
        let blocks = (within / unit).max(1);
        let most = (most / unit).clamp(1, blocks);
        let length = self.chance.piece(most as usize) as u64;
        let offset = self.chance.between(0, blocks - length);
        (offset * unit, length * unit)
    }

    fn legal(&mut self, id: usize) {
        let client = &self.clients[id];
        let (large, extended, floods) = (client.large, client.extended, client.floods);
        let chunks = client.structured || extended;
        let told = self.config.flags(chunks, client.may_narrow());
        let has = |flag: u16| told & flag != 0;
        let (data, size) = (self.config.data as u64, self.config.size);
        let mut kinds = vec![READ];
        if has(SEND_FLUSH) {
            kinds.push(FLUSH);
        }
        if !has(READ_ONLY) {
            kinds.extend([WRITE, WRITE]);
        }
        for (flag, kind) in [(SEND_TRIM, TRIM), (SEND_WRITE_ZEROES, WRITE_ZEROES), (SEND_CACHE, CACHE)] {
            if has(flag) {
                kinds.push(kind);
            }
        }
        if !client.usable_contexts().is_empty() {
            kinds.push(BLOCK_STATUS);
        }
        // Each flood is of one kind, mostly.
        let kind = if floods && !self.chance.one_in(4) { kinds[id % kinds.len()] } else { self.chance.pick(&kinds) };
        if extended && matches!(kind, CACHE | WRITE_ZEROES | TRIM | BLOCK_STATUS) && self.chance.one_in(10) {
            // More than a compact request can ask for, if there is so much.
            let (offset, length) = self.range(1 << 38, size);
            if length > u64::from(u32::MAX) {
                let request = self.new_request(id, kind, 0, offset, length);
                return self.send(id, request);
            }
        }
        let most = match kind {
            _ if self.chance.one_in(if floods { 10 } else { 3 }) => 16,
            READ | WRITE if floods && id.is_multiple_of(2) => 16,
            READ if floods => 2 << 20,
            READ | WRITE if large => (160u64 << 10).min(self.config.max_payload()),
            READ | WRITE => 2048,
            CACHE | WRITE_ZEROES => 150 << 10,
            _ if extended => 1 << 36,
            _ => 1 << 30,
        };
        let most = most.min(if matches!(kind, READ | WRITE) { self.config.max_payload() } else { u64::MAX });
        // Only where there is something to write to; all else may be anywhere.
        let within = if kind == WRITE || size == data || self.chance.one_in(2) { data } else { size };
        let (offset, length) = if kind == FLUSH { (0, 0) } else { self.range(most, within) };
        let mut flags = 0;
        if has(SEND_FUA) && self.chance.one_in(if matches!(kind, WRITE | TRIM | WRITE_ZEROES) { 3 } else { 30 }) {
            flags |= FUA;
        }
        let one_in_two = self.chance.one_in(2);
        match kind {
            READ if has(SEND_DF) && one_in_two => flags |= DF,
            WRITE if extended => flags |= PAYLOAD_LEN,
            WRITE_ZEROES if one_in_two => flags |= NO_HOLE,
            WRITE_ZEROES if has(SEND_FAST_ZERO) => flags |= FAST_ZERO,
            BLOCK_STATUS if one_in_two => flags |= REQ_ONE,
            _ => {}
        }
        let mut request = self.new_request(id, kind, flags, offset, length);
        if has(BLOCK_STATUS_PAYLOAD) && kind == BLOCK_STATUS && self.chance.one_in(3) {
            self.narrow(id, &mut request);
        }
        if kind == WRITE && self.chance.one_in(10) {
            // As QEMU 10 does, which means the same.
            request.flags &= !PAYLOAD_LEN;
        }
        self.send(id, request);
    }

    /// Lets a block status ask for some contexts only, or for such as there are not.
    fn narrow(&mut self, id: usize, request: &mut Request) {
        let illegal = self.config.illegal;
        let mut contexts = self.clients[id].usable_contexts().to_vec();
        let keep = self.chance.piece(contexts.len());
        while contexts.len() > keep {
            contexts.remove(self.chance.below(contexts.len()));
        }
        request.contexts = contexts.iter().map(|context| context.1).collect();
        if self.chance.one_in(illegal) {
            request.stray = true;
            contexts.push(if self.chance.one_in(2) { contexts[0] } else { (99, 0) });
        }
        request.flags |= PAYLOAD_LEN;
        request.payload = request.length.to_be_bytes().to_vec();
        contexts.iter().for_each(|context| request.payload.extend(context.0.to_be_bytes()));
    }

    fn illegal(&mut self, id: usize) {
        let extended = self.clients[id].extended;
        let unit = self.config.min_block();
        let size = self.config.size;
        let (offset, length) = self.range(2048, self.config.data as u64);
        let kind = self.chance.pick(&[READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS]);
        let payload = if extended && kind == WRITE { PAYLOAD_LEN } else { 0 };
        let other = self.chance.pick(&[NO_HOLE, DF, REQ_ONE, FAST_ZERO]);
        let request = match self.chance.below(12) {
            // Of no kind.
            0 => self.new_request(id, 99, 0, offset, length),
            // With flags that do not exist.
            1 => self.new_request(id, kind, payload | 1 << 12, offset, length),
            // Past the end.
            2 => self.new_request(id, kind, payload, size / unit * unit, length),
            3 => self.new_request(id, kind, payload, u64::MAX / unit * unit, length),
            // Not offered, or read-only, as the case may be.
            4 | 5 => self.new_request(id, kind, payload, offset, length),
            6 => self.new_request(id, FLUSH, 0, offset + 1, 0),
            // Of no length.
            7 => self.new_request(id, kind, payload, offset, 0),
            // Not aligned, if that matters.
            8 => self.new_request(id, kind, payload, offset + 1, length.max(2) - 1),
            // For other commands.
            9 => self.new_request(id, kind, payload | other, offset, length),
            // Too long, with or without its data.
            10 if self.config.max_payload() < 100 << 10 => self.new_request(id, kind, payload, 0, 128 << 10),
            10 => self.new_request(id, READ, 0, 0, MAX_PAYLOAD + unit),
            _ if extended => {
                // Data where none belongs.
                let kind = self.chance.pick(&[READ, TRIM, CACHE, WRITE_ZEROES]);
                let mut request = self.new_request(id, kind, PAYLOAD_LEN, offset, length);
                request.payload = PATTERN[..length as usize].to_vec();
                request.stray = true;
                request
            }
            // The end of all understanding.
            _ => {
                self.note(Some(id), "loses its way", 0, 0);
                let client = &mut self.clients[id];
                client.may_be_closed = true;
                client.said_goodbye = true;
                client.lost_its_way = true;
                client.leaving = Some(Over::Eof);
                return client.write(&[0x55; 40]);
            }
        };
        if request.kind == WRITE && request.data.len() as u64 != request.length {
            return;
        }
        if extended && request.kind == WRITE && request.length == 0 {
            // A payload has at least one byte.
            return;
        }
        // What the server makes of one that is legal after all must not take long.
        if request.length <= 256 << 10 || matches!(request.kind, READ | TRIM) {
            self.send(id, request);
        }
    }
}
